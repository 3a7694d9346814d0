"""Shard files: many images per file, each with its own checksum, read straight into a batch.

A shard has the layout of zarr v3's `sharding_indexed` codec, so that zarr and TensorStore can read
a raw store without this module. It consists of

  - the chunks, one after another: an image's raw pixels or its JPEG, then the CRC-32C of these;
  - the index: a uint64 offset and length for each slot, all ones for a slot without an image;
  - the CRC-32C of the index.

One file per image would make copying and listing a data set slow. One checksum per shard would
have to be computed over 200 MB to verify one random image, hence one checksum per image: a
flipped bit raises an error when the image is read, and is never trained on.

On local disks each image is one `preadv` into its place in the batch, without an intermediate
copy. TensorStore, which reads the same files from buckets, allocates and copies each image twice
and reaches 40 % of that rate (docs/data.md).
"""

import contextlib
import functools
import math
import os
import resource
import uuid
import weakref
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np
import simplejpeg
import tensorstore as ts
from crc32c import crc32c
from jaxtyping import Int, UInt8

from alexnet_jax.utils.errors import one_line

MAX_SLOTS = 1024
MAX_BYTES = 256 * 2**20
CHECKSUM_BYTES = 4
JPEG_QUALITY = 95  # ImageNet then takes about 40 GB instead of 262 GB
INDEX_ENTRY = np.dtype([("offset", "<u8"), ("length", "<u8")])
ABSENT = 2**64 - 1
INDEX_CODECS = [{"name": "bytes", "configuration": {"endian": "little"}}, {"name": "crc32c"}]
INDEX_CACHE_BYTES = 64 * 2**20  # for remote shards; all indices of ImageNet take 20 MB
ALIGNMENT = 64  # bytes; on CPU, JAX uses arrays with this alignment without copying them

Pieces = Sequence[memoryview | bytes]  # the content of a file, in order
# In quotes, because the class of older versions of TensorStore takes no parameter at run time.
Request: TypeAlias = "ts.Future[ts.KvStore.ReadResult]"


class CorruptShardError(Exception):
    """A shard, or an image in it, is missing or differs from what was written."""


class ReplacedShardError(Exception):
    """A shard was written again after its store was opened."""


