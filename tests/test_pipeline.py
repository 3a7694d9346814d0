"""Each example once per epoch, in an order that the seed determines, from any position, on any
number of hosts."""

import json
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_jax import config as configs
from alexnet_jax.data import pipeline
from alexnet_jax.data.shards import slots_per_shard
from alexnet_jax.utils.errors import UserError

EXAMPLES = 1000
IMAGENET = 1_281_167


IN_SHARDS = 2048  # image size of a store with 16 images per shard
SLOTS = 16


class Numbered:
    """A store whose labels are the indices of its examples; it records which ones are read.

    Of shards that it has to keep, it records how often each is fetched and how many it keeps.
    """

    def __init__(self, num_examples=EXAMPLES, image_size=1):
        self.num_examples = num_examples
        self.image_shape = (image_size, image_size, 3)
        self.slots_per_shard = slots_per_shard(self.image_shape)
        self.rows = np.arange(num_examples)
        self.path, self.labels, self.class_names = "numbers", self.rows % 2, ("even", "odd")
        self.was_read = []
        self.kept, self.most_kept, self.fetched, self.read_unkept = set(), 0, Counter(), 0

    def keep_shards(self, indices):
        shards = set((indices // SLOTS).tolist())
        self.fetched.update(shards - self.kept)
        self.kept, self.most_kept = shards, max(self.most_kept, len(shards))

    def read(self, indices, threads=1, pad_to=0):
        assert ((indices >= 0) & (indices < self.num_examples)).all()
        self.was_read += indices.tolist()
        self.read_unkept += len(set((indices // SLOTS).tolist()) - self.kept)
        labels = np.pad(np.int32(indices), (0, max(0, pad_to - len(indices))), constant_values=-1)
        return {"image": np.zeros((len(labels), 1, 1, 3), np.uint8), "label": labels}


def local_indices(batch_size, host, hosts):
    return np.array_split(np.arange(batch_size), hosts)[host]


def iterators_of(stores, batch_size, seed=0, shuffle_shards=0):
    """Returns one iterator over training batches for each host, which has a store of its own."""
    return [
        pipeline.train_batches(
            pipeline.Order(store, batch_size, seed, shuffle_shards),
            local_indices(batch_size, host, len(stores)),
        )
        for host, store in enumerate(stores)
    ]


def stream(
    num_batches,
    seed=0,
    batch_size=64,
    hosts=1,
    num_examples=EXAMPLES,
    positions=None,
    shuffle_shards=0,
):
    """Returns the labels of global batches, starting at `positions`, and the final positions."""
    stores = [Numbered(num_examples, IN_SHARDS) for _ in range(hosts)]
    iterators = iterators_of(stores, batch_size, seed, shuffle_shards)
    for iterator in iterators if positions else ():
        iterator.set_state(positions[0])
    batches = [
        np.concatenate([next(iterator)["label"] for iterator in iterators])
        for _ in range(num_batches)
    ]
    return batches, [iterator.get_state() for iterator in iterators]


sizes = st.integers(1, 300)
batch_sizes = st.integers(1, 70)
host_counts = st.integers(1, 9)
seeds = st.integers(0, 2**32 - 1)
lanes = st.sampled_from([0, 1, 3, 8])  # shuffle_shards; 0 is a permutation of all examples
few = settings(max_examples=40, deadline=None, derandomize=True)


# The order


@few
@given(st.integers(1, 3000), batch_sizes, seeds, st.integers(0, 100), lanes)
def test_order_of_an_epoch_is_a_permutation(num_examples, batch_size, seed, epoch, shuffle_shards):
    order = pipeline.Order(Numbered(num_examples, IN_SHARDS), batch_size, seed, shuffle_shards)
    examples = order.examples(epoch * num_examples + np.arange(num_examples))
    assert sorted(examples) == list(range(num_examples))


@few
@given(st.integers(1, 500), st.lists(st.integers(0, 10**6), max_size=20), lanes)
def test_order_allows_random_access(num_examples, positions, shuffle_shards):
    order = pipeline.Order(Numbered(num_examples, IN_SHARDS), 64, 7, shuffle_shards)
    single = [int(order.examples(np.array([position]))[0]) for position in positions]
    assert order.examples(np.array(positions, np.int64)).tolist() == single


def test_order_is_the_documented_numpy_permutation():
    """Any program can reproduce the order of a run."""
    order = pipeline.Order(Numbered(IMAGENET), 128, seed=3)
    examples = order.examples(5 * IMAGENET + np.arange(IMAGENET))
    np.testing.assert_array_equal(examples, np.random.default_rng((3, 5)).permutation(IMAGENET))


def test_order_computes_each_epoch_once_for_all_threads():
    order = pipeline.Order(Numbered(IMAGENET), 128, seed=0)
    positions = 3 * IMAGENET - 500 + np.arange(1000)  # the end of one epoch, the start of another
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: order.examples(positions), range(16)))
    np.testing.assert_array_equal(found, [found[0]] * 16)
    assert order._permutation.cache_info().misses == 2


@pytest.mark.parametrize("shuffle_shards", [0, 8])
def test_epochs_and_seeds_have_different_orders(shuffle_shards):
    (first, second), _ = stream(2, batch_size=EXAMPLES, shuffle_shards=shuffle_shards)
    (other,), _ = stream(1, seed=1, batch_size=EXAMPLES, shuffle_shards=shuffle_shards)
    for order in (second, other):
        assert (first == order).sum() < 8  # of two random orders: Poisson with mean 1
    assert (np.diff(first) == 1).sum() < (8 if shuffle_shards == 0 else 120)


# Shard by shard


def test_batch_mixes_as_many_shards_as_configured():
    """16 shards of 16 images; 4 lanes of 8 rows read 4 shards each."""
    batches, _ = stream(8, batch_size=32, num_examples=256, shuffle_shards=4)
    for first, second in zip(batches[::2], batches[1::2], strict=True):
        assert [len(set(lane // SLOTS)) for lane in first.reshape(4, 8)] == [1] * 4
        for shard in np.concatenate([first.reshape(4, 8), second.reshape(4, 8)], axis=1):
            assert len(set(shard // SLOTS)) == 1 and len(set(shard)) == SLOTS
            assert (np.diff(shard) == 1).sum() < 8  # in random order


@pytest.mark.parametrize("hosts", [1, 2, 3, 4])
@pytest.mark.parametrize("num_examples", [1600, 1607])
def test_shards_are_fetched_once_an_epoch_by_the_host_of_their_lane(num_examples, hosts):
    """Except that two lanes may share a shard. A host keeps at most four shards of each lane."""
    batch_size, shuffle_shards, epochs = 24, 12, 3
    stores = [Numbered(num_examples, IN_SHARDS) for _ in range(hosts)]
    iterators = iterators_of(stores, batch_size, shuffle_shards=shuffle_shards)
    for _ in range(epochs * num_examples // batch_size):
        for iterator in iterators:
            next(iterator)
    num_shards = -(-num_examples // SLOTS)
    for store in stores:
        assert store.read_unkept == 0
        assert store.most_kept <= 4 * shuffle_shards / hosts
    fetched = sum(store.fetched.total() for store in stores)
    read_ahead = 2 * shuffle_shards
    assert fetched <= epochs * (num_shards + shuffle_shards) + read_ahead


def test_run_does_not_resume_in_another_order():
    config = configs.default_config()
    there = json.loads(configs.to_json(config))
    config.shuffle_shards = 4
    assert configs.differing_fields(config, there) == ["shuffle_shards (0 there, 4 here)"]


def test_store_in_the_order_of_its_classes_is_reported(capsys):
    store = Numbered(1600, IN_SHARDS)
    iterators_of([store], 64, shuffle_shards=8)
    assert capsys.readouterr().out == ""
    store.labels, store.class_names = store.rows // 50, tuple(map(str, range(32)))
    iterators_of([store], 64, shuffle_shards=8)
    assert "stored class by class, so that batches from 8 shards lack" in capsys.readouterr().out


# Training batches


@few
@given(sizes, batch_sizes, host_counts, seeds, lanes)
def test_train_epoch_has_each_example_once_over_all_hosts(
    num_examples, batch_size, hosts, seed, shuffle_shards
):
    """Also if the batch size does not divide the examples, or the hosts the batch size."""
    num_batches = -(-3 * num_examples // batch_size)
    batches, _ = stream(
        num_batches, seed, batch_size, hosts, num_examples, shuffle_shards=shuffle_shards
    )
    labels = np.concatenate(batches)
    for epoch in range(3):
        of_epoch = labels[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(of_epoch) == list(range(num_examples))


@few
@given(sizes, batch_sizes, host_counts, lanes)
def test_global_batches_do_not_depend_on_the_number_of_hosts(
    num_examples, batch_size, hosts, shuffle_shards
):
    several, _ = stream(5, 0, batch_size, hosts, num_examples, shuffle_shards=shuffle_shards)
    single, _ = stream(5, 0, batch_size, 1, num_examples, shuffle_shards=shuffle_shards)
    np.testing.assert_array_equal(several, single)


@few
@given(sizes, batch_sizes, host_counts, host_counts, st.integers(0, 12), lanes)
def test_resuming_on_another_number_of_hosts_continues_the_stream(
    num_examples, batch_size, before, after, done, shuffle_shards
):
    same = {"num_examples": num_examples, "shuffle_shards": shuffle_shards}
    uninterrupted, _ = stream(done + 4, 0, batch_size, 1, **same)
    first, positions = stream(done, 0, batch_size, before, **same)
    assert all(position == positions[0] for position in positions)
    rest, _ = stream(4, 0, batch_size, after, positions=positions, **same)
    np.testing.assert_array_equal([*first, *rest], uninterrupted)


def test_restored_position_continues_with_the_next_batch():
    iterator = pipeline.train_batches(pipeline.Order(Numbered(), 64, seed=0))
    for _ in range(23):
        next(iterator)
    restored = pipeline.train_batches(pipeline.Order(Numbered(), 64, seed=0))
    restored.set_state(iterator.get_state())
    for _ in range(5):
        np.testing.assert_array_equal(next(restored)["label"], next(iterator)["label"])


@few
@given(sizes, batch_sizes, host_counts)
def test_host_reads_only_its_part_of_each_batch(num_examples, batch_size, hosts):
    single, _ = stream(20, 0, batch_size, 1, num_examples)
    for host in range(hosts):
        store = Numbered(num_examples)
        indices = local_indices(batch_size, host, hosts)
        iterator = pipeline.train_batches(pipeline.Order(store, batch_size, 0), indices)
        taken = [next(iterator)["label"] for _ in range(3)]
        for labels, of_all in zip(taken, single, strict=False):
            np.testing.assert_array_equal(labels, of_all[indices])
        # It may read ahead of what was taken, by a limited number of batches.
        ahead = pipeline.MAX_READS + pipeline.MAX_PLACED + 3
        own = [batch[indices] for batch in single[: 3 + ahead]]
        assert set(store.was_read) <= set(np.concatenate(own).tolist())
        assert len(store.was_read) <= (3 + ahead) * len(indices)


@pytest.mark.parametrize("megabytes", [1, 25, 101, 201, 350, 700, 6400])
def test_read_ahead_is_limited_to_a_gigabyte_or_two_batches(monkeypatch, megabytes):
    monkeypatch.setattr(pipeline, "MAX_READS", 8)
    image_size = 256
    batch_size = int(megabytes * 1e6 / (image_size**2 * 3))
    store = Numbered(batch_size, image_size)
    iterator = pipeline.train_batches(pipeline.Order(store, batch_size, seed=0))
    next(iterator)
    time.sleep(0.3)
    ahead = len(store.was_read) // batch_size - 1
    assert ahead == 2 or 3 <= ahead <= 11 and ahead * megabytes <= 1100
    assert ahead == 11 or (ahead + 1) * megabytes > 1000  # as many as fit


def test_threads_share_large_batches(monkeypatch):
    """Where memory suffices only for a few batches, several threads read each of them."""
    threads = []

    class Recording(Numbered):
        def read(self, indices, threads_of_batch=1, pad_to=0):
            threads.append(threads_of_batch)
            return super().read(indices)

    monkeypatch.setattr(pipeline, "MAX_READS", 8)
    monkeypatch.setattr(pipeline, "READ_AHEAD_BYTES", 64 * 3 * 6)
    next(pipeline.train_batches(pipeline.Order(Recording(), 64, seed=0)))
    next(pipeline.train_batches(pipeline.Order(Recording(), 64 * 6, seed=0)))
    assert threads[0] == 2 and threads[-1] == 8


def test_batches_contain_the_images_and_labels_of_the_store(digit_stores):
    batch = next(pipeline.train_batches(pipeline.Order(digit_stores["eval"], 32, seed=0)))
    assert batch["image"].shape == (32, 72, 72, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    everything = digit_stores["eval"].read(np.arange(digit_stores["eval"].num_examples))
    for image, label in zip(batch["image"], batch["label"], strict=True):
        same = (everything["image"] == image).all(axis=(1, 2, 3))
        assert label in everything["label"][same]


def test_batches_are_placed_before_they_are_requested():
    placed = threading.Semaphore(0)

    def place(batch):
        placed.release()
        return batch

    iterator = pipeline.train_batches(pipeline.Order(Numbered(), 64, seed=0), place=place)
    next(iterator)
    for _ in range(1 + pipeline.MAX_PLACED):
        assert placed.acquire(timeout=60)
    restored = pipeline.train_batches(pipeline.Order(Numbered(), 64, seed=0))
    restored.set_state(iterator.get_state())  # the position counts only the batch that was taken
    np.testing.assert_array_equal(next(restored)["label"], next(iterator)["label"])


def test_error_of_the_store_reaches_the_consumer():
    class Failing(Numbered):
        def read(self, *arguments, **options):
            raise UserError("the store is gone")

    with pytest.raises(UserError, match="the store is gone"):
        next(pipeline.train_batches(pipeline.Order(Failing(), 64, seed=0)))


# Evaluation batches


@few
@given(sizes, batch_sizes, host_counts)
def test_evaluation_has_each_example_once_and_pads_with_label_minus_one(
    num_examples, batch_size, hosts
):
    parts = [
        list(
            pipeline.eval_batches(
                Numbered(num_examples), batch_size, local_indices(batch_size, host, hosts)
            )
        )
        for host in range(hosts)
    ]
    assert {len(batches) for batches in parts} == {-(-num_examples // batch_size)}
    for host, batches in enumerate(parts):
        indices = local_indices(batch_size, host, hosts)
        assert {len(batch["label"]) for batch in batches} == {len(indices)}
    labels = np.concatenate(
        [
            np.concatenate([batch["label"] for batch in of_hosts])
            for of_hosts in zip(*parts, strict=True)
        ]
    )
    np.testing.assert_array_equal(labels[:num_examples], np.arange(num_examples))
    assert (labels[num_examples:] == -1).all()


def test_padding_is_black_and_is_not_read_from_the_store(digit_stores):
    store = digit_stores["eval"]
    *_, last = pipeline.eval_batches(store, 384)
    count = store.num_examples % 384
    assert (last["label"] >= 0).sum() == count
    assert last["image"][:count].any(axis=(1, 2, 3)).all() and not last["image"][count:].any()
    numbered = Numbered()
    assert len(list(pipeline.eval_batches(numbered, 384))) == 3
    assert sorted(numbered.was_read) == list(range(EXAMPLES))
