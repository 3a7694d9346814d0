"""Caffe's bvlc_alexnet and bvlc_reference_caffenet, by the protobuf fields of its caffe.proto."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from jaxtyping import Float32

from alexnet_jax.models.alexnet import LAYERS, VARIANTS
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.weights.layouts import ChannelsFirst

# Of its mean image of ILSVRC-2012 (Caffe's examples/00-classification.ipynb): red, green, blue.
CHANNEL_MEAN = (122.6789143406786, 116.66876761696767, 104.0069879317889)

# By message, by field: number and type; a star repeats it. What is not here is passed over. The
# numbers are packed, which is as bytes are: 61 million of them do not become Python's one by one.
SCHEMA = {
    "Shape": {"dim": (1, "int64*")},
    "Blob": {
        "num": (1, "int64"),
        "channels": (2, "int64"),
        "height": (3, "int64"),
        "width": (4, "int64"),
        "data": (5, "bytes"),
        "shape": (7, "Shape"),
        "double_data": (8, "bytes"),
    },
    "Lrn": {
        "local_size": (1, "int64"),
        "alpha": (2, "float"),
        "beta": (3, "float"),
        "norm_region": (4, "int64"),
        "k": (5, "float"),
    },
    "V1Layer": {
        "name": (4, "string"),
        "type": (5, "int64"),
        "blobs": (6, "Blob*"),
        "lrn_param": (18, "Lrn"),
    },
    "Layer": {
        "name": (1, "string"),
        "type": (2, "string"),
        "blobs": (7, "Blob*"),
        "lrn_param": (118, "Lrn"),
    },
    "Net": {"layers": (2, "V1Layer*"), "layer": (100, "Layer*")},
}
V1_TYPES = {15: "LRN", 17: "Pooling"}
LRN_DEFAULTS = {"local_size": 5, "alpha": 1.0, "beta": 0.75, "norm_region": 0, "k": 1.0}
LRN = LRN_DEFAULTS | {"alpha": 1e-4}  # of both networks

# By the order of pooling and LRN: the variant that has the same.
VARIANT_OF_ORDER: dict[tuple[str, ...], str] = {
    ("LRN", "Pooling", "LRN", "Pooling", "Pooling"): "paper",  # bvlc_alexnet
    ("Pooling", "LRN", "Pooling", "LRN", "Pooling"): "caffenet",
}


def read(path: Path) -> tuple[str, ChannelsFirst]:
    """Returns the variant and its weights, for images of red, green, blue.

    Raises UserError if the file cannot be read or is of another network.
    """
    net = _parsed("Net", path)
    layers = [*net.layers, *net.layer]
    kinds = [_kind(layer) for layer in layers]
    variant = VARIANT_OF_ORDER.get(tuple(kind for kind in kinds if kind in V1_TYPES.values()))
    weighted = [layer for layer in layers if layer.blobs]
    if variant is None or len(weighted) != len(LAYERS):
        raise UserError(
            f"{path} is neither bvlc_alexnet nor bvlc_reference_caffenet: it has "
            f"{len(weighted)} layers of weights and {kinds.count('LRN')} of LRN, or their order "
            "is another"
        )
    for layer, kind in zip(layers, kinds, strict=True):
        if kind == "LRN":
            _check_lrn(layer, path)
    weights = {
        ours: _weights(layer, 4 if ours.startswith("conv") else 2, path)
        for ours, layer in zip(LAYERS, weighted, strict=True)
    }
    weight, bias = weights["conv1"]
    weights["conv1"] = weight[:, ::-1], bias  # Caffe's images are blue, green, red
    return variant, _as_paper(weights) if variant == "paper" else weights


def read_mean(path: Path) -> Float32[np.ndarray, "3 S S"]:
    """Returns the mean image in a .binaryproto: blue, green, red.

    Raises UserError if it cannot be read.
    """
    return _array(_parsed("Blob", path), 3, "the mean image", path)


def _as_paper(weights: ChannelsFirst) -> ChannelsFirst:
    """Weights with which variant `paper` computes what bvlc_alexnet does.

    Caffe's LRN has k = 1 and α / n; the paper's has k = 2 and α, so that of s·a with
    s² = 2 (α / n) / α it is s / 2^β times Caffe's of a. And ReLU(s·a) = s·ReLU(a). Caffe's
    dropout leaves nothing to do at test, where the paper's halves what it gives to fc7 and fc8.
    """
    paper, beta = VARIANTS["paper"].lrn, LRN["beta"]
    ratio = paper.k / LRN["k"]
    before = math.sqrt(ratio * LRN["alpha"] / LRN["local_size"] / paper.alpha)
    after = ratio**beta / before
    factors = {  # of the weight and of the bias
        "conv1": (before, before),
        "conv2": (after * before, before),
        "conv3": (after, 1),
        "fc7": (2, 1),
        "fc8": (2, 1),
    }
    return dict(weights) | {
        layer: (weights[layer][0] * np.float32(weight), weights[layer][1] * np.float32(bias))
        for layer, (weight, bias) in factors.items()
    }


def _kind(layer: Message) -> str:
    return layer.type if isinstance(layer.type, str) else V1_TYPES.get(layer.type, "other")


def _check_lrn(layer: Message, path: Path) -> None:
    given = layer.lrn_param
    for field, default in LRN_DEFAULTS.items():
        value = getattr(given, field) if given.HasField(field) else default
        if not math.isclose(value, LRN[field], rel_tol=1e-6):
            raise UserError(
                f"{path} has a layer {layer.name} with {field} {value:g}, which in bvlc_alexnet "
                f"and bvlc_reference_caffenet is {LRN[field]:g}"
            )


def _weights(layer: Message, axes: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if len(layer.blobs) != 2:
        raise UserError(f"{layer.name} in {path} has {len(layer.blobs)} arrays, not two")
    weight, bias = layer.blobs
    return _array(weight, axes, layer.name, path), _array(bias, 1, f"{layer.name}'s bias", path)


def _array(blob: Message, axes: int, what: str, path: Path) -> np.ndarray:
    """Returns float32 of so many axes; older files put axes of length 1 before them."""
    shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)
    content, dtype = (blob.data, "<f4") if blob.data else (blob.double_data, "<f8")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(content) or min(shape) < 1:
        raise UserError(
            f"{what} in {path} has {len(content)} bytes of numbers, which is not its shape of "
            f"{list(shape)}; the file is damaged"
        )
    if len(shape) < axes or math.prod(shape[:-axes]) != 1:
        raise UserError(
            f"{what} in {path} has the shape {list(shape)}, which is not of {axes} axes"
        )
    return np.frombuffer(content, dtype).astype(np.float32).reshape(shape[-axes:])


def _parsed(message: str, path: Path) -> Message:
    try:
        return MESSAGES[message].FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"{path} cannot be read as Caffe's protobuf: {one_line(error)}") from error


def _messages() -> dict[str, Any]:
    file = descriptor_pb2.FileDescriptorProto(name="alexnet_jax/caffe.proto", package="caffe")
    for message, fields in SCHEMA.items():
        described = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            field = described.field.add(name=name, number=number)
            field.label = field.LABEL_REPEATED if kind.endswith("*") else field.LABEL_OPTIONAL
            kind = kind.removesuffix("*")
            if kind in SCHEMA:
                field.type, field.type_name = field.TYPE_MESSAGE, f".caffe.{kind}"
            else:
                field.type = getattr(field, f"TYPE_{kind.upper()}")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {
        message: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"caffe.{message}"))
        for message in SCHEMA
    }


MESSAGES = _messages()
