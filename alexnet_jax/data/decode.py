"""Decodes image files into the square RGB images of the 2012 paper, or into whole photographs.

Section 2: "we first rescaled the image such that the shorter side was of length 256, and then
cropped out the central 256x256 patch from the resulting image".
"""

import functools
import io
import math
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import cv2
import numpy as np
import simplejpeg
from jaxtyping import UInt8
from PIL import ExifTags, Image, UnidentifiedImageError

from alexnet_jax.data.shards import BufferPool
from alexnet_jax.utils.errors import one_line

WHITE = (255, 255, 255, 255)
MAX_ASPECT = 2  # longer over shorter side of a stored whole photograph
# 400 MB of decoded pixels. A file that claims more is damaged or a decompression bomb.
MAX_PIXELS = 2**27
# EXIF 2.3, tag 0x0112 (orientation): what turns the stored pixels upright. 1 is upright.
TURN_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda image: np.rot90(image, 2),
    4: np.flipud,
    5: lambda image: image.swapaxes(0, 1),
    6: lambda image: np.rot90(image, -1),
    7: lambda image: np.rot90(image, 2).swapaxes(0, 1),
    8: np.rot90,
}
# Formats that Pillow recognizes by their content, but has no decoder for.
NOT_DECODED = frozenset(("BUFR", "GRIB", "HDF5", "MPEG", "WMF"))
# Bits that cameras and scanners use of samples with 16 bits.
SAMPLE_BITS = (8, 12, 16)
# Pillow scales the samples of these to 16 bits; of all others it returns them as stored.
SCALED_BY_PILLOW = ("PPM", "JPEG2000")
TIFF_SAMPLE_FORMAT, UNSIGNED = 339, (1,)
Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS replaces Pillow's limit, which only warns at first
# Pillow warns about damaged metadata of images that it decodes correctly.
warnings.filterwarnings("ignore", module="PIL")
cv2.setNumThreads(1)  # callers decode in as many threads as there are cores

_scratch = threading.local()
# Reusing the images' memory saves page faults: 0.1 ms of 1.7 ms per image.
_images = BufferPool()


class UnknownRange(ValueError):
    """The samples of an image do not tell which values are black and white."""


def is_image(path: Path) -> bool:
    """Returns whether a file is an image by its extension or its content.

    Either suffices: a damaged photograph must be reported, which needs an extension, and an image
    may have any name.
    """
    if path.suffix.lower() in _image_extensions():
        return True
    if not path.is_file():
        return False
    try:
        with Image.open(path) as picture:
            return picture.format not in NOT_DECODED
    except Exception:  # Pillow's plugins raise many types for other files
        return False


@functools.cache
def _image_extensions() -> frozenset[str]:
    formats = Image.registered_extensions()
    decoded = Image.OPEN.keys() - NOT_DECODED
    return frozenset(extension for extension, name in formats.items() if name in decoded)


