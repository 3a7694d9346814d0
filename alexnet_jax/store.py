"""The prepared store: square uint8 images and labels as zarr arrays, read by TensorStore.

A store is the folder (or gs:// prefix) `<data_dir>/<dataset>_<image_size>/<split>/`:

    zarr.json    group attributes: see `Store`; `complete` is set last
    image/       uint8[N, S, S, 3], RGB; shard files of whole images, each with a CRC-32C checksum
    label/       int32[N]
    mean_image/  float32[S, S, 3]
    corrupt.log  one line for each image that could not be decoded, where there were any

`python -m alexnet_jax.store --config configs/quickstart.py` prepares the stores of a config.
"""

import argparse
import hashlib
import json
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import tensorstore as ts

from alexnet_jax.errors import UserError, exits_cleanly, one_line

FORMAT_VERSION = 1
MAX_SHARD_ROWS = 1024
MAX_SHARD_BYTES = 256 * 2**20
CHECKSUM_BYTES = 4  # CRC-32C
INDEX_BYTES_PER_ROW = 16  # zarr sharding codec: uint64 offset and length of each inner chunk
FOLDER_PREFIX = "folder:"
PREPARE_COMMAND = "python -m alexnet_jax.store --config CONFIG"


@dataclass(frozen=True, eq=False)
class Store:
    """A complete store, open for reading. N examples, S pixels along a side.

    Attributes:
      path: where it lies.
      source: what it was prepared from, e.g. "imagenet2012/5.1.0 train".
      num_examples, image_size: N and S.
      class_names: the name of each label.
      mean_image: float32[S, S, 3], mean over the examples, in pixel units (0 to 255).
      mean_channel: float32[3], the mean image's mean over its pixels.
      eigenvalues: float32[3], of the covariance (0 to 255 squared units) of all pixels' RGB
        values, falling.
      eigenvectors: float32[3, 3], their unit eigenvectors in its columns, each with its entry
        of largest magnitude positive.
      labels: int32[N].
    """

    path: str
    source: str
    num_examples: int
    image_size: int
    class_names: tuple[str, ...] = field(repr=False)
    mean_image: np.ndarray = field(repr=False)
    mean_channel: np.ndarray
    eigenvalues: np.ndarray
    eigenvectors: np.ndarray
    labels: np.ndarray = field(repr=False)
    images: ts.TensorStore = field(repr=False)

    def read(self, indices: np.ndarray) -> dict[str, np.ndarray]:
        """Reads the examples at `indices` int[B], in that order, all images in one request.

        Returns {"image": uint8[B, S, S, 3], "label": int32[B]}.

        Raises:
          UserError: an image is damaged or cannot be read.
          IndexError: an index is not in [0, N).
        """
        indices = np.asarray(indices)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_examples:
            raise IndexError(f"indices must be in [0, {self.num_examples})")
        try:
            image = self.images[indices].read().result()
        except ValueError as error:
            raise _unreadable(self.path, error) from error
        return {"image": image, "label": self.labels[indices]}


def open_store(path: str | os.PathLike) -> Store:
    """Opens a complete store at a local path or a URL such as gs://bucket/folder.

    Raises:
      UserError: there is no store, it is not complete, another version of this program wrote it,
        or a file of it is missing, shortened or unreadable.
    """
    path = expand_dir(str(path))
    attributes = read_attributes(path)
    if attributes is None:
        raise UserError(f"no prepared store at {path}; prepare it: {PREPARE_COMMAND}")
    if attributes["format_version"] != FORMAT_VERSION:
        raise UserError(
            f"the store at {path} has format version {attributes['format_version']} and this "
            f"program reads version {FORMAT_VERSION}; delete it and prepare it again"
        )
    if not attributes["complete"]:
        raise UserError(f"the store at {path} is not complete; finish it: {PREPARE_COMMAND}")
    num_examples, size = attributes["num_examples"], attributes["image_size"]
    _check_shards(path, num_examples, size)
    root = open_kvstore(path)
    try:
        arrays = {name: _open_array(root, name) for name in ("image", "label", "mean_image")}
        labels = arrays["label"].read().result()
        mean_image = arrays["mean_image"].read().result()
    except ValueError as error:
        raise _unreadable(path, error) from error
    if arrays["image"].shape != (num_examples, size, size, 3) or labels.shape != (num_examples,):
        raise _damaged(path, f"its arrays do not have the {num_examples} examples it should have")
    return Store(
        path=path,
        source=attributes["source"],
        num_examples=num_examples,
        image_size=size,
        class_names=tuple(attributes["class_names"]),
        mean_image=mean_image,
        mean_channel=np.array(attributes["mean_channel"], np.float32),
        eigenvalues=np.array(attributes["eigenvalues"], np.float32),
        eigenvectors=np.array(attributes["eigenvectors"], np.float32),
        labels=labels,
        images=arrays["image"],
    )


