"""How often trained networks are right, alone and averaged: `python -m alexnet_jax.evaluate`."""

import argparse
import collections
import csv
import functools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32
from tqdm import tqdm

from alexnet_jax import config as configs
from alexnet_jax import inference as networks
from alexnet_jax.analysis import figures as plots
from alexnet_jax.data import augment, pipeline
from alexnet_jax.data.store import Store
from alexnet_jax.inference import Trained
from alexnet_jax.store import open_or_prepare
from alexnet_jax.training.train_step import first_five, mean_softmax
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import UserError, exits_cleanly, explained_write_errors

VIEWS = {"center": "centre crop", "ten": "ten views"}
BATCHES_IN_FLIGHT = 3
MOST_ROWS = 20  # of a table on the terminal; per_class.csv has all


class Tally:
    """What is counted of one network's answers, or of several networks' average.

    Attributes:
      confusion: int64[C, C], examples by label and by the class that came first.
      in_five: int64[C], by label, those whose label was among the first five.
      log_prob: sum of the labels' log-probabilities, nats.
    """

    def __init__(self, num_classes: int):
        self.confusion = np.zeros((num_classes, num_classes), np.int64)
        self.in_five = np.zeros(num_classes, np.int64)
        self.log_prob = 0.0

    def add(
        self,
        best: Int32[np.ndarray, "B 5"],
        log_probs: Float32[np.ndarray, " B"],
        labels: Int32[np.ndarray, " B"],
    ) -> None:
        """Counts examples by their best classes, falling, and log-probabilities of the labels."""
        np.add.at(self.confusion, (labels, best[:, 0]), 1)
        np.add.at(self.in_five, labels, (best == labels[:, None]).any(axis=1))
        self.log_prob += float(log_probs.sum(dtype=np.float64))

    def summary(self) -> dict[str, float]:
        """Returns the count, top1 and top5 (accuracies, 0 to 1), and loss, the mean of −log p."""
        count = int(self.confusion.sum())
        return {
            "count": count,
            "top1": float(self.confusion.trace() / count),
            "top5": float(self.in_five.sum() / count),
            "loss": -self.log_prob / count,
        }

    def per_class(self, class_names: Sequence[str]) -> list[dict[str, Any]]:
        """Returns a row for each class: its name, count, top1, top5 and what it is taken for.

        The last, `taken_for`, is the wrong class that came first most often, "" where none did.
        Classes without examples have no row.
        """
        rows = []
        for label, (name, answers) in enumerate(zip(class_names, self.confusion, strict=True)):
            count = int(answers.sum())
            if not count:
                continue
            wrong = answers.copy()
            wrong[label] = 0
            taken_for = class_names[int(wrong.argmax())] if wrong.any() else ""
            rows.append(
                {
                    "class": name,
                    "count": count,
                    "top1": float(answers[label] / count),
                    "top5": float(self.in_five[label] / count),
                    "taken_for": taken_for,
                }
            )
        return rows


class Contestant(NamedTuple):
    """One line of the results: which networks' softmax is averaged, over which views."""

    name: str
    views: str
    members: tuple[int, ...]


def contestants(workdirs: Sequence[Path], views: Sequence[str]) -> list[Contestant]:
    """Returns every network alone and, if there are several, all of them averaged, by views."""
    alone = [(str(workdir), (number,)) for number, workdir in enumerate(workdirs)]
    everybody = (f"average of {len(workdirs)}", tuple(range(len(workdirs))))
    lines = [*alone, everybody] if len(workdirs) > 1 else alone
    return [Contestant(name, view, members) for view in views for name, members in lines]


def evaluate(
    trained: Sequence[Trained],
    store: Store,
    batch_size: int,
    contest: Sequence[Contestant],
) -> list[Tally]:
    """Counts every example of the store once for each contestant, on all devices of this process.

    Several networks are averaged by their softmax, as the paper does (section 6).
    """
    tallies = [Tally(trained[0].config.model.num_classes) for _ in contest]
    answer = networks.on_all_devices(
        functools.partial(_answers, trained, contest), [network.variables for network in trained]
    )
    pending: collections.deque[tuple[np.ndarray, Any]] = collections.deque()

    def count_oldest() -> None:
        labels, answers = pending.popleft()
        counted = labels >= 0
        for tally, (best, log_probs) in zip(tallies, answers, strict=True):
            tally.add(np.asarray(best)[counted], np.asarray(log_probs)[counted], labels[counted])

    for batch in _shown(pipeline.eval_batches(store, batch_size), store, batch_size):
        pending.append((batch["label"], answer(batch["image"], batch["label"])))
        if len(pending) > BATCHES_IN_FLIGHT:
            count_oldest()
    while pending:
        count_oldest()
    return tallies


