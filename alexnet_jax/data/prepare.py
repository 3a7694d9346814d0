"""Prepares the stores of a config (see `store`), resumes their preparation, and opens them.

Work proceeds shard by shard. Row n of a store is example n of its source, so a shard depends only
on its own examples. Any number of hosts may each write some of the shards, be killed and resume,
and the files are identical, byte for byte. Each finished shard leaves a record in `parts/`. The
process that finds all records complete adds them up and marks the store as complete.
"""

import contextlib
import fcntl
import functools
import io
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Collection, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import cv2
import numpy as np
import simplejpeg
import tensorstore as ts
from crc32c import crc32c
from jaxtyping import Float32, Float64, Int64, UInt8
from tqdm import tqdm

from alexnet_jax.config import FOLDER_PREFIX, folder_path
from alexnet_jax.data.decode import decode, reason
from alexnet_jax.data.preprocess import PREPROCESSING
from alexnet_jax.data.shards import (
    Pieces,
    encode_jpeg,
    pack_shard,
    shard_key,
    slots_per_shard,
    write_local,
)
from alexnet_jax.data.sources import (
    Example,
    Source,
    describe_skipped,
    find_changes,
    open_source,
)
from alexnet_jax.data.store import (
    CORRUPT_LABEL,
    FORMAT_VERSION,
    RENEW_COMMAND,
    File,
    Store,
    central_square,
    identity_of,
    image_shape,
    needs_preparation,
    open_kvstore,
    open_store,
    read_attributes,
    read_files,
    store_paths,
    stored_for,
    to_canvas,
    write_array,
    write_attributes,
    write_files,
    write_image_metadata,
)
from alexnet_jax.utils import distributed
from alexnet_jax.utils.buckets import is_url
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import explain_write_errors

CORRUPT_KEY = "corrupt.log"
RECORD_KEY, SUM_KEY = "parts/{}.json", "parts/{}.npy"
RECORDS = ts.KvStore.KeyRange("parts/", "parts0")  # keys that begin with parts/
# Even if they are more than max_corrupt allows: all of a small data set are named at once.
MAX_CORRUPT_NAMED = 1000
DECODES_AHEAD = 256  # images; keeps the decoders busy while a shard is written
ALL = (1, 1)  # the only part of one


class TooManyCorrupt(UserError):
    """More images are corrupt than max_corrupt allows."""


def open_or_prepare(
    config: Mapping[str, Any], uses: Sequence[str] = ("train", "eval")
) -> dict[str, Store]:
    """Opens the stores of a config, {"train": …, "eval": …}; prepares those that are not complete.

    Reads the fields dataset, data_dir, train_split, eval_split, image_size, preprocess, stored,
    storage and max_corrupt. TensorFlow is imported only if a store has to be prepared from a tfds
    data set.

    In a multi-host run, each host prepares its part of a store in a bucket. Local folders may be
    shared by hosts or not, which no host can tell. Therefore the first host to arrive at a folder
    prepares the whole store, and the others wait for it.

    Args:
      uses: which stores are needed.

    Raises UserError as `open_store` and `prepare_splits` do, and if the images of a folder are not
    those that its store was prepared from.
    """
    paths = {use: path for use, path in store_paths(config).items() if use in uses}
    if any(needs_preparation(path) for path in paths.values()):
        part = distributed.part() if is_url(config["data_dir"]) else ALL
        prepare_splits(config, paths, part)
    distributed.wait_for_all("stores are prepared")
    stores = {use: open_store(path) for use, path in paths.items()}
    for use, store in stores.items():
        # A process killed just after it completed a store leaves the records behind. Without
        # write access they may stay.
        with contextlib.suppress(ValueError):
            _remove_records(open_kvstore(store.path))
        if changes := find_outdated(config, use, store):
            raise UserError(
                f"the store at {store.path} is outdated: {changes}; run {RENEW_COMMAND} with the "
                "--config arguments of this run to prepare it again"
            )
    return stores


