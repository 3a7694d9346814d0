"""Builds a store (see `store`) from a tfds builder or a folder of images, and resumes one.

Work goes in blocks of one shard file. After each, `progress.npz` says how far it came, so that a
preparation that was stopped goes on there and ends with the same bytes.
"""

import contextlib
import io
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import tensorstore as ts
from tqdm import tqdm

from alexnet_jax.decode import decode_square
from alexnet_jax.errors import UserError, explained_write_errors, one_line
from alexnet_jax.sources import Example, Source, open_source
from alexnet_jax.store import (
    FORMAT_VERSION,
    array_kvstore,
    is_settled,
    is_url,
    open_kvstore,
    shard_rows,
)

PROGRESS_KEY = "progress.npz"
CORRUPT_KEY = "corrupt.log"
DECODES_AHEAD = 512  # goes on while a shard is written


@dataclass
class Progress:
    """What a preparation has done; `image_sum` and `outer_sum` are exact, so order is no matter.

    Attributes:
      consumed: source examples decoded or found corrupt.
      labels: int32[rows], one a stored image.
      image_sum: int64[S, S, 3], sum of the stored images.
      outer_sum: int64[3, 3], sum over all stored pixels of the outer product of RGB with itself.
      corrupt: a line for each corrupt example.
    """

    consumed: int
    labels: np.ndarray
    image_sum: np.ndarray
    outer_sum: np.ndarray
    corrupt: list[str]


def prepare_splits(config: Mapping[str, Any], paths: Mapping[str, str]) -> None:
    """Prepares the train and eval stores of a config where they are not complete.

    Args:
      config: fields dataset, data_dir, train_split, eval_split, image_size, max_corrupt.
      paths: where the stores lie, {"train": …, "eval": …}.

    Raises:
      UserError: the data set, a split or its files are missing or cannot be had; more than
        max_corrupt of the images are corrupt; the store cannot be written.
    """
    splits = {paths["train"]: config["train_split"], paths["eval"]: config["eval_split"]}
    folder = os.path.dirname(paths["train"])
    with explained_write_errors(folder, "another data_dir"), _lock(folder):
        sources = {
            path: open_source(config, split)  # all of them, before hours go into the first
            for path, split in splits.items()
            if not is_settled(path)
        }
        for path, source in sources.items():
            with explained_write_errors(path, "another data_dir"):
                prepare_store(source, path, config["image_size"], config["max_corrupt"])


def prepare_store(source: Source, path: str, size: int, max_corrupt: float) -> None:
    """Writes, or goes on writing, the store of one source at `path`.

    Args:
      size: S, pixels along a side of the stored images.
      max_corrupt: the share of the source's examples that may be corrupt.

    Raises:
      UserError: more are corrupt, or none can be read.
    """
    root = open_kvstore(path)
    identity = {
        "format_version": FORMAT_VERSION,
        "source": source.name,
        "source_examples": source.num_examples,
        "image_size": size,
        "class_names": list(source.class_names),
    }
    progress = _load_progress(root, identity) or _start(root, identity)
    images = _open_images(root, source.num_examples, size)
    limit = int(max_corrupt * source.num_examples + 1e-9)  # 0.29 * 100 is 28.999999999999996
    bar = tqdm(
        total=source.num_examples,
        initial=progress.consumed,
        desc="/".join(path.split("/")[-2:]),
        unit=" images",
    )
    with bar:
        for block in _blocks(source, progress, size, limit, path, bar):
            start = len(progress.labels) - len(block)
            images[start : start + len(block)].write(block).result()
            _save_progress(root, identity, progress)
    if not len(progress.labels):
        raise UserError(f"{source.name} has no image that can be decoded; see {path}/{CORRUPT_KEY}")
    _finish(root, identity, images, progress)


def _start(root: ts.KvStore, identity: dict[str, Any]) -> Progress:
    size = identity["image_size"]
    progress = Progress(
        consumed=0,
        labels=np.zeros(0, np.int32),
        image_sum=np.zeros((size, size, 3), np.int64),
        outer_sum=np.zeros((3, 3), np.int64),
        corrupt=[],
    )
    root.delete_range(ts.KvStore.KeyRange()).result()
    _write_attributes(root, identity | {"complete": False})
    _save_progress(root, identity, progress)
    return progress


def _blocks(
    source: Source, progress: Progress, size: int, limit: int, path: str, bar: tqdm
) -> Iterator[np.ndarray]:
    """Yields uint8[rows, S, S, 3] of a whole shard, with `progress` counting it already.

    A block is overwritten when the next one is asked for.
    """
    block = np.empty((shard_rows(size), size, size, 3), np.uint8)
    labels: list[int] = []
    for example, image, outer in _decode_in_order(source.read_from(progress.consumed), size):
        progress.consumed += 1
        bar.update()
        if isinstance(image, Exception):
            _count_corrupt(source, progress, f"{example.name}: {one_line(image)}", limit, path)
            continue
        block[len(labels)] = image
        labels.append(example.label)
        progress.image_sum += image
        progress.outer_sum += outer
        if len(labels) == len(block):
            progress.labels = np.append(progress.labels, np.array(labels, np.int32))
            yield block
            labels = []
    if labels:
        progress.labels = np.append(progress.labels, np.array(labels, np.int32))
        yield block[: len(labels)]


def _count_corrupt(source: Source, progress: Progress, line: str, limit: int, path: str) -> None:
    progress.corrupt.append(line)
    if len(progress.corrupt) > limit:
        _write_corrupt_log(open_kvstore(path), progress)
        raise UserError(
            f"{len(progress.corrupt)} of the first {progress.consumed} images of {source.name} "
            f"cannot be decoded, more than max_corrupt allows ({limit} of {source.num_examples}); "
            f"they are named in {path}/{CORRUPT_KEY}: mend them, or raise --config.max_corrupt"
        )


