"""A picture of a training batch as the network sees it, with labels."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.analysis import figures as plots
from alexnet_jax.data import augment, pipeline
from alexnet_jax.data.store import Store
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import train_step as step

SAMPLES = 36


def save_samples(config: ConfigDict, store: Store, number: int, path: Path) -> None:
    """Writes the first images of training batch `number`, as its step augments them, with labels.

    The mean is left in, so that the picture can be looked at; all else is what the step does.
    """
    positions = number * config.batch_size + np.arange(min(SAMPLES, config.batch_size))
    batch = store.read(pipeline.shuffled(positions, store.num_examples, config.seed))
    schedule = optim.make_schedule(config, store.num_examples / config.batch_size)
    stats = augment.statistics(store, config)
    stats = stats._replace(mean=np.zeros_like(stats.mean))
    noise = schedule(jnp.int32(number), jnp.float32(1.0)).color_noise
    key = step.train_key(config.seed)
    images = jax.jit(lambda x: step.augmented(key, number, x, noise, stats, config))(batch["image"])
    pixels = np.asarray(images) / augment.scale(config)
    names = [store.class_names[label] for label in batch["label"]]
    plots.save_sample_grid(np.clip(np.rint(pixels), 0, 255).astype(np.uint8), names, path)
