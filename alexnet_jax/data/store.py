"""The prepared store: square uint8 images and labels, as zarr arrays.

A store is the folder (or gs:// prefix) `<data_dir>/<dataset>_<image_size>/<split>/`:

    zarr.json    group attributes: see `Store`; `complete` is set last
    image/       uint8[R, S, S, 3], RGB: shard files of images with checksums (see `shards`)
    label/       int32[R]; CORRUPT_LABEL where the source's image could not be decoded
    mean_image/  float32[S, S, 3]
    corrupt.log  one line for each such image, where there were any
    parts/       while it is prepared: what is known of the shards made so far (see `prepare`)

Row r is the source's example r; a store's examples are its rows without the corrupt ones.
"""

import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import tensorstore as ts
from jaxtyping import Float32, Int, Int32, Int64
from tqdm import tqdm

from alexnet_jax.data.buffers import Buffers
from alexnet_jax.data.shards import (
    Damage,
    LocalShards,
    RemoteShards,
    Shards,
    rows_per_shard,
    shard_key,
    unpack_jpeg,
    unpack_raw,
)
from alexnet_jax.data.zarr_files import read_array
from alexnet_jax.utils.errors import UserError, one_line

FORMAT_VERSION = 2
CORRUPT_LABEL = -1
RECORDS = ts.KvStore.KeyRange("parts/", "parts0")  # keys that begin with parts/
PREPARE_COMMAND = "python -m alexnet_jax.store prepare --config CONFIG"
UNPACK = {"raw": unpack_raw, "jpeg": unpack_jpeg}


@dataclass(frozen=True, eq=False)
class Store:
    """A complete store, open for reading. N examples, S pixels along a side.

    Attributes:
      path: where it lies.
      source: what it was prepared from, e.g. "imagenet2012/5.1.0 train".
      storage: "raw" or "jpeg".
      num_examples: N.
      num_corrupt: examples of the source that could not be decoded.
      image_size: S.
      class_names: the name of each label.
      mean_image: mean over the examples, in pixel units (0 to 255).
      mean_channel: the mean image's mean over its pixels.
      eigenvalues: of the covariance (0 to 255 squared units) of all pixels' RGB values, falling.
      eigenvectors: their unit eigenvectors in its columns, each with its entry of largest
        magnitude positive.
      rows: where the examples lie.
      shard_bytes: the length of each shard file.
    """

    path: str
    source: str
    storage: str
    num_examples: int
    num_corrupt: int
    image_size: int
    class_names: tuple[str, ...] = field(repr=False)
    mean_image: Float32[np.ndarray, "S S 3"] = field(repr=False)
    mean_channel: Float32[np.ndarray, " 3"]
    eigenvalues: Float32[np.ndarray, " 3"]
    eigenvectors: Float32[np.ndarray, "3 3"]
    labels: Int32[np.ndarray, " N"] = field(repr=False)
    rows: Int64[np.ndarray, " N"] = field(repr=False)
    shard_bytes: tuple[int, ...] = field(repr=False)
    shards: Shards = field(repr=False)
    buffers: Buffers = field(repr=False, default_factory=Buffers)

    def read(self, indices: Int[np.ndarray, " B"]) -> dict[str, np.ndarray]:
        """Reads the examples at `indices`, in that order.

        Returns {"image": uint8[B, S, S, 3], "label": int32[B]}.

        Raises:
          UserError: an image is damaged or cannot be read.
          IndexError: an index is not in [0, N).
        """
        indices = np.asarray(indices)
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_examples:
            raise IndexError(f"indices must be in [0, {self.num_examples})")
        images = self.buffers.take((len(indices), self.image_size, self.image_size, 3))
        try:
            self.shards.read(self.rows[indices], images, UNPACK[self.storage])
        except Damage as error:
            raise damaged(self.path, str(error)) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error
        return {"image": images, "label": self.labels[indices]}


