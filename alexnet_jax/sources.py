"""What a store is prepared from: the examples of a tfds builder, or of a folder of images."""

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from alexnet_jax.errors import UserError
from alexnet_jax.store import FOLDER_PREFIX, expand_dir


@dataclass(frozen=True)
class Example:
    """One example. `load()` gives encoded bytes, or an array that `decode_square` takes."""

    name: str
    label: int
    load: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class Source:
    """Examples in an order that is the same at every reading; `read_from(n)` skips the first n."""

    name: str
    num_examples: int
    class_names: tuple[str, ...]
    read_from: Callable[[int], Iterator[Example]]


def open_source(config: Mapping[str, Any], split: str) -> Source:
    dataset = config["dataset"]
    if dataset.startswith(FOLDER_PREFIX):
        raise UserError("folders: not yet")
    return tfds_source(dataset, expand_dir(config["data_dir"]), split)


def tfds_source(dataset: str, data_dir: str, split: str) -> Source:
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    import tensorflow as tf
    import tensorflow_datasets as tfds

    import alexnet_jax.datasets  # noqa: F401  (registers our builders)

    tf.config.set_visible_devices([], "GPU")
    builder = tfds.builder(dataset, data_dir=data_dir)
    builder.download_and_prepare()
    info = builder.info.splits[split]
    decoders = {"image": tfds.decode.SkipDecoding()}

    def read_from(start: int) -> Iterator[Example]:
        read_config = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        data = builder.as_dataset(
            split=f"{split}[{start}:]", decoders=decoders, read_config=read_config
        )
        for index, example in enumerate(data.as_numpy_iterator(), start):
            image = example["image"]
            yield Example(f"example {index}", int(example["label"]), lambda image=image: image)

    return Source(
        name=f"{builder.info.full_name} {split}",
        num_examples=info.num_examples,
        class_names=tuple(builder.info.features["label"].names),
        read_from=read_from,
    )
