"""Shard files: many images in one file, each with a checksum, read straight into a batch.

A shard is zarr's `sharding_indexed` layout (zarr v3): one chunk after another, then an index of
uint64 offset and length for every place in the shard (both all ones where there is no image), then
the index's CRC-32C. A chunk is an image's raw pixels, or its JPEG bytes, and their CRC-32C.

On local disks each image is one `preadv` into the batch that it belongs to. TensorStore, which
reads the same files everywhere else, allocates and copies every image twice, and so is several
times slower (docs/data.md).
"""

import contextlib
import functools
import os
import resource
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import simplejpeg
import tensorstore as ts
from crc32c import crc32c
from jaxtyping import Int, UInt8

from alexnet_jax.utils.errors import one_line

MAX_ROWS = 1024
MAX_BYTES = 256 * 2**20
CHECKSUM_BYTES = 4
JPEG_QUALITY = 95  # ImageNet then takes about 40 GB
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("length", "<u8")])
ABSENT = 2**64 - 1
INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
INDEX_CACHE_BYTES = 64 * 2**20  # of remote shards; ImageNet's indices take 20 MB

Unpack = Callable[[np.ndarray, np.ndarray], None]
Pieces = Sequence[memoryview | bytes]  # of a file, one after the other


class Damage(Exception):
    """A shard or an image of it is missing or not what was written; the text tells which."""


