"""Predicts the five most probable classes of image files."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from alexnet_jax import inference
from alexnet_jax.analysis import figures
from alexnet_jax.analysis.prediction import Prediction, Skipped, find_files, predict_files
from alexnet_jax.data.augment import VIEWS
from alexnet_jax.data.preprocess import PREPROCESSING
from alexnet_jax.data.wordnet import display_names
from alexnet_jax.utils import buckets, process
from alexnet_jax.utils.errors import UserError, exits_cleanly
from alexnet_jax.utils.files import atomic_write, explain_write_errors, printable

EXIT_SOME_SKIPPED = 3
MAX_IMAGES_IN_PANEL = 40
PANEL_SUFFIXES = (".png", ".pdf", ".svg")
MAX_COLUMN_WIDTH = 40  # characters of a file or class name in the table


def format_line(prediction: Prediction, class_names: Sequence[str], file_width: int) -> str:
    """Returns a line of the table: the file, then each class with its probability."""
    width = min(MAX_COLUMN_WIDTH, max(map(len, class_names)))
    cells = [
        f"{100 * probability:5.1f} % {class_names[label][:MAX_COLUMN_WIDTH]:{width}}"
        for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
    ]
    return f"{str(prediction.path):{file_width}}  {'  '.join(cells)}".rstrip()


def to_json(result: Prediction | Skipped, class_names: Sequence[str]) -> str:
    """Returns a line of JSON: `file` and `predictions`, best first, or `file` and `error`."""
    row: dict[str, Any] = {"file": str(result.path)}
    if isinstance(result, Skipped):
        row["error"] = result.reason
    else:
        row["predictions"] = [
            {"class": class_names[label], "label": int(label), "probability": float(probability)}
            for label, probability in zip(result.labels, result.probabilities, strict=True)
        ]
    return json.dumps(row, ensure_ascii=False)


def save_panel(predictions: Sequence[Prediction], class_names: Sequence[str], path: Path) -> None:
    """Draws predictions. A file in a folder named after a class has that class as its label."""
    folders = display_names(printable(prediction.path.parent.name) for prediction in predictions)
    with explain_write_errors(path, "another file for --panel"), atomic_write(path) as new:
        figures.save_predictions(
            [prediction.image for prediction in predictions],
            [folder if folder in class_names else None for folder in folders],
            [[class_names[label] for label in prediction.labels] for prediction in predictions],
            [prediction.probabilities for prediction in predictions],
            new,
        )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command and returns its exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.predict",
        description="Prints the five most probable classes of each image. Photographs are turned "
        "upright by their EXIF orientation. Files that are not images are skipped and named on "
        f"stderr; the exit code is then {EXIT_SOME_SKIPPED}.",
    )
    parser.add_argument(
        "workdir", type=buckets.readable, help="workdir of a training run or of alexnet_jax.convert"
    )
    parser.add_argument(
        "images", nargs="+", help="files, folders (with all files below), or patterns in quotes"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object per line")
    parser.add_argument(
        "--panel",
        type=Path,
        metavar="FILE.png",
        help=f"also draw the first {MAX_IMAGES_IN_PANEL} images with their predictions as bars, "
        "as in the paper's Figure 4",
    )
    parser.add_argument(
        "--views",
        choices=VIEWS,
        default="center",
        help="the center crop, or the average over nine crops or the paper's ten views (default: "
        "center)",
    )
    parser.add_argument(
        "--step", type=int, help="step of the checkpoint (default: the best top-1 accuracy)"
    )
    parser.add_argument(
        "--preprocess",
        choices=PREPROCESSING,
        help="how squares are made of images (default: preprocess of the network's config)",
    )
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be at least 1")
    if args.panel and args.panel.suffix.lower() not in PANEL_SUFFIXES:
        raise UserError(f"--panel {args.panel} must end in {' or '.join(PANEL_SUFFIXES)}")
    process.set_up()
    files = find_files(args.images)
    network = inference.load(args.workdir, args.step, needs_classes=True)
    network = inference.with_preprocess(network, args.preprocess)
    width = min(MAX_COLUMN_WIDTH, max(len(str(path)) for path in files))
    in_panel: list[Prediction] = []
    skipped = 0
    for result in predict_files(network, files, args.views, args.batch_size):
        if isinstance(result, Skipped):
            skipped += 1
            print(f"skipped {result.path}: {result.reason}", file=sys.stderr)
        elif args.panel and len(in_panel) < MAX_IMAGES_IN_PANEL:
            in_panel.append(result)
        if args.json:
            print(to_json(result, network.class_names))
        elif isinstance(result, Prediction):
            print(format_line(result, network.class_names, width))
    if in_panel:
        save_panel(in_panel, network.class_names, args.panel)
        print(f"wrote {args.panel}", file=sys.stderr)
    return EXIT_SOME_SKIPPED if skipped else 0


if __name__ == "__main__":
    main()
