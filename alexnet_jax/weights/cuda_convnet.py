"""Checkpoints of the authors' program of 2012: run #145, whose two towers become groups."""

import itertools
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from alexnet_jax.models.alexnet import KERNEL_SIZES
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.weights import pickles as plain_pickle
from alexnet_jax.weights.layouts import ChannelsFirst

# By our layer: the towers' layers in layers-145.cfg, how many towers each has inputs from, and the
# shape of the matrix for each of these: [C·R·R, O] of a convolution, [I, O] of an fc layer.
TOWERS = {
    "conv1": (("conv1a", "conv1b"), 1, (3 * 11 * 11, 48)),
    "conv2": (("conv2a", "conv2b"), 1, (48 * 5 * 5, 128)),
    "conv3": (("conv3a", "conv3b"), 2, (128 * 3 * 3, 192)),
    "conv4": (("conv4a", "conv4b"), 1, (192 * 3 * 3, 192)),
    "conv5": (("conv5a", "conv5b"), 1, (192 * 3 * 3, 128)),
    "fc6": (("fc2048a", "fc2048b"), 2, (128 * 6 * 6, 2048)),
    "fc7": (("fc2048ba", "fc2048bb"), 2, (2048, 2048)),
}
LAST_INPUTS = 2, 2048  # of fc1000, or what it is called with another number of classes

# Runs whose arrays have the same shapes did these otherwise (#147, #148).
NORM = {"type": "cmrnorm", "size": 5, "scale": 1e-4 / 5, "pow": 0.75, "minDiv": 2.0}
WITHIN_MAP_NORM = {"type": "rnorm", "size": 5, "scale": 0.001 / 25, "pow": 0.75}
POOL = {"type": "pool", "pool": "max", "sizeX": 3, "stride": 2}
OTHER_LAYERS = {
    "rnorm1": NORM,
    "rnorm2": NORM,
    "cnorm2": WITHIN_MAP_NORM,
    "pool1": POOL,
    "pool2": POOL,
    "pool3": POOL,
}

Layer = dict[str, Any]


def read(path: Path) -> tuple[str, ChannelsFirst]:
    """Returns variant `original` and its weights: tower a's filters and units first, then b's.

    Args:
      path: a checkpoint EPOCH.BATCH, or the folder that it lies in, of which the newest is taken.

    Raises UserError if there is none, or it cannot be read, or is of another network.
    """
    path = _newest(path) if path.is_dir() else path
    layers = _layers(plain_pickle.load(path), path)
    try:
        _check_other_layers(layers)
        weights = {layer: _joined(layer, layers) for layer in TOWERS}
        return "original", weights | {"fc8": _last(layers)}
    except ValueError as error:
        raise UserError(f"{path} is not of run #145: {one_line(error)}") from error


def read_mean(path: Path) -> np.ndarray:
    """Returns `data_mean` of the program's batches.meta, of any shape. Raises as `read` does."""
    content = plain_pickle.load(path)
    try:
        return _array(content["data_mean"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not a batches.meta of the 2012 program: it has no data_mean"
        ) from error


def _newest(folder: Path) -> Path:
    numbers = {p: p.name.split(".") for p in folder.iterdir() if re.fullmatch(r"\d+\.\d+", p.name)}
    if not numbers:
        raise UserError(
            f"{folder} is neither a workdir, with a config.json, nor a folder of the 2012 "
            "program's checkpoints, named EPOCH.BATCH"
        )
    return max(numbers, key=lambda p: [int(number) for number in numbers[p]])


def _layers(content: Any, path: Path) -> dict[str, Layer]:
    """By name. Older checkpoints have a list of them."""
    try:
        found = content["model_state"]["layers"]
        layers: dict[str, Layer] = _by_name(found) if isinstance(found, list) else found
        if not all(isinstance(name, str) and isinstance(layers[name], dict) for name in layers):
            raise TypeError("a layer is no dict")
        return layers
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{path} is not a checkpoint of the 2012 program: it has no model_state of layers"
        ) from error


def _by_name(layers: list[Layer]) -> dict[str, Layer]:
    """Of layers in a list the inputs are places in it."""
    names = [layer["name"] for layer in layers]
    return {layer["name"]: _with_named_inputs(layer, names) for layer in layers}


def _with_named_inputs(layer: Layer, names: list[str]) -> Layer:
    inputs = [names[i] if isinstance(i, int) else i for i in layer.get("inputs", ())]
    return {**layer, "inputs": inputs}


def _check_other_layers(layers: dict[str, Layer]) -> None:
    for kind, tower in itertools.product(OTHER_LAYERS, "ab"):
        layer = layers.get(kind + tower, {})
        for field, value in OTHER_LAYERS[kind].items():
            if layer.get(field) != value:
                raise ValueError(f"{kind}{tower} is not a layer with {field} {value}")


def _joined(layer: str, layers: dict[str, Layer]) -> tuple[np.ndarray, np.ndarray]:
    names, inputs, shape = TOWERS[layer]
    towers = [_tower(name, layers, inputs, shape) for name in names]
    weight, bias = (np.concatenate(arrays) for arrays in zip(*towers, strict=True))
    if layer.startswith("conv"):
        size = KERNEL_SIZES[int(layer[-1]) - 1]
        weight = weight.reshape(len(weight), -1, size, size)
    return weight, bias


def _last(layers: dict[str, Layer]) -> tuple[np.ndarray, np.ndarray]:
    known = {name for names, *_ in TOWERS.values() for name in names}
    names = [name for name in layers if "weights" in layers[name] and name not in known]
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} layers of weights behind fc2048ba and fc2048bb")
    inputs, rows = LAST_INPUTS
    outputs = _array(layers[names[0]].get("biases")).size
    return _tower(names[0], layers, inputs, (rows, outputs))


def _tower(
    name: str, layers: dict[str, Layer], inputs: int, shape: tuple[int, int]
) -> tuple[Float32[np.ndarray, "O I"], Float32[np.ndarray, " O"]]:
    """Returns the weights for all inputs, and the biases. Raises ValueError."""
    layer = layers.get(name, {})
    matrices = layer.get("weights")
    if not isinstance(matrices, list) or len(matrices) != inputs:
        raise ValueError(f"{name} is not a layer with {inputs} matrices of weights")
    matrices = [_array(matrix) for matrix in matrices]
    bias = _array(layer.get("biases")).ravel()
    for array, wanted in ((bias, shape[1:]), *((matrix, shape) for matrix in matrices)):
        if array.shape != wanted:
            raise ValueError(f"{name} has an array of {list(array.shape)}, not {list(wanted)}")
    if inputs == 2:
        order = _towers_of(layer.get("inputs"), name)
        matrices = [matrices[order.index(tower)] for tower in "ab"]
    return np.concatenate(matrices).T, bias


def _towers_of(inputs: Any, name: str) -> list[str]:
    """In layers-145.cfg fc2048bb, alone, has the input of tower b first."""
    names = [i for i in inputs if isinstance(i, str)] if isinstance(inputs, list) else []
    towers = [i.removesuffix("_neuron")[-1:] for i in names]
    if sorted(towers) != ["a", "b"]:
        raise ValueError(f"{name} has not one input of each tower")
    return towers


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, plain_pickle.PickledArray):
        raise ValueError("an array is missing")
    return np.asarray(value.array(), np.float32)
