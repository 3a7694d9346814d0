"""Our training step without its augmentation, on the images that other libraries' steps take."""

from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.config import default_config
from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.alexnet import AlexNet, layer_table
from alexnet_jax.training import train_step as step
from alexnet_jax.training.optimizer import make_schedule

SIDE = 224


def network(variant: str, dtype: str) -> AlexNet:
    return AlexNet(variant=variant, dtype=dtype)


def train_step(variant: str, dtype: str):
    """Returns a pure function of (state, float[B, 224, 224, 3], int32[B])."""
    config = default_config()
    stats = Statistics(np.zeros(3, np.float32), np.zeros((3, 3), np.float32))
    whole_step = step.make_train_step(
        network(variant, dtype), config, stats, make_schedule(config, 5000)
    )

    def without_augmentation(state: step.TrainState, images: jax.Array, labels: jax.Array):
        with mock.patch.object(step, "augmented", lambda key, number, given, *_: given):
            return whole_step(state, {"image": images, "label": labels})

    return without_augmentation


def init_state(variant: str, dtype: str) -> step.TrainState:
    return step.init_state(network(variant, dtype), default_config())


def inputs(batch: int) -> tuple[jax.Array, jax.Array]:
    """Returns float32[B, 224, 224, 3] of noise and int32[B]."""
    images = jax.random.normal(jax.random.key(0), (batch, SIDE, SIDE, 3))
    return images, jnp.arange(batch) % 1000


def step_and_inputs(variant: str, batch: int, dtype: str) -> tuple[Any, ...]:
    """Returns the step and what it takes, on the device."""
    state = jax.jit(lambda: init_state(variant, dtype))()
    return train_step(variant, dtype), state, *inputs(batch)


def layer_flops(variant: str) -> list[int]:
    """Returns the operations of conv1 to fc8 for one image's forward pass."""
    rows = layer_table(network(variant, "float32"), (SIDE, SIDE, 3))
    return [of.flops for of in rows if of.flops]
