"""The parts of this package that benchmarks measure. Only this file changes with their API."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import alexnet_jax
from alexnet_jax import inference
from alexnet_jax.data.augment import Statistics
from alexnet_jax.training.train_step import TrainState
from alexnet_jax.utils import process

SIDE = 224


def network(variant: str, dtype: str) -> alexnet_jax.AlexNet:
    return alexnet_jax.AlexNet(variant=variant, dtype=dtype)


def optimizer() -> Any:
    """Returns the paper's update."""
    return alexnet_jax.make_optimizer(alexnet_jax.default_config(), steps_per_epoch=5000)


def init_state(variant: str, dtype: str) -> TrainState:
    model = network(variant, dtype)
    return alexnet_jax.init_state(model, optimizer(), seed=0, input_shape=(SIDE, SIDE, 3))


class Augmented:
    """Takes the place of `Augment` for images that are augmented already."""

    def __call__(self, images: jax.Array, keys: Any, step: Any, sizes: Any) -> jax.Array:
        return images

    def mix(self, images: jax.Array, labels: jax.Array, keys: Any) -> dict[str, jax.Array]:
        return {"image": images, "label": labels}


def train_step(variant: str, dtype: str) -> Callable:
    """Returns the step without augmentation, as the other libraries' steps are measured.

    A pure function of (state, float[B, 224, 224, 3], int32[B]).
    """
    step = alexnet_jax.make_train_step(network(variant, dtype), optimizer(), Augmented())
    return lambda state, images, labels: step(state, {"image": images, "label": labels})


def inputs(batch: int) -> tuple[jax.Array, jax.Array]:
    """Returns random images, float32[B, 224, 224, 3], and labels, int32[B]."""
    images = jax.random.normal(jax.random.key(0), (batch, SIDE, SIDE, 3))
    return images, jnp.arange(batch) % 1000


def augmentation(crop: str) -> Callable:
    """Returns a compiled function of uint8[B, 256, 256, 3] and B random keys.

    Args:
      crop: "random" or "inception".
    """
    config = alexnet_jax.default_config()
    config.augment.crop = crop
    mean = np.full((config.image_size, config.image_size, 3), 120, np.float32)
    return jax.jit(alexnet_jax.make_augment(config, Statistics(mean, np.eye(3, dtype=np.float32))))


def save_untrained(workdir: Path, fields: dict[str, Any]) -> None:
    """Writes the workdir of a network with its initial parameters; it is as fast as a trained one.

    Args:
      fields: config fields that differ from the default.
    """
    config = alexnet_jax.default_config()
    config.update_from_flattened_dict(fields)
    model, size = alexnet_jax.build_model(config), config.augment.crop_size
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, size, size, 3)))
    stats = Statistics(np.float32([124, 117, 104]), np.zeros((3, 3), np.float32))
    inference.create(workdir, config, {"batch_stats": {}, **variables}, stats, class_names=())


def predictor(workdir: Path) -> Callable:
    """Returns a function of uint8[B, 256, 256, 3] to probabilities, as alexnet_jax.predict has."""
    process.set_up()
    log_probs = inference.classifier(alexnet_jax.load(workdir), "center")
    return lambda images: np.exp(log_probs(images))
