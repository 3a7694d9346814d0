"""Builds a store (see `store`) from a tfds builder or a folder of images, and resumes one.

Work goes shard by shard. Row n of a store is its source's example n, so that a shard depends on
nothing but its own examples: any number of hosts may make some of the shards each, be killed and
go on, and the files end the same, byte for byte. Each finished shard leaves a record in `parts/`;
when all are there, the host that sees it adds them up.
"""

import contextlib
import io
import itertools
import json
import os
import sys
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
import simplejpeg
import tensorstore as ts
from jaxtyping import Float32, Float64, UInt8
from tqdm import tqdm

from alexnet_jax.data.decode import decode_square
from alexnet_jax.data.pixel_statistics import outer_sum, statistics
from alexnet_jax.data.shards import (
    Pieces,
    pack_jpeg,
    pack_shard,
    rows_per_shard,
    shard_key,
    write_local,
)
from alexnet_jax.data.sources import FOLDER_PREFIX, Example, Source, open_source
from alexnet_jax.data.store import (
    CORRUPT_LABEL,
    FORMAT_VERSION,
    RECORDS,
    is_settled,
    is_url,
    open_kvstore,
    read_attributes,
    remove_records,
)
from alexnet_jax.data.zarr_files import write_array, write_attributes, write_image_metadata
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.files import explain_write_errors

CORRUPT_KEY = "corrupt.log"
DECODES_AHEAD = 256  # goes on while a shard is written
WHOLE = (1, 1)


@dataclass
class Part:
    """What is known of one finished shard.

    Attributes:
      labels: of its examples, CORRUPT_LABEL for those that could not be decoded.
      corrupt: a line for each of those.
      outer_sum: sum over its pixels of the outer product of RGB with itself; exact.
      num_bytes: of its file.
    """

    labels: list[int]
    corrupt: list[str]
    outer_sum: Float64[np.ndarray, "3 3"]
    num_bytes: int


@dataclass(frozen=True)
class Decoded:
    """An example's image and what a shard holds of it; or, of both, the error."""

    image: UInt8[np.ndarray, "S S 3"] | None
    chunk: np.ndarray | bytes | None
    error: str = ""


def prepare_splits(
    config: Mapping[str, Any], paths: Mapping[str, str], part: tuple[int, int] = WHOLE
) -> None:
    """Prepares the train and eval stores of a config where they are not complete.

    Args:
      config: fields dataset, data_dir, train_split, eval_split, image_size, storage, max_corrupt.
      paths: where the stores lie, {"train": …, "eval": …}.
      part: (i, n): the i-th of n hosts, counted from 1, makes its part of the shards alone.

    Raises:
      UserError: the data set, a split or its files are missing or cannot be had; more than
        max_corrupt of the images are corrupt; a label is none of the classes; the store cannot
        be written.
    """
    splits = {paths["train"]: config["train_split"], paths["eval"]: config["eval_split"]}
    folder = os.path.dirname(paths["train"])

    def lock(whole: bool) -> contextlib.AbstractContextManager[None]:
        """One host of several locks only what all of them do; one alone locks all the while."""
        return _lock(folder) if whole == (part == WHOLE) else contextlib.nullcontext()

    with explain_write_errors(folder, "another data_dir"), lock(whole=True):
        with lock(whole=False):
            sources = {
                path: open_source(config, split)  # all of them, before hours go into the first
                for path, split in splits.items()
                if not is_settled(path)
            }
            works = [_Work(source, path, config, part) for path, source in sources.items()]
        for work in works:
            with explain_write_errors(work.path, "another data_dir"):
                work.make_shards()
                with lock(whole=False):
                    work.finish_if_all_shards_are_made()


def prepare_store(source: Source, path: str, config: Mapping[str, Any]) -> None:
    """Writes, or goes on writing, the store of one source at `path`; see `prepare_splits`."""
    work = _Work(source, path, config, WHOLE)
    work.make_shards()
    work.finish_if_all_shards_are_made()


