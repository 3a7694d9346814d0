"""Do opening a store, shuffling and resuming take longer with more images?

    python benchmarks/store_scale.py

Prepares stores of 2x2 pixel images, up to as many as ImageNet has. Opening reads the labels and
checks that every shard exists.
"""

import itertools
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from harness import Row, parser, row, show, write

from alexnet_jax.data import pipeline
from alexnet_jax.data.prepare import prepare_store
from alexnet_jax.data.sources import Example, Source
from alexnet_jax.data.store import Store, open_store

SIZES = (10_000, 100_000, 1_281_167)  # the last is ImageNet's
QUICK_SIZES = (1_000, 10_000)
BATCH, EPOCHS, ROUNDS = 256, 90, 7
SEEDS = itertools.count()  # always another, since the permutations of a seed are cached


def make_store(count: int, path: str) -> None:
    """Prepares a store of `count` images; the pixels of each are its number."""

    def read(first: int, end: int) -> Iterator[Example]:
        for n in range(first, end):
            pixels = np.full((2, 2, 3), (n >> 16, n >> 8 & 255, n & 255), np.uint8)
            yield Example(str(n), n % 1000, pixels.copy)

    names = tuple(map(str, range(1000)))
    prepare_store(Source("numbers", count, names, read), path, image_size=2)


def first_batch(store: Store, position: dict[str, Any] | None = None) -> None:
    """Makes a shuffled pipeline, restores its position if given, and reads one batch."""
    batches = pipeline.train_batches(pipeline.Order(store, BATCH, next(SEEDS)))
    if position:
        batches.set_state(position)
    next(batches)


def milliseconds(function: Callable[[], Any]) -> float:
    started = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - started)


def peak_kb(store: Store) -> float:
    """Returns the peak memory of Python and NumPy while the first batch is read."""
    tracemalloc.start()
    first_batch(store)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 1e3


def measure(count: int, path: str, rounds: int) -> list[Row]:
    """Returns the rows of one size."""
    store = open_store(path)
    late = {"next_index": int((EPOCHS - 0.1) * count / BATCH)}  # the next batch, as in checkpoints
    timed: dict[str, Callable[[], Any]] = {
        "open": lambda: open_store(path),
        "first batch": lambda: first_batch(store),
        f"resume in epoch {EPOCHS}": lambda: first_batch(store, late),
    }
    rows = [
        row(f"{what}, {count:,} images", [milliseconds(f) for _ in range(rounds)], "ms", BATCH)
        for what, f in timed.items()
    ]
    memory = [peak_kb(store) for _ in range(rounds)]
    return [*rows, row(f"memory of the pipeline, {count:,} images", memory, "kB", BATCH)]


def main() -> None:
    args = parser(__doc__, quick="two small stores, two rounds").parse_args()
    rows = []
    for count in QUICK_SIZES if args.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            make_store(count, folder)
            rows += measure(count, folder, 2 if args.quick else ROUNDS)
    show(rows)
    write(rows, args.json)


if __name__ == "__main__":
    main()