def decode_square(image: bytes | np.ndarray, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Decodes the central square of an image, as `decode` does."""
    return decode(image, size, max_aspect=1)


def decode(
    image: bytes | np.ndarray, size: int, max_aspect: int = MAX_ASPECT
) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image, turns it upright, and scales it so that the shorter side is `size`.

    Of an image that is longer than `max_aspect` times its shorter side, the center is kept. Scaling
    antialiases when it shrinks an image. Color and grayscale JPEGs that have to shrink, which
    includes nearly all of ImageNet, take a path that is twice as fast (see `_shrink_jpeg`). For all
    others, Pillow decodes, and scales with its bicubic filter.

    Args:
      image: bytes of any format that Pillow reads, or an array uint8[H, W], uint8[H, W, 1],
        uint8[H, W, 3], uint8[H, W, 4], uint16[H, W] or uint16[H, W, 1].
      size: pixels of the shorter side of the result.
      max_aspect: at most this many times `size` is the longer side.

    Returns:
      RGB. Grayscale becomes three equal channels, transparent pixels are blended with white, CMYK
      (including Adobe's inverted kind) is converted. Samples of more than 8 bits are scaled by the
      range that `_to_eight_bits` finds.

    Raises:
      Exception: whatever Pillow raises for bytes that are not a complete image; ValueError for an
        image of more than MAX_PIXELS, which is not decoded; UnknownRange.
    """
    if isinstance(image, np.ndarray):
        picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
        return _scale(picture, size, max_aspect)
    try:
        shrunk = _shrink_jpeg(image, size, max_aspect)
    except ValueError:  # not a JPEG, or one for which libjpeg warns; Pillow decides
        shrunk = None
    if shrunk is not None and not _may_be_turned(image):
        return shrunk
    picture = Image.open(io.BytesIO(image))
    scaled = _scale(picture, size, max_aspect, image) if shrunk is None else shrunk
    # Turning an image and cropping its center commute. TIFFs are upright already: Pillow
    # turns them, and removes their orientation, when it loads their pixels.
    turn = TURN_UPRIGHT.get(_orientation(picture))
    return scaled if turn is None else np.ascontiguousarray(turn(scaled))


def decode_at_own_size(image: bytes | np.ndarray) -> UInt8[np.ndarray, "H W 3"]:
    """Decodes an image by Pillow alone, in its own size, and turns it upright.

    Arguments, colors and errors are those of `decode_square`.
    """
    if isinstance(image, np.ndarray):
        pixels = image[..., 0] if image.shape[2:] == (1,) else image
        return np.asarray(_rgb(Image.fromarray(pixels)))
    picture = Image.open(io.BytesIO(image))
    whole = np.asarray(_rgb(picture, image))
    turn = TURN_UPRIGHT.get(_orientation(picture))
    return whole if turn is None else np.ascontiguousarray(turn(whole))


def _may_be_turned(jpeg: bytes) -> bool:
    """Returns whether a JPEG may have an orientation. Most have none, and parsing takes 60 µs."""
    metadata = jpeg[: jpeg.find(b"\xff\xda")]  # all before the start of the first scan
    return b"Exif\0" in metadata or b"tiff:Orientation" in metadata


def _orientation(picture: Image.Image) -> int:
    try:
        return int(picture.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # of many types; damaged metadata does not make an image useless
        return 1


def read_square(
    path: Path,
    size: int,
    decode: Callable[[bytes | np.ndarray, int], np.ndarray] = decode_square,
) -> UInt8[np.ndarray, "{size} {size} 3"] | str:
    """Returns the image of a file, or a sentence that says why not.

    Args:
      decode: of `preprocess.PREPROCESSING`.
    """
    if path.exists() and not path.is_file():
        return "it is not a regular file"
    try:
        return decode(path.read_bytes(), size)
    except Exception as error:  # damaged bytes make the decoders raise almost any exception
        return reason(error)


def reason(error: Exception) -> str:
    """Returns why an image cannot be decoded, as one line, given the decoder's exception."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image"  # Pillow's text has a memory address, new in each process
    return one_line(error) or type(error).__name__


def _shrink_jpeg(image: bytes, size: int, max_aspect: int) -> np.ndarray | None:
    """Decodes a JPEG whose sides are longer than `size`; returns None for any other.

    libjpeg halves the image during decoding as often as possible, which skips most of the work.
    Then follow a Gaussian filter as wide as the remaining scale requires, and bilinear
    interpolation. The two together have the variance of the triangle filter (Pillow's BILINEAR),
    so the image is nearly the same, but OpenCV vectorizes them.
    """
    height, width, colors, _ = simplejpeg.decode_jpeg_header(image)
    too_many = height * width > MAX_PIXELS
    if too_many or min(height, width) <= size or colors not in ("YCbCr", "Gray"):
        return None
    least = {"min_height": size, "min_width": size, "min_factor": 2}
    height, width, *_ = simplejpeg.decode_jpeg_header(image, **least)
    decoded, blurred = _scratch_bytes(2 * height * width * 3).reshape(2, -1)
    pixels = simplejpeg.decode_jpeg(image, buffer=decoded, **least)
    side = min(height, width)
    kept = min(height, max_aspect * side), min(width, max_aspect * side)
    top, left = (height - kept[0]) // 2, (width - kept[1]) // 2
    center = pixels[top : top + kept[0], left : left + kept[1]]
    # A triangle of half-width s has variance s²/6; bilinear interpolation contributes 1/6.
    deviation = math.sqrt(((side / size) ** 2 - 1) / 6)
    if deviation > 0:
        taps = 2 * math.ceil(2 * deviation) + 1
        blurred = blurred[: center.size].reshape(center.shape)
        center = cv2.GaussianBlur(center, (taps, taps), deviation, dst=blurred)
    height, width = (round(length * size / side) for length in kept)
    return cv2.resize(center, (width, height), dst=_images.take((height, width, 3)))


def _scratch_bytes(count: int) -> np.ndarray:
    """Returns memory that belongs to this thread, because new memory would cost page faults."""
    memory: np.ndarray | None = getattr(_scratch, "bytes", None)
    if memory is None or memory.size < count:
        memory = _scratch.bytes = np.empty(count, np.uint8)
    return memory


def _scale(picture: Image.Image, size: int, max_aspect: int, encoded: bytes = b"") -> np.ndarray:
    """Scales the center, whose borders may lie between pixels.

    Args:
      encoded: the bytes of the picture, if it has any.
    """
    picture = _rgb(picture, encoded)
    side = min(picture.size)
    width, height = (min(length, max_aspect * side) for length in picture.size)
    left, top = (picture.width - width) / 2, (picture.height - height) / 2
    box = (left, top, left + width, top + height)
    scaled = (round(width * size / side), round(height * size / side))
    return np.asarray(picture.resize(scaled, Image.Resampling.BICUBIC, box=box))


def _rgb(picture: Image.Image, encoded: bytes = b"") -> Image.Image:
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"the image has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS}"
        )
    return _to_rgb(_to_eight_bits(picture, encoded))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, WHITE)
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")


def _to_eight_bits(picture: Image.Image, encoded: bytes) -> Image.Image:
    """Returns the picture with samples of 8 bits.

    Files with wider samples rarely say which value is white. Integers up to 65,535 have the fewest
    bits of SAMPLE_BITS that hold the brightest one, for example 12 for the data of most scientific
    cameras. Integers that use most of 32 bits have 32. Floats reach to 1 or to 255.

    Raises UnknownRange for other values.
    """
    if picture.format in SCALED_BY_PILLOW and picture.mode.startswith("I"):
        return Image.fromarray((np.asarray(picture) >> 8).astype(np.uint8))
    if picture.mode == "F":
        return Image.fromarray(_floats_to_bytes(np.asarray(picture)))
    if picture.mode.startswith("I"):
        samples = np.asarray(picture)
        tags = getattr(picture, "tag_v2", {TIFF_SAMPLE_FORMAT: None})
        if tags.get(TIFF_SAMPLE_FORMAT, UNSIGNED) == UNSIGNED:  # Pillow has no unsigned mode
            samples = samples.view(samples.dtype.str.replace("i", "u"))
        return Image.fromarray(_integers_to_bytes(samples))
    # Of colors with 16 bits Pillow keeps the upper 8, which are nearly black if only 12 are used.
    if ";16" in str(getattr(picture, "tile", "")) and np.asarray(picture).max() < 16:
        colors = cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_UNCHANGED)
        if colors is not None and colors.dtype == np.uint16 and colors.shape[2:] == (3,):
            return Image.fromarray(_integers_to_bytes(colors[..., ::-1]))
    return picture


def _integers_to_bytes(samples: np.ndarray) -> np.ndarray:
    low, high = int(samples.min()), int(samples.max())
    bits = [bits for bits in (*SAMPLE_BITS, 32) if high < 1 << bits]
    # Values between the two ranges could have any number of bits.
    if low < 0 or not bits or 1 << SAMPLE_BITS[-1] <= high < 1 << 28:
        raise _unknown_range(low, high)
    scaled: np.ndarray = (samples >> (bits[0] - 8)).astype(np.uint8)
    return scaled


def _floats_to_bytes(samples: np.ndarray) -> np.ndarray:
    low, high = float(samples.min()), float(samples.max())
    # An image with values up to 255 would be nearly black if it reached no further than 16.
    if not (low >= 0 and (high <= 1 or 16 <= high <= 255)):  # also if they are NaN
        raise _unknown_range(low, high)
    scaled: np.ndarray = np.rint(samples * (255 if high <= 1 else 1)).astype(np.uint8)
    return scaled


def _unknown_range(low: float, high: float) -> UnknownRange:
    return UnknownRange(
        f"its values run from {low:g} to {high:g}, which does not tell what is black and white; "
        "save it with 8 bits"
    )
