"""A picture of a training batch as the network sees it, with labels."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from alexnet_jax.analysis import figures
from alexnet_jax.data.augment import Augment
from alexnet_jax.data.pipeline import shuffled
from alexnet_jax.data.store import Store
from alexnet_jax.training.train_step import augment_batch, train_key

MAX_SAMPLES = 36


def save_samples(
    store: Store, augment: Augment, seed: int, batch_size: int, step: int, path: Path
) -> None:
    """Writes the first images of the batch of a training step, augmented as in that step.

    Only the mean is not subtracted, so that the picture shows natural colors.
    """
    positions = step * batch_size + np.arange(min(MAX_SAMPLES, batch_size))
    batch = store.read(shuffled(positions, store.num_examples, seed))
    with_mean = augment.stats._replace(mean=np.zeros_like(augment.stats.mean))
    augment = dataclasses.replace(augment, stats=with_mean)
    key = jax.random.fold_in(train_key(seed), step)
    images = jax.jit(lambda x: augment_batch(augment, key, x, step))(batch["image"])
    pixels = np.clip(np.rint(np.asarray(images) / augment.scale), 0, 255).astype(np.uint8)
    names = [store.class_names[label] for label in batch["label"]]
    figures.save_sample_grid(pixels, names, path)
