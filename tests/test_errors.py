"""How commands end: one line for errors that the user can fix, a traceback for bugs."""

import asyncio
import errno
import gc
import os
import re
import resource
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore
from PIL import Image

from alexnet_jax.utils import errors
from alexnet_jax.utils.files import DISK_FULL, atomic_write, explain_write_errors


@pytest.fixture
def run_command(monkeypatch, capsys):
    """Runs a function as a command; returns its exit code and what it printed on stderr."""
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # commands replace it

    def run(main):
        with pytest.raises(SystemExit) as ended:
            errors.exits_cleanly(main)()
        return ended.value.code, capsys.readouterr().err

    return run


def raises(error):
    raise error


def test_user_error_and_ctrl_c_are_one_line(run_command):
    user_error = errors.UserError("no such file")
    assert run_command(lambda: raises(user_error)) == (2, "error: no such file\n")
    assert run_command(lambda: raises(KeyboardInterrupt)) == (130, "interrupted\n")


def test_bug_keeps_its_traceback(run_command):
    code, stderr = run_command(lambda: raises(RuntimeError("what now")))
    assert code == 1
    assert stderr.startswith("Traceback (most recent call last):")
    assert stderr.endswith("RuntimeError: what now\n")


def take_too_much_memory():
    jnp.zeros(2**46).block_until_ready()


def test_too_little_memory_of_a_device_is_one_line(run_command):
    code, stderr = run_command(take_too_much_memory)
    assert code == 2 and stderr.count("\n") == 1
    assert re.match("error: the cpu device has too little .*RESOURCE_EXHAUSTED.*; end", stderr)


@pytest.mark.parametrize(
    ("status", "is_explained"),
    [("FAILED_PRECONDITION", True), ("INTERNAL", False), ("RESOURCE_EXHAUSTED", True)],
)
def test_status_of_jax_decides(status, is_explained, run_command):
    text = f"{status}: DNN library initialization failed.\nLook at the errors above"
    code, stderr = run_command(lambda: raises(jax.errors.JaxRuntimeError(text)))
    assert code == (2 if is_explained else 1)
    assert (stderr.count("\n") == 1 and stderr.startswith("error: the cpu device")) == is_explained


@pytest.mark.parametrize(
    ("platform", "command"),
    [
        ("cuda", ["train.py", "--config=quickstart"]),
        ("nonesuch", ["-m", "alexnet_jax.evaluate", "WORKDIR"]),
    ],
)
def test_missing_platform_is_one_line(platform, command, digits, trained_run, tmp_path):
    words = [str(trained_run) if word == "WORKDIR" else word for word in command]
    if "train.py" in words:
        words += [f"--workdir={tmp_path / 'run'}", f"--config.data_dir={digits}"]
    environment = os.environ | {"JAX_PLATFORMS": platform, "CUDA_VISIBLE_DEVICES": ""}
    result = commands.run(sys.executable, *words, env=environment)
    assert result.returncode == 2 and result.stderr.count("\n") == 1
    assert f"error: JAX cannot start the platform of JAX_PLATFORMS={platform}" in result.stderr
    assert not (tmp_path / "run").exists()


def test_command_whose_output_nobody_reads_ends_silently(trained_run):
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "alexnet_jax.visualize", "network", str(trained_run)]
    result = subprocess.run(command, cwd=commands.ROOT, stdout=writing, stderr=subprocess.PIPE)
    os.close(writing)
    assert (result.returncode, result.stderr) == (errors.EXIT_BROKEN_PIPE, b"")


def test_return_value_is_the_exit_code(run_command):
    assert run_command(lambda: 75) == (75, "")
    assert run_command(lambda: None) == (None, "")  # 0 for the system


class FailsWhenDeleted:
    def __init__(self, text):
        self.text = text

    def __del__(self):
        raise RuntimeError(self.text)


@pytest.mark.parametrize(
    "text",
    ["Event loop is closed", "Encountered error while reading array index: ()", "something else"],
)
def test_unraisable_errors_are_printed_unless_orbax_repeats_its_own(text, run_command):
    _, stderr = run_command(lambda: FailsWhenDeleted(text) and None)
    assert ("RuntimeError" in stderr) == (text == "something else")


WRITE = "async def write():\n    raise OSError('no space left')"


async def leave_errors_unread(module):
    """Fails in parallel writes and in a task of `module`, and reads none of the errors."""
    namespace = {"__name__": module}
    exec(WRITE, namespace)
    asyncio.gather(namespace["write"](), namespace["write"]())
    task = asyncio.ensure_future(namespace["write"]())
    await asyncio.sleep(0)
    await asyncio.sleep(0)
    del task


@pytest.mark.parametrize(
    ("module", "logged"),
    [
        ("orbax.checkpoint", []),  # Orbax raises the first error, and the others say the same
        (
            "elsewhere",
            [
                "Task exception was never retrieved",
                "_GatheringFuture exception was never retrieved",
            ],
        ),
    ],
)
def test_asyncio_logs_unread_errors_unless_they_are_of_orbax(module, logged, run_command, caplog):
    run_command(lambda: asyncio.run(leave_errors_unread(module)))
    gc.collect()
    assert sorted(record.getMessage().split("\n")[0] for record in caplog.records) == logged


NOISE = np.random.default_rng(0).integers(0, 256, (100, 100, 3)).astype(np.uint8)


def write_tensorstore(path):
    spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(path)}}
    metadata = {"shape": NOISE.shape, "data_type": "uint8"}
    tensorstore.open({**spec, "metadata": metadata}, create=True).result().write(NOISE).result()


WRITERS = {
    "file": lambda path: path.write_bytes(NOISE.tobytes()),
    "numpy": lambda path: np.savez(path, NOISE),
    "pillow": lambda path: Image.fromarray(NOISE).save(path, "PNG"),
    "tensorstore": write_tensorstore,
}


@pytest.mark.parametrize("library", WRITERS)
def test_file_size_limit_is_explained(library, tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, hard))
    try:
        with (
            pytest.raises(errors.UserError, match="cannot write .*: file too large; make room or"),
            explain_write_errors(tmp_path, "another folder"),
        ):
            WRITERS[library](tmp_path / "new")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("library", WRITERS)
def test_file_in_place_of_a_folder_is_explained(library, tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(errors.UserError, match="not a directory; choose another folder"),
        explain_write_errors(tmp_path, "another folder"),
    ):
        WRITERS[library](tmp_path / "file" / "new")


def test_write_error_is_found_among_the_causes(tmp_path):
    with (
        pytest.raises(errors.UserError, match=f"cannot write {tmp_path}: no space left on device"),
        explain_write_errors(tmp_path, "another folder", DISK_FULL),
    ):
        try:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RuntimeError("saving failed") from error


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT)),
        PermissionError(errno.EACCES, os.strerror(errno.EACCES)),  # not in DISK_FULL
        ValueError("negative size"),
    ],
)
def test_other_errors_pass_unchanged(error, tmp_path):
    with pytest.raises(type(error)), explain_write_errors(tmp_path, "another folder", DISK_FULL):
        raise error


def test_failed_atomic_write_keeps_the_old_file(tmp_path):
    path = tmp_path / "file.txt"
    path.write_text("old")
    with pytest.raises(KeyboardInterrupt), atomic_write(path) as new:
        new.write_text("half")
        raise KeyboardInterrupt
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.txt", "old")]
    with atomic_write(path) as new:
        assert new.suffix == ".txt"
        new.write_text("new")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("file.txt", "new")]