def slots_per_shard(image_shape: Sequence[int]) -> int:
    """Returns the number of images per shard: a power of two, at most 1,024 and 256 MiB."""
    fitting = max(1, min(MAX_SLOTS, MAX_BYTES // math.prod(image_shape)))
    return 1 << (fitting.bit_length() - 1)


def shard_key(shard: int) -> str:
    """Returns a shard's path in its store: that of a chunk of the zarr array `image`."""
    return f"image/c/{shard}/0/0/0"


def checksum(data: np.ndarray | memoryview | bytes) -> bytes:
    """Returns the CRC-32C as stored, in little-endian order."""
    return crc32c(data).to_bytes(CHECKSUM_BYTES, "little")


def pack_shard(chunks: Sequence[np.ndarray | bytes | None]) -> Pieces:
    """Returns the content of a shard as pieces, which avoids a copy of the images.

    Args:
      chunks: one per slot; None leaves the slot without an image.
    """
    index = np.full(len(chunks), ABSENT, np.dtype("<u8")).repeat(2).view(INDEX_ENTRY)
    pieces: list[memoryview | bytes] = []
    end = 0
    for slot, chunk in enumerate(chunks):
        if chunk is not None:
            data = memoryview(chunk).cast("B")
            index[slot] = end, len(data) + CHECKSUM_BYTES
            pieces += data, checksum(data)
            end += len(data) + CHECKSUM_BYTES
    return [*pieces, index.tobytes(), checksum(index.tobytes())]


def write_local(path: str, pieces: Pieces, scratch: str) -> None:
    """Writes a file so that it appears under its name only when it is complete and on disk.

    Args:
      path: of the file.
      pieces: its content.
      scratch: a folder on the same file system, which keeps what a killed process leaves behind
        out of the zarr array.
    """
    for folder in (scratch, os.path.dirname(path)):
        os.makedirs(folder, exist_ok=True)
    unfinished = f"{scratch}/{uuid.uuid4().hex}.unfinished"
    try:
        with open(unfinished, "wb") as file:
            file.writelines(pieces)
            file.flush()
            os.fsync(file.fileno())  # the record that follows must not survive a crash alone
        os.replace(unfinished, path)
    except OSError:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(unfinished)  # a full disk needs the space
        raise


def encode_jpeg(image: UInt8[np.ndarray, "S S 3"]) -> bytes:
    """Returns the JPEG that a shard of a store with storage="jpeg" contains."""
    jpeg: bytes = simplejpeg.encode_jpeg(image, JPEG_QUALITY, colorsubsampling="420")
    return jpeg


def _decode_raw(data: UInt8[np.ndarray, " bytes"], image: UInt8[np.ndarray, "S S 3"]) -> None:
    image.reshape(-1)[:] = data


def _decode_jpeg(data: UInt8[np.ndarray, " bytes"], image: UInt8[np.ndarray, "S S 3"]) -> None:
    decoded = simplejpeg.decode_jpeg(data, buffer=image)
    if decoded.shape != image.shape:
        raise ValueError(f"the JPEG has the shape {decoded.shape} instead of {image.shape}")


DECODERS: dict[str, Callable[[np.ndarray, np.ndarray], None]] = {
    "raw": _decode_raw,
    "jpeg": _decode_jpeg,
}


@dataclass
class _OpenShard:
    """The file descriptor and the index of a shard."""

    file: int
    index: np.ndarray

    def __del__(self) -> None:
        os.close(self.file)


class LocalShards:
    """Reads the shards of a store on a local disk.

    Args:
      path: of the store.
      storage: "raw" or "jpeg".
      num_slots: images per shard.
      times: when each shard was last modified. Shards are opened when they are first read. One that
        was replaced until then is of another data set than the labels.
    """

    def __init__(self, path: str, storage: str, num_slots: int, times: Sequence[int] = ()):
        self._path, self._storage, self._num_slots = path, storage, num_slots
        self._times = times
        # Shards stay open. Half of the permitted descriptors remain for the rest of the program.
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._open = functools.lru_cache(maxsize=max(16, descriptors // 2))(self._open_shard)

    def read(self, rows: Int[np.ndarray, " B"], images: UInt8[np.ndarray, "B S S 3"]) -> None:
        """Reads the images at `rows` into `images`.

        Raises CorruptShardError, ReplacedShardError or OSError.
        """
        if len(rows) > 1 and not self._is_cached(int(rows[0])):
            # Disks are faster when they have many requests to choose from. The first image stands
            # for all, since this costs 4 µs for each, in vain if they are in the page cache.
            for row in rows.tolist():
                opened, offset, length = self._find(row)
                os.posix_fadvise(opened.file, offset, length, os.POSIX_FADV_WILLNEED)
        for row, image in zip(rows.tolist(), images, strict=True):
            self._read_one(row, image)

    def _is_cached(self, row: int) -> bool:
        """Returns whether an image is in the page cache. Not every file system can tell."""
        opened, offset, _ = self._find(row)
        try:
            return os.preadv(opened.file, [bytearray(1)], offset, os.RWF_NOWAIT) == 1
        except OSError:  # a damaged disk is reported when the image is read
            return False

    def _find(self, row: int) -> tuple[_OpenShard, int, int]:
        """Returns the shard of an image, and the offset and length of the image there."""
        shard, slot = divmod(row, self._num_slots)
        opened = self._open(shard)
        offset, length = opened.index[slot].item()
        if offset == ABSENT:
            raise CorruptShardError(f"image {slot} of shard {shard_key(shard)} is missing")
        return opened, offset, length

    def _read_one(self, row: int, image: UInt8[np.ndarray, "S S 3"]) -> None:
        shard, slot = divmod(row, self._num_slots)
        opened, offset, length = self._find(row)
        in_place = self._storage == "raw" and length == image.nbytes + CHECKSUM_BYTES
        data = image.reshape(-1) if in_place else np.empty(length - CHECKSUM_BYTES, np.uint8)
        stored_checksum = bytearray(CHECKSUM_BYTES)
        # One system call fills both. It releases Python's lock, so that threads read in parallel.
        if os.preadv(opened.file, [data, stored_checksum], offset) != length:
            raise CorruptShardError(f"shard {shard_key(shard)} ends before its image {slot}")
        _verify(data, stored_checksum, shard, slot)
        if not in_place:
            _decode(self._storage, data, image, shard, slot)

    def _open_shard(self, shard: int) -> _OpenShard:
        try:
            file = os.open(f"{self._path}/{shard_key(shard)}", os.O_RDONLY | os.O_CLOEXEC)
        except FileNotFoundError as error:
            raise CorruptShardError(f"shard {shard_key(shard)} is missing") from error
        opened = _OpenShard(file, np.zeros(0, INDEX_ENTRY))
        index_bytes = self._num_slots * INDEX_ENTRY.itemsize
        if self._times and os.fstat(file).st_mtime_ns != self._times[shard]:
            raise ReplacedShardError(f"shard {shard_key(shard)} was replaced")
        start = os.fstat(file).st_size - index_bytes - CHECKSUM_BYTES
        tail = os.pread(file, index_bytes + CHECKSUM_BYTES, start) if start >= 0 else b""
        if len(tail) < index_bytes or checksum(tail[:index_bytes]) != tail[index_bytes:]:
            raise CorruptShardError(f"the index of shard {shard_key(shard)} is damaged")
        opened.index = np.frombuffer(tail, INDEX_ENTRY, self._num_slots)
        return opened


class RemoteShards:
    """Reads the shards of a store in any key-value store of TensorStore, such as a bucket.

    Args:
      root: the key-value store, rooted at the store.
      storage: "raw" or "jpeg".
      num_slots: images per shard.
    """

    def __init__(self, root: ts.KvStore, storage: str, num_slots: int):
        self._root, self._storage, self._num_slots = root, storage, num_slots
        self._context = ts.Context({"cache_pool": {"total_bytes_limit": INDEX_CACHE_BYTES}})
        self._open = functools.cache(self._open_shard)
        self._kept: dict[int, list[Request]] = {}

    def keep(self, shards: Collection[int]) -> None:
        """Fetches shards, each with one request, and keeps them until a call leaves them out.

        Returns before they are there.
        """
        kept = self._kept
        self._kept = {shard: kept.get(shard) or self._fetch(shard) for shard in shards}

    def read(self, rows: Int[np.ndarray, " B"], images: UInt8[np.ndarray, "B S S 3"]) -> None:
        """Reads the images at `rows` into `images`. Raises CorruptShardError."""
        slots, kept = [divmod(row, self._num_slots) for row in rows.tolist()], self._kept
        # All requests are sent before the first answer is awaited: latency is paid once a batch.
        # A batch makes one request of images that follow each other in a shard, as in evaluation.
        with ts.Batch() as batch:
            requests = [
                kept[shard][slot] if shard in kept else self._request(shard, slot, batch)
                for shard, slot in slots
            ]
        for (shard, slot), request, image in zip(slots, requests, images, strict=True):
            try:
                answer = request.result()
            except ValueError as error:
                raise CorruptShardError(f"shard {shard_key(shard)}: {one_line(error)}") from error
            if answer.state != "value":
                raise CorruptShardError(f"image {slot} of shard {shard_key(shard)} is missing")
            chunk = np.frombuffer(answer.value, np.uint8)
            data, stored_checksum = chunk[:-CHECKSUM_BYTES], chunk[-CHECKSUM_BYTES:].tobytes()
            _verify(data, stored_checksum, shard, slot)
            _decode(self._storage, data, image, shard, slot)

    def _fetch(self, shard: int) -> list[Request]:
        with ts.Batch() as batch:  # of all slots makes one request, which includes the index
            return [self._request(shard, slot, batch) for slot in range(self._num_slots)]

    def _request(self, shard: int, slot: int, batch: ts.Batch) -> Request:
        # By default TensorStore asks whether its copy of the index is still the newest.
        return self._open(shard).read(slot.to_bytes(4, "big"), batch=batch, staleness_bound=0)

    def _open_shard(self, shard: int) -> ts.KvStore:
        spec = {
            "driver": "zarr3_sharding_indexed",
            "base": (self._root / shard_key(shard)).spec().to_json(),
            "grid_shape": [self._num_slots],
            "index_codecs": INDEX_CODECS,
        }
        return ts.KvStore.open(spec, context=self._context).result()


Shards = LocalShards | RemoteShards


def _verify(data: np.ndarray, stored_checksum: bytes | bytearray, shard: int, slot: int) -> None:
    if checksum(data) != stored_checksum:
        name = f"image {slot} of shard {shard_key(shard)}"
        raise CorruptShardError(f"{name} does not match its checksum")


def _decode(storage: str, data: np.ndarray, image: np.ndarray, shard: int, slot: int) -> None:
    try:
        DECODERS[storage](data, image)
    except ValueError as error:
        name = f"image {slot} of shard {shard_key(shard)}"
        raise CorruptShardError(f"{name}: {one_line(error)}") from error


class BufferPool:
    """Memory for arrays that is reused once no view of the previous array is left.

    The kernel clears fresh memory page by page on first use, which takes longer than reading a
    batch into it.
    """

    def __init__(self) -> None:
        self._free: dict[int, list[np.ndarray]] = {}

    def take(self, shape: tuple[int, ...]) -> np.ndarray:
        """Returns an aligned, uninitialized uint8 array of this shape."""
        num_bytes = int(np.prod(shape))
        free = self._free.setdefault(num_bytes, [])
        try:
            buffer = free.pop()  # atomic, unlike a check followed by a pop
        except IndexError:
            allocated = np.empty(num_bytes + ALIGNMENT, np.uint8)
            buffer = allocated[-allocated.ctypes.data % ALIGNMENT :][:num_bytes]
        owner = _Owner(buffer)
        weakref.finalize(owner, free.append, buffer).atexit = False
        return np.asarray(owner).reshape(shape)


class _Owner:
    """What NumPy considers the owner of an array's memory: it lives as long as any view of it.

    JAX also keeps it alive while an array that shares its memory exists.
    """

    def __init__(self, buffer: np.ndarray):
        self.__array_interface__ = buffer.__array_interface__