def find_outdated(config: Mapping[str, Any], use: str, store: Store) -> str:
    """Returns why the store of a folder does not have its present images, "" if it has them."""
    if not config["dataset"].startswith(FOLDER_PREFIX):
        return ""  # a version of a tfds data set does not change
    root, split = folder_path(config["dataset"]), config[f"{use}_split"]
    if not (root / split).is_dir():
        return ""  # the store does not need it
    if store.format_version < FORMAT_VERSION:
        return "an earlier version prepared it, which ignored EXIF orientations"
    recorded = read_files(store.path)
    changes, current = find_changes(root, split, config["train_split"], store, recorded)
    if changes:
        return f"images in {root / split} changed since then ({changes})"
    if current != recorded:
        with contextlib.suppress(ValueError):  # without write access they are read at each start
            write_files(open_kvstore(store.path), current)
    return ""


def prepare_splits(
    config: Mapping[str, Any],
    paths: Mapping[str, str],
    part: tuple[int, int] = ALL,
    outdated: Collection[str] = (),
) -> None:
    """Prepares the stores of a config that are not complete.

    Args:
      config: see `open_or_prepare`.
      paths: of the stores, {"train": …, "eval": …}.
      part: (i, n) writes only the i-th of n parts of the shards, counted from 1.
      outdated: paths of stores to prepare again, although they are complete.

    Raises:
      UserError: the data set, a split or its files are missing or cannot be downloaded; more than
        the fraction max_corrupt of the images is corrupt; a label is out of range; the store cannot
        be written.
    """
    splits = {path: config[f"{use}_split"] for use, path in paths.items()}
    parent = os.path.dirname(next(iter(splits)))

    def lock(during_all_work: bool) -> contextlib.AbstractContextManager[None]:
        """Processes that share the work lock only what each of them does: the start and the end.
        A single process locks everything, so that a second one waits and finds complete stores.
        """
        return _lock(parent) if during_all_work == (part == ALL) else contextlib.nullcontext()

    corrupt = []
    with explain_write_errors(parent, "another data_dir"), lock(during_all_work=True):
        with lock(during_all_work=False):
            # Both sources are opened before any work: a typo in eval_split must not cost hours.
            sources = {
                path: open_source(
                    config["dataset"], config["data_dir"], split, config["train_split"]
                )
                for path, split in splits.items()
                if path in outdated or needs_preparation(path)
            }
            stored = {path: stored_for(config, use) for use, path in paths.items()}
            jobs = [
                _Job(
                    source,
                    path,
                    config["image_size"],
                    config["storage"],
                    stored[path],
                    config["max_corrupt"],
                    part,
                    config["preprocess"],
                )
                for path, source in sources.items()
            ]
            for job in jobs:
                if job.source.skipped:
                    print(
                        f"{job.source.name}: skipped files that are not images: "
                        f"{describe_skipped(job.source.skipped)}",
                        file=sys.stderr,
                    )
                _begin(job)
        for job in jobs:
            try:
                with explain_write_errors(job.path, "another data_dir"):
                    _write_missing_shards(job)
                    with lock(during_all_work=False):
                        _complete(job)
            except TooManyCorrupt as error:
                corrupt.append(str(error))
    if corrupt:
        raise TooManyCorrupt(
            f"{' and '.join(corrupt)}; repair or remove them, or raise --config.max_corrupt"
        )


def renew(config: Mapping[str, Any]) -> None:
    """Prepares the stores of a folder again whose images changed. Other stores stay as they are.

    Raises UserError as `open_store` and `prepare_splits` do.
    """
    paths = store_paths(config)
    complete = {use: path for use, path in paths.items() if not needs_preparation(path)}
    outdated = [
        path
        for use, path in complete.items()
        if find_outdated(config, use, open_store(path, check_shards=False))
    ]
    prepare_splits(config, paths, outdated=outdated)


