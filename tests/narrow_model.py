"""Narrow networks with variables and images for them."""

import jax
import jax.numpy as jnp
import numpy as np

from alexnet_jax.models.alexnet import AlexNet

NARROW = 0.1  # 8-24-40-40-24 filters, 408 hidden units; 8-16-40-24-24 for owt


def images(size: int = 63, batch: int = 2, channels: int = 3) -> jax.Array:
    pixels = np.random.default_rng(1).uniform(-128, 128, (batch, size, size, channels))
    return jnp.asarray(pixels, jnp.float32)


def init(model: AlexNet, x: jax.Array) -> dict:
    return jax.jit(model.init)(jax.random.key(0), x)


def apply(model: AlexNet, variables: dict, x: jax.Array, **kwargs):
    return jax.jit(lambda v, x, rngs: model.apply(v, x, rngs=rngs, **kwargs))(
        variables, x, {"dropout": jax.random.key(2)}
    )


def random_variables(model: AlexNet, x: jax.Array) -> dict:
    """Returns weights and biases so large that every layer shows in the logits."""
    rng = np.random.default_rng(3)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        std = np.sqrt(2 / np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 10.0
        return rng.normal(0, std, leaf.shape).astype(np.float32)

    shapes = jax.eval_shape(model.init, jax.random.key(0), x)
    statistics = jax.tree.map(lambda leaf: np.ones(leaf.shape, leaf.dtype), shapes)
    return {**statistics, "params": jax.tree.map(draw, shapes["params"])}
