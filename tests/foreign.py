"""What other programs' weights are tested with: random ones in channels first, and two photographs.

Also the geometry of all AlexNets, for PyTorch.
"""

from pathlib import Path

import images
import numpy as np

from alexnet_jax import trained
from alexnet_jax.model import LAYERS

CLASSES = 7
GEOMETRY = {"conv2": 2, "conv3": 1, "conv4": 1, "conv5": 1}  # padding; stride 1
TWO_TOWERS = {"conv1": 1, "conv2": 2, "conv3": 1, "conv4": 2, "conv5": 2}  # groups
FILTERS = {"owt": (64, 192, 384, 256, 256), "towers": (96, 256, 384, 384, 256)}
SIZES = (11, 5, 3, 3, 3)

Weights = dict[str, tuple[np.ndarray, np.ndarray]]


def random_weights(filters: str, bias: float, classes: int = CLASSES) -> Weights:
    """Float32[O, I / groups, R, R] or [O, I], and [O], which keep the scale of their inputs."""
    rng = np.random.default_rng(11)
    outputs = FILTERS[filters]
    shapes = {}
    for layer, inputs, units, size in zip(LAYERS, (3, *outputs), outputs, SIZES, strict=False):
        groups = TWO_TOWERS[layer] if filters == "towers" else 1
        shapes[layer] = (units, inputs // groups, size, size)
    shapes |= {"fc6": (4096, 9216), "fc7": (4096, 4096), "fc8": (classes, 4096)}

    def draw(shape: tuple[int, ...]) -> tuple[np.ndarray, np.ndarray]:
        weight = rng.standard_normal(shape, np.float32)
        weight *= np.float32(np.sqrt(2 / np.prod(shape[1:])))
        return weight, rng.normal(0, bias, shape[0]).astype(np.float32)

    return {layer: draw(shape) for layer, shape in shapes.items()}


def photographs() -> np.ndarray:
    """uint8[2, 256, 256, 3]."""
    return np.stack([images.photograph(number, 256, 256) for number in range(2)])


def log_probs(workdir: Path) -> np.ndarray:
    """What a workdir's network finds of the photographs, by the way of all commands."""
    return np.asarray(trained.classifier(trained.load(workdir))(photographs()))


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())
