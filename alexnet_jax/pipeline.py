"""Grain: which examples, in which order, on which host; whole batches of uint8 images.

Grain shuffles and batches indices alone, in O(1) memory; each batch is then one read of the
store (TensorStore fetches its images concurrently).
"""

from collections.abc import Iterator

import grain
import numpy as np

from alexnet_jax.store import Store

Batch = dict[str, np.ndarray]

READS_IN_FLIGHT = 4  # batches; measured best for a local store


def train_batches(
    store: Store, batch_size: int, seed: int, process_index: int = 0, process_count: int = 1
) -> grain.DatasetIterator:
    """Returns an endless iterator over one host's part of every global batch.

    Each epoch is a new permutation of all examples; batches run on across the ends of epochs,
    so that every example comes exactly once in each epoch whatever the batch size. Global batch
    n holds the examples at places n·batch_size … of that stream, for any number of hosts.

    Args:
      batch_size: global, a multiple of `process_count`.

    Yields {"image": uint8[batch_size / process_count, S, S, 3], "label": int32[…]}. The
    iterator's `get_state()` and `set_state()` hold its position.
    """
    stream = grain.MapDataset.range(store.num_examples).shuffle(seed=seed).repeat()
    batches = stream[process_index::process_count].batch(batch_size // process_count)
    reading = grain.ReadOptions(num_threads=READS_IN_FLIGHT, prefetch_buffer_size=READS_IN_FLIGHT)
    return iter(batches.map(store.read).to_iter_dataset(reading))


def eval_batches(
    store: Store, batch_size: int, process_index: int = 0, process_count: int = 1
) -> Iterator[Batch]:
    """Yields every example once, in order, one host's part of every global batch.

    The last batches are filled up with examples of label -1, which the evaluation step does not
    count; all hosts yield equally many batches.
    """
    share = batch_size // process_count
    starts = range(0, store.num_examples, batch_size)

    def read(batch: int) -> Batch:
        first = starts[batch] + process_index * share
        places = np.arange(first, first + share)
        rows = store.read(np.minimum(places, store.num_examples - 1))
        rows["label"] = np.where(places < store.num_examples, rows["label"], -1).astype(np.int32)
        return rows

    reading = grain.ReadOptions(num_threads=READS_IN_FLIGHT, prefetch_buffer_size=READS_IN_FLIGHT)
    return iter(grain.MapDataset.range(len(starts)).map(read).to_iter_dataset(reading))
