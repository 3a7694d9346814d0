"""How similar the representations of networks are: RDM correlation and linear CKA.

Both compare the responses of two networks to the same images, whatever the number and the order of
their units: by the distances between images, or by the inner products of their responses.
"""

import difflib
from collections.abc import Callable, Sequence

import numpy as np
from jaxtyping import Float32, Float64

from alexnet_jax import inference
from alexnet_jax.data.store import Store
from alexnet_jax.inference import Trained
from alexnet_jax.models.alexnet import named_layers
from alexnet_jax.utils.errors import UserError

Responses = Float32[np.ndarray, "N D"]


def responses(
    network: Trained, layer: str, batches: Sequence[np.ndarray]
) -> Float32[np.ndarray, "N D"]:
    """Returns the outputs of a layer for images, one row each.

    Args:
      layer: of `named_layers(model.variant)`.
      batches: uint8[B, S, S, 3] each; only the last one may be shorter.

    Raises:
      UserError: the network has no such layer.
    """
    check_layer(network, layer)
    extract = inference.feature_extractor(network, [layer])
    length = len(batches[0])
    rows = []
    for images in batches:
        padded = np.pad(images, ((0, length - len(images)), *((0, 0),) * 3))
        rows.append(np.asarray(extract(padded)[layer])[: len(images)].reshape(len(images), -1))
    return np.concatenate(rows)


def check_layer(network: Trained, layer: str) -> None:
    """Raises UserError, which names the nearest ones, if a network has no such layer."""
    known = named_layers(network.model.variant)
    if layer not in known:
        near = difflib.get_close_matches(layer, known, n=4, cutoff=0.4) or known
        raise UserError(f"unknown layer {layer!r}; the nearest are {', '.join(near)}")


def rdm(x: Responses) -> Float64[np.ndarray, " pairs"]:
    """Returns 1 - Pearson's correlation between the responses to each pair of images.

    This is the upper triangle, by rows, of the representational dissimilarity matrix of
    Kriegeskorte et al. 2008 (doi 10.3389/neuro.06.004.2008). An image to which all units respond
    alike has no correlation; its distances are 1.
    """
    centered = x.astype(np.float64) - x.mean(axis=1, keepdims=True, dtype=np.float64)
    norms = np.linalg.norm(centered, axis=1, keepdims=True)
    unit = np.divide(centered, norms, out=np.zeros_like(centered), where=norms > 0)
    distances: np.ndarray = 1 - (unit @ unit.T)[np.triu_indices(len(x), k=1)]
    return distances


def rdm_correlation(x: Responses, y: Responses) -> float:
    """Returns Spearman's correlation between the RDMs of two networks."""
    return float(np.corrcoef(_ranks(rdm(x)), _ranks(rdm(y)))[0, 1])


def linear_cka(x: Responses, y: Responses) -> float:
    """Returns ‖Yᵀ X‖² / (‖Xᵀ X‖ ‖Yᵀ Y‖) of the centered responses, in Frobenius norms.

    Kornblith et al. 2019 (arXiv 1905.00414, §3). It is 1 for responses that differ by a rotation
    and a factor. Computed from the N×N inner products, since layers have more units than images.
    """
    first, second = (_gram(responses) for responses in (x, y))
    return float((first * second).sum() / (np.linalg.norm(first) * np.linalg.norm(second)))


METRICS: dict[str, Callable[[Responses, Responses], float]] = {
    "rdm": rdm_correlation,
    "cka": linear_cka,
}


def similarity_matrix(
    all_responses: Sequence[Responses], metric: Callable[[Responses, Responses], float]
) -> Float64[np.ndarray, "K K"]:
    """Returns the similarity of each pair of networks; 1 of each with itself."""
    matrix = np.eye(len(all_responses))
    for row, first in enumerate(all_responses):
        for column in range(row):
            matrix[row, column] = matrix[column, row] = metric(first, all_responses[column])
    return matrix


def sample(store: Store, count: int, batch_size: int) -> list[np.ndarray]:
    """Returns images that are evenly spaced over a store, in batches."""
    indices = np.linspace(0, store.num_examples - 1, min(count, store.num_examples)).round()
    starts = range(0, len(indices), batch_size)
    return [store.read(indices[i : i + batch_size].astype(int))["image"] for i in starts]


def _gram(x: Responses) -> Float64[np.ndarray, "N N"]:
    centered = x.astype(np.float64) - x.mean(axis=0, dtype=np.float64)
    product: np.ndarray = centered @ centered.T
    return product


def _ranks(values: Float64[np.ndarray, " n"]) -> Float64[np.ndarray, " n"]:
    """Returns the ranks of values; equal ones share the mean of theirs."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    ranks: np.ndarray = np.cumsum(counts) - (counts - 1) / 2
    return ranks[inverse]
