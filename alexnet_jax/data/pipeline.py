"""The input pipeline: which examples, in which order, on which host, as batches of uint8 images.

    Order (NumPy) -> Store.read in threads (Grain) -> place on the devices (Grain)

There is no decoding and no augmentation here. The store holds decoded images, and the train step
augments on the devices.

A batch is a pure function of (seed, number of the batch). That gives three properties at once:
resuming needs only one integer, every host computes the same order without communication, and the
order does not depend on the number of hosts.
"""

import functools
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

import grain
import jax
import numpy as np
from jaxtyping import Int, Int64
from ml_collections import ConfigDict

from alexnet_jax.config import seed_for
from alexnet_jax.data.store import Store
from alexnet_jax.utils import distributed
from alexnet_jax.utils.buckets import is_url

Batch = dict[str, np.ndarray]  # of `Store.read`

# Threads that read batches. Reading releases Python's lock. `launch` binds a process to some cores.
CORES = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
MAX_READS = max(2, min(8, CORES or 1))
# Batches on their way to the devices during a step. One is enough to overlap the transfer with the
# step; a second one absorbs fluctuations of the reading time.
MAX_PLACED = 2
# Of all batches that are read before the consumer asks for them. A host that trains on 32,768
# images of 256x256 per step has batches of 6.4 GB; of such it reads two ahead, the minimum.
READ_AHEAD_BYTES = 2**30


