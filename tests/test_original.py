"""Variant `original` against an independent float64 forward pass of run #145, tower by tower."""

import jax
import numpy as np
import pytest

from alexnet_jax.models.alexnet import AlexNet

FACTS = (
    "conv1 reaches past the bottom and right edges",
    "block 1 normalizes before its ReLU",
    "lrn divides alpha by n",
    "lrn sees one tower",
    "within-map norm after conv2",
    "hidden units halved at test",
)


def towers(a: np.ndarray) -> list[np.ndarray]:
    return np.split(a, 2, axis=-1)


def conv(a: np.ndarray, kernel: np.ndarray, pads: tuple[int, int], stride: int = 1) -> np.ndarray:
    a = np.pad(a, ((0, 0), pads, pads, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(a, kernel.shape[:2], axis=(1, 2))
    return np.einsum("bhwcyx,yxco->bhwo", windows[:, ::stride, ::stride], kernel, optimize=True)


def pool(a: np.ndarray) -> np.ndarray:
    windows = np.lib.stride_tricks.sliding_window_view(a, (3, 3), axis=(1, 2))
    return windows[:, ::2, ::2].max((-2, -1))


def lrn(a: np.ndarray, alpha: float) -> np.ndarray:
    channels = np.arange(a.shape[-1])
    near = np.abs(channels[:, None] - channels) <= 2
    return a / (2 + alpha * (a**2 @ near)) ** 0.75


def within_map(a: np.ndarray) -> np.ndarray:
    squares = np.pad(a**2, ((0, 0), (2, 2), (2, 2), (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(squares, (5, 5), axis=(1, 2))
    return a / (1 + 0.001 / 25 * windows.sum((-2, -1))) ** 0.75


def run_145(params: dict, x: np.ndarray, undone: str = "") -> np.ndarray:
    """Test-time logits as layers-145.cfg and layer.py compute them, without the fact `undone`."""
    facts = {fact: fact != undone for fact in FACTS}
    reaches_past, lrn_first, divides, per_tower, within, halved = (facts[f] for f in FACTS)
    weights = {n: np.asarray(p["kernel"], np.float64) for n, p in params.items()}
    biases = {n: np.asarray(p["bias"], np.float64) for n, p in params.items()}

    def relu(a: np.ndarray) -> np.ndarray:
        return np.maximum(a, 0)

    def norm(a: np.ndarray) -> np.ndarray:
        alpha = 1e-4 / 5 if divides else 1e-4
        parts = [lrn(t, alpha) for t in towers(a)] if per_tower else [lrn(a, alpha)]
        return np.concatenate(parts, axis=-1)

    def grouped(a: np.ndarray, name: str, pad: int) -> np.ndarray:
        halves = zip(towers(a), towers(weights[name]), strict=True)
        parts = [conv(half, kernel, (pad, pad)) for half, kernel in halves]
        return np.concatenate(parts, axis=-1) + biases[name]

    a = conv(x, weights["conv1"], (0, 3) if reaches_past else (2, 2), stride=4) + biases["conv1"]
    a = relu(pool(norm(a))) if lrn_first else pool(norm(relu(a)))
    a = norm(relu(grouped(a, "conv2", 2)))
    a = pool(within_map(a) if within else a)
    a = relu(conv(a, weights["conv3"], (1, 1)) + biases["conv3"])
    a = relu(grouped(a, "conv4", 1))
    a = relu(pool(grouped(a, "conv5", 1))).reshape(len(x), -1)
    for name in ("fc6", "fc7"):
        a = relu(a @ weights[name] + biases[name]) * (0.5 if halved else 1)
    return a @ weights["fc8"] + biases["fc8"]


@pytest.fixture(scope="module")
def original() -> tuple[dict, np.ndarray, np.ndarray]:
    """Params, images at 224 and the model's logits, of a narrow net whose every layer tells."""
    rng = np.random.default_rng(3)
    x = rng.uniform(-128, 128, (2, 224, 224, 3)).astype(np.float32)
    model = AlexNet("original", num_classes=10, width=0.1)  # 8-24-40-40-24 filters, 408 hidden

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        std = np.sqrt(2 / np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 10.0
        return rng.normal(0, std, leaf.shape).astype(np.float32)

    variables = jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), x))
    logits = jax.jit(model.apply)(variables, x)
    return variables["params"], x.astype(np.float64), np.asarray(logits)


def relative_error(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.abs(got - want).max() / np.abs(want).max())


def test_original_matches_run_145(original):
    params, x, logits = original
    assert relative_error(logits, run_145(params, x)) < 1e-5


@pytest.mark.parametrize("fact", FACTS)
def test_original_differs_if_one_fact_is_undone(original, fact):
    params, x, logits = original
    assert relative_error(logits, run_145(params, x, undone=fact)) > 1e-3