@contextlib.contextmanager
def _lock(folder: str) -> Iterator[None]:
    """Lets one process at a time prepare below a local folder; the others wait."""
    if is_url(folder):  # buckets have no locks; there, each host writes shards of its own
        yield
        return
    os.makedirs(folder, exist_ok=True)
    with open(f"{folder}/.lock", "w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"another process is preparing {folder}; waiting for it", file=sys.stderr)
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


# One store


def prepare_store(
    source: Source, path: str, image_size: int, storage: str = "raw", max_corrupt: float = 0.0
) -> None:
    """Prepares a single store, or resumes its preparation.

    Args:
      source: of the examples.
      path: of the store.
      image_size: pixels along a side of the stored images.
      storage: "raw" or "jpeg".
      max_corrupt: fraction of the source's images that may be corrupt.

    Raises UserError as `prepare_splits` does.
    """
    job = _Job(source, path, image_size, storage, "square", max_corrupt, ALL)
    _begin(job)
    _write_missing_shards(job)
    _complete(job)


@dataclass(frozen=True)
class _Job:
    """The preparation of one store, or of a part of it; see `prepare_store`, `prepare_splits`."""

    source: Source
    path: str
    image_size: int
    storage: str
    stored: str
    max_corrupt: float
    part: tuple[int, int]
    preprocess: str = "2012"

    @functools.cached_property
    def root(self) -> ts.KvStore:
        return open_kvstore(self.path)

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """Of a stored image."""
        return image_shape(self.image_size, self.stored)

    @property
    def num_shards(self) -> int:
        """Shards of the whole store."""
        return -(-self.source.num_examples // slots_per_shard(self.image_shape))

    def rows(self, shard: int) -> range:
        """Returns the rows of one shard; the last shard may have fewer than the others."""
        num_slots = slots_per_shard(self.image_shape)
        return range(shard * num_slots, min((shard + 1) * num_slots, self.source.num_examples))

    @property
    def origin(self) -> dict[str, Any]:
        """The attributes that tell what a store is made from, and in which format."""
        return {
            "format_version": FORMAT_VERSION,
            "source": self.source.name,
            "num_rows": self.source.num_examples,
            "image_size": self.image_size,
            "storage": self.storage,
            # Older stores of squares do not have it.
            **({"stored": self.stored} if self.stored != "square" else {}),
            "class_names": list(self.source.class_names),
        }


@dataclass
class _Record:
    """What is known of a finished shard.

    Attributes:
      labels: of its rows; CORRUPT_LABEL for images that cannot be decoded.
      corrupt: a line for each of these.
      outer_sum: see `_outer_sum`, summed over its images.
      num_bytes: of its file.
      files: of its rows, if the source is a folder.
      sizes: of its rows, if photographs are stored whole.
    """

    labels: list[int]
    corrupt: list[str]
    outer_sum: Float64[np.ndarray, "3 3"]
    num_bytes: int
    files: list[File] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)


def _begin(job: _Job) -> None:
    """Keeps an incomplete store of the same source and settings; else starts an empty one."""
    unfinished = job.origin | {"complete": False}
    attributes = read_attributes(job.path)
    if attributes == unfinished:
        return
    if attributes is not None and job.part != ALL:
        # Another host may be writing this store right now.
        raise UserError(
            f"the store at {job.path} was started from other data or by another version; "
            "delete it before several hosts prepare it"
        )
    job.root.delete_range(ts.KvStore.KeyRange()).result()
    write_attributes(job.root, unfinished)


def _write_missing_shards(job: _Job) -> None:
    """Writes the shards of this job's part that have no record yet.

    Threads decode the images, because the decoders release Python's lock. A shard is written while
    the images of the next one are decoded.
    """
    records = _read_records(job)
    number, count = job.part
    share = range(job.num_shards * (number - 1) // count, job.num_shards * number // count)
    missing = [
        shard
        for shard in share
        if shard not in records or _has_new_files(job, shard, records[shard])
    ]
    progress = tqdm(
        total=sum(len(job.rows(shard)) for shard in share),
        initial=sum(len(job.rows(shard)) for shard in share if shard not in missing),
        desc="/".join(job.path.split("/")[-2:]),
        unit=" images",
    )
    with progress, ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
        writing: Future[None] | None = None
        for run in _consecutive_runs(missing):  # a source is read from one row to another
            examples = job.source.read(job.rows(run[0]).start, job.rows(run[-1]).stop)
            decoded = _decode_in_order(job, examples, pool)
            for shard in run:
                image_sum, pieces = _assemble_shard(job, shard, decoded, records, progress)
                if writing:
                    writing.result()
                writing = pool.submit(_write_shard, job, shard, records[shard], image_sum, pieces)
        if writing:
            writing.result()


def _consecutive_runs(numbers: list[int]) -> Iterator[range]:
    """Groups ascending numbers: [1, 2, 3, 7, 8] gives range(1, 4) and range(7, 9)."""
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield range(run[0], run[-1] + 1)


@dataclass(frozen=True)
class Decoded:
    """A decoded example.

    Attributes:
      image: the central square; None if it is corrupt.
      chunk: what the shard contains of it.
      size: height and width of the whole photograph, or of the square.
      error: why it is corrupt.
      checksum: of the encoded image of a folder; None if it cannot be read.
    """

    image: UInt8[np.ndarray, "S S 3"] | None
    chunk: np.ndarray | bytes | None
    size: tuple[int, int]
    error: str = ""
    checksum: int | None = None


def _decode_in_order(
    job: _Job, examples: Iterator[Example], pool: ThreadPoolExecutor
) -> Iterator[tuple[Example, Decoded]]:
    """Decodes in the pool's threads, at most DECODES_AHEAD images ahead of the consumer."""
    pending: deque[tuple[Example, Future[Decoded]]] = deque()
    try:
        for example in examples:
            pending.append((example, pool.submit(_decode, job, example)))
            if len(pending) > DECODES_AHEAD:
                yield pending[0][0], pending.popleft()[1].result()
        while pending:
            yield pending[0][0], pending.popleft()[1].result()
    finally:
        for _, future in pending:
            future.cancel()


def _decode(job: _Job, example: Example) -> Decoded:
    checksum = None
    try:
        encoded = example.load()
        if job.source.files:
            checksum = crc32c(encoded)
        if job.stored == "whole":
            whole = decode(encoded, job.image_size)
            size, image = whole.shape[:2], to_canvas(whole)
        else:
            image = PREPROCESSING[job.preprocess].decode(encoded, job.image_size)
            size = image.shape[:2]
    except Exception as error:  # damaged bytes make the decoders raise almost any exception
        return Decoded(None, None, (job.image_size, job.image_size), reason(error), checksum)
    chunk: np.ndarray | bytes = image
    if job.storage == "jpeg":
        # The statistics describe the images that training reads, so they include the JPEG's loss.
        chunk = encode_jpeg(image)
        image = simplejpeg.decode_jpeg(chunk)
    return Decoded(central_square(image, size), chunk, size, "", checksum)


def _assemble_shard(
    job: _Job,
    shard: int,
    decoded: Iterator[tuple[Example, Decoded]],
    records: dict[int, _Record],
    progress: tqdm,
) -> tuple[Float32[np.ndarray, "S S 3"], Pieces]:
    """Takes the examples of one shard. Returns the sum of its images and the file's content.

    Adds the shard's record to `records` at once, so that its corrupt images count.
    """
    record = records[shard] = _Record([], [], np.zeros((3, 3)), 0)
    # float32 is exact here: it represents all integers up to 2**24, and MAX_SLOTS * 255 is 2**18.
    image_sum = np.zeros((job.image_size, job.image_size, 3), np.float32)
    chunks: list[np.ndarray | bytes | None] = []
    for row, (example, found) in zip(job.rows(shard), decoded, strict=False):
        progress.update()
        chunks.append(found.chunk)
        if job.source.files:
            record.files.append(job.source.files[row]._replace(crc32c=found.checksum))
        if job.stored == "whole":
            record.sizes.append(found.size)
        if found.image is None:
            record.labels.append(CORRUPT_LABEL)
            record.corrupt.append(f"{example.name}: {found.error}")
            _check_corrupt(job, records, MAX_CORRUPT_NAMED, seen=progress.n)
            continue
        _check_label(job.source, example)
        record.labels.append(example.label)
        cv2.accumulate(found.image, image_sum)
        record.outer_sum += _outer_sum(found.image)
    if len(chunks) < len(job.rows(shard)):
        raise UserError(
            f"{job.source.name} ends after {progress.n} examples instead of "
            f"{job.source.num_examples}; its files are damaged: build it again"
        )
    chunks += [None] * (slots_per_shard(job.image_shape) - len(chunks))
    pieces = pack_shard(chunks)
    record.num_bytes = sum(map(len, pieces))
    return image_sum, pieces


def _check_label(source: Source, example: Example) -> None:
    """Raises UserError for labels such as the -1 of many test splits."""
    classes = len(source.class_names)
    if not 0 <= example.label < classes:
        raise UserError(
            f"{example.name} of {source.name} has the label {example.label}, but there are "
            f"{classes} classes; choose a split with labels from 0 to {classes - 1}"
        )


def _check_corrupt(
    job: _Job, records: Mapping[int, _Record], tolerated: int, seen: int
) -> list[str]:
    """Returns a line per corrupt image. If there are too many, logs them and raises TooManyCorrupt.

    Args:
      tolerated: a number of corrupt images that is not too many, whatever max_corrupt is.
    """
    lines = [line for _, record in sorted(records.items()) for line in record.corrupt]
    limit = int(job.max_corrupt * job.source.num_examples + 1e-9)  # 0.29 * 100 is 28.999…
    if len(lines) > max(limit, tolerated):
        _write_corrupt_log(job, lines)
        raise TooManyCorrupt(
            f"{len(lines)} of {'the first ' if seen < job.source.num_examples else ''}{seen} "
            f"images of {job.source.name} cannot be decoded, more than max_corrupt allows "
            f"({limit}; {job.path}/{CORRUPT_KEY} names them)"
        )
    return lines


def _write_corrupt_log(job: _Job, lines: list[str]) -> None:
    log = "".join(f"{line}\n" for line in lines).encode()
    job.root.write(CORRUPT_KEY, log or None).result()  # None deletes an older log


def _has_new_files(job: _Job, shard: int, record: _Record) -> bool:
    """Returns whether a file of a folder may have another content than in the shard."""
    now = job.source.files[job.rows(shard).start : job.rows(shard).stop]
    return any(
        old.crc32c is None or new[:3] != old[:3] for old, new in zip(record.files, now, strict=True)
    )


def _complete(job: _Job) -> None:
    """Writes labels and statistics and marks the store as complete, if no shard is missing."""
    if not needs_preparation(job.path):
        return  # another host was faster
    records = _read_records(job)
    if missing := job.num_shards - len(records):
        print(
            f"part {job.part[0]} of {job.part[1]} of {job.path} is written; {missing} of all "
            f"{job.num_shards} shards are still missing"
        )
        return
    ordered = [records[shard] for shard in range(job.num_shards)]
    labels = np.array([label for record in ordered for label in record.labels], np.int32)
    num_examples = int((labels != CORRUPT_LABEL).sum())
    # Once more, because the corrupt images of all hosts count.
    _write_corrupt_log(job, _check_corrupt(job, records, 0, seen=labels.size))
    empty = sorted({*range(len(job.source.class_names))} - {*labels.tolist()})
    if not num_examples or (job.source.needs_all_classes and empty):
        which = ", ".join(job.source.class_names[label] for label in empty[:5])
        raise UserError(
            f"no image of the classes {which} of {job.source.name} can be decoded; "
            f"{job.path}/{CORRUPT_KEY} says why: repair them"
        )
    image_sum = np.zeros((job.image_size, job.image_size, 3), np.int64)
    for shard in range(job.num_shards):
        image_sum += np.load(io.BytesIO(job.root[SUM_KEY.format(shard)]))
    outer_sum = np.sum([record.outer_sum for record in ordered], axis=0)
    mean_image, statistics = _statistics(num_examples, image_sum, outer_sum)
    write_image_metadata(job.root, job.image_shape, job.source.num_examples, job.storage)
    write_array(job.root, "label", labels)
    if job.stored == "whole":
        sizes = [size for record in ordered for size in record.sizes]
        write_array(job.root, "size", np.array(sizes, np.int32))
    write_array(job.root, "mean_image", mean_image.astype(np.float32))
    files = [file for record in ordered for file in record.files]
    if files:
        write_files(job.root, files)
    # Last, since this makes the store usable.
    write_attributes(
        job.root,
        job.origin
        | statistics
        | {
            "identity": identity_of(files) if files else job.source.name,
            "num_examples": num_examples,
            "shard_bytes": [record.num_bytes for record in ordered],
            "complete": True,
        },
    )
    _remove_records(job.root)


# Records of finished shards


def _write_shard(
    job: _Job, shard: int, record: _Record, image_sum: np.ndarray, pieces: Pieces
) -> None:
    """Writes the file, then the sum of its images, then the record that says both exist."""
    if is_url(job.path):
        job.root.write(shard_key(shard), b"".join(pieces)).result()
    else:
        write_local(f"{job.path}/{shard_key(shard)}", pieces, scratch=f"{job.path}/parts")
    buffer = io.BytesIO()
    np.save(buffer, image_sum.astype(np.uint32))
    job.root.write(SUM_KEY.format(shard), buffer.getvalue()).result()
    content = vars(record) | {"outer_sum": record.outer_sum.tolist()}
    job.root.write(RECORD_KEY.format(shard), json.dumps(content).encode()).result()


def _read_records(job: _Job) -> dict[int, _Record]:
    found = {key.decode() for key in job.root.list(RECORDS).result()}
    requests = {
        shard: job.root.read(RECORD_KEY.format(shard))
        for shard in range(job.num_shards)
        if RECORD_KEY.format(shard) in found
    }
    contents = {shard: json.loads(request.result().value) for shard, request in requests.items()}
    return {
        shard: _Record(
            **content
            | {
                "outer_sum": np.array(content["outer_sum"]),
                "files": [File(*row) for row in content["files"]],
            }
        )
        for shard, content in contents.items()
    }


def _remove_records(root: ts.KvStore) -> None:
    if root.list(RECORDS).result():
        root.delete_range(RECORDS).result()


# Statistics of the train split


def _outer_sum(image: UInt8[np.ndarray, "S S 3"]) -> Float64[np.ndarray, "3 3"]:
    """Returns the sum over the pixels of the outer product of RGB with itself.

    It is exact, and ten times as fast as a matrix product: OpenCV sums squares of uint8 directly,
    and 2ab = a² + b² - (a - b)².
    """
    channels = cv2.split(image)
    squares = np.array([cv2.norm(channel, cv2.NORM_L2SQR) for channel in channels])
    outer = np.diag(squares)
    for a, b in ((0, 1), (0, 2), (1, 2)):
        difference = cv2.norm(channels[a], channels[b], cv2.NORM_L2SQR)
        outer[a, b] = outer[b, a] = (squares[a] + squares[b] - difference) / 2
    return outer


def _statistics(
    count: int, image_sum: Int64[np.ndarray, "S S 3"], outer_sum: Float64[np.ndarray, "3 3"]
) -> tuple[Float64[np.ndarray, "S S 3"], dict[str, list[Any]]]:
    """Returns the mean image and the other statistics, as `store.Store` describes them.

    The paper subtracts the mean image (section 2) and adds noise along the eigenvectors of the RGB
    covariance of all pixels (section 4.1).
    """
    mean_image = image_sum / count
    pixels = count * mean_image.shape[0] * mean_image.shape[1]
    mean = image_sum.sum(axis=(0, 1)) / pixels
    eigenvalues, eigenvectors = np.linalg.eigh(outer_sum / pixels - np.outer(mean, mean))
    # Rounding may make the zeros of grey images negative, of which there is no square root.
    eigenvalues, eigenvectors = np.maximum(eigenvalues[::-1], 0), eigenvectors[:, ::-1]
    # An eigenvector's sign is arbitrary; fix it, so that every machine gets the same store.
    largest = np.abs(eigenvectors).argmax(axis=0)
    eigenvectors = eigenvectors * np.sign(eigenvectors[largest, range(3)])
    statistics = {"mean_channel": mean, "eigenvalues": eigenvalues, "eigenvectors": eigenvectors}
    return mean_image, {name: value.tolist() for name, value in statistics.items()}
