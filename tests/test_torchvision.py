"""`owt` equals torchvision's own alexnet: shapes, values and gradients at every input size."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from torchvision_stub import torch, torchvision

from alexnet_jax.models.alexnet import AlexNet, named_layers

pytestmark = pytest.mark.torch

MODEL = AlexNet("owt")
NAMES = tuple(named_layers("owt"))
TOLERANCE = 1e-4
# Smallest; non-overlapping remainders of every kind; powers of two; the papers' sizes; largest.
AWKWARD = (63, 64, 66, 79, 95, 100, 127, 128, 160, 192, 224, 227, 240, 256, 299, 512)
KERNELS = {
    "conv1": "features.0",
    "conv2": "features.3",
    "conv3": "features.6",
    "conv4": "features.8",
    "conv5": "features.10",
    "fc6": "classifier.1",
    "fc7": "classifier.4",
    "fc8": "classifier.6",
}


@pytest.fixture(scope="module")
def reference():
    torch.manual_seed(0)
    return torchvision.models.alexnet().eval()


@pytest.fixture(scope="module")
def params(reference):
    return from_torch({name: x.detach() for name, x in reference.state_dict().items()})


def from_torch(state):
    """OIHW -> HWIO; [out, in] -> [in, out], with fc6's inputs from (C, H, W) to (H, W, C)."""
    found = {}
    for layer, module in KERNELS.items():
        weight = state[f"{module}.weight"].numpy()
        if layer == "fc6":
            weight = weight.reshape(4096, 256, 6, 6).transpose(0, 2, 3, 1).reshape(4096, -1)
        kernel = weight.transpose(2, 3, 1, 0) if weight.ndim == 4 else weight.T
        found[layer] = {"kernel": kernel, "bias": state[f"{module}.bias"].numpy()}
    return found


def images(size, batch=2, seed=0):
    rng = np.random.default_rng(seed)
    return rng.standard_normal((batch, size, size, 3), np.float32)


def torch_outputs(network, x):
    """The output of every module of torchvision's network, in order; ours has as many layers."""
    outputs = []
    hooks = [
        module.register_forward_hook(lambda module, _, y: outputs.append(y.clone()))
        for module in [*network.features, network.avgpool, *network.classifier]
    ]
    network(x)
    for hook in hooks:
        hook.remove()
    return dict(zip(NAMES, outputs, strict=True))


def test_shapes_of_all_layers_at_sizes_from_63_to_512():
    """At all sizes of two periods: the strides multiply to 32. Beyond, at every seventh size."""
    with torch.device("meta"):
        network = torchvision.models.alexnet().eval()
    variables = jax.eval_shape(MODEL.init, jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
    differing = []
    for size in (*range(63, 128), *range(128, 513, 7)):
        _, ours = jax.eval_shape(
            lambda v, x: MODEL.apply(v, x, features=NAMES),
            variables,
            jax.ShapeDtypeStruct((1, size, size, 3), jnp.float32),
        )
        theirs = torch_outputs(network, torch.empty(1, 3, size, size, device="meta"))
        for name in NAMES:
            shape = tuple(theirs[name].shape)
            want = (shape[0], *shape[2:], shape[1]) if len(shape) == 4 else shape
            # torchvision flattens between avgpool and the first dropout, ours before fc6.
            if name != "dropout5" and ours[name].shape != want:
                differing.append((size, name))
    assert differing == []


@pytest.mark.parametrize("size", AWKWARD)
def test_values_of_all_layers_and_logits(reference, params, size):
    x = images(size)
    with torch.no_grad():
        theirs = torch_outputs(reference, torch.from_numpy(x).permute(0, 3, 1, 2))
    # An argument and not a constant, with which compiling takes much longer.
    apply = jax.jit(lambda params, x: MODEL.apply({"params": params}, x, features=NAMES))
    logits, ours = apply(params, x)
    for name in NAMES:
        want = theirs[name].numpy()
        if want.ndim == 4:
            want = want.transpose(0, 2, 3, 1)
        elif name == "dropout5":
            want = want.reshape(2, 256, 6, 6).transpose(0, 2, 3, 1)
        np.testing.assert_allclose(ours[name], want, rtol=0, atol=TOLERANCE * np.abs(want).max())
    np.testing.assert_array_equal(logits, ours["fc8"])


@pytest.mark.parametrize("size", [64, 127, 224, pytest.param(256, marks=pytest.mark.long)])
def test_gradients(reference, params, size):
    """A value at ReLU's zero, or a tie in a pooling window, sends a gradient elsewhere if it is
    rounded differently. That happens for some images, so one of three batches must agree.
    """
    labels = np.array([3, 7])

    @jax.jit
    @jax.grad
    def gradients(params, x):
        logits = MODEL.apply({"params": params}, x)
        return optax.softmax_cross_entropy_with_integer_labels(logits, labels).mean()

    def largest_error(x):
        reference.zero_grad()
        logits = reference(torch.from_numpy(x).permute(0, 3, 1, 2))
        torch.nn.functional.cross_entropy(logits, torch.from_numpy(labels)).backward()
        theirs = from_torch({name: p.grad for name, p in reference.named_parameters()})
        errors = jax.tree.map(
            lambda ours, want: np.linalg.norm(ours - want) / np.linalg.norm(want),
            gradients(params, x),
            theirs,
        )
        return max(jax.tree.leaves(errors))

    assert any(largest_error(images(size, seed=seed)) < 1e-4 for seed in range(3))