def open_store(path: str | os.PathLike[str], check_shards: bool = True) -> Store:
    """Opens a complete store at a local path or a URL such as gs://bucket/folder.

    Args:
      check_shards: whether to see that all shard files are there, in their length.

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
    num_rows, size = attributes["num_rows"], attributes["image_size"]
    shard_bytes = tuple(attributes["shard_bytes"])
    if check_shards:
        _check_shard_files(path, shard_bytes)
    root = open_kvstore(path)
    try:
        labels = read_array(root, "label")
        mean_image = read_array(root, "mean_image")
    except ValueError as error:
        raise _unreadable(path, error) from error
    rows = np.flatnonzero(labels != CORRUPT_LABEL)
    if labels.shape != (num_rows,) or len(rows) != attributes["num_examples"]:
        raise damaged(path, f"it does not have labels for its {num_rows} rows")
    per_shard = rows_per_shard(size)
    return Store(
        path=path,
        source=attributes["source"],
        storage=attributes["storage"],
        num_examples=len(rows),
        num_corrupt=num_rows - len(rows),
        image_size=size,
        class_names=tuple(attributes["class_names"]),
        mean_image=mean_image,
        mean_channel=np.array(attributes["mean_channel"], np.float32),
        eigenvalues=np.array(attributes["eigenvalues"], np.float32),
        eigenvectors=np.array(attributes["eigenvectors"], np.float32),
        labels=labels[rows],
        rows=rows,
        shard_bytes=shard_bytes,
        shards=RemoteShards(root, per_shard) if is_url(path) else LocalShards(path, per_shard),
    )


def is_settled(path: str) -> bool:
    """Returns whether `open_store` alone decides about a store, and nothing is to be prepared."""
    attributes = read_attributes(path)
    if attributes is None:
        return False
    return bool(attributes["complete"] or attributes["format_version"] != FORMAT_VERSION)


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


def read_attributes(path: str) -> dict[str, Any] | None:
    """Returns the group attributes of the store at `path`, None where there is no store.

    Raises:
      UserError: they are there but cannot be read.
    """
    try:
        found = open_kvstore(path).read("zarr.json").result()
        if found.state == "missing":
            return None
        attributes: dict[str, Any] = json.loads(found.value)["attributes"]
        return {"format_version": None, "complete": False} | attributes
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def remove_records(root: ts.KvStore) -> None:
    """Removes what a preparation knew of its shards, if it is there."""
    if root.list(RECORDS).result():
        root.delete_range(RECORDS).result()


def _check_shard_files(path: str, shard_bytes: Sequence[int]) -> None:
    """Finds missing shards and, on local disks, shortened ones."""
    keys = {f"image/{key.decode()}" for key in (open_kvstore(path) / "image/").list().result()}
    for shard, expected in enumerate(shard_bytes):
        key = shard_key(shard)
        if key not in keys:
            raise damaged(path, f"shard {key} is missing")
        if not is_url(path) and (actual := os.path.getsize(f"{path}/{key}")) != expected:
            raise damaged(path, f"shard {key} is {actual} bytes and should be {expected}")


def damaged(path: str, what: str) -> UserError:
    """Returns what to raise where a store is not what was prepared."""
    return UserError(f"the store at {path} is damaged: {what}; delete it and prepare it again")


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(
        f"cannot read the store at {path} ({one_line(error)}); if it is damaged, delete it and "
        "prepare it again"
    )


def damages(store: Store) -> Iterator[str]:
    """Reads every image of a store against its checksum; yields what is wrong with it.

    Shows a progress bar meanwhile.
    """

    per_shard = rows_per_shard(store.image_size)
    image = np.empty((1, store.image_size, store.image_size, 3), np.uint8)
    for shard in tqdm(range(len(store.shard_bytes)), desc=store.path, unit=" shards"):
        first, end = np.searchsorted(store.rows, (shard * per_shard, (shard + 1) * per_shard))
        for row in store.rows[first:end]:
            try:
                store.shards.read(np.array([row]), image, UNPACK[store.storage])
            except (Damage, OSError) as error:
                yield str(error)
