"""Nearest neighbors equal scikit-learn's, from a stream, a store and an index."""

import images
import numpy as np
import pytest
from sklearn.neighbors import NearestNeighbors

from alexnet_jax import inference
from alexnet_jax.analysis.neighbors import (
    build_index,
    nearest,
    nearest_in_index,
    nearest_in_store,
)
from alexnet_jax.data.store import Store


def parts(features, *ends):
    return iter(np.split(features, ends))


@pytest.mark.parametrize("ends", [(), (1,), (100, 200, 300), (3, 299)])
def test_nearest_equals_scikit_learn_for_any_batches(ends):
    rng = np.random.default_rng(0)
    features = rng.normal(size=(300, 40)).astype(np.float32)
    queries = rng.normal(size=(5, 40)).astype(np.float32)
    found, distances = nearest(queries, parts(features, *ends), 7)
    expected = NearestNeighbors(n_neighbors=7, algorithm="brute").fit(features.astype(np.float64))
    distances_there, indices = expected.kneighbors(queries.astype(np.float64))
    np.testing.assert_array_equal(found, indices)
    np.testing.assert_allclose(distances, distances_there, rtol=1e-6)
    assert found.dtype == np.int64 and distances.dtype == np.float32


def test_small_distances_between_large_features_are_exact():
    """float32 would cancel: the distances are a millionth of the features' norm."""
    base = np.full(4096, 1000.0, np.float32)
    features = np.tile(base, (50, 1))
    features[:, 0] += np.arange(50)[::-1] / 8
    found, distances = nearest(features[[30]], parts(features, 17, 31), 4)
    assert found[0, 0] == 30 and distances[0, 0] == 0
    assert set(found[0, 1:3]) == {29, 31}
    np.testing.assert_allclose(distances[0], [0, 1 / 8, 1 / 8, 1 / 4])


def test_equal_distances_are_in_the_order_of_the_stream():
    features = np.ones((40, 8), np.float32)
    found, distances = nearest(np.zeros((2, 8), np.float32), parts(features, 10, 20), 3)
    np.testing.assert_array_equal(found, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(distances, np.sqrt(8), rtol=1e-6)


def test_short_stream_gives_all_of_its_features():
    found, distances = nearest(np.zeros((2, 3), np.float32), iter([np.eye(3)[:2]]), 6)
    assert found.shape == distances.shape == (2, 2)


def test_one_batch_at_a_time_is_in_memory():
    held = []

    def stream():
        import weakref

        for number in range(5):
            batch = np.full((10, 4), number, np.float32)
            held.append(weakref.ref(batch))
            yield batch
            del batch
            assert sum(ref() is not None for ref in held) <= 1

    found, _ = nearest(np.full((1, 4), 4, np.float32), stream(), 2)
    np.testing.assert_array_equal(found, [[40, 41]])


def test_neighbors_in_a_store_equal_scikit_learn(network, digit_stores):
    split = digit_stores["eval"]
    queries = images.photograph(0, 72, 72)[None]
    found, distances = nearest_in_store(network, split, queries, 4)
    extract = inference.feature_extractor(network, ["relu7"])
    everything = split.read(np.arange(split.num_examples))["image"]
    reference = NearestNeighbors(n_neighbors=4, algorithm="brute")
    reference.fit(np.asarray(extract(everything)["relu7"]))
    distances_there, expected = reference.kneighbors(np.asarray(extract(queries)["relu7"]))
    np.testing.assert_array_equal(found, expected)
    np.testing.assert_allclose(distances, distances_there, rtol=1e-3)


@pytest.fixture(scope="module")
def index(network, digit_stores):
    return build_index(network, digit_stores["train"], 300)


def test_index_has_evenly_spaced_examples(network, digit_stores, index):
    split = digit_stores["train"]
    np.testing.assert_array_equal(np.unique(np.diff(index.rows)), [13, 14])  # 4,000 / 300
    assert index.rows[0] == 0 and index.rows[-1] >= split.num_examples - 14
    expected = inference.feature_extractor(network, ["relu7"])(split.read(index.rows)["image"])
    np.testing.assert_allclose(index.features, expected["relu7"], rtol=1e-4, atol=1e-4)


def test_index_of_a_small_store_has_all_examples(network, digit_stores):
    small = Store(**{**vars(digit_stores["train"]), "num_examples": 130})
    assert build_index(network, small, 2000).rows.tolist() == list(range(130))


def test_indexed_example_is_its_own_nearest_neighbor(index):
    rows, distances = nearest_in_index(index, index.features[[7, 250]], 3)
    np.testing.assert_array_equal(rows[:, 0], index.rows[[7, 250]])
    np.testing.assert_array_equal(distances[:, 0], 0)
