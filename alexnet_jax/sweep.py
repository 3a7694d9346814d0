"""Trains a config and variations of it one after another, and compares them in a table and a plot.

    python -m alexnet_jax.sweep --config quickstart --workdir runs/ablations \\
        --with model.ablation=no_lrn --with "model.ablation=no_dropout num_epochs=20"

Each --with is one further run, which changes the named fields. --config.FIELD=VALUE changes a field
of all runs. Each run has a workdir of its own below --workdir, as if alexnet_jax.train had made it.
The same command continues an interrupted sweep. More --with may be added later.
"""

import argparse
import csv
import fcntl
import json
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax.analysis import figures
from alexnet_jax.data.augment import make_augment
from alexnet_jax.models.build import build_model
from alexnet_jax.models.summary import layer_table
from alexnet_jax.training.checkpoint import has_checkpoint
from alexnet_jax.training.metrics import read_metrics
from alexnet_jax.training.optimizer import make_schedule
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import EXIT_STOPPED, UserError, exits_cleanly
from alexnet_jax.utils.files import atomic_write, explain_write_errors

BASE = "base"
POLL_S = 0.2
COLUMNS = {
    "run": "run",
    "parameters": "parameters",
    "top1_error": "top-1 error",
    "top5_error": "top-5 error",
    "loss": "loss",
    "difference": "top-1 error minus base",
}


class Case(NamedTuple):
    """One run of a sweep.

    Attributes:
      name: of its workdir.
      overrides: fields and texts of their values, for `configs.load`.
    """

    name: str
    overrides: tuple[tuple[str, str], ...]
    config: ConfigDict
    workdir: Path


def make_cases(
    path: str, common: Sequence[tuple[str, str]], variations: Sequence[str], folder: Path
) -> list[Case]:
    """Returns the config itself and its variations, after checking that all can be trained.

    Args:
      path: as for `configs.load`.
      common: fields of all runs.
      variations: texts such as "model.ablation=no_lrn num_epochs=20".
      folder: of the workdirs.

    Raises:
      UserError: a variation is malformed or repeated, or its config cannot be trained.
    """
    cases: list[Case] = []
    for text in ("", *variations):
        words = shlex.split(text)
        for word in words:
            if "=" not in word:
                raise UserError(f"--with {text!r}: {word!r} must be FIELD=VALUE")
        name = "_".join(re.sub(r"[^\w.=+-]+", "-", word) for word in sorted(words)) or BASE
        if name in (case.name for case in cases):
            raise UserError(f"--with {text!r} describes a run twice; remove one of them")
        own = tuple((field, value) for field, _, value in (word.partition("=") for word in words))
        overrides = (*common, *own)
        config = configs.load(path, overrides)
        _check(config)
        cases.append(Case(name, overrides, config, folder / name))
    return cases


def _check(config: ConfigDict) -> None:
    """Raises UserError for values that a training would reject, without using devices."""
    configs.check_bounds(config)
    make_augment(config)
    make_schedule(config, steps_per_epoch=1.0)
    layer_table(build_model(config), (config.augment.crop_size, config.augment.crop_size, 3))


def is_finished(case: Case) -> bool:
    """Returns whether a run has reached and evaluated its last step."""
    if not has_checkpoint(case.workdir):
        return False
    try:
        saved = json.loads((case.workdir / "config.json").read_text())
    except (OSError, ValueError):
        return False  # the training reports it
    if configs.differing_fields(case.config, saved):
        return False
    rows = [row for row in read_metrics(case.workdir) if row["split"] == "eval"]
    return bool(rows) and rows[-1]["epoch"] >= case.config.num_epochs - 1e-4


def train_case(path: str, case: Case, stop: process.StopRequest) -> None:
    """Trains one run in a process of its own, from its newest checkpoint if it has one.

    Raises:
      UserError: the training failed; its own message is above.
      Stopped: a signal arrived; the run is saved.
    """
    _wait_for_other(case, stop)
    fields = [f"--config.{field}={value}" for field, value in case.overrides]
    command = ["-m", "alexnet_jax.train", "--config", path, f"--workdir={case.workdir}", *fields]
    # In a session of its own, Ctrl-C does not reach it: it would count as its second signal.
    child = subprocess.Popen([sys.executable, *command], start_new_session=True)
    asked = False
    while child.poll() is None:
        if stop.requested() and not asked:
            child.send_signal(signal.SIGTERM)
            asked = True
        time.sleep(POLL_S)
    if asked or child.returncode == EXIT_STOPPED:
        raise Stopped
    if child.returncode:
        raise UserError(
            f"training {case.name} ended with exit code {child.returncode}; correct what it "
            "reports above, and run the same command again"
        )


