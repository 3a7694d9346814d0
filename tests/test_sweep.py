"""`python -m alexnet_jax.sweep`: several configs in one table, through kills and signals."""

import csv
import os
import signal
import subprocess
import sys

import commands
import pytest

from alexnet_jax import sweep
from alexnet_jax.training.metrics import read_metrics

FIELDS = (
    *(field for field in (*commands.SMALL, *commands.FEW) if "epochs" not in field),
    "--config.num_epochs=1",
    "--config.parallel=jit",
    "--config.checkpoint.every_steps=5",
)
VARIATION = "model.ablation=no_conv3 num_epochs=10"
RUNS = {"base": 20, "model.ablation=no_conv3_num_epochs=10": 200}  # with their steps


def command(data_dir, folder, *more):
    return (
        *(sys.executable, "-m", "alexnet_jax.sweep", "--config", "quickstart"),
        *(f"--workdir={folder}", f"--config.data_dir={data_dir}", *FIELDS, *more),
        *("--with", VARIATION),
    )


def children(pid):
    """Returns the processes that a process started."""
    with open(f"/proc/{pid}/task/{pid}/children") as file:
        return [int(child) for child in file.read().split()]


def interrupted(argv, run, step, stop):
    """Starts a sweep, calls `stop(process)` at a step of a run, and returns its exit code."""
    process = subprocess.Popen(
        argv, cwd=commands.ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    name, stopped = "", False
    with process.stdout:
        for line in process.stdout:
            if line.startswith("run "):
                name = line.split(": ")[1].strip()
            is_later = line.startswith("step ") and int(line.split()[1]) >= step
            if not stopped and name == run and is_later:
                stop(process)
                stopped = True
    assert stopped
    return process.wait(timeout=100)


def kill_all(process):
    (child,) = children(process.pid)
    process.kill()
    os.kill(child, signal.SIGKILL)


@pytest.mark.slow
def test_stopped_sweep_saves_and_one_that_dies_leaves_its_training_running(digits, tmp_path):
    argv = command(digits, tmp_path)
    base, varied = RUNS
    assert interrupted(argv, varied, 1, lambda p: p.send_signal(signal.SIGINT)) == 75
    # This sweep dies, while its training goes on. The next one waits for that.
    interrupted(argv, varied, 1, lambda process: process.kill())
    result = commands.run(*argv)
    assert result.returncode == 0, result.stderr
    steps = [row["step"] for row in read_metrics(tmp_path / varied) if row["split"] == "train"]
    assert steps == list(range(1, RUNS[varied] + 1))
    again = commands.run(*argv)  # finished runs are only read
    assert again.returncode == 0 and "run " not in again.stdout.partition("| run")[0]


def test_killed_sweep_finishes_with_the_same_command(digits, tmp_path):
    argv = command(digits, tmp_path)
    base, varied = RUNS
    assert interrupted(argv, varied, 9, kill_all) == -signal.SIGKILL
    log = (tmp_path / base / "metrics.jsonl").read_bytes()
    result = commands.run(*argv)
    assert result.returncode == 0, result.stderr

    assert (tmp_path / base / "metrics.jsonl").read_bytes() == log  # not trained again
    for run, count in RUNS.items():
        steps = [row["step"] for row in read_metrics(tmp_path / run) if row["split"] == "train"]
        assert steps == list(range(1, count + 1)), run
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["run"] for row in rows] == [*RUNS]
    for row in rows:
        last = read_metrics(tmp_path / row["run"])[-1]
        assert float(row["top1_error"]) == pytest.approx(1 - last["top1"])
        assert float(row["loss"]) == pytest.approx(last["loss"])
        difference = float(row["top1_error"]) - float(rows[0]["top1_error"])
        assert float(row["difference"]) == pytest.approx(difference)
    assert int(rows[1]["parameters"]) < int(rows[0]["parameters"])
    table = (tmp_path / "sweep.md").read_text()
    assert table in result.stdout and table.count("\n") == 4
    assert (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--with", "model.ablation=no_lnr"], "the nearest are no_lrn"),
        (["--with", "model.width"], "'model.width' must be FIELD=VALUE"),
        (["--with", "model.widht=1"], "unknown field model.widht"),
        (["--with", "seed=1", "--with", "seed=1"], "describes a run twice"),
        (["--with", "batch_size=0"], "batch_size=0 must lie between"),
        (["--with", "schedule.kind=cosin"], "schedule.kind='cosin' does not exist"),
        (["--config.augment.crop_size=80"], "augment.crop_size=80 must lie between"),
    ],
)
def test_every_run_is_checked_before_the_first_one_trains(words, message, tmp_path, capsys):
    argv = ["--config", "quickstart", f"--workdir={tmp_path / 'sweep'}", *words]
    with pytest.raises(SystemExit, match="^2$"):
        sweep.main(argv)
    assert message in capsys.readouterr().err
    assert not (tmp_path / "sweep").exists()


def test_sweep_ends_where_a_training_fails(tmp_path):
    words = (f"--config.dataset=folder:{tmp_path}", f"--workdir={tmp_path / 'runs'}")
    argv = (sys.executable, "-m", "alexnet_jax.sweep", "--config", "folder", *words)
    result = commands.run(*argv, "--with", "seed=1")
    assert result.returncode == 2
    assert "training base ended with exit code 2; correct what it reports above" in result.stderr
    assert f"no folder {tmp_path / 'train'}" in result.stderr
