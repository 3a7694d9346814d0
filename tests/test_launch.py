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


def test_each_process_knows_its_place():
    done = commands.run(*COMMAND, "--processes", "3", "--", "-c", PRINTS_PLACE)
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    for prefix, index in (("", 0), ("[1] ", 1), ("[2] ", 2)):
        assert f"{prefix}process {index} of 3 uses device {index}" in lines
    (address,) = {line.partition("at ")[2] for line in lines if "coordinator" in line}
    assert address.startswith("127.0.0.1:")


KILLED = "process 1 was killed by SIGKILL, and the others ended because they lost it"


@pytest.mark.parametrize(
    ("endings", "code", "message"),
    [
        ([(0, 0), (0, 0)], 0, ""),
        ([(0, 0), (0, 7)], 7, ""),
        ([(0, 75), (0.5, 75)], 75, ""),
        ([(0.5, 5), (0, 7)], 7, "process 1 failed first, with exit code 7; its output says why"),
        ([(0.5, -signal.SIGABRT), (0, 2)], 2, "process 1 failed first, with exit code 2"),
        ([(0.5, -signal.SIGABRT), (0, -signal.SIGKILL)], EXIT_PEER_LOST, KILLED),
        ([(0.5, 1), (0, -signal.SIGKILL)], EXIT_PEER_LOST, KILLED),
        ([(0, 0), (0, -signal.SIGSEGV)], 128 + signal.SIGSEGV, ""),
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
