"""Measures the accuracy of trained networks, alone and averaged, overall and by class."""

import argparse
import csv
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_jax import config as configs
from alexnet_jax import inference
from alexnet_jax.analysis import evaluation, figures
from alexnet_jax.analysis.evaluation import ClassificationMetrics, Ensemble
from alexnet_jax.data.augment import make_augment
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.preprocess import PREPROCESSING
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import exits_cleanly
from alexnet_jax.utils.files import explain_write_errors

VIEWS = {"center": "center crop", "nine": "nine views", "ten": "ten views"}
MAX_CLASSES_PRINTED = 20  # per_class.csv has all of them


def format_results(ensembles: Sequence[Ensemble], metrics: Sequence[ClassificationMetrics]) -> str:
    """Returns a table with a line for each ensemble."""
    width = max(len("network"), *(len(ensemble.name) for ensemble in ensembles))
    lines = [f"{'network':{width}}  {'views':11}    top-1    top-5   -log p"]
    for ensemble, own in zip(ensembles, metrics, strict=True):
        summary = own.summary()
        lines.append(
            f"{ensemble.name:{width}}  {VIEWS[ensemble.views]:11}  "
            f"{100 * summary['top1']:5.2f} %  {100 * summary['top5']:5.2f} %  "
            f"{summary['loss']:7.4f}"
        )
    return "\n".join(lines)


def format_per_class(rows: Sequence[dict[str, Any]]) -> str:
    """Returns a table of the MAX_CLASSES_PRINTED classes with the lowest accuracy, lowest first."""
    rows = sorted(rows, key=lambda row: (row["top1"], row["top5"]))
    printed = rows[:MAX_CLASSES_PRINTED]
    width = max(len("class"), *(len(row["class"]) for row in printed))
    lines = [f"{'class':{width}}  examples    top-1    top-5  most often taken for"]
    lines += [
        f"{row['class']:{width}}  {row['count']:8,}  {100 * row['top1']:5.1f} %  "
        f"{100 * row['top5']:5.1f} %  {row['taken_for']}".rstrip()
        for row in printed
    ]
    if len(rows) > len(printed):
        lines.append(f"… and {len(rows) - len(printed)} more classes")
    return "\n".join(lines)


def write_results(
    folder: Path,
    ensembles: Sequence[Ensemble],
    metrics: Sequence[ClassificationMetrics],
    class_names: Sequence[str],
) -> None:
    """Writes evaluation.json, and per_class.csv and confusion.png of the last ensemble."""
    with explain_write_errors(folder, "another --out"):
        folder.mkdir(parents=True, exist_ok=True)
        rows = [
            {"network": ensemble.name, "views": ensemble.views, **own.summary()}
            for ensemble, own in zip(ensembles, metrics, strict=True)
        ]
        (folder / "evaluation.json").write_text(json.dumps(rows, indent=2) + "\n")
        per_class = metrics[-1].per_class(class_names)
        with (folder / "per_class.csv").open("w", newline="") as file:
            table = csv.DictWriter(file, per_class[0].keys())
            table.writeheader()
            table.writerows(per_class)
        figures.save_confusion(metrics[-1].confusion, class_names, folder / "confusion.png")


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Runs the command."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.evaluate",
        description="Evaluates trained networks on the eval split of their data. With several "
        "networks, also evaluates the average of their softmax. Prints top-1 and top-5 accuracy "
        "and the mean of -log p, then the accuracy of each class for the last line, lowest first. "
        "Writes evaluation.json, per_class.csv and confusion.png.",
    )
    parser.add_argument(
        "workdir",
        type=buckets.readable,
        nargs="+",
        help="workdir of a training run or of alexnet_jax.convert",
    )
    parser.add_argument(
        "--views",
        nargs="+",
        choices=list(VIEWS),
        help="the center crop, nine crops, the paper's ten views, or several of these (default: "
        "eval.views of the config)",
    )
    parser.add_argument(
        "--step", type=int, help="step of the checkpoint (default: the best top-1 accuracy)"
    )
    parser.add_argument(
        "--preprocess",
        choices=PREPROCESSING,
        help="how squares are made of images; the data is prepared again for another one than that "
        "of the run (default: preprocess of the config)",
    )
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    parser.add_argument(
        "--dataset",
        help="a data set with the same classes, such as folder:PATH (default: that of the run)",
    )
    parser.add_argument(
        "--data-dir", help="folder with the prepared data (default: data_dir of the config)"
    )
    parser.add_argument(
        "--out", type=buckets.local, help="folder for the results (default: the first workdir)"
    )
    args = parser.parse_args(argv)
    process.set_up()
    networks = [
        inference.with_preprocess(
            inference.load(workdir, args.step, needs_classes=True), args.preprocess
        )
        for workdir in args.workdir
    ]
    config = networks[0].config
    if args.dataset:
        config.dataset = args.dataset
    if args.data_dir:
        config.data_dir = args.data_dir
    config.batch_size = args.batch_size
    configs.check_bounds(config)
    make_augment(config)  # checks its fields
    store = open_or_prepare(config, ["eval"])["eval"]
    evaluation.check_comparable(args.workdir, networks, store)
    ensembles = evaluation.all_ensembles(args.workdir, args.views or [config.eval.views])
    metrics = evaluation.evaluate(networks, store, config.batch_size, ensembles)
    class_names = networks[0].class_names
    print(f"{store.num_examples:,} examples of {store.source}\n")
    print(format_results(ensembles, metrics))
    print(f"\n{ensembles[-1].name}, {VIEWS[ensembles[-1].views]}, by class:\n")
    print(format_per_class(metrics[-1].per_class(class_names)))
    folder = args.out or buckets.folder_for_results(args.workdir[0])
    write_results(folder, ensembles, metrics, class_names)
    print(f"\nwrote evaluation.json, per_class.csv and confusion.png to {folder}")


if __name__ == "__main__":
    main()
