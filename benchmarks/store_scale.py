"""What opening, shuffling and resuming cost, against the number of examples in a store.

    python benchmarks/store_scale.py

Prepares stores of very small images, up to as many as ImageNet has. Opening reads the labels and
looks at every shard file; it is timed in processes of their own, imports left out.
"""

import subprocess
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from rows import Row, options, row, write

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from alexnet_jax.config import default_config  # noqa: E402
from alexnet_jax.data import pipeline  # noqa: E402
from alexnet_jax.data.prepare import prepare_store  # noqa: E402
from alexnet_jax.data.sources import Example, Source  # noqa: E402
from alexnet_jax.store import Store, open_store  # noqa: E402

IMAGENET = 1_281_167
SIZES = (10_000, 100_000, IMAGENET)
QUICK_SIZES = (1_000, 10_000)
SIDE = 2
BATCH = 256
EPOCHS = 90
ROUNDS = 7

OPEN = """
import sys, time
from alexnet_jax.store import open_store
start = time.perf_counter()
open_store(sys.argv[1])
print(time.perf_counter() - start)
"""


def make_store(count: int, path: Path) -> None:
    """Prepares a store of `count` images of 2x2 pixels that tell their number."""

    def read(first: int, end: int) -> Iterator[Example]:
        for number in range(first, end):
            pixels = np.full((SIDE, SIDE, 3), (number >> 16, number >> 8 & 255, number & 255))
            yield Example(str(number), number % 1000, lambda p=pixels: p.astype(np.uint8))

    config = default_config()
    config.image_size = SIDE
    prepare_store(Source("numbers", count, tuple(map(str, range(1000))), read), str(path), config)


def open_seconds(path: Path) -> float:
    """Returns how long a new process takes to open a store."""
    command = [sys.executable, "-c", OPEN, str(path)]
    return float(subprocess.run(command, cwd=ROOT, check=True, capture_output=True).stdout)


def first_batch_seconds(store: Store, position: dict[str, Any] | None) -> float:
    """Returns how long it takes to make a shuffled pipeline, at a position, and its first batch."""
    start = time.perf_counter()
    batches = pipeline.train_batches(store, BATCH, seed=0)
    if position:
        batches.set_state(position)
    next(batches)
    return time.perf_counter() - start


def pipeline_kilobytes(store: Store) -> float:
    """Returns the peak of Python's and NumPy's memory while a first batch is made."""
    tracemalloc.start()
    next(pipeline.train_batches(store, BATCH, seed=0))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return peak / 1e3


def measure(count: int, path: Path, rounds: int) -> list[Row]:
    """Returns the rows of one size."""
    store = open_store(path)
    late = {
        "next_index": int((EPOCHS - 0.1) * count / BATCH)
    }  # a batch's number, as in checkpoints
    figures: dict[str, tuple[str, Callable[[], float]]] = {
        "open": ("ms", lambda: 1e3 * open_seconds(path)),
        "first shuffled batch": ("ms", lambda: 1e3 * first_batch_seconds(store, None)),
        f"resume in epoch {EPOCHS}": ("ms", lambda: 1e3 * first_batch_seconds(store, late)),
        "memory of the pipeline": ("kB", lambda: pipeline_kilobytes(store)),
    }
    return [
        row(f"{what}, {count} examples", [figure() for _ in range(rounds)], unit, BATCH)
        for what, (unit, figure) in figures.items()
    ]


def main() -> None:
    """Prints a table of medians, and writes it as rows if asked."""
    args = options(__doc__, quick="smaller stores, fewer rounds").parse_args()
    rows = []
    for count in QUICK_SIZES if args.quick else SIZES:
        with tempfile.TemporaryDirectory() as folder:
            make_store(count, Path(folder))
            rows += measure(count, Path(folder), 2 if args.quick else ROUNDS)
    for of in sorted(rows, key=lambda of: of["what"].split(",")[0]):
        spread = f"({of['min']:.1f} to {of['max']:.1f})"
        print(f"{of['what']:44} {of['median']:8.1f} {of['unit']}  {spread}")
    write(rows, args.json)


if __name__ == "__main__":
    main()
