"""`python -m alexnet_jax.launch`: the processes it starts, their output and its exit code."""

import os
import signal
import subprocess
import sys

import commands
import pytest

from alexnet_jax import launch
from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import EXIT_PEER_LOST, EXIT_USER_ERROR

COMMAND = (sys.executable, "-m", "alexnet_jax.launch")
PRINTS_PLACE = f"""
import os
index, count = os.environ["{distributed.INDEX}"], os.environ["{distributed.COUNT}"]
print("process", index, "of", count, "uses device", os.environ["JAX_LOCAL_DEVICE_IDS"])
print("coordinator at", os.environ["{distributed.ADDRESS}"])
print("on cores", *sorted(os.sched_getaffinity(0)))
"""
FIRST_WAITS = f"""
import os, signal
if os.environ["{distributed.INDEX}"] == "0":
    print("waiting", flush=True)
    signal.pause()
"""
# When process i ends, in seconds, and how: an exit code or a signal.
ENDS = f"""
import os, signal, sys, time
seconds, code = ENDINGS[int(os.environ["{distributed.INDEX}"])]
time.sleep(seconds)
if code < 0:
    os.kill(os.getpid(), -code)
sys.exit(code)
"""


@pytest.mark.parametrize("how_many", [["--processes", "3"], ["--per-gpu"]])
def test_each_process_knows_its_place(how_many, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5,6,-1,7")  # CUDA uses the first three
    done = commands.run(*COMMAND, *how_many, "--", "-c", PRINTS_PLACE)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for prefix, index in (("", 0), ("[1] ", 1), ("[2] ", 2)):
        assert f"{prefix}process {index} of 3 uses device {index}" in lines
    (address,) = {line.partition("at ")[2] for line in lines if "coordinator" in line}
    assert address.startswith("127.0.0.1:")
    cores = [set(map(int, line.split()[-1:])) for line in lines if "on cores" in line]
    assert len(cores) == 3 and set.union(*cores) <= os.sched_getaffinity(0)


@pytest.mark.parametrize(
    ("cores", "count", "sizes"),
    [(2, 1, [2]), (2, 2, [1, 1]), (5, 2, [2, 3]), (2, 3, [1, 1, 1]), (1, 4, [1, 1, 1, 1])],
)
def test_cores_are_shared_equally(cores, count, sizes):
    shares = launch.shares(range(cores), count)
    assert [len(share) for share in shares] == sizes
    assert {core for share in shares for core in share} == set(range(cores))


def test_processes_stay_within_the_cores_of_the_launcher():
    core = min(os.sched_getaffinity(0))
    command = ("taskset", "--cpu-list", str(core), *COMMAND, "--processes=2", "--")
    done = commands.run(*command, "-c", PRINTS_PLACE)
    assert done.stdout.count(f"on cores {core}\n") == 2


@pytest.mark.parametrize("visible", ["", "-1", None])
def test_machine_without_gpus_is_reported(visible, tmp_path):
    environment = {**os.environ, "PATH": str(tmp_path)}  # no nvidia-smi
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    if visible is not None:
        environment["CUDA_VISIBLE_DEVICES"] = visible
    done = commands.run(*COMMAND, "--per-gpu", "--", "-c", "", env=environment)
    assert done.returncode == EXIT_USER_ERROR
    assert done.stderr.startswith("error: --per-gpu finds no GPU ")
    assert done.stderr.count("\n") == 1


def test_gpus_are_counted_by_nvidia_smi(tmp_path):
    """With a program of that name in place of NVIDIA's, whose output has the same form."""
    listed = "GPU 0: NVIDIA H100 (UUID: GPU-0)\\n  MIG 1g.10gb Device 0: (UUID: MIG-0)\\n"
    listed += "GPU 1: NVIDIA H100 (UUID: GPU-1)\\n"
    (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{listed}'\n")
    (tmp_path / "nvidia-smi").chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    environment.pop("CUDA_VISIBLE_DEVICES", None)
    done = commands.run(*COMMAND, "--per-gpu", "--", "-c", PRINTS_PLACE, env=environment)
    assert "process 1 of 2" in done.stdout, done.stderr


KILLED = "process 1 was killed by SIGKILL, and the others ended because they lost it"


@pytest.mark.parametrize(
    ("endings", "code", "message"),
    [
        ([(0, 75), (0.5, 75)], 75, ""),
        ([(0.5, 5), (0, 7)], 7, "process 1 failed first, with exit code 7; its output says why"),
        ([(0.5, -signal.SIGABRT), (0, -signal.SIGKILL)], EXIT_PEER_LOST, KILLED),
        *(
            pytest.param(*values, marks=pytest.mark.long)
            for values in (
                ([(0, 0), (0, 0)], 0, ""),
                ([(0, 0), (0, 7)], 7, ""),
                ([(0.5, -signal.SIGABRT), (0, 2)], 2, "process 1 failed first, with exit code 2"),
                ([(0.5, 1), (0, -signal.SIGKILL)], EXIT_PEER_LOST, KILLED),
                ([(0, 0), (0, -signal.SIGSEGV)], 128 + signal.SIGSEGV, ""),
            )
        ),
    ],
)
def test_exit_code_is_that_of_the_first_failure(endings, code, message):
    script = ENDS.replace("ENDINGS", repr([(s, int(c)) for s, c in endings]))
    done = commands.run(*COMMAND, "--processes=2", "--", "-c", script)
    assert done.returncode == code
    assert done.stderr.startswith(f"error: {message}") if message else done.stderr == ""
    assert done.stderr.count("\n") == bool(message)


def test_sigterm_reaches_process_0():
    command = (*COMMAND, "--processes=2", "--", "-c", FIRST_WAITS)
    with subprocess.Popen(command, cwd=commands.ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "waiting\n"
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=60) == 128 + signal.SIGTERM


def test_zero_processes_are_rejected(monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # commands replace it
    with pytest.raises(SystemExit, match=f"^{EXIT_USER_ERROR}$"):
        launch.main(["--processes=0", "--", "-c", ""])
    assert capsys.readouterr().err == "error: --processes=0 must be at least 1\n"


JOINS_AND_WAITS = """
import jax, os, time
from alexnet_jax.utils import distributed
with distributed.joined():
    print("joined", jax.process_index(), os.getpid(), flush=True)
    time.sleep(600)
"""


def test_killed_coordinator_ends_the_others_and_is_reported(monkeypatch):
    """Process 1 runs no collective, so it depends on JAX's coordination service."""
    monkeypatch.setenv("PYTHONPATH", str(commands.ROOT))
    command = (*COMMAND, "--processes=2", "--", "-c", JOINS_AND_WAITS)
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, **pipes, text=True) as run:
        pids = {}
        while len(pids) < 2:
            _, found, numbers = run.stdout.readline().partition("joined ")
            if found:
                index, pid = map(int, numbers.split())
                pids[index] = pid
        os.kill(pids[0], signal.SIGKILL)
        _, stderr = run.communicate(timeout=60)
    assert run.returncode == EXIT_PEER_LOST
    assert stderr.startswith("error: process 0 was killed by SIGKILL, and the others ended")
