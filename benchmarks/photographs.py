"""JPEGs of ImageNet's own statistics: 500x375 pixels, about 110 KB, parts of real photographs."""

import io
import math
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

LONG_SIDE, SHORT_SIDE = 500, 375  # pixels
PORTRAIT_EVERY = 5
PHOTOGRAPHS = ("china.jpg", "flower.jpg")
QUALITIES = (99, 98, 98, 98, 98)  # in turn; 110 KB in the mean
LEAST_PART = 0.8  # of the largest rectangle that the photograph holds, along a side
RECORD_FILES = 16
POOL = 256  # distinct JPEGs behind a folder of any size


def jpegs(count: int, seed: int = 0) -> list[bytes]:
    """Returns JPEG files, the same for the same seed; every fifth stands upright (375x500).

    They are parts of scikit-learn's two photographs, zoomed, flipped and of other brightness.
    """
    rng = np.random.default_rng(seed)
    return [_jpeg(number, rng) for number in range(count)]


def write_folder(root: Path, split_counts: Mapping[str, int], classes: int = 10) -> None:
    """Writes `root/SPLIT/classK/NNNNNN.jpg` for every split, which the store prepares.

    Beyond POOL images their content repeats; every file has bytes of its own on the disk.
    """
    pool = jpegs(min(POOL, max(split_counts.values())))
    for split, count in split_counts.items():
        for label in range(classes):
            (root / split / f"class{label}").mkdir(parents=True)
        for number in range(count):
            file = root / split / f"class{number % classes}" / f"{number:06}.jpg"
            file.write_bytes(pool[number % len(pool)])


def files_and_labels(split: Path) -> list[tuple[Path, int]]:
    """Returns every image file below `SPLIT/classK`, and its K."""
    files = sorted(split.rglob("*.jpg"))
    return [(file, int(file.parent.name.removeprefix("class"))) for file in files]


def write_records(files: Sequence[tuple[Path, int]], root: Path) -> list[Path]:
    """Writes image files and labels as tfds does: shuffled tf.train.Examples in several TFRecords.

    Their features are `image`, the encoded bytes, and `label`. Returns the TFRecord files.
    """
    import tensorflow as tf

    root.mkdir()
    order = np.random.default_rng(0).permutation(len(files))
    records = [root / f"{part:05}.tfrecord" for part in range(RECORD_FILES)]
    for part, record in enumerate(records):
        with tf.io.TFRecordWriter(str(record)) as writer:
            for file, label in (files[number] for number in order[part::RECORD_FILES]):
                image = tf.train.BytesList(value=[file.read_bytes()])
                feature = {
                    "image": tf.train.Feature(bytes_list=image),
                    "label": tf.train.Feature(int64_list=tf.train.Int64List(value=[label])),
                }
                example = tf.train.Example(features=tf.train.Features(feature=feature))
                writer.write(example.SerializeToString())
    return records


def _jpeg(number: int, rng: np.random.Generator) -> bytes:
    upright = number % PORTRAIT_EVERY == PORTRAIT_EVERY - 1
    size = (SHORT_SIDE, LONG_SIDE) if upright else (LONG_SIDE, SHORT_SIDE)
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
    """Returns left, top, right, bottom of a part that has the proportions of `size`."""
    largest = min(whole.width / size[0], whole.height / size[1])
    scale = largest * math.exp(rng.uniform(math.log(LEAST_PART), 0))
    width, height = size[0] * scale, size[1] * scale
    left, top = rng.uniform(0, whole.width - width), rng.uniform(0, whole.height - height)
    return left, top, left + width, top + height


@cache
def _photograph(name: str) -> Image.Image:
    from sklearn.datasets import load_sample_image

    return Image.fromarray(load_sample_image(name))