def train_batches(
    order: "Order",
    local_indices: Int[np.ndarray, " L"] | None = None,
    place: Callable[[Batch], Any] = lambda batch: batch,
) -> grain.DatasetIterator:
    """Returns an endless iterator over one host's part of every global training batch.

    The epochs form one endless stream, each a new permutation of all examples. Global batch n is
    the stream's positions [n * batch_size, (n + 1) * batch_size). Batches continue across the end
    of an epoch. So all batches have the same size, which a jitted step needs, and no example is
    dropped, whatever the batch size.

    Args:
      order: of the train split. With `shuffle_shards`, shards of a bucket are fetched whole, before
        their use.
      local_indices: the indices into every global batch that this host reads, in rising order; by
        default all.
      place: called for each batch in a background thread, e.g. to transfer it to the devices.

    Returns:
      An iterator over the results of `place` for {"image": uint8[L, S, S, 3], "label": int32[L]},
      or what else `Store.read` returns.
      Its `get_state()` and `set_state()` read and change its position, which is the number of the
      next global batch: the same on every host, and valid for any number of hosts.
    """
    store, batch_size, shuffle_shards = order.store, order.batch_size, order.shuffle_shards
    indices = np.arange(batch_size) if local_indices is None else local_indices
    _advise(store, shuffle_shards)
    # In a stretch of batches, each lane uses up a quarter of a shard.
    stretch = max(1, shuffle_shards * store.slots_per_shard // (4 * batch_size))
    lock, announced = threading.Lock(), -1

    def announce(number: int) -> None:
        """Has the shards of the next two stretches fetched, whenever a stretch begins."""
        nonlocal announced
        now = number // stretch
        with lock:
            if announced - MAX_READS <= now <= announced:  # other threads may be a little behind
                return
            announced = now
            numbers = np.arange(max(0, now - 1) * stretch, (now + 3) * stretch)
            store.keep_shards(order.examples((numbers[:, None] * batch_size + indices).ravel()))

    def read(number: int, threads: int) -> Batch:
        if shuffle_shards:
            announce(number)
        return store.read(order.examples(number * batch_size + indices), threads)

    return iter(_pipeline(sys.maxsize // batch_size, read, place, store, len(indices)))


def eval_batches(
    store: Store,
    batch_size: int,
    local_indices: Int[np.ndarray, " L"] | None = None,
    place: Callable[[Batch], Any] = lambda batch: batch,
) -> Iterator[Any]:
    """Yields each example once, in the order of the store; one host's part of every global batch.

    The last batch is padded with black images with label -1, which the evaluation step does not
    count. So every batch has the same shape, which avoids a second compilation, and
    every host yields the same number of batches, without which collectives would hang.

    Args:
      store: of the split to evaluate.
      batch_size: global batch size.
      local_indices: as for `train_batches`.
      place: as for `train_batches`.
    """
    indices = np.arange(batch_size) if local_indices is None else local_indices

    def read(number: int, threads: int) -> Batch:
        positions = number * batch_size + indices
        real = positions[positions < store.num_examples]
        return store.read(real, threads, pad_to=len(indices))

    num_batches = -(-store.num_examples // batch_size)
    return iter(_pipeline(num_batches, read, place, store, len(indices)))


class Order:
    """Which example is at each position of the endless stream of epochs. Threads may share it.

    By default an epoch is one random permutation of all examples. With `shuffle_shards` = L, the
    rows of every batch form L lanes of equal size. Each lane reads one shard after another, in
    random order, and the images of a shard in random order. So a batch mixes the images of L
    shards, and whoever reads some rows of each batch needs only the shards of their lanes: L shards
    are open over all hosts, and a host that has 1/H of the rows fetches 1/H of the shards.

    An order depends on nothing but the arguments. In particular, not on the number of hosts.

    Args:
      store: whose examples are ordered.
      batch_size: global batch size. It matters only for lanes.
      seed: determines, together with the epoch, an epoch's order.
      shuffle_shards: the number of lanes, or 0.
    """

    def __init__(self, store: Store, batch_size: int, seed: int, shuffle_shards: int = 0):
        self.store, self.batch_size, self.seed = store, batch_size, seed
        self.shuffle_shards = shuffle_shards
        # Some threads may still read the end of the previous epoch.
        self._permutation = functools.lru_cache(maxsize=2)(self._permute)
        self._lock = threading.Lock()

    def examples(self, positions: Int[np.ndarray, " B"]) -> Int64[np.ndarray, " B"]:
        """Returns indices in [0, N) for positions from 0 on. Epoch e is [e * N, (e + 1) * N)."""
        epochs, offsets = np.divmod(np.asarray(positions, np.int64), self.store.num_examples)
        examples = np.empty_like(offsets)
        for epoch in np.unique(epochs):  # two at the end of an epoch, otherwise one
            in_epoch = epochs == epoch
            with self._lock:  # else all reading threads would compute a new epoch's order
                order = self._permutation(int(epoch))
            examples[in_epoch] = order[offsets[in_epoch]]
        return examples

    def _permute(self, epoch: int) -> Int64[np.ndarray, " N"]:
        """An epoch's order. For ImageNet it takes 10 MB and 17 to 32 ms, with lanes 0.2 s.

        NumPy may change this order between its versions, so that all hosts need the same one.
        """
        count = self.store.num_examples
        rng = np.random.default_rng((self.seed, epoch))
        if not self.shuffle_shards:
            return rng.permutation(count)
        shards = self.store.rows // self.store.slots_per_shard
        ranks = rng.permutation(shards[-1] + 1)
        shard_by_shard = np.argsort(ranks[shards] + rng.random(count), kind="stable")
        # The lanes divide this sequence among themselves, each by the positions it has.
        rows = (epoch * count + np.arange(count)) % self.batch_size
        lanes = rows * self.shuffle_shards // self.batch_size
        order = np.empty(count, np.int64)
        order[np.argsort(lanes, kind="stable")] = shard_by_shard
        return order


def build_order(store: Store, config: ConfigDict) -> Order:
    """Returns the order in which a run of a config sees the examples of its train split."""
    seed = seed_for(config, "order")
    return Order(store, config.batch_size, seed, config.shuffle_shards)


def _advise(store: Store, shuffle_shards: int) -> None:
    """Says so if the order does not suit the store."""
    if is_url(store.path) and not shuffle_shards:
        distributed.say(
            f"{store.path} is read with one request for each image; with "
            "--config.shuffle_shards=16 it is read in whole shards (docs/data.md)"
        )
    if shuffle_shards:
        num_classes = len(store.class_names)
        shards = store.rows // store.slots_per_shard
        classes_per_shard = len(np.unique(shards * num_classes + store.labels)) / (shards[-1] + 1)
        if classes_per_shard * shuffle_shards < num_classes / 2:
            distributed.say(
                f"the images of {store.path} are stored class by class, so that batches from "
                f"{shuffle_shards} shards lack most classes; shuffle_shards=0 mixes all"
            )


def _pipeline(
    num_batches: int,
    read: Callable[[int, int], Batch],
    place: Callable[[Batch], Any],
    store: Store,
    local_batch_size: int,
) -> grain.IterDataset:
    """Reads batches 0, 1, … in threads and places them, both ahead of the consumer.

    Grain's elements are the numbers of batches, not examples: its own shuffling and batching cost
    10 µs of Python per example, half the time of reading one.

    Several threads read one batch each, as long as READ_AHEAD_BYTES allow that many batches.
    Otherwise several threads share a batch, which needs less memory and is as fast if it is large.
    """
    batch_bytes = max(1, local_batch_size * math.prod(store.image_shape))
    affordable = READ_AHEAD_BYTES // batch_bytes
    num_placed = max(1, min(MAX_PLACED, affordable // 4))
    # Another one is being placed. With 0, the thread that places batches also reads them.
    num_reads = max(0, min(MAX_READS, affordable - num_placed - 1))
    threads = -(-MAX_READS // max(1, num_reads))
    visible_in_profiles = jax.profiler.annotate_function(read, name="read batch")
    batches = grain.MapDataset.range(num_batches).map(lambda n: visible_in_profiles(n, threads))
    placed = batches.to_iter_dataset(
        grain.ReadOptions(num_threads=num_reads, prefetch_buffer_size=num_reads)
    ).map(place)
    return grain.experimental.ThreadPrefetchIterDataset(placed, prefetch_buffer_size=num_placed)
