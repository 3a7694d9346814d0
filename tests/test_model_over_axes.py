"""The network over mapped axes: fc layers in parts, batch norm of the whole batch."""

import jax
import numpy as np
from narrow_model import NARROW, apply, images, random_variables

from alexnet_jax.models.alexnet import AlexNet


def test_fc_layers_split_over_an_axis_equal_the_whole():
    """Each of two devices has half of an fc kernel's rows, and half of the images."""
    x = images(batch=4)
    whole, split = (
        AlexNet("paper", width=NARROW, batch_axes=axes, fc_axis=axis)
        for axes, axis in (((), None), (("group",), "group"))
    )
    variables = random_variables(whole, x)
    layers = variables["params"].items()
    parts, axes = ({name: dict(arrays) for name, arrays in layers} for _ in range(2))
    for name, arrays in layers:
        axes[name] = dict.fromkeys(arrays)
        if name.startswith("fc"):
            parts[name]["kernel"] = np.stack(np.split(arrays["kernel"], 2))
            axes[name]["kernel"] = 0
    got = jax.vmap(
        lambda params, x: apply(split, {"params": params}, x, train=True),
        in_axes=(axes, 0),
        axis_name="group",
    )(parts, x.reshape(2, 2, *x.shape[1:]))
    want = apply(whole, variables, x, train=True)
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-5 * float(want.max()))


def test_batch_norm_statistics_follow_the_batch():
    model, x = AlexNet("bn", width=NARROW, dropout=0.0), images(batch=4)
    variables = random_variables(model, x)
    _, new = apply(model, variables, x, train=True, mutable=["batch_stats"])
    conv1 = jax.lax.conv_general_dilated(
        x,
        variables["params"]["conv1"]["kernel"],
        (4, 4),
        "VALID",
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    stats = new["batch_stats"]["bn1"]
    np.testing.assert_allclose(stats["mean"], 0.9 + 0.1 * conv1.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * conv1.var((0, 1, 2)), rtol=1e-4)


def test_batch_norm_over_an_axis_equals_the_whole_batch():
    x = images(batch=4)
    whole, mapped = (
        AlexNet("bn", width=NARROW, dropout=0.0, batch_axes=axes) for axes in ((), ("batch",))
    )
    variables = random_variables(whole, x)
    want, want_stats = apply(whole, variables, x, train=True, mutable=["batch_stats"])
    got, got_stats = jax.vmap(
        lambda part: apply(mapped, variables, part, train=True, mutable=["batch_stats"]),
        axis_name="batch",
    )(x.reshape(2, 2, *x.shape[1:]))
    np.testing.assert_allclose(got.reshape(want.shape), want, atol=1e-4)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-3, atol=1e-4),
        got_stats,
        want_stats,
    )
