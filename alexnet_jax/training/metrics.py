"""What a run reports: the progress bar, metrics.jsonl and TensorBoard."""

import json
import time
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

from alexnet_jax.training.train_step import Metrics
from alexnet_jax.utils import distributed
from alexnet_jax.utils.files import atomic_write

Row = dict[str, Any]


class Report:
    """Reports the progress of a run on process 0. On other processes its methods do nothing.

    A run that was killed has rows of steps that it now repeats. These are removed, so that
    metrics.jsonl has each step at most once.

    Args:
      workdir: folder of the run.
      step: number of steps done so far.
      total_steps: number of steps of the whole run.
      evaluated: whether this step was evaluated. If not, its evaluation is repeated too.
    """

    def __init__(self, workdir: Path, step: int, total_steps: int, evaluated: bool = True):
        self._is_active = distributed.is_first()
        # On a terminal tqdm draws a bar. In a log file each row is a line instead (disable=None).
        self._bar = tqdm(
            initial=step,
            total=total_steps,
            unit="step",
            disable=None if self._is_active else True,
        )
        if not self._is_active:
            return

        def is_repeated(row: Row) -> bool:
            again = row["step"] == step and row["split"] == "eval" and not evaluated
            return row["step"] > step or again

        from tensorboardX import SummaryWriter  # imports PyTorch if it is installed: seconds

        path = workdir / "metrics.jsonl"
        rows = [row for row in read_metrics(workdir) if not is_repeated(row)]
        with atomic_write(path) as new:
            new.write_text("".join(json.dumps(row) + "\n" for row in rows))
        self._file = path.open("a")
        self._tensorboard = SummaryWriter(
            str(workdir / "tensorboard"), purge_step=step + 1, flush_secs=10
        )

    def train(self, row: Row) -> None:
        """Records and shows a row of training metrics; see `read_metrics` for its keys."""
        self._record({**row, "split": "train"})
        text = (
            f"loss {row['loss']:.3f}, top1 {row['top1']:.1%}, lr {row['learning_rate']:.2g}, "
            f"{row['images_per_s']:.0f} images/s, data wait {row['data_wait']:.1%}"
        )
        self.show(text)
        if self._bar.disable:
            self.say(f"{_step_and_epoch(row)}  {text}")

    def evaluation(self, row: Row) -> None:
        """Records and prints a row of evaluation metrics."""
        self._record({**row, "split": "eval"})
        without = f"; without averaging top1 {row['last_top1']:.2%}" if "last_top1" in row else ""
        self.say(
            f"{_step_and_epoch(row)}  evaluation: loss {row['loss']:.3f}, "
            f"top1 {row['top1']:.2%}, top5 {row['top5']:.2%}{without}"
        )

    def say(self, text: str) -> None:
        """Prints a line, above the bar."""
        if self._is_active:
            tqdm.write(text)

    def show(self, text: str) -> None:
        """Shows a text behind the bar."""
        self._bar.set_postfix_str(text)

    def advance(self) -> None:
        """Advances the bar by one step."""
        self._bar.update()

    def close(self) -> None:
        """Closes the files. The bar stays on the screen."""
        self._bar.close()
        if self._is_active:
            self._file.close()
            self._tensorboard.close()

    def _record(self, row: Row) -> None:
        if not self._is_active:
            return
        self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        for name, value in row.items():
            if name not in ("step", "epoch", "split"):
                self._tensorboard.add_scalar(f"{row['split']}/{name}", value, row["step"])


def _step_and_epoch(row: Row) -> str:
    return f"step {row['step']:6d}  epoch {row['epoch']:6.2f}"


class Meter:
    """Collects the metrics of steps, which stay on the devices, and measures their speed.

    Args:
      batch_size: number of images per step, on all processes together.
    """

    def __init__(self, batch_size: int):
        self.batch_size = batch_size
        self.first_step = True
        self._steps: list[tuple[int, Metrics]] = []
        self._created = time.perf_counter()
        self.restart_clock()

    def add(self, step: int, metrics: Metrics, waited: float, steps_in_flight: int) -> None:
        """Adds a dispatched step, then blocks until at most `steps_in_flight` are unfinished.

        Args:
          step: its number, counted from 1.
          metrics: scalars by name.
          waited: seconds that the loop waited for the step's batch.
          steps_in_flight: at least 1.
        """
        self._steps.append((step, metrics))
        self._waited += waited
        self.first_step = False
        jax.block_until_ready(self._steps[:-steps_in_flight][-1:])

    def restart_clock(self) -> None:
        """Excludes the time until now, and the steps added until now, from the measured speed."""
        self._clock, self._waited = time.perf_counter(), 0.0
        self._untimed = len(self._steps)

    def drain(
        self, steps_in_flight: int = 0
    ) -> tuple[list[tuple[int, dict[str, float]]], dict[str, float]]:
        """Fetches and removes the steps added so far, except for the latest `steps_in_flight`.

        Fetching the newest step would wait for it, and leave the devices without work.

        Returns:
          [(step, metrics), …] and their speed: images_per_s, and data_wait, the share of the time
          that was spent waiting for batches.
        """
        count = max(0, len(self._steps) - steps_in_flight)
        if not count:
            return [], {}
        numbers, metrics = zip(*self._steps[:count], strict=True)
        fetched = jax.device_get(list(metrics))  # all in one transfer
        steps = [
            (step, {name: float(value) for name, value in values.items()})
            for step, values in zip(numbers, fetched, strict=True)
        ]
        timed, since = count - self._untimed, self._clock
        if timed <= 0:  # the first step alone: its only time includes the compilation
            timed, since = count, self._created
        seconds = time.perf_counter() - since
        speed = {
            "images_per_s": timed * self.batch_size / seconds,
            "data_wait": self._waited / seconds,
        }
        self._steps = self._steps[count:]
        self.restart_clock()
        self._untimed = 0  # the steps in flight finish after this moment
        return steps, speed


def read_metrics(workdir: Path) -> list[Row]:
    """Returns the rows of `workdir/metrics.jsonl`, [] if there is none.

    Each has step, epoch, split ("train" or "eval"), loss (nats), top1 and top5 (0 to 1). Training
    rows also have learning_rate, images_per_s, data_wait (see `Meter.drain`) and, if gradients are
    clipped, grad_norm. Evaluation rows of a run with moving averages are those of the averages, and
    have last_loss, last_top1 and last_top5 of the parameters themselves. Reading ends at a line
    that a crash cut short.
    """
    path = workdir / "metrics.jsonl"
    rows: list[Row] = []
    for line in path.read_text().splitlines() if path.exists() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    return rows
