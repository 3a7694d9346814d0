"""Small images, and the config and statistics to augment them with."""

import jax
import numpy as np

from alexnet_jax.config import default_config
from alexnet_jax.data.augment import Statistics, make_augment

SIZE, CROP = 40, 32
BORDER = SIZE - CROP


def config(**fields):
    """Random crops only, unless fields of `config.augment` say otherwise."""
    c = default_config()
    c.image_size = SIZE
    c.augment.crop_size = CROP
    c.augment.update({"color_noise": 0.0, "flip": False} | fields)
    return c


def images(count=1, seed=0, size=SIZE):
    return np.random.default_rng(seed).integers(0, 256, (count, size, size, 3), np.uint8)


def stats(mean=None, basis=None):
    return Statistics(
        np.zeros((SIZE, SIZE, 3), np.float32) if mean is None else np.float32(mean),
        np.zeros((3, 3), np.float32) if basis is None else np.float32(basis),
    )


def run(batch, c, s, seed=0):
    """Returns a batch augmented with a key for each image."""
    keys = jax.random.split(jax.random.PRNGKey(seed), len(batch))
    return np.asarray(jax.jit(make_augment(c, s))(batch, keys))


def run_as_on_tpu(monkeypatch, *args):
    """As `run`, by the code that is selected when a program is lowered for TPU."""
    with monkeypatch.context() as patch:
        patch.setattr(jax.lax, "platform_dependent", lambda *args, tpu, **others: tpu(*args))
        return run(*args)
