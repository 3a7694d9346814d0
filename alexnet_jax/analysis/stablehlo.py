"""StableHLO programs for other compilers: inference and the training step of a config.

Parameters are arguments, so that a program is small and has no weights. Arguments and results are
flattened; a description names each, with its shape and dtype, in order.
"""

import json
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax import config as configs
from alexnet_jax.data.augment import Statistics, make_augment
from alexnet_jax.data.store import batch_shapes
from alexnet_jax.models.build import build_model
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import build_state, build_train_step

PROGRAMS = ("inference", "training")
IMAGENET = 1_281_167  # images of an epoch, which the schedule of a training step needs


class Program(NamedTuple):
    """A program as text, and what its arguments and results are, as JSON."""

    text: str
    description: str


def lower(config: ConfigDict, what: str, platform: str) -> Program:
    """Returns a program for batches of `config.batch_size`.

    Args:
      what: "inference", from variables and float32 images, mean subtracted, to logits; or
        "training", from the train state and a batch of uint8 images and labels to the next state
        and metrics, with the augmentation (whose mean is 0).
      platform: "cpu", "cuda" or "tpu". Some operations have another form for each.
    """
    of_config = _inference if what == "inference" else _training
    function, arguments, results = of_config(config)
    traced = jax.jit(function, keep_unused=True).trace(*arguments.values())
    outputs = traced.out_info if len(results) > 1 else (traced.out_info,)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    description = {
        "program": what,
        "platform": platform,
        "jax_version": jax.__version__,
        "arguments": _named(arguments),
        "results": _named(dict(zip(results, outputs, strict=True))),
        "config": json.loads(configs.to_json(config)),
    }
    return Program(text, json.dumps(description, indent=1) + "\n")


# A function, its arguments by name, and the names of its results.
Lowered = tuple[Callable[..., Any], dict[str, Any], tuple[str, ...]]


def _inference(config: ConfigDict) -> Lowered:
    model, size = build_model(config), make_augment(config).view_size
    images = jax.ShapeDtypeStruct((config.batch_size, size, size, 3), jnp.float32)
    variables = jax.eval_shape(model.init, jax.random.PRNGKey(0), images)

    def infer(variables: Any, images: jax.Array) -> Any:
        return model.apply(variables, images)

    return infer, {"variables": variables, "images": images}, ("logits",)


def _training(config: ConfigDict) -> Lowered:
    model = build_model(config)
    steps_per_epoch = IMAGENET / config.batch_size
    tx = make_optimizer(config, steps_per_epoch)
    # The values do not matter, but the color noise of a zero matrix would not be computed.
    statistics = Statistics(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
    config.augment.mean = "channel"
    augment = make_augment(config, statistics, steps_per_epoch)
    state = jax.eval_shape(lambda: build_state(config, model, tx))
    batch = {
        name: jax.ShapeDtypeStruct((config.batch_size, *shape), dtype)
        for name, (shape, dtype) in batch_shapes(config.image_size, config.stored).items()
    }
    train_step = build_train_step(config, model, tx, augment)
    return train_step, {"state": state, "batch": batch}, ("state", "metrics")


def _named(trees: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns a description of each array, in the order in which the program has them."""
    found = []
    for name, tree in trees.items():
        for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
            parts = [name, *(jax.tree_util.keystr((key,), simple=True) for key in path)]
            found.append(
                {"name": ".".join(parts), "shape": list(leaf.shape), "dtype": str(leaf.dtype)}
            )
    return found