class _Work:
    """One host's part of preparing one store."""

    def __init__(self, source: Source, path: str, config: Mapping[str, Any], part: tuple[int, int]):
        self.source, self.path, self.part = source, path, part
        self.size, self.storage = config["image_size"], config["storage"]
        self.root = open_kvstore(path)
        self.rows = rows_per_shard(self.size)
        self.num_shards = -(-source.num_examples // self.rows)
        self.max_corrupt = config["max_corrupt"]
        self.identity = {
            "format_version": FORMAT_VERSION,
            "source": source.name,
            "num_rows": source.num_examples,
            "image_size": self.size,
            "storage": self.storage,
            "class_names": list(source.class_names),
        }
        self._start()
        self.parts = _read_parts(self.root, range(self.num_shards))

    def make_shards(self) -> None:
        """Makes those shards of this host's share that are not made yet."""
        number, count = self.part
        share = range(self.num_shards * (number - 1) // count, self.num_shards * number // count)
        missing = [shard for shard in share if shard not in self.parts or self._was_mended(shard)]
        bar = tqdm(
            total=sum(len(self._examples(shard)) for shard in share),
            initial=sum(len(self._examples(shard)) for shard in share if shard not in missing),
            desc="/".join(self.path.split("/")[-2:]),
            unit=" images",
        )
        with bar, ThreadPoolExecutor(max(2, os.cpu_count() or 1)) as pool:
            for run in _consecutive_runs(missing):
                self._make_run(run, pool, bar)

    def finish_if_all_shards_are_made(self) -> None:
        """Writes labels and statistics and marks the store complete, unless shards are missing."""
        if is_settled(self.path):
            return
        self.parts = _read_parts(self.root, range(self.num_shards))
        if missing := self.num_shards - len(self.parts):
            print(
                f"part {self.part[0]} of {self.part[1]} of {self.path} is made; of all "
                f"{self.num_shards} shards {missing} are still to be made"
            )
            return
        parts = [self.parts[shard] for shard in range(self.num_shards)]
        labels = np.array([label for part in parts for label in part.labels], np.int32)
        num_examples = int((labels != CORRUPT_LABEL).sum())
        self._check_corrupt(seen=labels.size)
        self._write_corrupt_log(self._corrupt_lines())
        if not num_examples:
            raise UserError(
                f"{self.source.name} has no image that can be decoded; see "
                f"{self.path}/{CORRUPT_KEY}"
            )
        image_sum = np.zeros((self.size, self.size, 3), np.int64)
        for shard in range(self.num_shards):
            image_sum += np.load(io.BytesIO(self.root[_sum_key(shard)]))
        outer_sums = np.sum([part.outer_sum for part in parts], axis=0)
        found = statistics(num_examples, image_sum, outer_sums)
        write_image_metadata(self.root, self.size, self.source.num_examples, self.storage)
        write_array(self.root, "label", labels)
        write_array(self.root, "mean_image", found.pop("mean_image").astype(np.float32))
        write_attributes(
            self.root,
            self.identity
            | {name: value.tolist() for name, value in found.items()}
            | {
                "num_examples": num_examples,
                "shard_bytes": [part.num_bytes for part in parts],
                "complete": True,
            },
        )
        remove_records(self.root)

    def _start(self) -> None:
        """Goes on with a preparation of the same source, or clears the place for a new one."""
        attributes = read_attributes(self.path)
        if attributes == self.identity | {"complete": False}:
            return
        if attributes is not None and self.part != WHOLE:
            raise UserError(
                f"the store at {self.path} was begun from other data or by another version; "
                "delete it before several hosts prepare it"
            )
        self.root.delete_range(ts.KvStore.KeyRange()).result()
        write_attributes(self.root, self.identity | {"complete": False})

    def _examples(self, shard: int) -> range:
        first = shard * self.rows
        return range(first, min(first + self.rows, self.source.num_examples))

    def _was_mended(self, shard: int) -> bool:
        """Returns whether a file of a folder that was corrupt can be decoded by now."""
        labelled = zip(self._examples(shard), self.parts[shard].labels, strict=True)
        corrupt = [row for row, label in labelled if label == CORRUPT_LABEL]
        return self.source.name.startswith(FOLDER_PREFIX) and any(
            self._decode(example).image is not None
            for row in corrupt
            for example in self.source.read(row, row + 1)
        )

    def _make_run(self, shards: range, pool: ThreadPoolExecutor, bar: tqdm) -> None:
        """Makes consecutive shards; each is written while the next one's images are decoded."""
        first, end = self._examples(shards[0])[0], self._examples(shards[-1])[-1] + 1
        decoded = self._decode_in_order(self.source.read(first, end), pool)
        writing = None
        for shard in shards:
            part, image_sum, content = self._assemble(shard, decoded, bar)
            if writing:
                writing.result()
            writing = pool.submit(self._write_shard, shard, part, image_sum, content)
        if writing:
            writing.result()

    def _assemble(
        self, shard: int, decoded: Iterator[tuple[Example, Decoded]], bar: tqdm
    ) -> tuple[Part, Float32[np.ndarray, "S S 3"], Pieces]:
        """Takes a shard's examples; returns its part, its image sum and the file's content."""
        part = Part([], [], np.zeros((3, 3)), 0)
        # Exact: not more than MAX_ROWS sums of integers below 256, and float32 counts to 2**24.
        image_sum = np.zeros((self.size, self.size, 3), np.float32)
        chunks = []
        self.parts[shard] = part
        for example, found in itertools.islice(decoded, len(self._examples(shard))):
            bar.update()
            chunks.append(found.chunk)
            if found.image is None:
                part.labels.append(CORRUPT_LABEL)
                part.corrupt.append(f"{example.name}: {found.error}")
                self._check_corrupt(seen=bar.n)
                continue
            self._check_label(example)
            part.labels.append(example.label)
            cv2.accumulate(found.image, image_sum)
            part.outer_sum += outer_sum(found.image)
        if len(chunks) < len(self._examples(shard)):
            raise UserError(
                f"{self.source.name} ends after {bar.n} examples and should have "
                f"{self.source.num_examples}; its files are damaged: build it anew"
            )
        chunks += [None] * (self.rows - len(chunks))
        content = pack_shard(chunks)
        part.num_bytes = sum(map(len, content))
        return part, image_sum, content

    def _write_shard(self, shard: int, part: Part, image_sum: np.ndarray, content: Pieces) -> None:
        """Writes the file, then the sum, then the record that says that both are there."""
        buffer = io.BytesIO()
        np.save(buffer, image_sum.astype(np.uint32))
        if is_url(self.path):
            self.root.write(shard_key(shard), b"".join(content)).result()
        else:
            write_local(f"{self.path}/{shard_key(shard)}", content, scratch=f"{self.path}/parts")
        self.root.write(_sum_key(shard), buffer.getvalue()).result()
        record = vars(part) | {"outer_sum": part.outer_sum.tolist()}
        self.root.write(_part_key(shard), json.dumps(record).encode()).result()

    def _check_corrupt(self, seen: int) -> None:
        """Raises UserError once more images are corrupt than may be."""
        lines = self._corrupt_lines()
        limit = int(self.max_corrupt * self.source.num_examples + 1e-9)  # 0.29 * 100 is 28.999…
        if len(lines) > limit:
            self._write_corrupt_log(lines)
            raise UserError(
                f"{len(lines)} of the first {seen} images of {self.source.name} cannot be "
                f"decoded, more than max_corrupt allows ({limit} of {self.source.num_examples}); "
                f"they are named in {self.path}/{CORRUPT_KEY}: mend them, or raise "
                "--config.max_corrupt"
            )

    def _corrupt_lines(self) -> list[str]:
        return [line for _, part in sorted(self.parts.items()) for line in part.corrupt]

    def _write_corrupt_log(self, lines: list[str]) -> None:
        log = "".join(f"{line}\n" for line in lines).encode()
        self.root.write(CORRUPT_KEY, log or None).result()  # None removes an older one

    def _check_label(self, example: Example) -> None:
        classes = len(self.source.class_names)
        if not 0 <= example.label < classes:
            raise UserError(
                f"{example.name} of {self.source.name} has the label {example.label}, which is "
                f"none of its {classes} classes; choose a split with labels from 0 to {classes - 1}"
            )

    def _decode_in_order(
        self, examples: Iterator[Example], pool: ThreadPoolExecutor
    ) -> Iterator[tuple[Example, Decoded]]:
        """Decodes in threads (the decoders let go of Python's lock), a bounded number ahead."""
        pending: deque[tuple[Example, Future[Decoded]]] = deque()
        try:
            for example in examples:
                pending.append((example, pool.submit(self._decode, example)))
                if len(pending) > DECODES_AHEAD:
                    yield pending[0][0], pending.popleft()[1].result()
            while pending:
                yield pending[0][0], pending.popleft()[1].result()
        finally:
            for _, future in pending:
                future.cancel()

    def _decode(self, example: Example) -> Decoded:
        try:
            image = decode_square(example.load(), self.size)
        except Exception as error:  # damaged bytes make the decoders raise nearly anything
            return Decoded(None, None, one_line(error))
        if self.storage == "raw":
            return Decoded(image, image)
        jpeg = pack_jpeg(image)
        return Decoded(simplejpeg.decode_jpeg(jpeg), jpeg)  # statistics are of what will be read


def _consecutive_runs(numbers: list[int]) -> Iterator[range]:
    for _, group in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0]):
        run = [number for _, number in group]
        yield range(run[0], run[-1] + 1)


def _part_key(shard: int) -> str:
    return f"parts/{shard}.json"


def _sum_key(shard: int) -> str:
    return f"parts/{shard}.npy"


def _read_parts(root: ts.KvStore, shards: range) -> dict[int, Part]:
    found = {key.decode() for key in root.list(RECORDS).result()}
    asked = {n: root.read(_part_key(n)) for n in shards if _part_key(n) in found}
    records = {n: json.loads(future.result().value) for n, future in asked.items()}
    return {
        n: Part(**record | {"outer_sum": np.array(record["outer_sum"])})
        for n, record in records.items()
    }


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
