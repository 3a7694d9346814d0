"""Reads Caffe's bvlc_alexnet and bvlc_reference_caffenet, and its mean images, from protobuf."""

import math
from pathlib import Path
from typing import Any

import numpy as np
from google.protobuf import descriptor_pb2, descriptor_pool, message_factory
from google.protobuf.message import DecodeError, Message
from jaxtyping import Float32

from alexnet_jax.models.alexnet import LRN, VARIANTS, MaxPool, named_layers
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.weights.layouts import ChannelsFirst, weight_shapes

# Mean of ILSVRC-2012 in Caffe's examples/00-classification.ipynb, here red, green, blue.
CHANNEL_MEAN = (122.6789143406786, 116.66876761696767, 104.0069879317889)

# The part of caffe.proto that is needed: message -> field -> (number, type); a star means repeated.
# Packed arrays of numbers are declared as bytes, which have the same encoding: otherwise protobuf
# would make a Python object of each of 61 million numbers.
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
V1_TYPES = {15: "LRN", 17: "Pooling"}  # values of the enum V1LayerParameter.LayerType
LRN_DEFAULTS = {"local_size": 5, "alpha": 1.0, "beta": 0.75, "norm_region": 0, "k": 1.0}
LRN_OF_BOTH = LRN_DEFAULTS | {"alpha": 1e-4}

# The variants of bvlc_alexnet and bvlc_reference_caffenet. They differ in the order of LRN and
# pooling.
CAFFE_VARIANTS = ("paper", "caffenet")


def starts_net(head: bytes) -> bool:
    """Returns whether a file may be a network: it starts with the name, or with a layer.

    No pickle starts with these bytes.
    """
    name, v1_layer, layer = b"\x0a", b"\x12", b"\xa2\x06"  # field number · 8 + 2, as a varint
    return head.startswith((name, v1_layer, layer))


def read(path: Path) -> tuple[str, ChannelsFirst]:
    """Returns the variant and its weights, for RGB images.

    Raises:
      UserError: the file cannot be read or is neither of the two networks.
    """
    net = _parse("Net", path)
    layers = [*net.layers, *net.layer]
    order = [kind for kind in map(_kind, layers) if kind in V1_TYPES.values()]
    with_weights = [layer for layer in layers if layer.blobs]
    variant = next((name for name in CAFFE_VARIANTS if order == _order(name)), None)
    shapes = weight_shapes(variant, 1) if variant else {}
    if variant is None or len(with_weights) != len(shapes):
        raise UserError(
            f"{path} is neither bvlc_alexnet nor bvlc_reference_caffenet: it has "
            f"{len(with_weights)} layers with weights and {order.count('LRN')} with LRN, or they "
            "are in another order"
        )
    for layer in layers:
        if _kind(layer) == "LRN":
            _check_lrn(layer, path)
    weights = {
        name: _weights(layer, len(shape), path)
        for (name, shape), layer in zip(shapes.items(), with_weights, strict=True)
    }
    weight, bias = weights["conv1"]
    weights["conv1"] = weight[:, ::-1], bias  # Caffe's images are BGR
    return variant, _for_paper(weights) if variant == "paper" else weights


def read_mean(path: Path) -> Float32[np.ndarray, "3 S S"]:
    """Returns the mean image of a .binaryproto, whose channels are blue, green, red.

    Raises:
      UserError: the file cannot be read.
    """
    return _array(_parse("Blob", path), 3, "the mean image", path)


def _for_paper(weights: ChannelsFirst) -> ChannelsFirst:
    """Returns the weights with which variant `paper` computes what bvlc_alexnet does.

    Caffe's LRN is a / (1 + α/5 Σ a²)^β, the paper's a / (2 + α Σ a²)^β. With s² = 2 (α/5) / α, the
    paper's LRN of s·a is s / 2^β times Caffe's LRN of a, and ReLU(s·a) = s·ReLU(a). Caffe's dropout
    scales in training; the paper halves the inputs of fc7 and fc8 at test time instead.
    """
    caffe, paper = LRN_OF_BOTH, named_layers("paper")["lrn1"]
    assert isinstance(paper, LRN)
    ratio = paper.k / caffe["k"]
    before = math.sqrt(ratio * caffe["alpha"] / caffe["local_size"] / paper.alpha)
    after = ratio ** caffe["beta"] / before
    factors = {  # for the weight and for the bias
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


def _order(variant: str) -> list[str]:
    kinds = {LRN: "LRN", MaxPool: "Pooling"}
    return [kinds[type(layer)] for layer in VARIANTS[variant] if type(layer) in kinds]


def _kind(layer: Message) -> str:
    return layer.type if isinstance(layer.type, str) else V1_TYPES.get(layer.type, "other")


def _check_lrn(layer: Message, path: Path) -> None:
    for field, default in LRN_DEFAULTS.items():
        params = layer.lrn_param
        value = getattr(params, field) if params.HasField(field) else default
        if not math.isclose(value, LRN_OF_BOTH[field], rel_tol=1e-6):
            raise UserError(
                f"{layer.name} in {path} has {field} {value:g}; in bvlc_alexnet and "
                f"bvlc_reference_caffenet it is {LRN_OF_BOTH[field]:g}"
            )


def _weights(layer: Message, axes: int, path: Path) -> tuple[np.ndarray, np.ndarray]:
    if len(layer.blobs) != 2:
        raise UserError(f"{layer.name} in {path} has {len(layer.blobs)} arrays instead of two")
    weight, bias = layer.blobs
    return _array(weight, axes, layer.name, path), _array(bias, 1, f"{layer.name}'s bias", path)


def _array(blob: Message, axes: int, what: str, path: Path) -> np.ndarray:
    """Returns a float32 array with this number of axes; older files have leading axes of size 1."""
    shape = tuple(blob.shape.dim) or (blob.num, blob.channels, blob.height, blob.width)
    content, dtype = (blob.data, "<f4") if blob.data else (blob.double_data, "<f8")
    if math.prod(shape) * np.dtype(dtype).itemsize != len(content) or min(shape) < 1:
        raise UserError(
            f"{what} in {path} has {len(content)} bytes, which does not match its shape "
            f"{list(shape)}; the file is damaged"
        )
    if len(shape) < axes or math.prod(shape[:-axes]) != 1:
        raise UserError(f"{what} in {path} has shape {list(shape)} instead of {axes} axes")
    return np.frombuffer(content, dtype).astype(np.float32).reshape(shape[-axes:])


def _parse(message: str, path: Path) -> Message:
    try:
        return MESSAGES[message].FromString(path.read_bytes())
    except (OSError, DecodeError) as error:
        raise UserError(f"{path} cannot be read as Caffe's protobuf: {one_line(error)}") from error


def _build_messages() -> dict[str, Any]:
    """Returns the protobuf classes of `SCHEMA`."""
    file = descriptor_pb2.FileDescriptorProto(name="alexnet_jax/caffe.proto", package="caffe")
    for message, fields in SCHEMA.items():
        descriptor = file.message_type.add(name=message)
        for name, (number, kind) in fields.items():
            field = descriptor.field.add(name=name, number=number)
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


MESSAGES = _build_messages()
