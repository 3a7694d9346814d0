"""Each example once per epoch, in an order that the seed determines, from any position, on any
number of hosts."""

import threading
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_jax.data import pipeline
from alexnet_jax.utils.errors import UserError

EXAMPLES = 1000
IMAGENET = 1_281_167


class Numbered:
    """A store whose labels are the indices of its examples; it records which ones are read."""

    def __init__(self, num_examples=EXAMPLES, image_size=1):
        self.num_examples = num_examples
        self.image_size = image_size
        self.was_read = []

    def read(self, indices, threads=1, pad_to=0):
        assert ((indices >= 0) & (indices < self.num_examples)).all()
        self.was_read += indices.tolist()
        labels = np.pad(np.int32(indices), (0, max(0, pad_to - len(indices))), constant_values=-1)
        return {"image": np.zeros((len(labels), 1, 1, 3), np.uint8), "label": labels}


def local_indices(batch_size, host, hosts):
    return np.array_split(np.arange(batch_size), hosts)[host]


def stream(num_batches, seed=0, batch_size=64, hosts=1, num_examples=EXAMPLES, positions=None):
    """Returns the labels of global batches, starting at `positions`, and the final positions."""
    iterators = [
        pipeline.train_batches(
            Numbered(num_examples), batch_size, seed, local_indices(batch_size, host, hosts)
        )
        for host in range(hosts)
    ]
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
few = settings(max_examples=40, deadline=None, derandomize=True)


# The order


@few
@given(st.integers(1, 3000), seeds, st.integers(0, 100))
def test_shuffled_epoch_is_a_permutation(num_examples, seed, epoch):
    order = pipeline.shuffled(epoch * num_examples + np.arange(num_examples), num_examples, seed)
    assert sorted(order) == list(range(num_examples))


@few
@given(st.integers(1, 500), st.lists(st.integers(0, 10**6), max_size=20))
def test_shuffled_allows_random_access(num_examples, positions):
    single = [
        int(pipeline.shuffled(np.array([position]), num_examples, 7)[0]) for position in positions
    ]
    together = pipeline.shuffled(np.array(positions, np.int64), num_examples, 7)
    assert together.tolist() == single


def test_shuffled_is_the_documented_numpy_permutation():
    """Any program can reproduce the order of a run."""
    order = pipeline.shuffled(5 * IMAGENET + np.arange(IMAGENET), IMAGENET, 3)
    np.testing.assert_array_equal(order, np.random.default_rng((3, 5)).permutation(IMAGENET))


def test_shuffled_computes_each_epoch_once_for_all_threads():
    pipeline._permutation.cache_clear()
    positions = 3 * IMAGENET - 500 + np.arange(1000)  # the end of one epoch, the start of another
    with ThreadPoolExecutor(8) as pool:
        orders = list(pool.map(lambda _: pipeline.shuffled(positions, IMAGENET, 0), range(16)))
    np.testing.assert_array_equal(orders, [orders[0]] * 16)
    assert pipeline._permutation.cache_info().misses == 2


def test_epochs_and_seeds_have_different_orders():
    (first, second), _ = stream(2, batch_size=EXAMPLES)
    (other,), _ = stream(1, seed=1, batch_size=EXAMPLES)
    for order in (second, other):
        assert (first == order).sum() < 8  # of two random orders: Poisson with mean 1
    assert (np.diff(first) == 1).sum() < 8


# Training batches


@few
@given(sizes, batch_sizes, host_counts, seeds)
def test_train_epoch_has_each_example_once_over_all_hosts(num_examples, batch_size, hosts, seed):
    """Also if the batch size does not divide the examples, or the hosts the batch size."""
    num_batches = -(-3 * num_examples // batch_size)
    labels = np.concatenate(stream(num_batches, seed, batch_size, hosts, num_examples)[0])
    for epoch in range(3):
        of_epoch = labels[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(of_epoch) == list(range(num_examples))


@few
@given(sizes, batch_sizes, host_counts)
def test_global_batches_do_not_depend_on_the_number_of_hosts(num_examples, batch_size, hosts):
    several, _ = stream(5, 0, batch_size, hosts, num_examples)
    single, _ = stream(5, 0, batch_size, 1, num_examples)
    np.testing.assert_array_equal(several, single)


@few
@given(sizes, batch_sizes, host_counts, host_counts, st.integers(0, 12))
def test_resuming_on_another_number_of_hosts_continues_the_stream(
    num_examples, batch_size, before, after, done
):
    uninterrupted, _ = stream(done + 4, 0, batch_size, 1, num_examples)
    first, positions = stream(done, 0, batch_size, before, num_examples)
    assert all(position == positions[0] for position in positions)
    rest, _ = stream(4, 0, batch_size, after, num_examples, positions)
    np.testing.assert_array_equal([*first, *rest], uninterrupted)


def test_restored_position_continues_with_the_next_batch():
    iterator = pipeline.train_batches(Numbered(), 64, seed=0)
    for _ in range(23):
        next(iterator)
    restored = pipeline.train_batches(Numbered(), 64, seed=0)
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
        iterator = pipeline.train_batches(store, batch_size, 0, indices)
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
    iterator = pipeline.train_batches(store, batch_size, seed=0)
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
    next(pipeline.train_batches(Recording(), 64, seed=0))
    next(pipeline.train_batches(Recording(), 64 * 6, seed=0))
    assert threads[0] == 2 and threads[-1] == 8


def test_batches_contain_the_images_and_labels_of_the_store(digit_stores):
    batch = next(pipeline.train_batches(digit_stores["eval"], 32, seed=0))
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

    iterator = pipeline.train_batches(Numbered(), 64, seed=0, place=place)
    next(iterator)
    for _ in range(1 + pipeline.MAX_PLACED):
        assert placed.acquire(timeout=60)
    restored = pipeline.train_batches(Numbered(), 64, seed=0)
    restored.set_state(iterator.get_state())  # the position counts only the batch that was taken
    np.testing.assert_array_equal(next(restored)["label"], next(iterator)["label"])


def test_error_of_the_store_reaches_the_consumer():
    class Failing(Numbered):
        def read(self, *arguments, **options):
            raise UserError("the store is gone")

    with pytest.raises(UserError, match="the store is gone"):
        next(pipeline.train_batches(Failing(), 64, seed=0))


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
