"""Predictions for image files: finds, decodes and classifies them as a stream."""

import collections
import glob
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Float32, Int32, UInt8
from ml_collections import ConfigDict

from alexnet_jax import inference
from alexnet_jax.data.decode import read_square
from alexnet_jax.data.preprocess import PREPROCESSING
from alexnet_jax.inference import Trained
from alexnet_jax.training.train_step import top_five
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import files_below

DECODING_THREADS = max(2, os.cpu_count() or 1)
# Batches whose results are not fetched yet: threads decode while the devices compute.
BATCHES_IN_FLIGHT = 2

DecodedFile = tuple[Path, str | None]  # a file, and why it could not be decoded


class Prediction(NamedTuple):
    """The most probable classes of one file.

    Attributes:
      labels: the k most probable classes, most probable first.
      probabilities: their softmax probabilities.
      image: the decoded image, before crop and mean subtraction.
    """

    path: Path
    labels: Int32[np.ndarray, " k"]
    probabilities: Float32[np.ndarray, " k"]
    image: UInt8[np.ndarray, "S S 3"]


class Skipped(NamedTuple):
    """A file that could not be decoded, and why."""

    path: Path
    reason: str


def find_files(words: Sequence[str]) -> list[Path]:
    """Returns the files that paths, folders and glob patterns name, each once.

    A folder stands for all files below it (see `files_below`).

    Raises UserError if a word names no file, or a folder links to itself.
    """
    found: dict[Path, None] = {}  # an ordered set
    for word in words:
        if "://" in word:
            raise UserError(f"{word} is a URL; download it and name the file")
        path = Path(word).expanduser()
        if path.is_dir():
            files = list(files_below(path))
        elif path.exists():
            files = [path]
        else:
            matches = map(Path, sorted(glob.glob(str(path), recursive=True)))
            files = [match for match in matches if match.is_file()]
        if not files:
            raise UserError(
                f"there is no file at {word}; name image files, a folder, or a pattern in quotes"
            )
        found |= dict.fromkeys(files)
    return list(found)


def predict_files(
    network: Trained, files: Sequence[Path], views: str, batch_size: int
) -> Iterator[Prediction | Skipped]:
    """Yields the prediction of each file, or why there is none, in the order of the files.

    Threads read and decode files while the devices compute. Only a few batches are in memory at a
    time, however many files there are.

    Args:
      views: "center", or "ten" for the average over the paper's ten views.
    """
    classify = inference.on_all_devices(
        lambda variables, images: top_five(inference.log_probs(network, views, variables, images)),
        network.variables,
    )
    pending: collections.deque[tuple[list[DecodedFile], np.ndarray, Any]] = collections.deque()

    def oldest() -> Iterator[Prediction | Skipped]:
        decoded, images, (log_probs, labels) = pending.popleft()
        rows = zip(np.exp(log_probs), np.asarray(labels), images, strict=True)
        for path, fault in decoded:
            if fault is not None:
                yield Skipped(path, fault)
            else:
                probabilities, best, image = next(rows)
                yield Prediction(path, best, probabilities, image)

    for decoded, images in decoded_batches(files, network.config, batch_size):
        pending.append((decoded, images, classify(images)))
        if len(pending) > BATCHES_IN_FLIGHT:
            yield from oldest()
    while pending:
        yield from oldest()


def decoded_batches(
    files: Sequence[Path], config: ConfigDict, batch_size: int
) -> Iterator[tuple[list[DecodedFile], UInt8[np.ndarray, "B S S 3"]]]:
    """Yields files and the images of those that could be decoded.

    All batches have the same size B, so that only one program is compiled. The last is padded.

    Args:
      config: of the network; `preprocess` and `image_size` decide about the squares.
    """
    size, decode = config.image_size, PREPROCESSING[config.preprocess].decode
    length = min(batch_size, len(files))
    threads = grain.ReadOptions(num_threads=DECODING_THREADS, prefetch_buffer_size=2 * length)
    results = grain.MapDataset.source(files).map(
        lambda path: (path, read_square(path, size, decode))
    )
    decoded: list[DecodedFile] = []
    images = np.zeros((length, size, size, 3), np.uint8)
    count = 0
    for path, image in results.to_iter_dataset(threads):
        if isinstance(image, str):
            decoded.append((path, image))
            continue
        decoded.append((path, None))
        images[count] = image
        count += 1
        if count == length:
            yield decoded, images
            decoded, images, count = [], np.zeros_like(images), 0
    if decoded:
        yield decoded, images
