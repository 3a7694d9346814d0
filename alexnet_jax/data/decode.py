"""Decodes image files into the square RGB images of the 2012 paper.

Section 2: "we first rescaled the image such that the shorter side was of length 256, and then
cropped out the central 256x256 patch from the resulting image".
"""

import io
import math
import threading
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
# 400 MB of decoded pixels. A file that claims more is damaged or a decompression bomb.
MAX_PIXELS = 2**27
# EXIF 2.3, tag 0x0112 (orientation): what turns the stored pixels upright. 1 is upright.
TURN_UPRIGHT: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda square: np.rot90(square, 2),
    4: np.flipud,
    5: lambda square: square.swapaxes(0, 1),
    6: lambda square: np.rot90(square, -1),
    7: lambda square: np.rot90(square, 2).swapaxes(0, 1),
    8: np.rot90,
}
Image.MAX_IMAGE_PIXELS = None  # MAX_PIXELS replaces Pillow's limit, which only warns at first
cv2.setNumThreads(1)  # callers decode in as many threads as there are cores

_scratch = threading.local()
# Reusing the images' memory saves page faults: 0.1 ms of 1.7 ms per image.
_images = BufferPool()


def decode_square(image: bytes | np.ndarray, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Decodes an image, scales its shorter side to `size` and crops the central square.

    Scaling antialiases when it shrinks an image. Color and grayscale JPEGs that have to shrink,
    which includes nearly all of ImageNet, take a path that is twice as fast (see `_shrink_jpeg`).
    For all others, Pillow decodes, and scales with its bicubic filter. EXIF orientations are
    ignored, as by the ImageNet preparations of 2012 and of tfds (see `decode_upright`).

    Args:
      image: bytes of any format that Pillow reads, or an array uint8[H, W], uint8[H, W, 1],
        uint8[H, W, 3] or uint8[H, W, 4].
      size: pixels along a side of the result.

    Returns:
      RGB. Grayscale becomes three equal channels, transparent pixels are blended with white, CMYK
      (including Adobe's inverted kind) is converted, 16-bit samples keep their upper 8 bits.

    Raises:
      Exception: whatever Pillow raises for bytes that are not a complete image; ValueError for an
        image of more than MAX_PIXELS, which is not decoded.
    """
    if isinstance(image, np.ndarray):
        return _scale_square(
            Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), size
        )
    try:
        shrunk = _shrink_jpeg(image, size)
    except ValueError:  # not a JPEG, or one for which libjpeg warns; Pillow decides
        shrunk = None
    return _scale_square(Image.open(io.BytesIO(image)), size) if shrunk is None else shrunk


def decode_upright(image: bytes, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Decodes like `decode_square`, then turns the image as its EXIF orientation says.

    The order does not matter: turning an image and cropping the central square commute.
    """
    square = decode_square(image, size)
    picture = Image.open(io.BytesIO(image))
    turn = TURN_UPRIGHT.get(picture.getexif().get(ExifTags.Base.Orientation, 1))
    if turn is None or picture.format == "TIFF":  # Pillow itself turns TIFFs
        return square
    return np.ascontiguousarray(turn(square))


def read_upright(path: Path, size: int) -> UInt8[np.ndarray, "{size} {size} 3"] | str:
    """Returns the image of a file, as `decode_upright` does, or a sentence that says why not."""
    if path.exists() and not path.is_file():
        return "it is not a regular file"
    try:
        return decode_upright(path.read_bytes(), size)
    except Exception as error:  # damaged bytes make the decoders raise almost any exception
        return reason(error)


def reason(error: Exception) -> str:
    """Returns why an image cannot be decoded, as one line, given the decoder's exception."""
    if isinstance(error, UnidentifiedImageError):
        return "it is not an image"  # Pillow's text has a memory address, new in each process
    return one_line(error) or type(error).__name__


def _shrink_jpeg(image: bytes, size: int) -> np.ndarray | None:
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
    top, left = (height - side) // 2, (width - side) // 2
    square = pixels[top : top + side, left : left + side]
    # A triangle of half-width s has variance s²/6; bilinear interpolation contributes 1/6.
    deviation = math.sqrt(((side / size) ** 2 - 1) / 6)
    if deviation > 0:
        taps = 2 * math.ceil(2 * deviation) + 1
        blurred = blurred[: square.size].reshape(square.shape)
        square = cv2.GaussianBlur(square, (taps, taps), deviation, dst=blurred)
    return cv2.resize(square, (size, size), dst=_images.take((size, size, 3)))


def _scratch_bytes(count: int) -> np.ndarray:
    """Returns memory that belongs to this thread, because new memory would cost page faults."""
    memory: np.ndarray | None = getattr(_scratch, "bytes", None)
    if memory is None or memory.size < count:
        memory = _scratch.bytes = np.empty(count, np.uint8)
    return memory


def _scale_square(picture: Image.Image, size: int) -> np.ndarray:
    """Scales the central square, whose borders may lie between pixels."""
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"the image has {picture.width}x{picture.height} pixels, more than {MAX_PIXELS}"
        )
    picture = _to_rgb(picture)
    side = min(picture.size)
    left, top = (picture.width - side) / 2, (picture.height - side) / 2
    box = (left, top, left + side, top + side)
    return np.asarray(picture.resize((size, size), Image.Resampling.BICUBIC, box=box))


def _to_rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):
        samples = np.asarray(picture).astype(np.uint32)
        picture = Image.fromarray((samples >> 8).astype(np.uint8))
    if picture.has_transparency_data:
        picture = picture.convert("RGBA")
        paper = Image.new("RGBA", picture.size, WHITE)
        picture = Image.alpha_composite(paper, picture)
    return picture.convert("RGB")
