"""The prepared store: uint8 RGB images of one size and their labels, as zarr v3 arrays.

JPEG decoding and resizing dominate the cost of an input pipeline, and AlexNet needs neither at
training time: its augmentation crops from fixed 256x256 images (2012 paper, sections 2 and 4.1).
So both happen once, when the store is prepared, and training only copies bytes.

A store is a folder or a bucket prefix `<data_dir>/<dataset>_<image_size>/<split>/` with

    zarr.json    attributes of the zarr group, see `Store`; `complete` is set last
    image/       uint8[R, S, S, 3]: shard files of images with checksums, see `shards`
    label/       int32[R]; CORRUPT_LABEL where the source's image cannot be decoded
    size/        int32[R, 2], of whole photographs; see `to_canvas`
    mean_image/  float32[S, S, 3]
    corrupt.log  one line for each such image, if there are any
    files.json   of a folder of images: name, size, time and CRC-32C of each file, see `File`
    parts/       only during preparation: records of the finished shards, see `prepare`

Whole photographs are uint8[R, S, 2S, 3], for inception crops that reach beyond the central square.

Row r is example r of the source. The examples of a store are its rows except the corrupt ones.
The format is zarr because TensorStore reads and writes it on disks and in buckets, and other
programs can read it.
"""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
import tensorstore as ts
from jaxtyping import Float32, Int, Int32, Int64, UInt8
from tqdm import tqdm

from alexnet_jax.config import FOLDER_PREFIX, folder_path
from alexnet_jax.data.decode import MAX_ASPECT
from alexnet_jax.data.shards import (
    DECODERS,
    INDEX_CODECS,
    JPEG_QUALITY,
    BufferPool,
    CorruptShardError,
    LocalShards,
    RemoteShards,
    ReplacedShardError,
    Shards,
    shard_key,
    slots_per_shard,
)
from alexnet_jax.data.wordnet import display_names
from alexnet_jax.utils.buckets import is_url
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.files import printable

FORMAT_VERSION = 3
# Version 2 has the same arrays. Its images are not turned upright, and it has no files.json.
READABLE_VERSIONS = (2, FORMAT_VERSION)
FILES_KEY = "files.json"
CORRUPT_LABEL = -1
STORED = ("square", "whole")
JPEG_BLOCK = 16  # pixels; colors have half the resolution of blocks of 8
PREPARE_COMMAND = "python -m alexnet_jax.store prepare --config CONFIG"
RENEW_COMMAND = "python -m alexnet_jax.store renew"


class File(NamedTuple):
    """A file of a folder of images.

    Attributes:
      name: class/…/file, relative to the folder of the split.
      size: in bytes; -1 if it could not be determined.
      mtime_ns: time of its last modification. Size and time tell only whether to read it again.
      crc32c: checksum of its content; None if it was not read.
    """

    name: str
    size: int
    mtime_ns: int
    crc32c: int | None = None


def image_shape(image_size: int, stored: str) -> tuple[int, int, int]:
    """Returns the shape of a stored image: (S, S, 3), or (S, 2S, 3) of whole photographs."""
    return (image_size, image_size * (MAX_ASPECT if stored == "whole" else 1), 3)


def batch_shapes(image_size: int, stored: str) -> dict[str, tuple[tuple[int, ...], type]]:
    """Returns shape and dtype of what `Store.read` returns for one example, by name."""
    size = {"size": ((2,), np.int32)} if stored == "whole" else {}
    return {"image": (image_shape(image_size, stored), np.uint8), **size, "label": ((), np.int32)}