def rows_per_shard(size: int) -> int:
    """Returns how many images of `size` pixels a side one shard holds: a power of two."""
    fitting = max(1, min(MAX_ROWS, MAX_BYTES // (size * size * 3)))
    return 1 << (fitting.bit_length() - 1)


def shard_key(shard: int) -> str:
    """Returns the name of a shard below the store: that of a chunk of the zarr array `image`."""
    return f"image/c/{shard}/0/0/0"


def checksum(data: np.ndarray | memoryview | bytes) -> bytes:
    """Returns the CRC-32C as it is stored."""
    return crc32c(data).to_bytes(CHECKSUM_BYTES, "little")


def pack_shard(chunks: Sequence[np.ndarray | bytes | None]) -> Pieces:
    """Returns the content of a shard of these chunks, in pieces, so that no image is copied.

    None leaves a place without an image.
    """
    index = np.full(len(chunks), ABSENT, np.dtype("<u8")).repeat(2).view(INDEX_ENTRY)
    pieces: list[memoryview | bytes] = []
    end = 0
    for place, chunk in enumerate(chunks):
        if chunk is not None:
            data = memoryview(chunk).cast("B")
            index[place] = end, len(data) + CHECKSUM_BYTES
            pieces += data, checksum(data)
            end += len(data) + CHECKSUM_BYTES
    return [*pieces, index.tobytes(), checksum(index.tobytes())]


def write_local(path: str, pieces: Pieces, scratch: str) -> None:
    """Writes a file that is there whole or not at all.

    Args:
      scratch: a folder on the same file system, for what a kill may leave behind.
    """
    for folder in (scratch, os.path.dirname(path)):
        os.makedirs(folder, exist_ok=True)
    unfinished = f"{scratch}/{uuid.uuid4().hex}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)  # a full disk needs the room
        raise


def unpack_raw(data: UInt8[np.ndarray, " S*S*3"], image: UInt8[np.ndarray, "S S 3"]) -> None:
    """Copies the pixels of a chunk into an image."""
    image.reshape(-1)[:] = data


def pack_jpeg(image: UInt8[np.ndarray, "S S 3"]) -> bytes:
    """Returns the JPEG that a shard holds under storage=jpeg."""
    jpeg: bytes = simplejpeg.encode_jpeg(image, JPEG_QUALITY, colorsubsampling="420")
    return jpeg


def unpack_jpeg(data: UInt8[np.ndarray, " bytes"], image: UInt8[np.ndarray, "S S 3"]) -> None:
    """Decodes the JPEG bytes of a chunk into an image."""
    decoded = simplejpeg.decode_jpeg(data, buffer=image)
    if decoded.shape != image.shape:
        raise ValueError(f"a JPEG of {decoded.shape} pixels and not of {image.shape}")


@dataclass
class _OpenShard:
    """A shard file's descriptor and index."""

    file: int
    index: np.ndarray

    def __del__(self) -> None:
        os.close(self.file)


class LocalShards:
    """The shards of a store on a local disk.

    Args:
      path: of the store.
      rows: places in a shard.
    """

    def __init__(self, path: str, rows: int):
        self._path, self._rows = path, rows
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._open = functools.lru_cache(maxsize=max(16, descriptors // 2))(self._open_shard)

    def read(
        self, rows: Int[np.ndarray, " B"], images: UInt8[np.ndarray, "B S S 3"], unpack: Unpack
    ) -> None:
        """Reads the images at `rows` into `images`. Raises Damage."""
        for row, image in zip(rows.tolist(), images, strict=True):
            self._read_one(row, image, unpack)

    def _read_one(self, row: int, image: np.ndarray, unpack: Unpack) -> None:
        shard, place = divmod(row, self._rows)
        opened = self._open(shard)
        offset, length = opened.index[place].item()
        if offset == ABSENT:
            raise Damage(f"image {place} of shard {shard_key(shard)} is missing")
        raw = unpack is unpack_raw and length == image.nbytes + CHECKSUM_BYTES
        data = image.reshape(-1) if raw else np.empty(length - CHECKSUM_BYTES, np.uint8)
        stored = bytearray(CHECKSUM_BYTES)
        if os.preadv(opened.file, [data, stored], offset) != length:
            raise Damage(f"shard {shard_key(shard)} ends before its image {place}")
        _check(data, stored, shard, place)
        if not raw:
            _unpack(unpack, data, image, shard, place)

    def _open_shard(self, shard: int) -> _OpenShard:
        try:
            file = os.open(f"{self._path}/{shard_key(shard)}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise Damage(f"shard {shard_key(shard)} is missing") from error
        opened = _OpenShard(file, np.zeros(0, INDEX_ENTRY))
        index_bytes = self._rows * INDEX_ENTRY.itemsize
        start = os.fstat(file).st_size - index_bytes - CHECKSUM_BYTES
        tail = os.pread(file, index_bytes + CHECKSUM_BYTES, start) if start >= 0 else b""
        if len(tail) < index_bytes or checksum(tail[:index_bytes]) != tail[index_bytes:]:
            raise Damage(f"the index of shard {shard_key(shard)} is damaged")
        opened.index = np.frombuffer(tail, INDEX_ENTRY, self._rows)
        return opened


class RemoteShards:
    """The shards of a store below any TensorStore key-value store, such as a bucket."""

    def __init__(self, root: ts.KvStore, rows: int):
        self._root, self._rows = root, rows
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": INDEX_CACHE_BYTES}})
        self._open = functools.cache(self._open_shard)

    def read(
        self, rows: Int[np.ndarray, " B"], images: UInt8[np.ndarray, "B S S 3"], unpack: Unpack
    ) -> None:
        """Reads the images at `rows` into `images`, all at once. Raises Damage."""
        places = [divmod(row, self._rows) for row in rows.tolist()]
        asked = [self._open(shard).read(_place_key(place)) for shard, place in places]
        for (shard, place), future, image in zip(places, asked, images, strict=True):
            try:
                found = future.result()
            except ValueError as error:
                raise Damage(f"shard {shard_key(shard)}: {one_line(error)}") from error
            if found.state != "value":
                raise Damage(f"image {place} of shard {shard_key(shard)} is missing")
            chunk = np.frombuffer(found.value, np.uint8)
            data, stored = chunk[:-CHECKSUM_BYTES], chunk[-CHECKSUM_BYTES:].tobytes()
            _check(data, stored, shard, place)
            _unpack(unpack, data, image, shard, place)

    def _open_shard(self, shard: int) -> ts.KvStore:
        spec = {
            "driver": "zarr3_sharding_indexed",
            "base": (self._root / shard_key(shard)).spec().to_json(),
            "grid_shape": [self._rows],
            "index_codecs": INDEX_CODECS,
        }
        return ts.KvStore.open(spec, context=self._context).result()


Shards = LocalShards | RemoteShards


def _place_key(place: int) -> bytes:
    return place.to_bytes(4, "big")


def _check(data: np.ndarray, stored: bytes | bytearray, shard: int, place: int) -> None:
    if checksum(data) != stored:
        raise Damage(f"image {place} of shard {shard_key(shard)} does not have its checksum")


def _unpack(unpack: Unpack, data: np.ndarray, image: np.ndarray, shard: int, place: int) -> None:
    try:
        unpack(data, image)
    except ValueError as error:
        raise Damage(f"image {place} of shard {shard_key(shard)}: {one_line(error)}") from error
