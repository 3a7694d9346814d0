"""Taps: their names, responses, edits and gradients between any two of them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrow_model import NARROW, apply, images, init, random_variables

from alexnet_jax.analysis import taps as functions
from alexnet_jax.analysis.taps import set_units
from alexnet_jax.models.alexnet import VARIANTS, AlexNet, Tanh, named_layers
from alexnet_jax.models.names import find_tap, known_names, taps
from alexnet_jax.utils.errors import UserError


def responses(model, variables, x, *more):
    return jax.jit(lambda v, x: functions.responses(model, v, x, *more))(variables, x)


def gradients(model, variables, x, *more):
    return jax.jit(lambda v, x: functions.gradients(model, v, x, *more))(variables, x)


TANH = tuple(Tanh() if layer.kind == "relu" else layer for layer in VARIANTS["paper"])
NAMES = {  # of the same tap
    ("owt", "relu5"): ["features.11", "layer 5", "pool5.input", "features.12.input"],
    ("owt", "conv1"): ["features.0", "relu1.input", "features.1.input"],
    ("owt", "input"): ["conv1.input", "features.0.input"],
    ("owt", "avgpool5"): ["avgpool", "drop5.input", "classifier.0.input"],
    ("owt", "relu7"): ["classifier.5", "layer 7", "last hidden layer", "fc8.input"],
    ("owt", "fc8"): ["classifier.6", "layer 8", "prob.input"],
    ("owt", "fc6"): ["classifier.1"],
    ("single", "fc6"): ["classifier.1"],  # as in torchvision's network, by its role
    ("single", "dropout6"): ["classifier.3", "drop6", "fc7.input"],
    ("paper", "lrn1"): ["norm1", "pool1.input"],
    ("paper", "dropout7"): ["drop7"],
    ("caffenet", "pool1"): ["norm1.input"],
    ("original", "relu1"): ["layer 1", "conv2.input"],
    ("original", "mapnorm2"): ["pool2.input"],
    (TANH, "tanh3"): ["layer 3", "conv4.input"],
    ("bn", "bn1"): ["relu1.input"],
    ("owt_conv", "pool5"): ["features.12", "avgpool.input"],
    ("cifar_13pct", "relu4"): ["last hidden layer", "fc5.input"],
}


@pytest.mark.parametrize(("variant", "tap"), NAMES, ids=str)
def test_names_of_a_tap(variant, tap):
    for name in [tap, *NAMES[variant, tap]]:
        assert find_tap(variant, name) == tap, name


@pytest.mark.parametrize("variant", VARIANTS)
def test_torchvision_has_names_where_the_operations_are_its_own(variant):
    names = [name for name in known_names(variant) if name.startswith(("features", "classifier"))]
    numbers = {"owt": (13, range(7)), "single": (13, range(1, 7))}.get(variant, (0, ()))
    assert names == [
        *(f"features.{n}" for n in range(numbers[0])),
        *(f"classifier.{n}" for n in numbers[1]),
    ]


@pytest.mark.parametrize(
    ("variant", "name", "near"),
    [
        ("paper", "rellu5", "relu5"),
        ("owt", "feature.11", "features.11"),
        ("paper", "features.11", "relu5"),
        ("owt_conv", "fc7", "relu1"),
        ("owt", "norm1", "conv1"),
        ("owt", "input.input", "input"),
        ("owt", "layer 5.input", "layer 5"),
        ("owt", "relu5.output", "relu5"),
        ("owt", "", "conv1"),
    ],
)
def test_unknown_layer_is_rejected_with_the_nearest_names(variant, name, near):
    with pytest.raises(UserError, match=f"unknown layer '{name}'; the nearest names are") as error:
        find_tap(variant, name)
    assert near in str(error.value).partition("names are ")[2].split(", ")


@pytest.mark.parametrize("variant", ["paper", "owt", "bn"])
def test_responses_are_the_outputs_of_the_layers(variant):
    model, x = AlexNet(variant, width=NARROW), images()
    variables = random_variables(model, x)
    logits, outputs = apply(model, variables, x, features=tuple(named_layers(variant)))
    found = responses(model, variables, x, taps(variant))
    np.testing.assert_array_equal(found.pop("input"), x)
    np.testing.assert_allclose(found.pop("prob"), jax.nn.softmax(logits), rtol=1e-5, atol=1e-12)
    assert found.keys() == outputs.keys()
    for name, value in found.items():
        scale = np.abs(outputs[name]).max()
        np.testing.assert_allclose(value, outputs[name], rtol=0, atol=1e-5 * scale)


def test_prob_alone_and_no_names():
    model, x = AlexNet("owt", num_classes=3, width=NARROW), images()
    variables = init(model, x)
    assert responses(model, variables, x, []) == {}
    np.testing.assert_allclose(responses(model, variables, x, ["prob"])["prob"].sum(1), 1, 1e-6)


@pytest.mark.parametrize("tap", ["conv1", "relu1", "pool1", "fc7", "fc8"])
def test_an_edit_that_changes_nothing_changes_no_logit(tap):
    """Without edits and features, pooling may run before bias and ReLU."""
    model, x = AlexNet("owt", width=NARROW), images(96)
    variables = random_variables(model, x)
    want = apply(model, variables, x)
    got = apply(model, variables, x, edits={tap: lambda value: value})
    np.testing.assert_allclose(got, want, rtol=0, atol=1e-5 * np.abs(want).max())


def test_ablating_a_map_equals_a_kernel_of_zeros():
    model, x = AlexNet("single", width=NARROW), images(96)
    variables = random_variables(model, x)
    off = [1, 5]
    cut = jax.tree.map(np.copy, variables)
    for array in cut["params"]["conv2"].values():
        array[..., off] = 0.0
    want = responses(model, cut, x, ["pool2", "fc8"])
    got = responses(model, variables, x, ["pool2", "fc8"], {"features.4": set_units(off, 0.0)})
    assert np.abs(want["fc8"] - apply(model, variables, x)).max() > 0.1
    for name in want:
        scale = np.abs(want[name]).max()
        np.testing.assert_allclose(got[name], want[name], rtol=0, atol=1e-5 * scale)


def test_a_set_value_is_what_the_next_layers_and_the_tap_itself_see():
    model, x = AlexNet("owt", width=NARROW), images()
    variables = random_variables(model, x)
    value = np.random.default_rng(0).normal(size=(2, 408)).astype(np.float32)
    found = responses(model, variables, x, ["relu7", "fc8"], {"classifier.5": lambda _: value})
    np.testing.assert_array_equal(found["relu7"], value)
    params = variables["params"]["fc8"]
    np.testing.assert_allclose(
        found["fc8"], value @ params["kernel"] + params["bias"], rtol=1e-4, atol=1e-3
    )


def test_edited_images():
    model, x = AlexNet("owt", width=NARROW), images()
    variables = random_variables(model, x)
    mirrored = responses(model, variables, x, ["fc8"], {"input": lambda x: x[:, :, ::-1]})["fc8"]
    want = apply(model, variables, x[:, :, ::-1])
    np.testing.assert_allclose(mirrored, want, rtol=0, atol=1e-5 * np.abs(want).max())


@pytest.mark.parametrize(
    ("edits", "message"),
    [
        ({"relu5": abs, "features.11": abs}, "features.11 cannot be made: relu5 is named twice"),
        ({"prob": abs}, "prob follows the last layer"),
        ({"relu9": abs}, "unknown layer 'relu9'"),
    ],
)
def test_edits_that_cannot_be_made(edits, message):
    model = AlexNet("owt", width=NARROW)
    with pytest.raises(UserError, match=message):
        responses(model, {}, images(), ["fc8"], edits)


def test_images_that_are_too_small():
    model = AlexNet("owt", width=NARROW)
    with pytest.raises(UserError, match="62x62 pixels are too small.*at least 63x63"):
        responses(model, {}, images(62), ["fc8"])


def test_gradient_to_the_images_is_that_of_jax():
    model, x = AlexNet("paper", width=NARROW), images()
    variables = random_variables(model, x)
    want = jax.jit(jax.grad(lambda x: model.apply(variables, x)[:, 3].sum()))(x)
    found = gradients(model, variables, x, ("fc8", lambda y: y[:, 3].sum()), ["input"])["input"]
    np.testing.assert_allclose(found, want, rtol=0, atol=1e-4 * np.abs(want).max())


def test_gradient_between_taps_is_the_difference_that_an_edit_makes():
    """The pre-activation of a unit is linear in the layer before it."""
    model, x = AlexNet("paper", width=NARROW), images(96)
    variables = random_variables(model, x)

    def unit(edits):
        return responses(model, variables, x, ["fc7"], edits)["fc7"][:, 5]

    def edit(h):
        return h.at[:, 11].add(10.0)

    (slope,) = gradients(
        model, variables, x, ("fc7", lambda y: y[:, 5].sum()), ["dropout6"]
    ).values()
    difference = unit({"dropout6": edit}) - unit({})
    np.testing.assert_allclose(difference / 10, slope[:, 11], rtol=1e-2)


def test_gradients_with_edits_are_at_the_changed_values():
    model, x = AlexNet("owt", width=NARROW), images()
    variables = random_variables(model, x)
    of = ("classifier.6", lambda y: y[:, 0].sum())
    off = {"relu5": set_units([2], 0.0)}
    found = gradients(model, variables, x, of, ["conv5", "relu5", "fc8"], off)
    assert not found["conv5"][..., 2].any() and found["conv5"].any()
    assert found["relu5"][..., 2].any()  # what setting the unit to another value would change
    np.testing.assert_array_equal(found["fc8"][:, :2], [[1, 0], [1, 0]])


def test_gradient_to_a_later_tap_is_rejected():
    model, x = AlexNet("owt", width=NARROW), images()
    with pytest.raises(UserError, match="no gradient of relu5 to fc6, which comes after it"):
        gradients(model, {}, x, ("relu5", jnp.sum), ["input", "fc6"])


@pytest.mark.torch
def test_responses_and_gradients_at_all_names_are_those_of_pytorch_hooks():
    from torchvision_stub import torch, torchvision

    from alexnet_jax.weights import layouts
    from alexnet_jax.weights.torchvision import MODULES

    torch.manual_seed(0)
    network = torchvision.models.alexnet(num_classes=9).eval()
    state = {name: value.detach().numpy() for name, value in network.state_dict().items()}
    weights = {n: (state[f"{m}.weight"], state[f"{m}.bias"]) for n, m in MODULES.items()}
    params = layouts.to_params(weights, "owt")
    x = np.random.default_rng(0).standard_normal((2, 95, 95, 3), np.float32)
    names = [n for n in known_names("owt") if n.startswith(("features.", "classifier."))]
    names.append("avgpool")
    outputs = {}

    def keep(name):
        def hook(module, _, output):
            outputs[name] = output.clone()  # ReLU changes its input in place
            outputs[name].retain_grad()
            return outputs[name]

        return hook

    for name in names:
        network.get_submodule(name).register_forward_hook(keep(name))
    for module in network.modules():
        if isinstance(module, torch.nn.ReLU):
            module.inplace = False
    network(torch.tensor(x).permute(0, 3, 1, 2))
    outputs["features.11"][:, 7].square().sum().backward()

    def ours(value):
        value = value.detach().numpy()
        return value.transpose(0, 2, 3, 1) if value.ndim == 4 else value

    model = AlexNet("owt", num_classes=9)
    found = responses(model, {"params": params}, x, names)
    for name in names:
        want = ours(outputs[name])
        got = np.asarray(found[name])
        if name == "classifier.0":  # flattened there
            got = got.transpose(0, 3, 1, 2).reshape(want.shape)
        np.testing.assert_allclose(got, want, rtol=0, atol=1e-4 * np.abs(want).max(), err_msg=name)

    earlier = [f"features.{n}" for n in range(12)]
    of = ("features.11", lambda y: jnp.square(y[..., 7]).sum())
    slopes = gradients(model, {"params": params}, x, of, earlier)
    for name in earlier:
        want = ours(outputs[name].grad)
        error = np.linalg.norm(slopes[name] - want) / np.linalg.norm(want)
        assert error < 1e-3, name
