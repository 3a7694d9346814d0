"""Nearest neighbors by fc7 features, as in the right half of the paper's Figure 4."""

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8
from tqdm import tqdm

from alexnet_jax import inference
from alexnet_jax.analysis.features import displayed_outputs
from alexnet_jax.data import pipeline
from alexnet_jax.data.store import Store
from alexnet_jax.inference import OfImages, Trained
from alexnet_jax.models.alexnet import has_classes

BATCH = 128  # images; every batch has this size, so that the network is compiled once


def nearest(
    queries: Float32[np.ndarray, "Q D"], batches: Iterable[Float32[np.ndarray, "B D"]], count: int
) -> tuple[Int64[np.ndarray, "Q count"], Float32[np.ndarray, "Q count"]]:
    """Returns each query's nearest features by Euclidean distance (paper §6.1).

    Keeps one batch and the nearest features so far in memory, however many batches there are.

    Args:
      batches: features; B may differ between batches.
      count: number of neighbors, at least 1.

    Returns:
      Indices into the concatenated batches, and distances in ascending order; equal distances are
      in the order of the indices. If there are fewer than `count` features, all of them.
    """
    queries = np.asarray(queries, np.float64)
    indices = np.empty((len(queries), 0), np.int64)
    distances = np.empty((len(queries), 0), np.float64)
    start = 0
    for batch in batches:
        features = np.asarray(batch, np.float64)
        candidates = _candidates(queries, features, count)
        exact = np.linalg.norm(features[candidates] - queries[:, None], axis=2)
        indices = np.hstack([indices, start + candidates])
        distances = np.hstack([distances, exact])
        kept = np.lexsort((indices, distances))[:, :count]
        indices = np.take_along_axis(indices, kept, axis=1)
        distances = np.take_along_axis(distances, kept, axis=1)
        start += len(features)
    return indices, distances.astype(np.float32)


def _candidates(
    queries: Float64[np.ndarray, "Q D"], features: Float64[np.ndarray, "B D"], count: int
) -> Int64[np.ndarray, "Q found"]:
    """Returns the indices of up to `count` nearest features, in any order.

    |a - b|² = |a|² - 2ab + |b|² is one matrix product, but cancels where a and b are close: in
    float32 to an error of a thousandth of |a|. float64 is accurate enough to choose candidates,
    whose distances are then computed exactly, and takes little time compared to the network.
    """
    squares = np.square(features).sum(1) - 2 * queries @ features.T
    return np.argsort(squares, axis=1, kind="stable")[:, :count]


def nearest_in_store(
    network: Trained, store: Store, images: UInt8[np.ndarray, "Q S S 3"], count: int
) -> tuple[Int64[np.ndarray, "Q count"], Float32[np.ndarray, "Q count"]]:
    """Returns the examples of a store whose fc7 features are nearest to those of images.

    Reads the whole store; shows a progress bar on a terminal.

    Args:
      images: S is the config's `image_size`.

    Returns:
      Indices of examples and distances, as `nearest` does.
    """
    extract = make_extractor(network)
    return nearest(compute_features(extract, images), _store_features(extract, store), count)


def feature_name(network: Trained) -> str:
    """Returns the name of the output that is compared: of the last hidden layer, relu7.

    Of a network without fully connected layers it is the output of the last pooling layer.
    """
    *_, hidden, last = displayed_outputs(network.model.variant).items()
    return (hidden if has_classes(network.model.variant) else last)[1]


def make_extractor(network: Trained) -> OfImages:
    """Returns a function from images uint8[B, S, S, 3] to features float32[B, D]."""
    name = feature_name(network)
    extract = inference.feature_extractor(network, [name])
    return lambda images: extract(images)[name].reshape(len(images), -1)


def compute_features(
    extract: OfImages, images: UInt8[np.ndarray, "Q S S 3"]
) -> Float32[np.ndarray, "Q D"]:
    """Returns the features of images, computed in batches of BATCH."""
    found = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        padded = np.pad(part, ((0, BATCH - len(part)), (0, 0), (0, 0), (0, 0)))
        found.append(np.asarray(extract(padded))[: len(part)])
    return np.concatenate(found)


def _store_features(extract: OfImages, store: Store) -> Iterator[Float32[np.ndarray, "B D"]]:
    """Yields the features of all examples in order; the next are computed meanwhile."""

    def place(batch: pipeline.Batch) -> tuple[Any, np.ndarray]:
        return extract(batch["image"]), batch["label"] >= 0

    batches = pipeline.eval_batches(store, BATCH, place=place)
    with tqdm(total=store.num_examples, unit="image", disable=None) as bar:
        for features, real in batches:
            yield np.asarray(features)[real]
            bar.update(int(real.sum()))


class Index(NamedTuple):
    """Features of some examples of a store, in memory, for many queries one after another."""

    store: Store
    rows: Int64[np.ndarray, " N"]
    features: Float32[np.ndarray, "N D"]


def build_index(network: Trained, store: Store, count: int) -> Index:
    """Computes the features of `count` examples of a store, or of all if it has fewer.

    The examples are evenly spaced, because a store may be sorted by class. Shows a progress bar on
    a terminal.

    Raises:
      UserError: an image cannot be read.
    """
    count = min(count, store.num_examples)
    rows = np.arange(count) * store.num_examples // count
    extract = make_extractor(network)
    found = []
    with tqdm(total=count, desc="index", unit="image", disable=None) as bar:
        for start in range(0, count, BATCH):
            part = rows[start : start + BATCH]
            found.append(compute_features(extract, store.read(part)["image"]))
            bar.update(len(part))
    return Index(store, rows, np.concatenate(found))


def nearest_in_index(
    index: Index, queries: Float32[np.ndarray, "Q D"], count: int
) -> tuple[Int64[np.ndarray, "Q count"], Float32[np.ndarray, "Q count"]]:
    """Returns indices of examples of the index's store, and distances, as `nearest` does."""
    parts = np.split(index.features, range(BATCH, len(index.features), BATCH))
    found, distances = nearest(queries, parts, count)
    return index.rows[found], distances
