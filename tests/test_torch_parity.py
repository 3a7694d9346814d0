"""`paper` and `owt` in PyTorch, layer by layer: the same logits, gradients and training curves."""

from collections.abc import Callable
from functools import partial

import jax
import numpy as np
import optax
import pytest

from alexnet_jax.config import default_config
from alexnet_jax.models.alexnet import AlexNet, kernel_layers
from alexnet_jax.training.optimizer import make_optimizer

pytestmark = pytest.mark.torch
torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed: pip install -r requirements-torch.txt"
)
F = torch.nn.functional

TOLERANCE = 1e-4
STEPS = 20
MOMENTUM, WEIGHT_DECAY = 0.9, 5e-4

GROUPS = {"owt": (1, 1, 1, 1, 1), "paper": (1, 2, 1, 2, 2)}


def random_params(model: AlexNet, x: np.ndarray) -> dict:
    """Weights that preserve the scale of their inputs, and biases other than 0."""
    rng = np.random.default_rng(0)

    def draw(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
        std = np.sqrt(1 / np.prod(leaf.shape[:-1])) if len(leaf.shape) > 1 else 0.1
        return rng.normal(0, std, leaf.shape).astype(np.float32)

    return jax.tree.map(draw, jax.eval_shape(model.init, jax.random.key(0), x))["params"]


def random_batch(size: int, batch: int, classes: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng((1, seed))
    return (
        rng.standard_normal((batch, size, size, 3), np.float32),
        rng.integers(0, classes, batch).astype(np.int32),
    )


def to_torch(params: dict, pooled: int) -> dict:
    """HWIO -> OIHW; [in, out] -> [out, in], with fc6's inputs from (H, W, C) to (C, H, W)."""
    tensors = {}
    for name in kernel_layers("paper"):
        kernel = np.asarray(params[name]["kernel"])
        if name == "fc6":
            maps = kernel.reshape(pooled, pooled, -1, kernel.shape[-1])
            kernel = maps.transpose(2, 0, 1, 3).reshape(kernel.shape)
        kernel = kernel.transpose(3, 2, 0, 1) if kernel.ndim == 4 else kernel.T
        for leaf, array in (("kernel", kernel), ("bias", np.asarray(params[name]["bias"]))):
            tensors[name, leaf] = torch.tensor(np.ascontiguousarray(array), requires_grad=True)
    return tensors


def torch_loss(variant: str, tensors: dict, x: np.ndarray, labels: np.ndarray):
    """Logits and mean cross-entropy; x as the JAX model takes it, NHWC."""
    a = torch.from_numpy(x).permute(0, 3, 1, 2)
    geometry = [(4, 2), (1, 2), (1, 1), (1, 1), (1, 1)]
    for n, ((stride, padding), groups) in enumerate(
        zip(geometry, GROUPS[variant], strict=True), start=1
    ):
        kernel, bias = tensors[f"conv{n}", "kernel"], tensors[f"conv{n}", "bias"]
        a = F.relu(F.conv2d(a, kernel, bias, stride, padding, groups=groups))
        if variant == "paper" and n in (1, 2):
            # PyTorch divides alpha by n = 5, the paper does not.
            a = F.local_response_norm(a, 5, alpha=5 * 1e-4, beta=0.75, k=2.0)
        if n in (1, 2, 5):
            a = F.max_pool2d(a, 3, 2, ceil_mode=variant == "paper")
    if variant == "owt":
        a = F.adaptive_avg_pool2d(a, 6)
    a = a.flatten(1)
    for name in ("fc6", "fc7", "fc8"):
        a = F.linear(a, tensors[name, "kernel"], tensors[name, "bias"])
        a = a if name == "fc8" else F.relu(a)
    return a, F.cross_entropy(a, torch.from_numpy(labels).long())


def jax_loss(model: AlexNet, params: dict, x: np.ndarray, labels: np.ndarray):
    logits = model.apply({"params": params}, x, train=True)
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()
    return loss, logits


def relative_error(got, want) -> float:
    got, want = np.asarray(got), np.asarray(want)
    return float(np.abs(got - want).max() / np.abs(want).max())


def least_error(error_of_seed: Callable[[int], float]) -> float:
    """Returns the error of the first seed that meets the tolerance, or the least of five.

    If two values in a pooling window, or a value and ReLU's 0, differ by less than float32
    rounding, the gradient takes different paths in the two programs. One such tie changes the
    gradients of the layers below it by about 1e-3, and one batch in three has one. A wrong formula
    fails for every seed, so one seed without a tie decides.
    """
    errors = []
    for seed in range(5):
        errors.append(error_of_seed(seed))
        if errors[-1] < TOLERANCE:
            break
    return min(errors)


@pytest.mark.parametrize("variant", GROUPS)
def test_logits_loss_and_gradients(variant):
    model = AlexNet(variant, dropout=0.0)
    differentiate = jax.jit(jax.value_and_grad(partial(jax_loss, model), has_aux=True))

    def gradient_error(seed: int) -> float:
        x, labels = random_batch(224, batch=4, classes=1000, seed=seed)
        params = random_params(model, x)
        tensors = to_torch(params, pooled=6)
        want_logits, want_loss = torch_loss(variant, tensors, x, labels)
        want_loss.backward()
        (loss, logits), gradients = differentiate(params, x, labels)
        # There are no ties in the forward pass, so every seed must agree.
        assert relative_error(logits, want_logits.detach()) < TOLERANCE
        assert relative_error(loss, want_loss.detach()) < TOLERANCE
        got = to_torch(gradients, pooled=6)
        return max(relative_error(got[key].detach(), tensors[key].grad) for key in tensors)

    assert least_error(gradient_error) < TOLERANCE


# At 63 pixels the rate is high enough for weight decay to matter. At 224 it is low, because jumps
# of the loss would amplify differences of rounding.
CURVES = [("owt", 0.25, 63, 5e-3), ("paper", 0.25, 63, 5e-3), ("owt", 0.25, 224, 2e-4)]
CURVES += [pytest.param("paper", 0.25, 224, 1e-3, marks=pytest.mark.long)]


@pytest.mark.parametrize(("variant", "width", "size", "rate"), CURVES)
def test_loss_curve_of_twenty_steps_of_sgd(variant, width, size, rate):
    """PyTorch's velocity excludes the rate. At a constant rate the updates are equal."""
    classes = {63: 10, 224: 1000}[size]
    pooled = 6 if size == 224 or variant == "owt" else 1
    model = AlexNet(variant, num_classes=classes, dropout=0.0, width=width)
    optimizer, step = jax_optimizer_and_step(model, rate)

    def curve_error(seed: int) -> float:
        x, labels = random_batch(size, batch=4, classes=classes, seed=seed)
        params = random_params(model, x)
        want = torch_curve(variant, to_torch(params, pooled), x, labels, rate)
        got = jax_curve(optimizer, step, params, x, labels)
        assert want[-1] < 0.8 * want[0]
        return float(np.abs(got / want - 1).max())

    assert least_error(curve_error) < TOLERANCE


def torch_curve(
    variant: str, tensors: dict, x: np.ndarray, labels: np.ndarray, rate: float
) -> np.ndarray:
    sgd = torch.optim.SGD(
        tensors.values(), lr=rate, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, fused=True
    )  # fused: no copies of all parameters
    losses = []
    for _ in range(STEPS):
        sgd.zero_grad()
        _, loss = torch_loss(variant, tensors, x, labels)
        loss.backward()
        sgd.step()
        losses.append(loss.item())
    return np.array(losses)


def jax_optimizer_and_step(model: AlexNet, rate: float):
    config = default_config()
    config.learning_rate, config.optimizer.momentum = rate, MOMENTUM
    config.optimizer.weight_decay = config.optimizer.bias_weight_decay = WEIGHT_DECAY
    optimizer = make_optimizer(config, steps_per_epoch=1.0)

    @partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, x, labels):
        (loss, _), gradients = jax.value_and_grad(partial(jax_loss, model), has_aux=True)(
            params, x, labels
        )
        updates, state = optimizer.update(gradients, state, params, step=0, plateau_scale=1.0)
        return optax.apply_updates(params, updates), state, loss

    return optimizer, step


def jax_curve(
    optimizer: optax.GradientTransformationExtraArgs,
    step: Callable,
    params: dict,
    x: np.ndarray,
    labels: np.ndarray,
) -> np.ndarray:
    params = jax.device_put(params)
    state, losses = optimizer.init(params), []
    for _ in range(STEPS):
        params, state, loss = step(params, state, x, labels)
        losses.append(float(loss))
    return np.array(losses)
