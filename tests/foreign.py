"""Weights as other programs have them, channels first, and what to compare networks of them on."""

import contextlib
import io
from collections.abc import Callable
from pathlib import Path

import images
import numpy as np
import pytest

from alexnet_jax import convert
from alexnet_jax import inference as trained
from alexnet_jax.models.alexnet import LAYERS
from alexnet_jax.utils.errors import UserError

CLASSES = 7
FILTERS = {"owt": (64, 192, 384, 256, 256), "towers": (96, 256, 384, 384, 256)}
GROUPS = {"owt": (1, 1, 1, 1, 1), "towers": (1, 2, 1, 2, 2)}
SIZES = (11, 5, 3, 3, 3)

Weights = dict[str, tuple[np.ndarray, np.ndarray]]


def shapes(kind: str) -> dict[str, tuple[int, ...]]:
    """By layer the weight's shape, [O, I / groups, R, R] or [O, I], of `owt` or `towers`."""
    inputs = (3, *FILTERS[kind][:4])
    convolutions = zip(FILTERS[kind], inputs, GROUPS[kind], SIZES, strict=True)
    found = [(o, i // groups, size, size) for o, i, groups, size in convolutions]
    return dict(zip(LAYERS, [*found, (4096, 9216), (4096, 4096), (CLASSES, 4096)], strict=True))


def random_weights(kind: str, bias: float) -> Weights:
    """Float32 weights that keep the scale of their inputs, and biases [O] of that deviation."""
    rng = np.random.default_rng(11)

    def draw(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        weight = rng.standard_normal(shape, np.float32)
        weight *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        return weight, rng.normal(0, bias, shape[0]).astype(np.float32)

    return {layer: draw(shape) for layer, shape in shapes(kind).items()}


def tiny_weights() -> Weights:
    """Of sides of 2: enough for a file, and no AlexNet."""
    axes = {layer: len(shape) for layer, shape in shapes("owt").items()}
    return {
        layer: (np.arange(2.0**n, dtype=np.float32).reshape((2,) * n), np.zeros(2, np.float32))
        for layer, n in axes.items()
    }


def photographs() -> np.ndarray:
    """uint8[2, 256, 256, 3]."""
    return np.stack([images.photograph(number, 256, 256) for number in range(2)])


def log_probs(workdir: Path) -> np.ndarray:
    """What a workdir's network finds of the photographs, by the way of all commands."""
    return np.asarray(trained.classifier(trained.load(workdir))(photographs()))


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def converted(*arguments: str | Path) -> str:
    """Runs the command in this process, and returns what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), pytest.raises(SystemExit) as end:
        convert.main([str(argument) for argument in arguments])
    assert end.value.code is None
    return printed.getvalue()


def assert_refused(told: str, source: Path, *others: Path, to: Callable = convert.to_workdir):
    """That no workdir is made of a file, nor anything else, and why."""
    folder = source.parent
    before = sorted(folder.iterdir())
    with pytest.raises(UserError, match=told):
        to(source, folder / "new", *others)
    assert sorted(folder.iterdir()) == before
