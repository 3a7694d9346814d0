"""Converts between parameters and channels-first weights, as PyTorch and Caffe store them."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.models.alexnet import AlexNet, kernel_layers
from alexnet_jax.utils.errors import UserError

# For each layer its weight, float32[O, I / groups, R, R] of a convolution or float32[O, I] of a
# fully connected layer, and its bias, float32[O]. The inputs of fc6 are pool5 flattened as
# (C, H, W).
ChannelsFirst = Mapping[str, tuple[np.ndarray, np.ndarray]]
Params = dict[str, dict[str, Any]]

# Axes of a kernel, HWIO or IO, in the order of a weight, OIHW or OI, and the reverse.
WEIGHT_AXES = {4: (3, 2, 0, 1), 2: (1, 0)}
KERNEL_AXES = {4: (2, 3, 1, 0), 2: (1, 0)}


def weight_shapes(variant: str, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each layer's weight for images of 224×224 pixels."""
    image = jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32)
    params = jax.eval_shape(AlexNet(variant, num_classes).init, jax.random.key(0), image)["params"]
    shapes = {name: params[name]["kernel"].shape for name in kernel_layers(variant)}
    return {
        name: tuple(shape[axis] for axis in WEIGHT_AXES[len(shape)])
        for name, shape in shapes.items()
    }


def to_params(weights: ChannelsFirst, variant: str) -> Params:
    """Returns the parameters of a network whose number of classes is the length of its last bias.

    Raises:
      UserError: the shape of an array is not the one that the variant has.
    """
    params = {}
    *_, last = kernel_layers(variant)
    shapes = weight_shapes(variant, max(1, weights[last][1].size))
    for name, shape in shapes.items():
        weight, bias = weights[name]
        for part, array, expected in (("weight", weight, shape), ("bias", bias, shape[:1])):
            if array.shape != expected:
                raise UserError(
                    f"the {part} of {name} has shape {list(array.shape)}, but in AlexNet's variant "
                    f"{variant} it is {list(expected)}; the file contains another network"
                )
        if name == "fc6":  # inputs (C, H·W) to (H·W, C)
            maps = weight.reshape(len(weight), shapes["conv5"][0], -1)
            weight = maps.swapaxes(1, 2).reshape(shape)
        kernel = np.ascontiguousarray(weight.transpose(KERNEL_AXES[weight.ndim]))
        params[name] = {"kernel": kernel, "bias": bias}
    return params


def from_params(params: Params, variant: str) -> ChannelsFirst:
    """Returns the channels-first weights; the inverse of `to_params`."""
    weights = {}
    for name in kernel_layers(variant):
        kernel, bias = (np.asarray(params[name][part]) for part in ("kernel", "bias"))
        weight = kernel.transpose(WEIGHT_AXES[kernel.ndim])
        if name == "fc6":  # inputs (H·W, C) to (C, H·W)
            maps = weight.reshape(len(weight), -1, len(params["conv5"]["bias"]))
            weight = maps.swapaxes(1, 2).reshape(weight.shape)
        weights[name] = np.ascontiguousarray(weight), bias
    return weights
