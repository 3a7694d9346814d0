"""The nearest by Euclidean distance, of more features than memory would hold."""

import images
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from alexnet_jax import inference as trained
from alexnet_jax.analysis.neighbors import nearest, nearest_in_store


def parts(features, *ends):
    return iter(np.split(features, ends))


@pytest.mark.parametrize("ends", [(), (1,), (100, 200, 300), (3, 299)])
def test_scikit_learn_finds_the_same_however_the_stream_is_cut(ends):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 40)).astype(np.float32)
    queries = rng.normal(size=(5, 40)).astype(np.float32)
    places, distances = nearest(queries, parts(features, *ends), 7)
    expected = NearestNeighbors(n_neighbors=7, algorithm="brute").fit(features.astype(np.float64))
    apart, chosen = expected.kneighbors(queries.astype(np.float64))
    np.testing.assert_array_equal(places, chosen)
    np.testing.assert_allclose(distances, apart, rtol=1e-6)
    assert places.dtype == np.int64 and distances.dtype == np.float32


def test_near_ones_far_from_the_origin_are_told_apart():
    """Where float32 would cancel: the distances are a millionth of the features' length."""
    base = np.full(4096, 1000.0, np.float32)
    features = np.tile(base, (50, 1))
    features[:, 0] += np.arange(50)[::-1] / 8
    places, distances = nearest(features[[30]], parts(features, 17, 31), 4)
    assert places[0, 0] == 30 and distances[0, 0] == 0
    assert set(places[0, 1:3]) == {29, 31}
    np.testing.assert_allclose(distances[0], [0, 1 / 8, 1 / 8, 1 / 4])


def test_equally_near_ones_are_in_the_order_of_the_stream():
    features = np.ones((40, 8), np.float32)
    places, distances = nearest(np.zeros((2, 8), np.float32), parts(features, 10, 20), 3)
    np.testing.assert_array_equal(places, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(distances, np.sqrt(8), rtol=1e-6)


def test_a_stream_shorter_than_asked_for_gives_all_it_has():
    places, distances = nearest(np.zeros((2, 3), np.float32), iter([np.eye(3)[:2]]), 6)
    assert places.shape == distances.shape == (2, 2)


def test_only_one_batch_is_held_at_a_time():
    held = []

    def stream():
        import weakref

        for number in range(5):
            batch = np.full((10, 4), number, np.float32)
            held.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(ref() is not None for ref in held) <= 1

    places, _ = nearest(np.full((1, 4), 4, np.float32), stream(), 2)
    np.testing.assert_array_equal(places, [[40, 41]])


def test_neighbors_in_a_store_are_scikit_learns(network, digit_stores):
    split = digit_stores["eval"]
    queries = images.photograph(0, 72, 72)[None]
    places, distances = nearest_in_store(network, split, queries, 4)
    extract = trained.feature_extractor(network, ["fc7"])
    everything = split.read(np.arange(split.num_examples))["image"]
    reference = NearestNeighbors(n_neighbors=4, algorithm="brute")
    reference.fit(np.asarray(extract(everything)["fc7"]))
    apart, expected = reference.kneighbors(np.asarray(extract(queries)["fc7"]))
    np.testing.assert_array_equal(places, expected)
    np.testing.assert_allclose(distances, apart, rtol=1e-3)
