"""The order of the examples: a permutation for every epoch, computed for a whole batch at once.

Nothing is stored, so that any place of any epoch costs the same. Grain has such a shuffle too, for
one index at a time: 10 µs of Python's lock for each image, half of what reading one took
(docs/data.md).
"""

import math

import numpy as np
from jaxtyping import Int64
from numpy.typing import NDArray

HALF_ROUNDS = 8


def shuffled(places: Int64[np.ndarray, " B"], count: int, seed: int) -> Int64[np.ndarray, " B"]:
    """Returns the examples at places of the endless stream of shuffled epochs.

    Args:
      places: at least 0; epoch e is [e·count, (e+1)·count).
      count: number of examples.
      seed: together with the epoch's number it decides about an epoch's order.

    Returns numbers in [0, count).
    """
    epochs, inside = np.divmod(np.asarray(places, np.int64), count)
    examples = np.empty_like(inside)
    for epoch in np.unique(epochs):
        keys = np.random.SeedSequence((seed, int(epoch))).generate_state(HALF_ROUNDS, np.uint64)
        of_epoch = epochs == epoch
        examples[of_epoch] = _permuted(inside[of_epoch].astype(np.uint64), count, keys)
    return examples


def _permuted(places: NDArray[np.uint64], count: int, keys: np.ndarray) -> NDArray[np.uint64]:
    """A Feistel network over the cells of the squarest grid that has room for `count`.

    Each half-round adds a hash of the column to the row, or of the row to the column, and so can be
    undone: the cells are permuted. Who lands on one of the few cells beyond `count` goes on from
    there until he does not (Black and Rogaway, "Ciphers with arbitrary finite domains", 2002).
    """
    rows = np.uint64(math.isqrt(count - 1) + 1)
    columns = np.uint64(-(-count // int(rows)))
    row, column = np.divmod(places, columns)
    for row_key, column_key in keys.reshape(-1, 2):
        row = (row + _hash(column ^ row_key) % rows) % rows
        column = (column + _hash(row ^ column_key) % columns) % columns
    found = row * columns + column
    beyond = found >= count
    if beyond.any():
        found[beyond] = _permuted(found[beyond], count, keys)
    return found


def _hash(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """SplitMix64's finalizer (Steele, Lea, Flood 2014)."""
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))
