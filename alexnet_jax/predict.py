"""What a trained network sees in photographs: `python -m alexnet_jax.predict WORKDIR IMAGE…`."""

import argparse
import collections
import glob
import json
import os
import signal
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int32, UInt8

from alexnet_jax import inference as trained
from alexnet_jax.analysis import figures as plots
from alexnet_jax.data.decode import read_upright
from alexnet_jax.inference import Trained
from alexnet_jax.training.train_step import first_five
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import UserError, exits_cleanly, explained_write_errors
from alexnet_jax.utils.files import written_whole

EXIT_SOME_SKIPPED = 3
MOST_IN_PANEL = 40
PANEL_KINDS = (".png", ".pdf", ".svg")
MOST_NAME = 40  # characters of a class's or a file's name that the table makes room for
THREADS = max(2, os.cpu_count() or 1)
BATCHES_IN_FLIGHT = 2

Read = tuple[Path, str | None]  # a file, and what is wrong with it


class Prediction(NamedTuple):
    """What the network sees in one file.

    Attributes:
      labels: the k classes of highest probability, highest first.
      probabilities: theirs, of a softmax over all classes.
      image: what it was shown, before crop and mean.
    """

    path: Path
    labels: Int32[np.ndarray, " k"]
    probabilities: Float32[np.ndarray, " k"]
    image: UInt8[np.ndarray, "S S 3"]


class Skipped(NamedTuple):
    """A file that is no image, and why."""

    path: Path
    reason: str


def find_files(words: Sequence[str]) -> list[Path]:
    """Returns the files that paths, folders and glob patterns name, each once.

    A folder means all files below it but hidden ones, by name. Raises UserError for a word that
    names none.
    """
    found: dict[Path, None] = {}
    for word in words:
        if "://" in word:
            raise UserError(f"{word} is a URL; download it and name the file")
        path = Path(word).expanduser()
        if path.is_dir():
            files = _files_below(path)
        elif path.exists():
            files = [path]
        else:
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(f"no file at {word}; name image files, a folder, or a quoted pattern")
        found |= dict.fromkeys(files)
    return list(found)


