"""Encoded image bytes to the square RGB image of the 2012 paper, section 2."""

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

from alexnet_jax.data.buffers import Buffers
from alexnet_jax.utils.errors import one_line

WHITE = (255, 255, 255, 255)
# 400 MB of decoded pixels; a file that claims more is an attack or damaged.
MAX_PIXELS = 2**27
# EXIF 2.3, tag 0x0112: how stored pixels become upright.
UPRIGHT = 1
TURNED: dict[int, Callable[[np.ndarray], np.ndarray]] = {
    2: np.fliplr,
    3: lambda square: np.rot90(square, 2),
    4: np.flipud,
    5: lambda square: square.swapaxes(0, 1),
    6: lambda square: np.rot90(square, -1),
    7: lambda square: np.rot90(square, 2).swapaxes(0, 1),
    8: np.rot90,
}
Image.MAX_IMAGE_PIXELS = None  # which would warn for some and raise for others
cv2.setNumThreads(1)  # the callers decode in as many threads as there are cores

_scratch = threading.local()
_images = Buffers()


def decode_square(image: bytes | np.ndarray, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Decodes an image, scales its shorter side to `size` and keeps the centre square.

    Scaling antialiases when it shrinks. Colour and grey JPEGs that have to shrink, nearly all
    there is in ImageNet, go a way of their own, twice as fast (see `_shrink_jpeg`). All else
    is Pillow's, with its bicubic filter, which widens with the scale. An EXIF orientation is not
    applied: the ImageNet preparations of 2012 and of tfds ignore it too (see `decode_upright`).

    Args:
      image: bytes of any format that Pillow reads, or an array uint8[H, W], uint8[H, W, 1],
        uint8[H, W, 3] or uint8[H, W, 4].
      size: pixels along the result's sides.

    Returns:
      RGB. Grey becomes three equal channels, transparency lies on white, CMYK (Adobe's inverted
      kind too) is converted, 16-bit samples keep their upper 8 bits.

    Raises:
      Exception: whatever Pillow raises for bytes that are no whole image; ValueError for one of
        more than MAX_PIXELS, which is not decoded.
    """
    if isinstance(image, np.ndarray):
        return _scale_square(
            Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image), size
        )
    try:
        shrunk = _shrink_jpeg(image, size)
    except ValueError:  # no JPEG, or one that libjpeg warns of: let Pillow judge
        shrunk = None
    return _scale_square(Image.open(io.BytesIO(image)), size) if shrunk is None else shrunk


def decode_upright(image: bytes, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Decodes as `decode_square` does, turned as the file's EXIF orientation says it is to be seen.

    The centre square of a turned image is the turned centre square.
    """
    square = decode_square(image, size)
    picture = Image.open(io.BytesIO(image))
    turned = TURNED.get(picture.getexif().get(ExifTags.Base.Orientation, UPRIGHT))
    if turned is None or picture.format == "TIFF":  # which Pillow turns by itself
        return square
    return np.ascontiguousarray(turned(square))


def read_upright(path: Path, size: int) -> UInt8[np.ndarray, "{size} {size} 3"] | str:
    """Returns a file's image, as `decode_upright` does, or why there is none."""
    if path.exists() and not path.is_file():
        return "it is not a regular file"
    try:
        return decode_upright(path.read_bytes(), size)
    except UnidentifiedImageError:
        return "it is no image"
    except Exception as error:  # whatever Pillow and the file system make of it
        return one_line(error) or type(error).__name__


def _shrink_jpeg(image: bytes, size: int) -> np.ndarray | None:
    """Decodes a JPEG whose sides are longer than `size`; returns None for any other.

    JPEG's own blocks halve it as often as they can; then a Gaussian as wide as the scale asks for
    and bilinear interpolation: of the same variance, and so nearly the same image, as the triangle
    filter (Pillow's BILINEAR), but both are vectorised.
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
    # A triangle of half width s has the variance s²/6, and bilinear interpolation alone 1/6.
    deviation = math.sqrt(((side / size) ** 2 - 1) / 6)
    if deviation > 0:
        taps = 2 * math.ceil(2 * deviation) + 1
        blurred = blurred[: square.size].reshape(square.shape)
        square = cv2.GaussianBlur(square, (taps, taps), deviation, dst=blurred)
    return cv2.resize(square, (size, size), dst=_images.take((size, size, 3)))


def _scratch_bytes(count: int) -> np.ndarray:
    """Returns memory of this thread's own, since fresh pages cost more than decoding into them."""
    memory: np.ndarray | None = getattr(_scratch, "bytes", None)
    if memory is None or memory.size < count:
        memory = _scratch.bytes = np.empty(count, np.uint8)
    return memory


def _scale_square(picture: Image.Image, size: int) -> np.ndarray:
    """Cuts the square at its exact, fractional place while scaling."""
    if picture.width * picture.height > MAX_PIXELS:
        raise ValueError(
            f"an image of {picture.width}x{picture.height} pixels, more than {MAX_PIXELS}"
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
