"""Which examples, in which order, on which host: whole batches of uint8 images.

Grain reads ahead and keeps the position. Its elements are the numbers of global batches, so a
position is the next one's: the same on every host, and for any number of hosts.
"""

import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np

from alexnet_jax.data.shuffle import shuffled
from alexnet_jax.data.store import Store

Batch = dict[str, np.ndarray]

# Batches read ahead, each by a thread that lets go of Python's lock while it reads.
READS_IN_FLIGHT = max(2, min(8, os.cpu_count() or 1))
PLACED_AHEAD = 2  # batches whose transfer goes on beside the steps


def train_batches(
    store: Store,
    batch_size: int,
    seed: int,
    own_places: np.ndarray | None = None,
    place: Callable[[Batch], Any] = lambda batch: batch,
) -> grain.DatasetIterator:
    """Returns an endless iterator over one host's part of every global batch.

    Each epoch is a new permutation of all examples; batches run on across the ends of epochs,
    so that every example comes exactly once in each epoch whatever the batch size. Global batch
    n holds the examples at places n·batch_size … of that stream, in the same order for any number
    of hosts.

    Args:
      batch_size: global.
      own_places: which places of every global batch are this host's; all by default.
      place: brings a batch to the devices; goes on for the next ones while a step runs.

    Yields what `place` makes of {"image": uint8[share, S, S, 3], "label": int32[share]}. The
    iterator's `get_state()` and `set_state()` hold its position.
    """
    share = np.arange(batch_size) if own_places is None else own_places

    def read(number: int) -> Batch:
        return store.read(shuffled(number * batch_size + share, store.num_examples, seed))

    numbers = grain.MapDataset.range(sys.maxsize // batch_size)
    return iter(_placed(_read_ahead(numbers, read), place))


def first_of_batch(store: Store, batch_size: int, seed: int, number: int, most: int) -> Batch:
    """Returns the first so many examples of one global batch, as `train_batches` has them."""
    places = number * batch_size + np.arange(min(most, batch_size))
    return store.read(shuffled(places, store.num_examples, seed))


def eval_batches(
    store: Store,
    batch_size: int,
    own_places: np.ndarray | None = None,
    place: Callable[[Batch], Any] = lambda batch: batch,
) -> Iterator[Any]:
    """Yields every example once, in order, one host's part of every global batch.

    The last batches are filled up with examples of label -1, which the evaluation step does not
    count; all hosts yield equally many batches. Arguments as for `train_batches`.
    """
    share = np.arange(batch_size) if own_places is None else own_places
    starts = range(0, store.num_examples, batch_size)

    def read(number: int) -> Batch:
        places = starts[number] + share
        rows = store.read(np.minimum(places, store.num_examples - 1))
        rows["label"] = np.where(places < store.num_examples, rows["label"], -1).astype(np.int32)
        return rows

    return iter(_placed(_read_ahead(grain.MapDataset.range(len(starts)), read), place))


def _read_ahead(numbers: grain.MapDataset, read: Callable[[int], Batch]) -> grain.IterDataset:
    seen_in_traces = jax.profiler.annotate_function(read, name="read batch")
    return numbers.map(seen_in_traces).to_iter_dataset(
        grain.ReadOptions(num_threads=READS_IN_FLIGHT, prefetch_buffer_size=READS_IN_FLIGHT)
    )


def _placed(batches: grain.IterDataset, place: Callable[[Batch], Any]) -> grain.IterDataset:
    return grain.experimental.ThreadPrefetchIterDataset(
        batches.map(place), prefetch_buffer_size=PLACED_AHEAD
    )
