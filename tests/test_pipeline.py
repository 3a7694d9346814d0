"""Every example once in each epoch, in an order that the seed decides, from any position on."""

import itertools

import numpy as np
import pytest

from alexnet_jax import config as configs
from alexnet_jax import pipeline, store

EXAMPLES = 1000


@pytest.fixture(scope="module")
def digits_store(digits):
    config = configs.load("configs/quickstart.py", [("data_dir", str(digits))])
    return store.open_or_prepare(config)["eval"]


class Numbered:
    """A store whose labels are the places of its examples."""

    num_examples = EXAMPLES

    def read(self, indices):
        return {"image": np.zeros((len(indices), 1, 1, 3), np.uint8), "label": np.int32(indices)}


def stream(batches, seed=0, batch_size=64, hosts=1):
    """The labels of so many global batches."""
    iterators = [
        pipeline.train_batches(Numbered(), batch_size, seed, host, hosts) for host in range(hosts)
    ]
    return [
        np.concatenate([next(iterator)["label"] for iterator in iterators]) for _ in range(batches)
    ]


@pytest.mark.parametrize("hosts", [1, 2, 4])
@pytest.mark.parametrize("batch_size", [64, 100, 300])
def test_an_epoch_is_every_example_once_whatever_the_batch_size(batch_size, hosts):
    labels = np.concatenate(stream(3 * EXAMPLES // batch_size + 1, 0, batch_size, hosts))
    if hosts == 1:
        for epoch in range(3):
            of_epoch = labels[epoch * EXAMPLES : (epoch + 1) * EXAMPLES]
            assert sorted(of_epoch) == list(range(EXAMPLES))
    counts = np.bincount(labels, minlength=EXAMPLES)
    assert {3, 4} >= set(counts)


@pytest.mark.parametrize("hosts", [2, 4])
def test_hosts_share_the_batches_of_one_host(hosts):
    for shared, whole in zip(stream(40, hosts=hosts), stream(40), strict=True):
        assert sorted(shared) == sorted(whole)


def test_epochs_and_seeds_have_orders_of_their_own():
    first, second = stream(2, batch_size=EXAMPLES)
    (other,) = stream(1, seed=1, batch_size=EXAMPLES)
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


def test_batches_are_the_stores_images_and_labels(digits_store):
    batch = next(pipeline.train_batches(digits_store, 32, seed=0))
    assert batch["image"].shape == (32, 72, 72, 3)
    assert batch["image"].dtype == np.uint8
    assert batch["label"].dtype == np.int32
    everything = digits_store.read(np.arange(digits_store.num_examples))
    for image, label in zip(batch["image"], batch["label"], strict=True):
        same = (everything["image"] == image).all(axis=(1, 2, 3))
        assert label in everything["label"][same]


@pytest.mark.parametrize(("batch_size", "hosts"), [(64, 1), (64, 4), (1000, 1), (1500, 2)])
def test_evaluation_sees_every_example_once_and_marks_what_fills_the_last_batch(batch_size, hosts):
    parts = [
        list(pipeline.eval_batches(Numbered(), batch_size, host, hosts)) for host in range(hosts)
    ]
    assert len({len(batches) for batches in parts}) == 1
    assert {len(b["label"]) for b in itertools.chain(*parts)} == {batch_size // hosts}
    labels = np.concatenate([b["label"] for b in itertools.chain(*parts)])
    assert sorted(labels[labels >= 0]) == list(range(EXAMPLES))
