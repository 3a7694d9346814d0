"""Weights laid out as PyTorch and Caffe have them, channels first, to parameters and back."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.models.alexnet import LAYERS, AlexNet
from alexnet_jax.utils.errors import UserError

POOLED = 6  # pool5's rows and columns, of crops of 224 and 227

# By layer: its weight, float32[O, I / groups, R, R] or float32[O, I], and bias, float32[O].
# The inputs of fc6 are pool5 flattened as (C, H, W).
ChannelsFirst = Mapping[str, tuple[np.ndarray, np.ndarray]]
Params = dict[str, dict[str, Any]]


def to_params(weights: ChannelsFirst, variant: str) -> Params:
    """Returns the parameters of a network of `variant`, num_classes being the length of fc8's bias.

    Raises UserError if an array's shape is not the variant's.
    """
    classes = max(1, np.size(weights["fc8"][1]))
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    expected = jax.eval_shape(AlexNet(variant, classes).init, jax.random.key(0), image)["params"]
    return {layer: _to_layer(layer, *weights[layer], expected[layer], variant) for layer in LAYERS}


def _to_layer(
    layer: str, weight: np.ndarray, bias: np.ndarray, expected: dict[str, Any], variant: str
) -> dict[str, np.ndarray]:
    shape = expected["kernel"].shape[::-1]
    if len(shape) == 4:
        shape = shape[:2] + shape[:1:-1]
    for name, array, wanted in (("weight", weight, shape), ("bias", bias, shape[:1])):
        if array.shape != wanted:
            raise UserError(
                f"the {name} of {layer} has the shape {list(array.shape)}, which in AlexNet's "
                f"variant {variant} is {list(wanted)}; it is another network's"
            )
    if layer == "fc6":
        maps = weight.reshape(len(weight), -1, POOLED, POOLED)
        weight = maps.transpose(0, 2, 3, 1).reshape(weight.shape)
    kernel = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
    return {"kernel": np.ascontiguousarray(kernel), "bias": bias}


def from_params(params: Params) -> ChannelsFirst:
    """The inverse of `to_params`."""
    return {layer: _from_layer(layer, params[layer]) for layer in LAYERS}


def _from_layer(layer: str, params: dict[str, Any]) -> tuple[np.ndarray, np.ndarray]:
    kernel = np.asarray(params["kernel"])
    weight = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
    if layer == "fc6":
        maps = weight.reshape(len(weight), POOLED, POOLED, -1)
        weight = maps.transpose(0, 3, 1, 2).reshape(weight.shape)
    return np.ascontiguousarray(weight), np.asarray(params["bias"])
