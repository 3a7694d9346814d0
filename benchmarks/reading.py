"""How fast is the store beyond one process and one machine's page cache?

    python benchmarks/reading.py

- "from disk": the pages of the shards are dropped from the cache before every batch. Reading the
  batch, which announces all its images to the disk, is compared with reading each image alone.
- "N processes": each reads its part of every batch from the same store, as with one process per
  GPU. A batch counts when all have their part.
- "from a bucket": a server on this machine, which waits 20 ms before it answers. One request for
  each image is compared with whole shards (`shuffle_shards`).
"""

import contextlib
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from time import sleep

import numpy as np
from harness import CORES, ROOT, Row, parser, ratio, row, show, take_turns, write

CONTEXT = multiprocessing.get_context("spawn")
WARM_UP = 32  # more batches than are read ahead, and half of the shards that are
COUNTED = 128  # batches in which requests are counted
LATENCY_S = 0.02
URL = "gs://bucket/store"
THREADS = max(2, CORES)
ONE, BATCH = "from disk, image by image", "from disk, batches"
BY = {"image": 0, "shard": 4}  # shuffle_shards


def make_store(path: Path, size: int, images: int) -> Path:
    """Prepares a store of noise."""
    from alexnet_jax.data.prepare import prepare_store
    from alexnet_jax.data.sources import Example, Source

    noise = np.random.default_rng(0).integers(0, 256, (64, size, size, 3), np.uint8)

    def read(first: int, end: int) -> Iterator[Example]:
        for number in range(first, end):
            yield Example(str(number), 0, noise[number % 64].copy)

    prepare_store(Source("noise", images, ("noise",), read), str(path), size)
    return path


def from_disk(path: Path, batch_size: int, parts: int) -> Generator[int]:
    """Reads random batches that are not in the page cache, each in `parts` calls."""
    from alexnet_jax.data.store import open_store

    store, rng = open_store(path), np.random.default_rng(0)
    files = [os.open(file, os.O_RDONLY) for file in path.glob("image/c/*/0/0/0")]
    for file in files:
        os.fsync(file)  # pages that are not written yet cannot be dropped
    with ThreadPoolExecutor(THREADS) as pool:
        while True:
            for file in files:
                os.posix_fadvise(file, 0, 0, os.POSIX_FADV_DONTNEED)
            indices = rng.choice(store.num_examples, batch_size, replace=False)
            batches = pool.map(store.read, np.array_split(indices, parts))
            yield sum(len(batch["label"]) for batch in batches)


def in_processes(path: Path, batch_size: int, processes: int) -> Generator[int]:
    """Reads every batch in several processes."""
    pipes = []
    for part in np.array_split(np.arange(batch_size), processes):
        ours, theirs = CONTEXT.Pipe()
        CONTEXT.Process(target=_read_part, args=(theirs, path, batch_size, part)).start()
        theirs.close()
        pipes.append(ours)
    while True:
        for pipe in pipes:
            pipe.send("next")
        yield sum(pipe.recv() for pipe in pipes)


def _read_part(pipe: Connection, path: Path, batch_size: int, part: np.ndarray) -> None:
    from alexnet_jax.data.pipeline import Order, train_batches
    from alexnet_jax.data.store import open_store

    batches = train_batches(Order(open_store(path), batch_size, 0), part)
    with contextlib.suppress(EOFError):
        while pipe.recv():
            pipe.send(len(next(batches)["label"]))
    batches.close()


def serve(pipe: Connection, path: Path) -> None:
    """Serves a store as a bucket; replies to every message with the number of GETs so far."""
    sys.path.append(str(ROOT / "tests"))
    from gcs import bucket_server

    gets: list[str] = []
    with bucket_server(delay_s=LATENCY_S, gets=gets) as (objects, environment):
        for file in path.rglob("*"):
            if file.is_file():
                objects[f"store/{file.relative_to(path)}"] = file.read_bytes()
        pipe.send(environment)
        while pipe.recv():
            pipe.send(len(gets))


def from_bucket(batch_size: int, lanes: int) -> Generator[int]:
    """Reads training batches from the served store."""
    from alexnet_jax.data.pipeline import Order, train_batches
    from alexnet_jax.data.store import open_store

    for batch in train_batches(Order(open_store(URL), batch_size, 0, lanes)):
        yield len(batch["label"])


def bucket_rows(path: Path, batch_size: int, rounds: int, seconds: float) -> list[Row]:
    """Returns images per second and requests per image, image by image and shard by shard."""
    pipe, theirs = CONTEXT.Pipe()
    server = CONTEXT.Process(target=serve, args=(theirs, path), daemon=True)
    server.start()
    os.environ |= pipe.recv()
    names = {f"from a bucket, {path.name} pixels, by {what}": n for what, n in BY.items()}
    makers = {name: partial(from_bucket, batch_size, lanes) for name, lanes in names.items()}
    turns = take_turns(makers, rounds, seconds, WARM_UP, group=WARM_UP)
    rates = {name: [turn.rate for turn in of] for name, of in turns.items()}
    rows = [row(name, of, "images/s", batch_size) for name, of in rates.items()]
    for name, make in makers.items():
        pipe.send("count")
        before, batches = pipe.recv(), make()
        images = sum(next(batches) for _ in range(COUNTED))
        pipe.send("count")
        rows.append(row(name, [(pipe.recv() - before) / images], "requests/image", batch_size))
        batches.close()
        sleep(1)  # until the batches that it reads ahead have arrived
    server.terminate()
    return [*rows, ratio(f"{path.name} pixels, by shard / by image", *reversed(rates.values()))]


def main() -> None:
    options = parser(__doc__, quick="few images, short turns")
    options.add_argument("--images", type=int, default=8192, help="of each size; default: 8192")
    options.add_argument("--batch-size", type=int, default=128, help="default: 128")
    args = options.parse_args()
    rounds, seconds, sizes, processes = 5, 3.0, (64, 128, 256), (1, 2, 4)
    if args.quick:
        rounds, seconds, sizes, processes = 1, 0.05, (8,), (1, 2)
        args.images, args.batch_size = 256, 8
    batch = args.batch_size
    with tempfile.TemporaryDirectory() as folder:
        paths = [make_store(Path(folder, str(size)), size, args.images) for size in sizes]
        turns = take_turns(
            {f"processes: {n}": partial(in_processes, paths[-1], batch, n) for n in processes},
            *(rounds, seconds, WARM_UP),
        )
        disk = {ONE: batch, BATCH: THREADS}
        disk_turns = take_turns(
            {name: partial(from_disk, paths[-1], batch, parts) for name, parts in disk.items()},
            *(rounds, seconds),
        )
        rates = {name: [turn.rate for turn in of] for name, of in (turns | disk_turns).items()}
        rows = [row(name, rate, "images/s", batch) for name, rate in rates.items()]
        rows.append(ratio("from disk, batches / image by image", rates[BATCH], rates[ONE]))
        for path in paths:
            rows += bucket_rows(path, batch, rounds, seconds)
    show(rows)
    write(rows, args.json)


if __name__ == "__main__":
    main()
