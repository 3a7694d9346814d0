"""Builds a checkpoint of the 2012 program's run #145 in the layout of its layer.py."""

from typing import Any

import foreign
import numpy as np
from python2_pickle import Called, Dtype, Global, OldStyle

NORM = {"type": "cmrnorm", "size": 5, "scale": 0.0001 / 5, "pow": 0.75, "minDiv": 2.0}
WITHIN = {"type": "rnorm", "size": 5, "scale": 0.001 / 5**2, "pow": 0.75}
POOL = {"type": "pool", "pool": "max", "sizeX": 3, "stride": 2, "start": 0}

# The inputs of each layer. Those of fc2048bb are in the opposite order.
INPUTS = {
    "conv1a": ["data"],
    "conv1b": ["data"],
    "conv2a": ["pool1a_neuron"],
    "conv2b": ["pool1b_neuron"],
    "conv3a": ["pool2a", "pool2b"],
    "conv3b": ["pool2a", "pool2b"],
    "conv4a": ["conv3a_neuron"],
    "conv4b": ["conv3b_neuron"],
    "conv5a": ["conv4a_neuron"],
    "conv5b": ["conv4b_neuron"],
    "fc2048a": ["pool3a_neuron", "pool3b_neuron"],
    "fc2048b": ["pool3a_neuron", "pool3b_neuron"],
    "fc2048ba": ["hs1a", "hs1b"],
    "fc2048bb": ["hs1b", "hs1a"],
    "fc1000": ["hs2a", "hs2b"],
}
OURS = {"fc2048a": "fc6", "fc2048b": "fc6", "fc2048ba": "fc7", "fc2048bb": "fc7", "fc1000": "fc8"}


def checkpoint(weights: foreign.Weights) -> dict[str, Any]:
    """Returns the content of a checkpoint of a network with these weights."""
    layers = {
        "data": {"name": "data", "type": "data", "dataIdx": 0, "outputs": 150528},
        "labels": {"name": "labels", "type": "data", "dataIdx": 1, "outputs": 1},
    }
    for kind, fields in {
        **{"rnorm1": NORM, "rnorm2": NORM, "cnorm2": WITHIN},
        **{"pool1": POOL, "pool2": POOL, "pool3": POOL},
        **{f"{name}_neuron": {"type": "neuron"} for name in ("conv3", "conv4")},
        "hs1": {"type": "hs", "keep": 0.5},
        "hs2": {"type": "hs", "keep": 0.5},
    }.items():
        for tower in "ab":
            name = kind.replace("_", f"{tower}_") if "_" in kind else kind + tower
            layers[name] = {"name": name, **fields}
    for tower in "ab":
        name = f"pool1{tower}_neuron"
        layers[name] = {"name": name, "type": "neuron", "inputs": [f"pool1{tower}"]}
        name = f"pool3{tower}_neuron"
        layers[name] = {"name": name, "type": "neuron", "inputs": [f"pool3{tower}"]}
    for name, inputs in INPUTS.items():
        layers[name] = weight_layer(name, inputs, weights)
        # The program stored references to the same dicts here too.
        layers[name]["inputLayers"] = [layers[i] for i in inputs if i in layers]
    error = Called(Global("numpy.core.multiarray", "scalar"), (Dtype("f8"), b"\0" * 8))
    return {
        "model_state": {
            "train_outputs": [({"logprob": [1.74, 0.41]}, 128)],
            "test_outputs": [({"logprob": [1.74, error]}, 128)],
            "epoch": 91,
            "batchnum": 1000,
            "layers": layers,
        },
        "op": options(),
    }


def weight_layer(name: str, inputs: list[str], weights: foreign.Weights) -> dict[str, Any]:
    ours = OURS.get(name, name[:5])
    weight, bias = weights[ours]
    if name != "fc1000":
        part = slice(0, len(bias) // 2) if name.endswith("a") else slice(len(bias) // 2, None)
        weight, bias = weight[part], bias[part]
    # One matrix per input: [C·R·R, O] in C order, or [I, O] in Fortran order.
    matrices = np.split(weight, len(inputs), axis=1)
    if inputs[0][-1:] == "b":
        matrices.reverse()
    is_conv = name.startswith("conv")
    order, shape = ("C", (-1, 1)) if is_conv else ("F", (1, -1))
    matrices = [np.array(m.reshape(len(bias), -1).T, order=order) for m in matrices]
    return {
        "name": name,
        "type": "conv" if is_conv else "fc",
        "inputs": inputs,
        "neuron": "relu",
        "weights": matrices,
        "weightsInc": [np.zeros((2, 2), np.float32) for _ in matrices],
        "biases": bias.reshape(shape),
        "biasesInc": np.zeros((2, 2), np.float32),
        "epsW": [0.01] * len(inputs),
        "initW": [0.01] * len(inputs),
        "sharedBiases": True,
        "outputs": len(bias),
    }


def options() -> OldStyle:
    """Returns the command line's options: instances and a class of the program's own modules."""
    parser = Global("options", "StringOptionParser")
    option = OldStyle(Global("options", "Option"), {"name": "data_path", "parser": parser})
    return OldStyle(Global("options", "OptionsParser"), {"options": {"data_path": option}})