def to_canvas(image: UInt8[np.ndarray, "H W 3"]) -> UInt8[np.ndarray, "S 2S 3"]:
    """Returns a photograph of shorter side S as it is stored with `stored="whole"`.

    Portraits are transposed, so that one shape serves both. Its height and width tell where the
    photograph ends and whether it is transposed. Pixels right of it are black, which takes few
    bytes as JPEG, except that its last column is repeated to the end of JPEG's blocks: black pixels
    in the same block would show in the photograph.
    """
    if len(image) > image.shape[1]:
        image = image.swapaxes(0, 1)
    size, width = image.shape[:2]
    block_end = min(-(-width // JPEG_BLOCK) * JPEG_BLOCK, MAX_ASPECT * size)
    canvas = np.zeros(image_shape(size, "whole"), np.uint8)
    canvas[:, :width], canvas[:, width:block_end] = image, image[:, -1:]
    return canvas


def central_square(
    image: UInt8[np.ndarray, "S W 3"], size: Sequence[int]
) -> UInt8[np.ndarray, "S S 3"]:
    """Returns the upright central square of a stored image, given its height and width."""
    start = (max(size) - min(size)) // 2
    square = image[:, start : start + len(image)]
    return np.ascontiguousarray(square.swapaxes(0, 1) if size[0] > size[1] else square)


@dataclass(frozen=True, eq=False)
class Store:
    """A complete store, open for reading. N examples of S by S pixels, or whole photographs.

    Attributes:
      path: a local path or a URL.
      source: what it was prepared from, e.g. "imagenet2012/5.1.0 train".
      identity: the same for the same data. Of a folder it depends on the name and the checksum of
        each file, but not on the folder's path.
      format_version: one of READABLE_VERSIONS.
      storage: "raw" or "jpeg".
      stored: "square" or "whole".
      num_examples: N.
      num_corrupt: number of the source's examples that cannot be decoded.
      image_size: S.
      class_names: one per label; names instead of ImageNet's WordNet IDs.
      mean_image: mean over the examples, in pixel values 0 to 255.
      mean_channel: mean of the mean image over its pixels.
      eigenvalues: of the covariance of RGB over all pixels of all images, in descending order, in
        squared pixel values.
      eigenvectors: the corresponding unit eigenvectors as columns, each with its entry of largest
        magnitude positive.
      labels: of the examples.
      sizes: height and width of whole photographs, turned upright; None for squares.
      rows: of the examples in the array `image`.
      shard_bytes: size of each shard file.
      reads_squares: whether `read` returns the central squares of whole photographs.
    """

    path: str
    source: str
    identity: str
    format_version: int
    storage: str
    stored: str
    num_examples: int
    num_corrupt: int
    image_size: int
    class_names: tuple[str, ...] = field(repr=False)
    mean_image: Float32[np.ndarray, "S S 3"] = field(repr=False)
    mean_channel: Float32[np.ndarray, " 3"]
    eigenvalues: Float32[np.ndarray, " 3"]
    eigenvectors: Float32[np.ndarray, "3 3"]
    labels: Int32[np.ndarray, " N"] = field(repr=False)
    sizes: Int32[np.ndarray, "N 2"] | None = field(repr=False)
    rows: Int64[np.ndarray, " N"] = field(repr=False)
    shard_bytes: tuple[int, ...] = field(repr=False)
    shards: Shards = field(repr=False)
    buffers: BufferPool = field(repr=False, default_factory=BufferPool)
    reads_squares: bool = False

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of a stored image."""
        return image_shape(self.image_size, self.stored)

    @property
    def slots_per_shard(self) -> int:
        """The number of images in each shard but the last."""
        return slots_per_shard(self.image_shape)

    def read(
        self, indices: Int[np.ndarray, " B"], threads: int = 1, pad_to: int = 0
    ) -> dict[str, np.ndarray]:
        """Reads the examples at `indices`, in this order. May be called from several threads.

        Args:
          threads: that share the work, which pays off for hundreds of images.
          pad_to: at least this many rows are returned. Those after the examples are black, with
            the label -1.

        Returns {"image": uint8[B, S, S, 3], "label": int32[B]}; of whole photographs {"image":
        uint8[B, S, 2S, 3], "size": int32[B, 2], "label": int32[B]}, see `to_canvas`.

        Raises:
          UserError: an image is damaged or cannot be read.
          IndexError: an index is not in [0, N).
        """
        indices = np.asarray(indices)
        # NumPy would accept a negative index and return another example.
        if indices.size and not 0 <= indices.min() <= indices.max() < self.num_examples:
            raise IndexError(f"indices must be in [0, {self.num_examples})")
        count, total = len(indices), max(len(indices), pad_to)
        images = self.buffers.take((total, *self.image_shape))
        labels = np.full(total, -1, np.int32)
        images[count:], labels[:count] = 0, self.labels[indices]
        try:
            self._read_rows(self.rows[indices], images[:count], threads)
        except CorruptShardError as error:
            raise damaged(self.path, str(error)) from error
        except ReplacedShardError as error:
            raise UserError(
                f"the store at {self.path} was prepared again while it was used ({error}); start "
                "the same command again"
            ) from error
        except OSError as error:
            raise _unreadable(self.path, error) from error
        if self.sizes is None:
            return {"image": images, "label": labels}
        if self.reads_squares:
            squares = self.buffers.take((total, self.image_size, self.image_size, 3))
            squares[count:] = 0
            for n, size in enumerate(self.sizes[indices].tolist()):
                squares[n] = central_square(images[n], size)
            return {"image": squares, "label": labels}
        sizes = np.full((total, 2), self.image_size, np.int32)
        sizes[:count] = self.sizes[indices]
        return {"image": images, "size": sizes, "label": labels}

    def keep_shards(self, indices: Int[np.ndarray, " B"]) -> None:
        """Has a bucket's shards with these examples fetched whole, and forgets all others.

        What is read of them until the next call needs no further request. Local shards are in the
        page cache anyway, if they fit.
        """
        if isinstance(self.shards, RemoteShards):
            self.shards.keep(np.unique(self.rows[indices] // self.slots_per_shard).tolist())

    def _read_rows(self, rows: np.ndarray, images: np.ndarray, threads: int) -> None:
        if threads == 1:
            self.shards.read(rows, images)
            return
        parts = np.array_split(rows, threads), np.array_split(images, threads)
        with ThreadPoolExecutor(threads) as pool:
            list(pool.map(self.shards.read, *parts))


def open_store(path: str | os.PathLike[str], check_shards: bool = True) -> Store:
    """Opens a complete store at a local path or a URL such as gs://bucket/folder.

    Args:
      path: of the store.
      check_shards: whether to check that all shard files exist and, on local disks, their sizes.

    Raises:
      UserError: there is no store, it is not complete or has another format version, or one of its
        files is missing, truncated or unreadable.
    """
    path = expand_dir(str(path))
    attributes = read_attributes(path)
    if attributes is None:
        raise UserError(f"no prepared store at {path}; prepare it with {PREPARE_COMMAND}")
    if attributes["format_version"] not in READABLE_VERSIONS:
        raise UserError(
            f"the store at {path} has format version {attributes['format_version']}, but this "
            f"program reads version {FORMAT_VERSION}; delete it and prepare it again"
        )
    if not attributes["complete"]:
        raise UserError(f"the store at {path} is not complete; finish it with {PREPARE_COMMAND}")
    num_rows, size = attributes["num_rows"], attributes["image_size"]
    storage, stored = attributes["storage"], attributes.get("stored", "square")
    num_slots = slots_per_shard(image_shape(size, stored))
    shard_bytes = tuple(attributes["shard_bytes"])
    times = _check_shard_files(path, shard_bytes) if check_shards else []
    root = open_kvstore(path)
    try:
        labels = read_array(root, "label")
        mean_image = read_array(root, "mean_image")
        sizes = read_array(root, "size") if stored == "whole" else None
    except ValueError as error:
        raise _unreadable(path, error) from error
    rows = np.flatnonzero(labels != CORRUPT_LABEL)
    if labels.shape != (num_rows,) or len(rows) != attributes["num_examples"]:
        raise damaged(path, f"the labels do not match its {num_rows} rows")
    return Store(
        path=path,
        source=attributes["source"],
        identity=attributes.get("identity", attributes["source"]),
        format_version=attributes["format_version"],
        storage=storage,
        stored=stored,
        num_examples=len(rows),
        num_corrupt=num_rows - len(rows),
        image_size=size,
        class_names=display_names(attributes["class_names"]),
        mean_image=mean_image,
        mean_channel=np.array(attributes["mean_channel"], np.float32),
        eigenvalues=np.array(attributes["eigenvalues"], np.float32),
        eigenvectors=np.array(attributes["eigenvectors"], np.float32),
        labels=labels[rows],
        sizes=None if sizes is None else sizes[rows],
        rows=rows,
        shard_bytes=shard_bytes,
        shards=RemoteShards(root, storage, num_slots)
        if is_url(path)
        else LocalShards(path, storage, num_slots, times),
    )


def needs_preparation(path: str) -> bool:
    """Returns whether there is no store at `path`, or an incomplete one.

    A store of an unknown version is not overwritten: `open_store` explains what to do about it.
    """
    attributes = read_attributes(path)
    if attributes is None:
        return True
    return attributes["format_version"] in READABLE_VERSIONS and not attributes["complete"]


def find_damage(store: Store) -> Iterator[str]:
    """Reads each image of a store and yields a description of each that is damaged or missing.

    Displays a progress bar.
    """
    num_slots = store.slots_per_shard
    image = np.empty((1, *store.image_shape), np.uint8)
    for shard in tqdm(range(len(store.shard_bytes)), desc=store.path, unit=" shards"):
        first, end = np.searchsorted(store.rows, (shard * num_slots, (shard + 1) * num_slots))
        store.keep_shards(np.arange(first, min(end + num_slots, store.num_examples)))
        for row in store.rows[first:end]:
            try:
                store.shards.read(np.array([row]), image)
            except (CorruptShardError, OSError) as error:
                yield str(error)


def _check_shard_files(path: str, shard_bytes: Sequence[int]) -> list[int]:
    """Raises UserError if a shard is missing or truncated. Returns their times on local disks."""
    keys = {f"image/{key.decode()}" for key in (open_kvstore(path) / "image/").list().result()}
    times = []
    for shard, expected in enumerate(shard_bytes):
        key = shard_key(shard)
        if key not in keys:
            raise damaged(path, f"shard {key} is missing")
        if is_url(path):
            continue
        found = os.stat(f"{path}/{key}")
        if found.st_size != expected:
            raise damaged(path, f"shard {key} has {found.st_size} bytes instead of {expected}")
        times.append(found.st_mtime_ns)
    return times


def damaged(path: str, what: str) -> UserError:
    """Returns the error for a store that differs from what was prepared."""
    return UserError(f"the store at {path} is damaged: {what}; delete it and prepare it again")


def _unreadable(path: str, error: Exception) -> UserError:
    return UserError(
        f"cannot read the store at {path} ({one_line(error)}); if it is damaged, delete it and "
        "prepare it again"
    )


# Where stores are


def store_paths(config: Mapping[str, Any]) -> dict[str, str]:
    """Returns the paths of a config's stores, {"train": …, "eval": …}.

    Raises UserError if `config.storage` or `config.stored` has an unknown value.
    """
    for field_name, values in (("storage", DECODERS), ("stored", STORED)):
        if config[field_name] not in values:
            raise UserError(f"{field_name}={config[field_name]!r}; it can be {', '.join(values)}")
    return {
        use: store_path(config, config[f"{use}_split"], stored_for(config, use))
        for use in ("train", "eval")
    }


def stored_for(config: Mapping[str, Any], use: str) -> str:
    """Returns how the images of a store are kept: whole ones are for training only."""
    stored: str = config["stored"] if use == "train" else "square"
    return stored


def store_path(config: Mapping[str, Any], split: str, stored: str = "square") -> str:
    """Returns `<data_dir>/<dataset>_<image_size>/<split>`, or `…_<image_size>_jpeg/<split>`.

    The folder of whole photographs ends in `_whole`, and that of squares of another preprocessing
    than the paper's in its name.

    Characters that do not suit file names, such as those of `train[:90%]`, are replaced by "-".
    Eight hex digits of a hash of the name follow, so that different names never share a store. A
    folder is named by its last part and the hash of its absolute path.
    """
    dataset = config["dataset"]
    if dataset.startswith(FOLDER_PREFIX):
        folder = folder_path(dataset)
        name = _file_name(f"folder-{folder.name}", unique=str(folder))
    else:
        name = _file_name(dataset)
    usual = {"preprocess": "2012", "storage": "raw"}
    suffix = "".join(f"_{config[key]}" for key in usual if config[key] != usual[key])
    suffix += "_whole" if stored == "whole" else ""
    parent = f"{expand_dir(config['data_dir'])}/{name}_{config['image_size']}{suffix}"
    return f"{parent}/{_file_name(split)}"


def _file_name(text: str, unique: str = "") -> str:
    safe = re.sub(r"[^\w.+-]+", "-", text).strip("-")
    if safe == text and not unique:
        return text
    return f"{safe}-{hashlib.sha256(os.fsencode(unique or text)).hexdigest()[:8]}"


def expand_dir(data_dir: str) -> str:
    """Returns an absolute local path with `~` expanded, or a URL without its final slash.

    Raises UserError if it is not UTF-8, as TensorStore requires.
    """
    if is_url(data_dir):
        return data_dir.rstrip("/")
    path = os.path.abspath(os.path.expanduser(data_dir))
    if printable(path) != path:
        raise UserError(f"the name of {printable(path)} is not UTF-8; choose another data_dir")
    return path


# The files of a store besides its shards


def open_kvstore(path: str) -> ts.KvStore:
    """Opens the key-value store rooted at a local path or a URL."""
    local = {"driver": "file", "path": f"{path.rstrip('/')}/"}
    return ts.KvStore.open(f"{path.rstrip('/')}/" if is_url(path) else local).result()


def read_attributes(path: str) -> dict[str, Any] | None:
    """Returns the group attributes of the store at `path`, or None if there is no store.

    Raises UserError if they cannot be read.
    """
    try:
        found = open_kvstore(path).read("zarr.json").result()
        if found.state == "missing":
            return None
        attributes: dict[str, Any] = json.loads(found.value)["attributes"]
        return {"format_version": None, "complete": False} | attributes
    except (ValueError, KeyError, TypeError) as error:
        raise _unreadable(path, error) from error


def write_attributes(root: ts.KvStore, attributes: dict[str, Any]) -> None:
    """Writes the attributes of the store's zarr group."""
    group = {"zarr_format": 3, "node_type": "group", "attributes": attributes}
    root.write("zarr.json", json.dumps(group, indent=1).encode()).result()


def read_files(path: str) -> list[File]:
    """Returns the files of a folder that the store at `path` was prepared from."""
    found = open_kvstore(path).read(FILES_KEY).result()
    try:
        return [File(*row) for row in json.loads(found.value)]
    except (ValueError, TypeError) as error:  # ValueError: also if it is missing
        raise _unreadable(path, error) from error


def write_files(root: ts.KvStore, files: Iterable[File]) -> None:
    """Writes what `read_files` returns, a line for each file."""
    lines = ",\n".join(map(json.dumps, files))
    root.write(FILES_KEY, f"[\n{lines}\n]\n".encode()).result()


def identity_of(files: Iterable[File]) -> str:
    """Returns the identity of a folder of images; see `Store`."""
    rows = [(file.name, file.crc32c) for file in files]
    digest = hashlib.sha256(json.dumps(rows).encode()).hexdigest()[:16]
    return f"folder of {len(rows)} files, sha256 {digest}"


def read_array(root: ts.KvStore, name: str) -> np.ndarray:
    """Returns a whole array. Raises ValueError if it is missing or damaged."""
    spec = {
        "driver": "zarr3",
        "kvstore": (root / f"{name}/").spec().to_json(),
        "fill_missing_data_reads": False,  # by default a missing file reads as zeros
    }
    return ts.open(spec, open=True).result().read().result()


def write_array(root: ts.KvStore, name: str, values: np.ndarray) -> None:
    """Writes an array as one chunk with a checksum. Overwrites an array of the same shape."""
    spec = {
        "driver": "zarr3",
        "kvstore": (root / f"{name}/").spec().to_json(),
        "store_data_equal_to_fill_value": True,  # by default an array of zeros gets no file
        "metadata": {
            "shape": values.shape,
            "data_type": values.dtype.name,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": values.shape}},
            "codecs": INDEX_CODECS,
        },
    }
    ts.open(spec, create=True, open=True).result().write(values).result()


def write_image_metadata(
    root: ts.KvStore, shape: tuple[int, int, int], num_rows: int, storage: str
) -> None:
    """Describes the shards as a zarr array, which zarr and TensorStore can open if it is raw.

    The codec "jpeg" is our own.
    """
    jpeg = {"name": "jpeg", "configuration": {"quality": JPEG_QUALITY}}
    sharding = {
        "chunk_shape": [1, *shape],
        "codecs": INDEX_CODECS if storage == "raw" else [jpeg, INDEX_CODECS[1]],
        "index_codecs": INDEX_CODECS,
        "index_location": "end",
    }
    grid = {"chunk_shape": [slots_per_shard(shape), *shape]}
    array = {
        "zarr_format": 3,
        "node_type": "array",
        "shape": [num_rows, *shape],
        "data_type": "uint8",
        "fill_value": 0,
        "chunk_grid": {"name": "regular", "configuration": grid},
        "chunk_key_encoding": {"name": "default"},
        "codecs": [{"name": "sharding_indexed", "configuration": sharding}],
    }
    root.write("image/zarr.json", json.dumps(array, indent=1).encode()).result()