class Stopped(Exception):
    """The sweep was asked to stop. The same command continues it."""


def _wait_for_other(case: Case, stop: process.StopRequest) -> None:
    """Waits for a run whose sweep was killed: it goes on without it, so nothing is lost."""
    lock = case.workdir / ".lock"
    if not lock.exists():
        return
    said = False
    with lock.open() as file:
        while not stop.requested():
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except BlockingIOError:
                if not said:
                    print(f"waiting for the process that trains in {case.workdir}", flush=True)
                said = True
                time.sleep(POLL_S)
    raise Stopped


def results(cases: Sequence[Case]) -> list[dict[str, Any]]:
    """Returns a row of `COLUMNS` for each run that was evaluated, by its last evaluation."""
    rows: list[dict[str, Any]] = []
    for case in cases:
        found = [row for row in read_metrics(case.workdir) if row["split"] == "eval"]
        if not found:
            continue
        size = case.config.augment.crop_size
        table = layer_table(build_model(case.config), (size, size, 3))
        error = 1 - found[-1]["top1"]
        row = {
            "run": case.name,
            "parameters": sum(layer.params for layer in table),
            "top1_error": error,
            "top5_error": 1 - found[-1]["top5"],
            "loss": found[-1]["loss"],
        }
        rows.append(row | {"difference": error - (rows[0]["top1_error"] if rows else error)})
    return rows


def format_results(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the rows as a Markdown table."""
    lines = [f"| {' | '.join(COLUMNS.values())} |", f"|{' --- |' * len(COLUMNS)}"]
    for row in rows:
        errors = (f"{100 * row[name]:.2f} %" for name in ("top1_error", "top5_error"))
        cells = [row["run"], f"{row['parameters']:,}", *errors, f"{row['loss']:.4f}"]
        lines.append(f"| {' | '.join(cells)} | {100 * row['difference']:+.2f} |")
    return "\n".join(lines)


def write_results(cases: Sequence[Case], folder: Path) -> str:
    """Writes sweep.csv, sweep.md and sweep.png of the runs so far; returns the table."""
    rows = results(cases)
    table = format_results(rows)
    with explain_write_errors(folder, "another --workdir"):
        with atomic_write(folder / "sweep.csv") as new, new.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS)
            writer.writeheader()
            writer.writerows(rows)
        with atomic_write(folder / "sweep.md") as new:
            new.write_text(table + "\n")
        known = {row["run"] for row in rows}
        runs = {case.name: read_metrics(case.workdir) for case in cases if case.name in known}
        with atomic_write(folder / "sweep.png") as new:
            figures.curves_of_runs(runs).savefig(new)
    return table


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="NAME", help="a bundled config or file")
    parser.add_argument(
        "--with",
        dest="variations",
        action="append",
        default=[],
        metavar='"FIELD=VALUE …"',
        help="a further run with these fields; may be given several times",
    )
    parser.add_argument(
        "--workdir", type=buckets.local, required=True, help="folder of the runs' workdirs"
    )
    words, common = configs.split_overrides(argv)
    args = parser.parse_args(words)
    jax.config.update("jax_platforms", "cpu")  # the devices belong to the trainings
    process.set_up()
    folder = args.workdir.expanduser()
    cases = make_cases(args.config, common, args.variations, folder)
    with explain_write_errors(folder, "another --workdir"):
        folder.mkdir(parents=True, exist_ok=True)
    with process.StopRequest() as stop:
        for number, case in enumerate(cases, start=1):
            if not is_finished(case):
                print(f"run {number} of {len(cases)}: {case.name}", flush=True)
                try:
                    train_case(args.config, case, stop)
                except Stopped:
                    print("stopped; run the same command to continue", file=sys.stderr)
                    return EXIT_STOPPED
            table = write_results(cases[:number], folder)
    print(f"\n{table}\n\nwrote sweep.csv, sweep.md and sweep.png to {folder}")
    return 0


if __name__ == "__main__":
    main()