def _files_below(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return files


def predictions(
    network: Trained, files: Sequence[Path], views: str, batch_size: int
) -> Iterator[Prediction | Skipped]:
    """Yields each file's prediction, or why there is none, in the files' order.

    Files are read and decoded by threads while the devices compute; few batches are ever in
    memory.

    Args:
      views: "center", or "ten" for the paper's average over ten views.
    """
    classify = trained.on_all_devices(
        lambda variables, images: first_five(trained.log_probs(network, views, variables, images)),
        network.variables,
    )
    pending: collections.deque[tuple[list[Read], np.ndarray, Any]] = collections.deque()

    def finished() -> Iterator[Prediction | Skipped]:
        read, images, (log_probs, labels) = pending.popleft()
        answers = zip(np.exp(log_probs), np.asarray(labels), images, strict=True)
        for path, fault in read:
            if fault is not None:
                yield Skipped(path, fault)
            else:
                probabilities, first, image = next(answers)
                yield Prediction(path, first, probabilities, image)

    for read, images in _batches(files, network.config.image_size, batch_size):
        pending.append((read, images, classify(images)))
        if len(pending) > BATCHES_IN_FLIGHT:
            yield from finished()
    while pending:
        yield from finished()


def _batches(
    files: Sequence[Path], size: int, batch_size: int
) -> Iterator[tuple[list[Read], UInt8[np.ndarray, "B S S 3"]]]:
    """Yields files, each with what is wrong with it, and the images of those that are well.

    B is the same in all batches, so that there is one program to compile; the last may have rows
    that no file goes with.
    """
    length = min(batch_size, len(files))
    threads = grain.ReadOptions(num_threads=THREADS, prefetch_buffer_size=2 * length)
    decoded = grain.MapDataset.source(files).map(lambda path: (path, read_upright(path, size)))
    read: list[Read] = []
    images = np.zeros((length, size, size, 3), np.uint8)
    filled = 0
    for path, image in decoded.to_iter_dataset(threads):
        if isinstance(image, str):
            read.append((path, image))
            continue
        read.append((path, None))
        images[filled] = image
        filled += 1
        if filled == length:
            yield read, images
            read, images, filled = [], np.zeros_like(images), 0
    if read:
        yield read, images


def format_line(prediction: Prediction, class_names: Sequence[str], file_width: int) -> str:
    """Returns a row of the table: the file, then each class with its probability."""
    widest = min(MOST_NAME, max(map(len, class_names)))
    cells = [
        f"{100 * probability:5.1f} % {class_names[label][:MOST_NAME]:{widest}}"
        for label, probability in zip(prediction.labels, prediction.probabilities, strict=True)
    ]
    return f"{str(prediction.path):{file_width}}  {'  '.join(cells)}".rstrip()


def to_json(result: Prediction | Skipped, class_names: Sequence[str]) -> str:
    """Returns one line of JSON: file and predictions, best first, or file and error."""
    row: dict[str, Any] = {"file": str(result.path)}
    if isinstance(result, Skipped):
        row["error"] = result.reason
    else:
        row["predictions"] = [
            {"class": class_names[label], "label": int(label), "probability": float(probability)}
            for label, probability in zip(result.labels, result.probabilities, strict=True)
        ]
    return json.dumps(row, ensure_ascii=False)


def _save_panel(shown: Sequence[Prediction], class_names: Sequence[str], path: Path) -> None:
    """A file in a folder that has a class's name is an example of that class."""
    with explained_write_errors(path, "another file for --panel"), written_whole(path) as new:
        plots.save_predictions(
            [prediction.image for prediction in shown],
            [p.path.parent.name if p.path.parent.name in class_names else None for p in shown],
            [[class_names[label] for label in prediction.labels] for prediction in shown],
            [prediction.probabilities for prediction in shown],
            new,
        )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.predict",
        description="Prints the five most probable classes of each image. An EXIF orientation is "
        "honoured. A file that is not an image is named on stderr and skipped; the exit code is "
        f"then {EXIT_SOME_SKIPPED}.",
    )
    parser.add_argument("workdir", type=Path, help="of train.py or alexnet_jax.convert")
    parser.add_argument(
        "images", nargs="+", help="files, folders (with all below them), or quoted patterns"
    )
    parser.add_argument("--json", action="store_true", help="one JSON object a line instead")
    parser.add_argument(
        "--panel",
        type=Path,
        metavar="FILE.png",
        help=f"also draw the first {MOST_IN_PANEL} images with their bars, as the paper's Figure 4",
    )
    parser.add_argument(
        "--views",
        choices=["center", "ten"],
        default="center",
        help="the centre crop, or the paper's average over ten views; default: center",
    )
    parser.add_argument("--step", type=int, help="of the checkpoint; default: the best by top-1")
    parser.add_argument("--batch-size", type=int, default=128, help="default: 128")
    args = parser.parse_args(argv)
    if args.batch_size < 1:
        raise UserError(f"--batch-size {args.batch_size} must be at least 1")
    if args.panel and args.panel.suffix.lower() not in PANEL_KINDS:
        raise UserError(f"--panel {args.panel} must end in {' or '.join(PANEL_KINDS)}")
    warnings.filterwarnings("ignore", module="PIL")  # of damaged notes in images that are well
    runtime.set_up()
    files = find_files(args.images)
    network = trained.load(args.workdir, args.step)
    width = min(MOST_NAME, max(len(str(path)) for path in files))
    shown: list[Prediction] = []
    skipped = 0
    for result in predictions(network, files, args.views, args.batch_size):
        if isinstance(result, Skipped):
            skipped += 1
            print(f"skipped {result.path}: {result.reason}", file=sys.stderr)
        elif len(shown) < MOST_IN_PANEL and args.panel:
            shown.append(result)
        if args.json:
            print(to_json(result, network.class_names))
        elif isinstance(result, Prediction):
            print(format_line(result, network.class_names, width))
    if shown:
        _save_panel(shown, network.class_names, args.panel)
        print(f"wrote {args.panel}", file=sys.stderr)
    return EXIT_SOME_SKIPPED if skipped else 0


if __name__ == "__main__":
    signal.signal(signal.SIGPIPE, signal.SIG_DFL)  # as `head` expects
    main()
