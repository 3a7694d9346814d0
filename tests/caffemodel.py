"""Writes files of bvlc_alexnet and bvlc_reference_caffenet in the protobuf wire format.

The field numbers are those of Caffe's caffe.proto.
"""

import struct
from collections.abc import Mapping

import foreign
import numpy as np

V1_TYPES = {"Data": 5, "Convolution": 4, "InnerProduct": 14, "LRN": 15, "Pooling": 17}
V1_TYPES |= {"ReLU": 18, "Dropout": 6, "SoftmaxWithLoss": 21}
LRN = {1: 5, 2: 1e-4, 3: 0.75}  # local_size, alpha, beta

BLOCKS = {
    "bvlc_alexnet": "conv1 relu1 norm1 pool1 conv2 relu2 norm2 pool2",
    "bvlc_reference_caffenet": "conv1 relu1 pool1 norm1 conv2 relu2 pool2 norm2",
}
REST = "conv3 relu3 conv4 relu4 conv5 relu5 pool5 fc6 relu6 drop6 fc7 relu7 drop7 fc8"
TYPES = {"conv": "Convolution", "relu": "ReLU", "norm": "LRN", "pool": "Pooling"}
TYPES |= {"fc": "InnerProduct", "drop": "Dropout"}


def varint(number: int) -> bytes:
    low, rest = number & 127, number >> 7
    return bytes([low | 128]) + varint(rest) if rest else bytes([low])


def field(number: int, value: int | float | str | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    content = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(content)) + content


def message(fields: Mapping[int, int | float]) -> bytes:
    return b"".join(field(number, value) for number, value in fields.items())


def blob(array: np.ndarray, old: bool = False, double: bool = False) -> bytes:
    """Returns a BlobProto.

    Args:
      old: in the format of 2014, with four axes, padded with leading axes of size 1.
      double: with the numbers in double precision.
    """
    if old:
        four = (1,) * (4 - array.ndim) + array.shape
        shape = message(dict(enumerate(four, start=1)))
    else:
        shape = field(7, field(1, b"".join(map(varint, array.shape))))
    numbers = field(8, array.astype("<f8").tobytes()) if double else field(5, array.tobytes())
    return shape + numbers


def layer(name: str, kind: str, blobs: list[bytes], v1: bool, lrn: Mapping = LRN) -> bytes:
    bottom, top, name_field, type_field, blob_field, lrn_field = (
        (2, 3, 4, 5, 6, 18) if v1 else (3, 4, 1, 2, 7, 118)
    )
    parts = [field(name_field, name), field(type_field, V1_TYPES[kind] if v1 else kind)]
    parts += [field(bottom, "before"), field(top, name)]
    parts += [field(blob_field, content) for content in blobs]
    if kind == "LRN":
        parts.append(field(lrn_field, message(lrn)))
    return b"".join(parts)


def net(
    name: str,
    weights: foreign.Weights,
    v1: bool = True,
    lrn: Mapping = LRN,
    rename: Mapping[str, str] | None = None,
    double: bool = False,
) -> bytes:
    """Returns a .caffemodel.

    Args:
      v1: in the format of 2014: the field `layers`, numbered types, blobs with four axes.
      rename: other names for layers.
    """
    layers = [layer("data", "Data", [], v1), *_layers(name, weights, v1, lrn, rename or {}, double)]
    layers.append(layer("loss", "SoftmaxWithLoss", [], v1))
    return field(1, name) + b"".join(field(2 if v1 else 100, content) for content in layers)


def _layers(name, weights, v1, lrn, rename, double) -> list[bytes]:
    layers = []
    for layer_name in f"{BLOCKS[name]} {REST}".split():
        blobs = [blob(array, old=v1, double=double) for array in weights.get(layer_name, ())]
        kind = TYPES[layer_name.rstrip("12345678")]
        layers.append(layer(rename.get(layer_name, layer_name), kind, blobs, v1, lrn))
    return layers