def _answers(
    trained: Sequence[Trained],
    contest: Sequence[Contestant],
    variables: Sequence[dict[str, Any]],
    images: jax.Array,
    labels: jax.Array,
) -> list[tuple[Int32[jax.Array, "B 5"], Float32[jax.Array, " B"]]]:
    """Each contestant's best five classes, and the log-probabilities of the labels."""
    of_member = {
        (number, views): networks.log_probs(trained[number], views, variables[number], images)
        for _, views, members in contest
        for number in members
    }

    def judged(views: str, members: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
        mean = mean_softmax(jnp.stack([of_member[number, views] for number in members]))
        _, best = first_five(mean)
        return best, jnp.take_along_axis(mean, jnp.maximum(labels, 0)[:, None], axis=1)[:, 0]

    return [judged(views, members) for _, views, members in contest]


def _shown(batches: Iterator[Any], store: Store, batch_size: int) -> Iterator[Any]:
    total = -(-store.num_examples // batch_size)
    shown: Iterator[Any] = tqdm(
        batches, "evaluating", total, unit="batch", disable=None, leave=False
    )
    return shown


def check_together(workdirs: Sequence[Path], trained: Sequence[Trained], store: Store) -> None:
    """Raises UserError unless all networks know the store's classes, from images of its size."""
    for workdir, network in zip(workdirs, trained, strict=True):
        classes = network.config.model.num_classes
        if classes != trained[0].config.model.num_classes or classes < len(store.class_names):
            raise UserError(
                f"{workdir} tells {classes} classes apart, {workdirs[0]} "
                f"{trained[0].config.model.num_classes} and the data has "
                f"{len(store.class_names)}; evaluate networks of the same classes together"
            )
        if network.config.image_size != store.image_size:
            raise UserError(
                f"{workdir} takes images stored at {network.config.image_size} pixels and the data "
                f"of {workdirs[0]} is stored at {store.image_size}; evaluate them apart"
            )
        named = network.class_names[: len(store.class_names)]
        if named != tuple(store.class_names) and named[0] != networks.unnamed(0):
            raise UserError(
                f"{workdir} knows the classes {', '.join(named[:3])} …, the data has "
                f"{', '.join(store.class_names[:3])} …; evaluate it on the data that it knows"
            )


def format_results(contest: Sequence[Contestant], tallies: Sequence[Tally]) -> str:
    """Returns the table of results, a line for each contestant."""
    width = max(len("network"), *(len(c.name) for c in contest))
    lines = [f"{'network':{width}}  {'views':11}    top-1    top-5   -log p"]
    for c, tally in zip(contest, tallies, strict=True):
        s = tally.summary()
        lines.append(
            f"{c.name:{width}}  {VIEWS[c.views]:11}  {100 * s['top1']:5.2f} %  "
            f"{100 * s['top5']:5.2f} %  {s['loss']:7.4f}"
        )
    return "\n".join(lines)


def format_per_class(rows: Sequence[dict[str, Any]]) -> str:
    """Returns the table of classes, worst first; of more than MOST_ROWS, the worst."""
    rows = sorted(rows, key=lambda row: (row["top1"], row["top5"]))
    shown = rows[:MOST_ROWS]
    width = max(len("class"), *(len(row["class"]) for row in shown))
    lines = [f"{'class':{width}}  examples    top-1    top-5  most often taken for"]
    lines += [
        f"{row['class']:{width}}  {row['count']:8,}  {100 * row['top1']:5.1f} %  "
        f"{100 * row['top5']:5.1f} %  {row['taken_for']}".rstrip()
        for row in shown
    ]
    if len(rows) > len(shown):
        lines.append(f"… and {len(rows) - len(shown)} classes more")
    return "\n".join(lines)


def write(
    folder: Path, contest: Sequence[Contestant], tallies: Sequence[Tally], names: Sequence[str]
) -> None:
    """Writes evaluation.json, and per_class.csv and confusion.png of the last contestant."""
    with explained_write_errors(folder, "another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"network": c.name, "views": c.views, **tally.summary()}
            for c, tally in zip(contest, tallies, strict=True)
        ]
        (folder / "evaluation.json").write_text(json.dumps(rows, indent=2) + "\n")
        per_class = tallies[-1].per_class(names)
        with (folder / "per_class.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, per_class[0].keys())
            table.writeheader()
            table.writerows(per_class)
        plots.save_confusion(tallies[-1].confusion, names, folder / "confusion.png")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.evaluate",
        description="Evaluates trained networks on the eval split of their data; several are also "
        "averaged. Prints top-1, top-5 and the mean of -log p, and of the last line's network the "
        "classes, the worst first. Writes evaluation.json, per_class.csv and confusion.png.",
    )
    parser.add_argument("workdir", type=Path, nargs="+", help="of train.py or alexnet_jax.convert")
    parser.add_argument(
        "--views",
        nargs="+",
        choices=list(VIEWS),
        help="of an image: its centre crop, the paper's ten views, or both; default: the config's",
    )
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the best by top-1")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument("--data-dir", help="where the data lies; default: the config's data_dir")
    parser.add_argument("--out", type=Path, help="folder to write to; default: the first workdir")
    args = parser.parse_args(argv)
    runtime.set_up()
    trained = [networks.load(workdir, args.step) for workdir in args.workdir]
    config = trained[0].config
    if args.data_dir:
        config.data_dir = args.data_dir
    config.batch_size = args.batch_size
    configs.check_bounds(config)
    augment.check(config)
    store = open_or_prepare(config)["eval"]
    check_together(args.workdir, trained, store)
    contest = contestants(args.workdir, args.views or [config.eval.views])
    tallies = evaluate(trained, store, config.batch_size, contest)
    names = trained[0].class_names
    last = contest[-1]
    print(f"{store.num_examples:,} examples of {store.source}\n")
    print(format_results(contest, tallies))
    print(f"\n{last.name}, {VIEWS[last.views]}, by class:\n")
    print(format_per_class(tallies[-1].per_class(names)))
    folder = args.out or args.workdir[0]
    write(folder, contest, tallies, names)
    print(f"\nwrote evaluation.json, per_class.csv and confusion.png into {folder}")


if __name__ == "__main__":
    main()
