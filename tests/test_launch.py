"""Several processes started as the hosts of one run: who says what, and how they end."""

import signal
import subprocess
import sys

import commands
import pytest

from alexnet_jax import launch
from alexnet_jax.utils import distributed as hosts
from alexnet_jax.utils.errors import EXIT_USER_ERROR

COMMAND = (sys.executable, "-m", "alexnet_jax.launch")
TELLS_ITS_PLACE = f"""
import os, sys
index, count = os.environ["{hosts.INDEX}"], os.environ["{hosts.COUNT}"]
print("process", index, "of", count, "sees device", os.environ["JAX_LOCAL_DEVICE_IDS"])
print("meets the others at", os.environ["{hosts.ADDRESS}"], file=sys.stderr)
sys.exit([0, 7, 5][int(index)])
"""
FIRST_WAITS = f"""
import os, signal
if os.environ["{hosts.INDEX}"] == "0":
    print("waiting", flush=True)
    signal.pause()
"""


def test_each_process_has_its_place_and_the_first_failure_s_exit_code_is_returned():
    done = commands.run(*COMMAND, "--processes", "3", "--", "-c", TELLS_ITS_PLACE)
    assert (done.returncode, done.stderr) == (7, "")
    lines = done.stdout.splitlines()
    for prefix, index in (("", 0), ("[1] ", 1), ("[2] ", 2)):
        assert f"{prefix}process {index} of 3 sees device {index}" in lines
    (address,) = {line.partition("at ")[2] for line in lines if "meets the others" in line}
    assert address.startswith("127.0.0.1:")


def test_sigterm_reaches_the_first_process_whose_signal_the_exit_code_tells():
    command = (*COMMAND, "--processes=2", "--", "-c", FIRST_WAITS)
    with subprocess.Popen(command, cwd=commands.ROOT, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout.readline() == "waiting\n"
        run.send_signal(signal.SIGTERM)
        assert run.wait(timeout=60) == 128 + signal.SIGTERM


def test_no_processes_are_refused(monkeypatch, capsys):
    monkeypatch.setattr(sys, "unraisablehook", sys.unraisablehook)  # which a command sets
    with pytest.raises(SystemExit, match=f"^{EXIT_USER_ERROR}$"):
        launch.main(["--processes=0", "--", "-c", ""])
    assert capsys.readouterr().err == "error: --processes=0 must be at least 1\n"
