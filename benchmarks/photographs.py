"""JPEGs like ImageNet's: 500x375 pixels, about 110 KB, cut from two real photographs."""

import io
import math
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

LONG_SIDE, SHORT_SIDE = 500, 375
PORTRAIT_EVERY = 5
PHOTOGRAPHS = ("china.jpg", "flower.jpg")  # in scikit-learn
QUALITIES = (99, 98, 98, 98, 98)  # in turn, which gives 110 KB on average
LEAST_ZOOM = 0.8  # smallest part, as a share of the largest rectangle's side
POOL = 256  # distinct JPEGs in a folder


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Returns JPEG files; the same seed gives the same files. Every fifth is 375x500.

    Each is a random part of a photograph, randomly flipped and brightened.
    """
    rng = np.random.default_rng(seed)
    return [_jpeg(number, rng) for number in range(count)]


def write_folder(root: Path, split_counts: Mapping[str, int], classes: int = 10) -> None:
    """Writes `root/SPLIT/classK/NNNNNN.jpg` for every split, as `folder:` datasets have them.

    Content repeats after POOL images, but each is a file of its own.
    """
    pool = jpegs(min(POOL, max(split_counts.values())))
    for split, count in split_counts.items():
        for label in range(classes):
            (root / split / f"class{label}").mkdir(parents=True)
        for number in range(count):
            file = root / split / f"class{number % classes}" / f"{number:06}.jpg"
            file.write_bytes(pool[number % len(pool)])


def files_and_labels(split: Path) -> list[tuple[Path, int]]:
    """Returns every image file below `SPLIT/classK`, and K."""
    files = sorted(split.rglob("*.jpg"))
    return [(file, int(file.parent.name.removeprefix("class"))) for file in files]


def _jpeg(number: int, rng: np.random.Generator) -> bytes:
    portrait = number % PORTRAIT_EVERY == PORTRAIT_EVERY - 1
    size = (SHORT_SIDE, LONG_SIDE) if portrait else (LONG_SIDE, SHORT_SIDE)
    whole = _photograph(PHOTOGRAPHS[number % 2])
    picture = whole.resize(size, Image.Resampling.BICUBIC, box=_random_box(whole, size, rng))
    if rng.random() < 0.5:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    brightness = rng.uniform(0.85, 1.15)
    picture = picture.point(lambda value: min(255, round(value * brightness)))
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=QUALITIES[number % len(QUALITIES)])
    return buffer.getvalue()


def _random_box(
    whole: Image.Image, size: tuple[int, int], rng: np.random.Generator
) -> tuple[float, float, float, float]:
    """Returns left, top, right and bottom of a part with the aspect ratio of `size`."""
    largest = min(whole.width / size[0], whole.height / size[1])
    scale = largest * math.exp(rng.uniform(math.log(LEAST_ZOOM), 0))
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, whole.width - width), rng.uniform(0, whole.height - height)
    return left, top, left + width, top + height


@cache
def _photograph(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))