def _decode_in_order(
    examples: Iterator[Example], size: int
) -> Iterator[tuple[Example, np.ndarray | Exception, np.ndarray | None]]:
    """Decodes in threads (Pillow lets go of Python's lock), a bounded number ahead.

    Yields each example with its image and the sum of its pixels' outer products, int64[3, 3]; or
    with what the decoder raised, and None.
    """

    def decode(example: Example) -> tuple[Example, np.ndarray | Exception, np.ndarray | None]:
        try:
            image = decode_square(example.load(), size)
        except Exception as error:  # damaged bytes make Pillow raise nearly anything
            return example, error, None
        pixels = image.reshape(-1, 3).astype(np.float64)  # sums of integers below 2**53: exact
        return example, image, (pixels.T @ pixels).astype(np.int64)

    pending: deque[Future] = deque()
    pool = ThreadPoolExecutor(max(2, os.cpu_count() or 1))
    try:
        for example in examples:
            pending.append(pool.submit(decode, example))
            if len(pending) > DECODES_AHEAD:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def statistics(progress: Progress) -> dict[str, np.ndarray]:
    """Returns the mean image, mean RGB, and eigen-decomposition of the RGB covariance.

    As in `store.Store`, in float64. The covariance is over all pixels of all images (2012 paper,
    section 4.1).
    """
    count = len(progress.labels)
    mean_image = progress.image_sum / count
    pixels = count * mean_image.shape[0] * mean_image.shape[1]
    mean = progress.image_sum.sum(axis=(0, 1)) / pixels
    eigenvalues, eigenvectors = np.linalg.eigh(progress.outer_sum / pixels - np.outer(mean, mean))
    eigenvalues, eigenvectors = np.maximum(eigenvalues[::-1], 0), eigenvectors[:, ::-1]
    largest = np.abs(eigenvectors).argmax(axis=0)
    eigenvectors = eigenvectors * np.sign(eigenvectors[largest, range(3)])
    return {
        "mean_image": mean_image,
        "mean_channel": mean,
        "eigenvalues": eigenvalues,
        "eigenvectors": eigenvectors,
    }


def _finish(
    root: ts.KvStore, identity: dict[str, Any], images: ts.TensorStore, progress: Progress
) -> None:
    count = len(progress.labels)
    _write_corrupt_log(root, progress)
    images.resize(exclusive_max=(count, None, None, None)).result()
    found = statistics(progress)
    _write_array(root, "label", progress.labels)
    _write_array(root, "mean_image", found.pop("mean_image").astype(np.float32))
    attributes = {name: value.tolist() for name, value in found.items()}
    _write_attributes(root, identity | attributes | {"num_examples": count, "complete": True})
    root.write(PROGRESS_KEY, None).result()


def _open_images(root: ts.KvStore, count: int, size: int) -> ts.TensorStore:
    checked_bytes = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
    sharding = {
        "chunk_shape": [1, size, size, 3],
        "codecs": checked_bytes,
        "index_codecs": checked_bytes,
        "index_location": "end",
    }
    grid = {"chunk_shape": [shard_rows(size), size, size, 3]}
    spec = {
        "driver": "zarr3",
        "kvstore": array_kvstore(root, "image"),
        "store_data_equal_to_fill_value": True,  # so that a black image is no missing image
    }
    if root.read("image/zarr.json").result().state != "missing":
        return ts.open(spec, open=True).result()
    spec["metadata"] = {
        "shape": [count, size, size, 3],
        "data_type": "uint8",
        "chunk_grid": {"name": "regular", "configuration": grid},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    return ts.open(spec, create=True).result()


def _write_array(root: ts.KvStore, name: str, values: np.ndarray) -> None:
    spec = {
        "driver": "zarr3",
        "kvstore": array_kvstore(root, name),
        "store_data_equal_to_fill_value": True,
        "metadata": {
            "shape": values.shape,
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": values.shape}},
            "codecs": [
                {"name": "bytes", "configuration": {"endian": "little"}},
                {"name": "crc32c"},
            ],
        },
    }
    ts.open(spec, create=True, delete_existing=True).result().write(values).result()


def _write_attributes(root: ts.KvStore, attributes: dict[str, Any]) -> None:
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    root.write("zarr.json", json.dumps(group, indent=1).encode()).result()


def _write_corrupt_log(root: ts.KvStore, progress: Progress) -> None:
    if progress.corrupt:
        root.write(CORRUPT_KEY, "".join(f"{line}\n" for line in progress.corrupt)).result()


def _save_progress(root: ts.KvStore, identity: dict[str, Any], progress: Progress) -> None:
    buffer = io.BytesIO()
    fields = vars(progress) | {"corrupt": json.dumps(progress.corrupt)}
    np.savez(buffer, identity=json.dumps(identity), **fields)
    root.write(PROGRESS_KEY, buffer.getvalue()).result()


def _load_progress(root: ts.KvStore, identity: dict[str, Any]) -> Progress | None:
    """Returns the progress of the same preparation; None: there is none, or of another."""
    found = root.read(PROGRESS_KEY).result()
    if found.state == "missing":
        return None
    with np.load(io.BytesIO(found.value)) as saved:
        if json.loads(str(saved["identity"])) != identity:
            return None
        return Progress(
            consumed=int(saved["consumed"]),
            labels=saved["labels"],
            image_sum=saved["image_sum"],
            outer_sum=saved["outer_sum"],
            corrupt=json.loads(str(saved["corrupt"])),
        )


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[None]:
    """Lets one process at a time prepare below a folder; others wait. Local disks only."""
    if is_url(folder):
        yield
        return
    import fcntl

    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is preparing {folder}; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
