"""AlexNet in JAX and Flax: the network, its data, its training.

The names below are the public API; docs/api.md has an example of each. `python -m alexnet_jax`
lists the commands.
"""

import os

__version__ = "1.0.0"

# XLA logs what it also raises. It reads this when JAX is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

from alexnet_jax.config import default_config, load_config  # noqa: E402
from alexnet_jax.data.augment import make_augment  # noqa: E402
from alexnet_jax.inference import load  # noqa: E402
from alexnet_jax.models.alexnet import VARIANTS, AlexNet  # noqa: E402
from alexnet_jax.models.build import build_model  # noqa: E402
from alexnet_jax.models.summary import layer_table  # noqa: E402
from alexnet_jax.training.optimizer import make_optimizer  # noqa: E402
from alexnet_jax.training.train_step import (  # noqa: E402
    init_state,
    make_eval_step,
    make_train_step,
)

__all__ = [
    "VARIANTS",
    "AlexNet",
    "build_model",
    "default_config",
    "init_state",
    "layer_table",
    "load",
    "load_config",
    "make_augment",
    "make_eval_step",
    "make_optimizer",
    "make_train_step",
]
