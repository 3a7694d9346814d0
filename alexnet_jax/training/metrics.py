"""What a run tells of itself: progress bar, metrics.jsonl, TensorBoard, curves.png."""

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from tensorboardX import SummaryWriter
from tqdm import tqdm

from alexnet_jax.analysis import figures as plots
from alexnet_jax.training.train_step import Metrics
from alexnet_jax.utils.files import atomic_write

Row = dict[str, Any]


class Report:
    """The progress bar and the files of one run, from one step on, which is `evaluated` or not.

    What an earlier part of the run wrote for later steps, which will now be made again, is
    dropped, so that every step stands in `metrics.jsonl` at most once.
    """

    def __init__(self, workdir: Path, step: int, total_steps: int, evaluated: bool = True):
        def stays(row: Row) -> bool:
            made_up = row["step"] == step and row["split"] == "eval" and not evaluated
            return row["step"] <= step and not made_up

        self._workdir = workdir
        self._rows = [row for row in read_metrics(workdir) if stays(row)]
        path = workdir / "metrics.jsonl"
        with atomic_write(path) as kept:
            kept.write_text("".join(json.dumps(row) + "\n" for row in self._rows))
        self._metrics = path.open("a")
        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=10
        )
        # On a terminal a bar; in a file or a cluster's log a line for each row instead.
        self._bar = tqdm(initial=step, total=total_steps, unit="step", disable=None)

    def advance(self) -> None:
        """Moves the bar by one step."""
        self._bar.update()

    def show(self, text: str) -> None:
        """Says behind the bar what is going on."""
        self._bar.set_postfix_str(text)

    def train(self, row: Row) -> None:
        """Records a row of training metrics (see `read_metrics` for its keys)."""
        self._record({**row, "split": "train"})
        text = (
            f"loss {row['loss']:.3f}, top1 {row['top1']:.1%}, lr {row['learning_rate']:.2g}, "
            f"{row['images_per_s']:.0f} images/s, data wait {row['data_wait']:.1%}"
        )
        self._bar.set_postfix_str(text)
        if self._bar.disable:
            self.say(f"{_place(row)}  {text}")

    def evaluation(self, row: Row) -> None:
        """Records a row of evaluation metrics, prints it, and draws curves.png anew."""
        self._record({**row, "split": "eval"})
        self.say(
            f"{_place(row)}  evaluation: loss {row['loss']:.3f}, top1 {row['top1']:.2%}, "
            f"top5 {row['top5']:.2%}"
        )
        plots.save_curves(self._rows, self._workdir / "curves.png")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        tqdm.write(text)

    def close(self) -> None:
        """Closes the files and leaves the bar as it is."""
        self._bar.close()
        self._metrics.close()
        self._tensorboard.close()

    def _record(self, row: Row) -> None:
        self._rows.append(row)
        self._metrics.write(json.dumps(row) + "\n")
        self._metrics.flush()
        for name, value in row.items():
            if name not in ("step", "epoch", "split"):
                self._tensorboard.add_scalar(f"{row['split']}/{name}", value, row["step"])


class NoReport:
    """What all processes of a run but one have in place of a `Report`: its methods do nothing."""

    def __getattr__(self, name: str) -> Callable[..., None]:
        return lambda *_: None


def _place(row: Row) -> str:
    return f"step {row['step']:6d}  epoch {row['epoch']:6.2f}"


class Meter:
    """Metrics and waiting times since the last drain; metrics stay on the devices until then."""

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.first_step = True
        self.steps: list[tuple[int, Metrics]] = []
        self.restart_clock()
        self.created = self.clock

    def add(self, number: int, metrics: Metrics, waited: float, steps_in_flight: int) -> None:
        """Notes a dispatched step, and the seconds its batch was waited for.

        Then waits until no more than so many of the noted steps are still under way.
        """
        self.steps.append((number, metrics))
        self.timed += 1
        self.waited += waited
        self.first_step = False
        jax.block_until_ready(self.steps[:-steps_in_flight][-1:])

    def restart_clock(self) -> None:
        """Leaves what went on until now out of the next drain's timing."""
        self.clock, self.timed, self.waited = time.perf_counter(), 0, 0.0

    def drain(
        self, fetch: Callable[[Metrics], Metrics] = jax.device_get
    ) -> tuple[list[tuple[int, dict[str, float]]], dict[str, float]]:
        """Returns (step, metrics) of the noted steps, and their images_per_s and data_wait."""
        steps = [(n, {k: float(v) for k, v in fetch(m).items()}) for n, m in self.steps]
        now = time.perf_counter()
        # Of a first step alone, which the clock leaves out, there is but the time with compilation.
        count, since = (self.timed, self.clock) if self.timed else (len(steps), self.created)
        seconds = now - since
        timing = {
            "images_per_s": count * self.batch_size / seconds,
            "data_wait": self.waited / seconds,
        }
        self.steps = []
        self.restart_clock()
        return steps, timing


def read_metrics(workdir: Path) -> list[Row]:
    """Returns the rows of `workdir/metrics.jsonl`, [] if there is none.

    Each has step, epoch, split ("train" or "eval"), loss (nats), top1 and top5 (0 to 1); those of
    training also learning_rate, images_per_s, and data_wait, the share of the time that the
    step waited for a batch; where gradients are clipped, grad_norm. A line cut short by a crash
    ends the rows.
    """
    rows = []
    path = workdir / "metrics.jsonl"
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