def open_or_prepare(config: Mapping[str, Any]) -> dict[str, Store]:
    """Opens a config's stores {"train": …, "eval": …}; prepares those that are not complete.

    Reads the fields dataset, data_dir, train_split, eval_split, image_size, max_corrupt.

    Raises:
      UserError: as `open_store` and `prepare.prepare_splits` do.
    """
    splits = {"train": config["train_split"], "eval": config["eval_split"]}
    paths = {use: store_path(config, split) for use, split in splits.items()}
    if not all(is_settled(path) for path in paths.values()):
        from alexnet_jax import prepare

        prepare.prepare_splits(config, paths)
    stores = {use: open_store(path) for use, path in paths.items()}
    if config["dataset"].startswith(FOLDER_PREFIX):
        from alexnet_jax.sources import check_folder_unchanged

        for use, store in stores.items():
            check_folder_unchanged(config, splits[use], store)
    return stores


def is_settled(path: str) -> bool:
    """Returns whether `open_store` alone decides about a store, and nothing is to be prepared."""
    attributes = read_attributes(path)
    if attributes is None:
        return False
    return attributes["complete"] or attributes["format_version"] != FORMAT_VERSION


def store_path(config: Mapping[str, Any], split: str) -> str:
    """Returns `<data_dir>/<dataset>_<image_size>/<split>`.

    Where a name has characters that do not suit file names, they become "-" and eight hex digits
    of the name's hash follow; a folder's name is its last part and the hash of its absolute path.
    """
    dataset = config["dataset"]
    if dataset.startswith(FOLDER_PREFIX):
        folder = Path(dataset.removeprefix(FOLDER_PREFIX)).expanduser().resolve()
        name = _file_name(f"folder-{folder.name}", unique=str(folder))
    else:
        name = _file_name(dataset)
    return f"{expand_dir(config['data_dir'])}/{name}_{config['image_size']}/{_file_name(split)}"


def _file_name(text: str, unique: str = "") -> str:
    safe = re.sub(r"[^\w.+-]+", "-", text).strip("-")
    if safe == text and not unique:
        return text
    return f"{safe}-{hashlib.sha256((unique or text).encode()).hexdigest()[:8]}"


def expand_dir(data_dir: str) -> str:
    """Returns an absolute local path, `~` expanded, or a URL as it is, without a final slash."""
    if is_url(data_dir):
        return data_dir.rstrip("/")
    return os.path.abspath(os.path.expanduser(data_dir))


def is_url(path: str) -> bool:
    return "://" in path


def open_kvstore(path: str) -> ts.KvStore:
    """Opens the key-value store below a local path or a URL."""
    local = {"driver": "file", "path": f"{path.rstrip('/')}/"}
    return ts.KvStore.open(f"{path.rstrip('/')}/" if is_url(path) else local).result()


def array_kvstore(root: ts.KvStore, name: str) -> dict[str, Any]:
    """Returns the TensorStore spec of the folder of one array."""
    return (root / f"{name}/").spec().to_json()


def read_attributes(path: str) -> dict[str, Any] | None:
    """Returns the group attributes of the store at `path`, None where there is no store.

    Raises:
      UserError: they are there but cannot be read.
    """
    try:
        found = open_kvstore(path).read("zarr.json").result()
        if found.state == "missing":
            return None
        attributes = json.loads(found.value)["attributes"]
        return {"format_version": None, "complete": False} | attributes
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def shard_rows(size: int) -> int:
    """Returns how many images of `size` pixels a side one shard file holds."""
    return max(1, min(MAX_SHARD_ROWS, MAX_SHARD_BYTES // (size * size * 3)))


def _open_array(root: ts.KvStore, name: str) -> ts.TensorStore:
    spec = {
        "driver": "zarr3",
        "kvstore": array_kvstore(root, name),
        "fill_missing_data_reads": False,  # zarr's default makes zeros of what is missing
    }
    return ts.open(spec, open=True).result()


def _check_shards(path: str, num_examples: int, size: int) -> None:
    """Finds missing shards and, on local disks, shortened ones."""
    rows = shard_rows(size)
    root = open_kvstore(path)
    keys = {key.decode() for key in (root / "image/").list().result()}
    for shard, start in enumerate(range(0, num_examples, rows)):
        key = f"c/{shard}/0/0/0"
        if key not in keys:
            raise _damaged(path, f"shard image/{key} is missing")
        if not is_url(path):
            stored = min(rows, num_examples - start) * (size * size * 3 + CHECKSUM_BYTES)
            expected = stored + rows * INDEX_BYTES_PER_ROW + CHECKSUM_BYTES
            actual = os.path.getsize(f"{path}/image/{key}")
            if actual != expected:
                raise _damaged(
                    path, f"shard image/{key} is {actual} bytes and should be {expected}"
                )


def _damaged(path: str, what: str) -> UserError:
    return UserError(f"the store at {path} is damaged: {what}; delete it and prepare it again")


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(
        f"cannot read the store at {path} ({one_line(error)}); if it is damaged, delete it and "
        "prepare it again"
    )


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> None:
    """Prepares a config's stores and says what they hold."""
    from alexnet_jax.config import check_bounds, parse

    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.store", description="Prepare the data of a config."
    )
    config, _ = parse(argv, parser)
    check_bounds(config)
    for store in open_or_prepare(config).values():
        print(f"{store.path}: {store.num_examples} examples of {len(store.class_names)} classes")


if __name__ == "__main__":
    main()
