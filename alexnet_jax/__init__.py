"""AlexNet in JAX and Flax: the network, its data, its training.

The names below are the public API; docs/api.md has an example of each. `python -m alexnet_jax`
lists the commands.
"""

import os
import sys

__version__ = "1.0.0"

# XLA logs what it also raises. It reads this when JAX is first imported.
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

try:
    from alexnet_jax.config import default_config, load_config
    from alexnet_jax.data.augment import make_augment
    from alexnet_jax.inference import load
    from alexnet_jax.models.alexnet import VARIANTS, AlexNet
    from alexnet_jax.models.build import build_model
    from alexnet_jax.models.summary import layer_table
    from alexnet_jax.training.optimizer import make_optimizer
    from alexnet_jax.training.train_step import (
        init_state,
        make_eval_step,
        make_train_step,
    )
except ModuleNotFoundError as error:
    # `python -m` calls the program "-m" while it imports a command's package. As a library, raise.
    if os.path.basename(sys.argv[0]) not in ("-m", "train.py"):
        raise
    print(
        f"error: this Python has no module {error.name}; activate the environment that has it "
        "(source .venv/bin/activate), or pip install -r requirements.txt",
        file=sys.stderr,
    )
    sys.exit(2)

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
