"""Encoded image bytes to the square RGB image of the 2012 paper, section 2."""

import io

import numpy as np
from PIL import Image

WHITE = (255, 255, 255, 255)


def decode_square(image: bytes | np.ndarray, size: int) -> np.ndarray:
    """Decodes an image, scales its shorter side to `size` and keeps the centre square.

    Scaling is Pillow's bicubic filter, which widens with the scale and so antialiases when it
    shrinks. The square is cut at its exact, fractional place while scaling. An EXIF orientation is
    not applied: the ImageNet preparations of 2012 and of tfds ignore it too.

    Args:
      image: bytes of any format that Pillow reads, or an array uint8[H, W], uint8[H, W, 1],
        uint8[H, W, 3] or uint8[H, W, 4].
      size: pixels along the result's sides.

    Returns:
      uint8[size, size, 3], RGB. Grey becomes three equal channels, transparency lies on white,
      CMYK (Adobe's inverted kind too) is converted, 16-bit samples keep their upper 8 bits.

    Raises:
      Exception: whatever Pillow raises for bytes that are no whole image.
    """
    if isinstance(image, np.ndarray):
        picture = Image.fromarray(image[..., 0] if image.shape[2:] == (1,) else image)
    else:
        picture = Image.open(io.BytesIO(image))
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
