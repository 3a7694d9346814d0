"""Reads checkpoints of the authors' 2012 program: run #145, whose two towers become groups."""

import itertools
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from alexnet_jax.models.alexnet import Conv, named_layers
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.weights import pickles
from alexnet_jax.weights.layouts import ChannelsFirst, weight_shapes

# The towers' layers in layers-145.cfg. The last layer has only one, fc1000, or another name with
# another number of classes.
TOWERS = {
    **{f"conv{number}": (f"conv{number}a", f"conv{number}b") for number in range(1, 6)},
    "fc6": ("fc2048a", "fc2048b"),
    "fc7": ("fc2048ba", "fc2048bb"),
}

# Layers without weights. Runs #147 and #148 have arrays of the same shapes and differ in these.
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
    """Returns the variant, `original`, and its weights: tower a's filters and units, then b's.

    Args:
      path: a checkpoint EPOCH.BATCH, or a folder, of which the newest checkpoint is read.

    Raises:
      UserError: there is no checkpoint, it cannot be read, or it contains another network.
    """
    path = _newest(path) if path.is_dir() else path
    layers = _layers(pickles.load(path), path)
    try:
        _check_other_layers(layers)
        return "original", _read_weights(layers)
    except ValueError as error:
        raise UserError(f"{path} is not a checkpoint of run #145: {one_line(error)}") from error


def read_mean(path: Path) -> np.ndarray:
    """Returns `data_mean` of the program's batches.meta, in any shape.

    Raises:
      UserError: the file cannot be read or is not a batches.meta.
    """
    content = pickles.load(path)
    try:
        return _array(content["data_mean"])
    except (TypeError, KeyError, ValueError) as error:
        raise UserError(
            f"{path} is not a batches.meta of the 2012 program: it has no data_mean"
        ) from error


def _newest(folder: Path) -> Path:
    checkpoints = [path for path in folder.iterdir() if re.fullmatch(r"\d+\.\d+", path.name)]
    if not checkpoints:
        raise UserError(
            f"{folder} is neither a workdir (it has no config.json) nor a folder of the 2012 "
            "program (it has no checkpoint named EPOCH.BATCH)"
        )
    return max(checkpoints, key=lambda path: [int(number) for number in path.name.split(".")])


def _layers(content: Any, path: Path) -> dict[str, Layer]:
    """Returns the layers by name. In older checkpoints they are a list."""
    try:
        found = content["model_state"]["layers"]
        layers: dict[str, Layer] = _by_name(found) if isinstance(found, list) else found
        if not all(isinstance(name, str) and isinstance(layers[name], dict) for name in layers):
            raise TypeError("a layer is not a dict")
        return layers
    except (TypeError, KeyError, IndexError) as error:
        raise UserError(
            f"{path} is not a checkpoint of the 2012 program: it has no model_state with layers"
        ) from error


def _by_name(layers: list[Layer]) -> dict[str, Layer]:
    """Replaces the inputs, which are indices into the list, by names."""
    names = [layer["name"] for layer in layers]
    return {
        layer["name"]: {
            **layer,
            "inputs": [names[i] if isinstance(i, int) else i for i in layer.get("inputs", ())],
        }
        for layer in layers
    }


def _check_other_layers(layers: dict[str, Layer]) -> None:
    for (kind, fields), tower in itertools.product(OTHER_LAYERS.items(), "ab"):
        layer = layers.get(kind + tower, {})
        for field, value in fields.items():
            if layer.get(field) != value:
                raise ValueError(f"{kind}{tower} does not have {field} {value}")


def _read_weights(layers: dict[str, Layer]) -> ChannelsFirst:
    last, num_classes = _last(layers)
    weights = {}
    for name, shape in weight_shapes("original", num_classes).items():
        towers = TOWERS.get(name, (last,))
        # conv1 sees the image. Grouped convolutions see the maps of their own tower, conv3 and the
        # fully connected layers those of both.
        layer = named_layers("original")[name]
        inputs = 1 if name == "conv1" or (isinstance(layer, Conv) and layer.groups == 2) else 2
        matrix_shape = math.prod(shape[1:]) // inputs, shape[0] // len(towers)
        parts = [_tower(tower, layers, inputs, matrix_shape) for tower in towers]
        weight, bias = (np.concatenate(arrays) for arrays in zip(*parts, strict=True))
        weights[name] = weight.reshape(shape), bias
    return weights


def _last(layers: dict[str, Layer]) -> tuple[str, int]:
    """Returns the name of the last layer and its number of classes."""
    known = set(itertools.chain(*TOWERS.values()))
    names = [name for name in layers if "weights" in layers[name] and name not in known]
    if len(names) != 1:
        raise ValueError(f"it has {len(names)} layers with weights after fc2048ba and fc2048bb")
    return names[0], max(1, _array(layers[names[0]].get("biases")).size)


def _tower(
    name: str, layers: dict[str, Layer], inputs: int, matrix_shape: tuple[int, int]
) -> tuple[Float32[np.ndarray, "O I"], Float32[np.ndarray, " O"]]:
    """Returns the weights for all inputs, and the biases.

    Args:
      inputs: number of layers that the layer takes inputs from; it has a matrix for each.
      matrix_shape: [C·R·R, O] of a convolution, [I, O] of a fully connected layer.
    """
    layer = layers.get(name, {})
    matrices = layer.get("weights")
    if not isinstance(matrices, list) or len(matrices) != inputs:
        raise ValueError(f"{name} does not have {inputs} weight matrices")
    matrices = [_array(matrix) for matrix in matrices]
    bias = _array(layer.get("biases")).ravel()
    for array, shape in ((bias, matrix_shape[1:]), *((m, matrix_shape) for m in matrices)):
        if array.shape != shape:
            raise ValueError(f"{name} has an array of shape {list(array.shape)}, not {list(shape)}")
    if inputs == 2:
        order = _input_towers(layer.get("inputs"), name)
        matrices = [matrices[order.index(tower)] for tower in "ab"]
    return np.concatenate(matrices).T, bias


def _input_towers(inputs: Any, name: str) -> list[str]:
    """Returns the towers of a layer's inputs: a, b, except for fc2048bb, which has b first."""
    names = [i for i in inputs if isinstance(i, str)] if isinstance(inputs, list) else []
    towers = [i.removesuffix("_neuron")[-1:] for i in names]
    if sorted(towers) != ["a", "b"]:
        raise ValueError(f"{name} does not have one input from each tower")
    return towers


def _array(value: Any) -> np.ndarray:
    if not isinstance(value, pickles.PickledArray):
        raise ValueError("an array is missing")
    return np.asarray(value.to_numpy(), np.float32)
