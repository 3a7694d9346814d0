"""Preprocessing by name: how an image file becomes the square pixels that a network was trained on.

    2012         shorter side scaled to `image_size`, central square (§2 of the paper)
    torchvision  the same with torchvision's filter and rounding
    caffe        squashed to `image_size` by OpenCV, as Caffe's tools do
    brainscore   squashed to the network's input by Pillow, as Brain-Score does

All return RGB. Crops, mean and scale follow on the device (`augment`). They belong to the network,
with whatever preprocessing it sees an image.
"""

from collections.abc import Callable
from typing import NamedTuple

import cv2
import numpy as np
from jaxtyping import UInt8
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax.data.decode import decode_at_own_size, decode_square
from alexnet_jax.utils.errors import UserError

Square = UInt8[np.ndarray, "S S 3"]
Decoder = Callable[[bytes | np.ndarray, int], Square]


def torchvision_square(image: bytes | np.ndarray, size: int) -> Square:
    """Returns what torchvision's Resize(size) and CenterCrop(size) do with an image.

    A center crop of 224 pixels from the 256 of this one is that of Resize(256), CenterCrop(224).
    """
    picture = Image.fromarray(decode_at_own_size(image))
    short = min(picture.size)
    width, height = (int(size * side / short) for side in picture.size)
    left, top = (round((side - size) / 2) for side in (width, height))
    resized = picture.resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(resized.crop((left, top, left + size, top + size)))


def caffe_square(image: bytes | np.ndarray, size: int) -> Square:
    """Squashes an image as Caffe's convert_imageset does: by OpenCV, bilinear, no antialiasing."""
    squashed: np.ndarray = cv2.resize(decode_at_own_size(image), (size, size))
    return squashed


def brainscore_square(image: bytes | np.ndarray, size: int) -> Square:
    """Squashes an image as Brain-Score does, by torchvision's Resize((size, size)).

    That is Pillow's BILINEAR, which antialiases.
    """
    picture = Image.fromarray(decode_at_own_size(image))
    return np.asarray(picture.resize((size, size), Image.Resampling.BILINEAR))


class Preprocessing(NamedTuple):
    """One way to make a square of an image.

    Attributes:
      decode: from the bytes of a file, or an array, to the square of a size.
      meaning: for people who prepare images with other programs; "{size}" is the size.
    """

    decode: Decoder
    meaning: str


PREPROCESSING = {
    "2012": Preprocessing(
        decode_square,
        "the upright image, its shorter side scaled to {size} pixels with antialiasing, then its "
        "central square",
    ),
    "torchvision": Preprocessing(
        torchvision_square,
        "the upright image after torchvision's Resize({size}) and CenterCrop({size})",
    ),
    "caffe": Preprocessing(
        caffe_square,
        "the upright image, its sides scaled to {size}x{size} pixels by OpenCV's cv2.resize",
    ),
    "brainscore": Preprocessing(
        brainscore_square,
        "the upright image, its sides scaled to {size}x{size} pixels by Pillow's BILINEAR",
    ),
}
WHOLE = ("brainscore",)  # the network sees all of these squares, without a crop


def view_size(config: ConfigDict) -> int:
    """Returns the size of what the network sees in evaluation, in pixels."""
    size: int = config.eval.crop_size or config.augment.crop_size
    return size


def check(config: ConfigDict) -> None:
    """Raises UserError if `config.preprocess` does not exist or does not fit the sizes."""
    if config.preprocess not in PREPROCESSING:
        raise UserError(
            f"preprocess={config.preprocess!r} does not exist; choose one of "
            f"{', '.join(PREPROCESSING)}"
        )
    if config.preprocess in WHOLE and config.image_size != view_size(config):
        raise UserError(
            f"preprocess={config.preprocess} shows the whole image to the network; set "
            f"--config.image_size={view_size(config)}, the size of its crops"
        )
