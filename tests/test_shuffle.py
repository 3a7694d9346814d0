"""Every epoch's order is a permutation, looks random, and is the same wherever one begins."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from alexnet_jax.data.shuffle import shuffled

IMAGENET = 1_281_167


@given(st.integers(1, 3000), st.integers(0, 2**32 - 1), st.integers(0, 100))
def test_an_epoch_is_a_permutation(count, seed, epoch):
    order = shuffled(epoch * count + np.arange(count), count, seed)
    assert sorted(order) == list(range(count))


def test_imagenets_epoch_is_a_permutation():
    order = shuffled(5 * IMAGENET + np.arange(IMAGENET), IMAGENET, 0)
    np.testing.assert_array_equal(np.bincount(order, minlength=IMAGENET), 1)


@given(st.integers(1, 500), st.lists(st.integers(0, 10**6), max_size=20))
def test_a_place_has_its_example_whatever_else_is_asked_for(count, places):
    alone = [int(shuffled(np.array([place]), count, 7)[0]) for place in places]
    assert shuffled(np.array(places, np.int64), count, 7).tolist() == alone


@pytest.mark.parametrize("count", [1000, 65_536, 100_003])
def test_orders_look_random(count):
    """As a random permutation would: where an example goes, its neighbours and other epochs."""
    order, other = (shuffled(epoch * count + np.arange(count), count, 3) for epoch in (0, 1))
    bound = 4 / np.sqrt(count)
    assert abs(np.corrcoef(np.arange(count), order)[0, 1]) < bound
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < bound
    assert abs(np.corrcoef(order, other)[0, 1]) < bound
    # Fixed points and steps to the next example are Poisson of mean 1.
    assert (order == np.arange(count)).sum() < 8
    assert (np.diff(order) == 1).sum() < 8
    # Ten tenths of the examples in each tenth of the epoch, by a chi-square of 81 degrees.
    table = np.zeros((10, 10))
    np.add.at(table, (np.arange(count) * 10 // count, order * 10 // count), 1)
    assert ((table - count / 100) ** 2 / (count / 100)).sum() < 81 + 5 * np.sqrt(2 * 81)


def test_every_order_of_three_examples_comes_about_equally_often():
    orders = [tuple(shuffled(3 * epoch + np.arange(3), 3, 0).tolist()) for epoch in range(3000)]
    counts = [orders.count(order) for order in set(orders)]
    assert len(counts) == 6
    assert min(counts) > 400


def test_seeds_have_orders_of_their_own():
    first, second = (shuffled(np.arange(1000), 1000, seed) for seed in (0, 1))
    assert (first == second).sum() < 8
