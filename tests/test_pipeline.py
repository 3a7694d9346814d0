"""Every example once in each epoch, in an order that the seed decides, from any position on."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from alexnet_jax.data import pipeline
from alexnet_jax.utils.errors import UserError

EXAMPLES = 1000


class Numbered:
    """A store whose labels are the places of its examples, and which notes what was read."""

    def __init__(self, num_examples=EXAMPLES):
        self.num_examples = num_examples
        self.was_read = []

    def read(self, indices):
        assert ((indices >= 0) & (indices < self.num_examples)).all()
        self.was_read += indices.tolist()
        return {"image": np.zeros((len(indices), 1, 1, 3), np.uint8), "label": np.int32(indices)}


def share_of(batch_size, host, hosts):
    return np.array_split(np.arange(batch_size), hosts)[host]


def stream(batches, seed=0, batch_size=64, hosts=1, num_examples=EXAMPLES, positions=None):
    """The labels of so many global batches, from positions on, and the hosts' positions then."""
    iterators = [
        pipeline.train_batches(
            Numbered(num_examples), batch_size, seed, share_of(batch_size, host, hosts)
        )
        for host in range(hosts)
    ]
    for iterator in iterators if positions else ():
        iterator.set_state(positions[0])
    found = [
        np.concatenate([next(iterator)["label"] for iterator in iterators]) for _ in range(batches)
    ]
    return found, [iterator.get_state() for iterator in iterators]


sizes = st.integers(1, 300)
batch_sizes = st.integers(1, 70)
host_counts = st.integers(1, 9)
few = settings(max_examples=40, deadline=None, derandomize=True)


@few
@given(sizes, batch_sizes, host_counts, st.integers(0, 2**32 - 1))
def test_an_epoch_is_every_example_once_over_all_hosts(num_examples, batch_size, hosts, seed):
    """Whether or not the batch divides the examples, or the hosts the batch."""
    count = -(-3 * num_examples // batch_size)
    labels = np.concatenate(stream(count, seed, batch_size, hosts, num_examples)[0])
    for epoch in range(3):
        of_epoch = labels[epoch * num_examples : (epoch + 1) * num_examples]
        assert sorted(of_epoch) == list(range(num_examples))


@few
@given(sizes, batch_sizes, host_counts)
def test_hosts_share_the_batches_of_one_host_in_the_same_order(num_examples, batch_size, hosts):
    shared, _ = stream(5, 0, batch_size, hosts, num_examples)
    whole, _ = stream(5, 0, batch_size, 1, num_examples)
    np.testing.assert_array_equal(shared, whole)


@few
@given(sizes, batch_sizes, host_counts, host_counts, st.integers(0, 12))
def test_another_number_of_hosts_goes_on_at_the_same_place(
    num_examples, batch_size, before, after, done
):
    uninterrupted, _ = stream(done + 4, 0, batch_size, 1, num_examples)
    first, positions = stream(done, 0, batch_size, before, num_examples)
    assert all(position == positions[0] for position in positions)
    rest, _ = stream(4, 0, batch_size, after, num_examples, positions)
    np.testing.assert_array_equal([*first, *rest], uninterrupted)


@few
@given(sizes, batch_sizes, host_counts)
def test_a_host_reads_nothing_but_its_share_of_the_batches(num_examples, batch_size, hosts):
    whole, _ = stream(20, 0, batch_size, 1, num_examples)
    for host in range(hosts):
        store = Numbered(num_examples)
        share = share_of(batch_size, host, hosts)
        iterator = pipeline.train_batches(store, batch_size, 0, share)
        taken = [next(iterator)["label"] for _ in range(3)]
        for labels, of_all in zip(taken, whole, strict=False):
            np.testing.assert_array_equal(labels, of_all[share])
        # It may be ahead of what was taken, by a bounded number of batches.
        ahead = pipeline.READS_IN_FLIGHT + pipeline.PLACED_AHEAD + 3
        own = [batch[share] for batch in whole[: 3 + ahead]]
        assert set(store.was_read) <= set(np.concatenate(own).tolist())
        assert len(store.was_read) <= (3 + ahead) * len(share)


def test_epochs_and_seeds_have_orders_of_their_own():
    (first, second), _ = stream(2, batch_size=EXAMPLES)
    (other,), _ = stream(1, seed=1, batch_size=EXAMPLES)
    assert not (first == second).all()
    assert not (first == other).all()
    assert (np.diff(first) == 1).mean() < 0.01


def test_a_restored_position_goes_on_with_the_very_next_batch():
    iterator = pipeline.train_batches(Numbered(), 64, seed=0)
    for _ in range(23):
        next(iterator)
    position = iterator.get_state()
    again = pipeline.train_batches(Numbered(), 64, seed=0)
    again.set_state(position)
    for _ in range(5):
        np.testing.assert_array_equal(next(again)["label"], next(iterator)["label"])


def test_batches_are_the_stores_images_and_labels(digit_stores):
    batch = next(pipeline.train_batches(digit_stores["eval"], 32, seed=0))
    assert batch["image"].shape == (32, 72, 72, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    everything = digit_stores["eval"].read(np.arange(digit_stores["eval"].num_examples))
    for image, label in zip(batch["image"], batch["label"], strict=True):
        same = (everything["image"] == image).all(axis=(1, 2, 3))
        assert label in everything["label"][same]


@few
@given(sizes, batch_sizes, host_counts)
def test_evaluation_sees_every_example_once_and_marks_what_fills_the_last_batch(
    num_examples, batch_size, hosts
):
    parts = [
        list(
            pipeline.eval_batches(
                Numbered(num_examples), batch_size, share_of(batch_size, host, hosts)
            )
        )
        for host in range(hosts)
    ]
    assert {len(batches) for batches in parts} == {-(-num_examples // batch_size)}
    for host, batches in enumerate(parts):
        share = share_of(batch_size, host, hosts)
        assert {len(batch["label"]) for batch in batches} == {len(share)}
    batches = [
        np.concatenate([batch["label"] for batch in row]) for row in zip(*parts, strict=True)
    ]
    labels = np.concatenate(batches)
    np.testing.assert_array_equal(labels[:num_examples], np.arange(num_examples))
    assert (labels[num_examples:] == -1).all()


def test_batches_are_placed_ahead_of_being_asked_for():
    """Without anybody waiting, the next batches are already on their way to the devices."""
    placed = threading.Semaphore(0)

    def place(batch):
        placed.release()
        return batch

    iterator = pipeline.train_batches(Numbered(), 64, seed=0, place=place)
    next(iterator)
    for _ in range(1 + pipeline.PLACED_AHEAD):
        assert placed.acquire(timeout=60)
    position = iterator.get_state()
    again = pipeline.train_batches(Numbered(), 64, seed=0)
    again.set_state(position)
    np.testing.assert_array_equal(next(again)["label"], next(iterator)["label"])


def test_an_error_of_the_store_reaches_whoever_asks_for_the_batch():
    class Failing(Numbered):
        def read(self, indices):
            raise UserError("the store is gone")

    with pytest.raises(UserError, match="the store is gone"):
        next(pipeline.train_batches(Failing(), 64, seed=0))
