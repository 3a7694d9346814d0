"""The images whose fc7 features lie nearest, as in the right half of the paper's Figure 4."""

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
from jaxtyping import Float32, Float64, Int64, UInt8
from tqdm import tqdm

from alexnet_jax import inference as trained
from alexnet_jax.data import pipeline
from alexnet_jax.data.store import Store
from alexnet_jax.inference import OfImages, Trained

BATCH = 128  # images; of one length, so that the network is compiled once


def nearest(
    queries: Float32[np.ndarray, "Q D"], batches: Iterable[Float32[np.ndarray, "B D"]], count: int
) -> tuple[Int64[np.ndarray, "Q count"], Float32[np.ndarray, "Q count"]]:
    """Finds each query's nearest features by Euclidean distance (paper §6.1).

    Holds one batch and the nearest so far, however many batches there are.

    Args:
      batches: B may differ.
      count: how many to find, from 1 up.

    Returns:
      Places in the stream of all batches, and their distances, rising; what is equally near is in
      the stream's order. Where the stream is shorter than count, so are both.
    """
    queries = np.asarray(queries, np.float64)
    places = np.empty((len(queries), 0), np.int64)
    distances = np.empty((len(queries), 0), np.float64)
    seen = 0
    for batch in batches:
        features = np.asarray(batch, np.float64)
        near = _candidates(queries, features, count)
        apart = np.linalg.norm(features[near] - queries[:, None], axis=2)
        places = np.hstack([places, seen + near])
        distances = np.hstack([distances, apart])
        kept = np.lexsort((places, distances))[:, :count]
        places = np.take_along_axis(places, kept, axis=1)
        distances = np.take_along_axis(distances, kept, axis=1)
        seen += len(features)
    return places, distances.astype(np.float32)


def nearest_in_store(
    network: Trained, store: Store, images: UInt8[np.ndarray, "Q S S 3"], count: int
) -> tuple[Int64[np.ndarray, "Q count"], Float32[np.ndarray, "Q count"]]:
    """Finds the examples of a store that are nearest to images by the network's fc7.

    Reads all of the store; on a terminal a bar shows how far it is.

    Args:
      images: S is the config's image_size.

    Returns the examples' indices and their distances, as `nearest`.
    """
    extract = trained.feature_extractor(network, ["fc7"])
    return nearest(fc7_of(extract, images), _of_store(extract, store), count)


def _candidates(
    queries: Float64[np.ndarray, "Q D"], features: Float64[np.ndarray, "B D"], count: int
) -> Int64[np.ndarray, "Q found"]:
    """Returns up to count of the nearest rows of features, in any order.

    |a - b|² = |a|² - 2ab + |b|² is one matrix product, but cancels where a and b are close: in
    float32 to an error of a thousandth of |a|. In float64, which costs nothing beside the network,
    it is good enough to choose by, and no more.
    """
    squares = np.square(features).sum(1) - 2 * queries @ features.T
    return np.argsort(squares, axis=1, kind="stable")[:, :count]


def fc7_of(extract: OfImages, images: UInt8[np.ndarray, "Q S S 3"]) -> Float32[np.ndarray, "Q D"]:
    """Returns the images' features, computed in batches of BATCH."""
    found = []
    for start in range(0, len(images), BATCH):
        part = images[start : start + BATCH]
        padded = np.pad(part, ((0, BATCH - len(part)), (0, 0), (0, 0), (0, 0)))
        found.append(np.asarray(extract(padded)["fc7"])[: len(part)])
    return np.concatenate(found)


def _of_store(extract: OfImages, store: Store) -> Iterator[Float32[np.ndarray, "B D"]]:
    """Yields the examples' features in order; the next are computed meanwhile."""

    def place(batch: pipeline.Batch) -> tuple[Any, np.ndarray]:
        return extract(batch["image"])["fc7"], batch["label"] >= 0

    batches = pipeline.eval_batches(store, BATCH, place=place)
    with tqdm(total=store.num_examples, unit="image", disable=None) as bar:
        for features, real in batches:
            yield np.asarray(features)[real]
            bar.update(int(real.sum()))
