"""The six variants: shapes, parameters, initial weights, features, dropout, batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from narrow_model import NARROW, apply, images, init, random_variables

from alexnet_jax.models.alexnet import (
    FEATURES,
    LAYERS,
    VARIANTS,
    AlexNet,
    format_layer_table,
    layer_table,
)
from alexnet_jax.models.layers import local_response_norm, max_pool
from alexnet_jax.utils.errors import UserError

PARAMS = {
    "paper": 60_965_224,
    "single": 62_378_344,
    "original": 60_965_224,
    "caffenet": 60_965_224,
    "owt": 61_100_840,
    # `single`, less the 1,376 biases of its convolutions, plus a scale and a bias for each.
    "bn": 62_378_344 - 1_376 + 2 * 1_376,
}
MEGA_MACS = {"paper": 724.4, "original": 724.4, "caffenet": 724.4, "owt": 714.2}


# Shapes and counts


@pytest.mark.parametrize("size", [224, 227])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_shapes(variant, size):
    filters = {"owt": (64, 192, 384, 256, 256)}.get(variant, (96, 256, 384, 384, 256))
    c1, c2, c3, c4, c5 = filters
    rows = layer_table(AlexNet(variant), (size, size, 3))
    assert {row.name: row.output_shape for row in rows} == {
        "conv1": (55, 55, c1),
        "pool1": (27, 27, c1),
        "conv2": (27, 27, c2),
        "pool2": (13, 13, c2),
        "conv3": (13, 13, c3),
        "conv4": (13, 13, c4),
        "conv5": (13, 13, c5),
        "pool5": (6, 6, c5),
        "fc6": (4096,),
        "fc7": (4096,),
        "fc8": (1000,),
    }


@pytest.mark.parametrize("variant", VARIANTS)
def test_parameter_count(variant):
    assert (
        sum(row.params for row in layer_table(AlexNet(variant), (224, 224, 3))) == PARAMS[variant]
    )


def test_parameter_count_of_each_layer_of_the_paper():
    rows = layer_table(AlexNet("paper"), (224, 224, 3))
    assert {row.name: row.params for row in rows if row.params} == {
        "conv1": 34_944,
        "conv2": 307_456,
        "conv3": 885_120,
        "conv4": 663_936,
        "conv5": 442_624,
        "fc6": 37_752_832,
        "fc7": 16_781_312,
        "fc8": 4_097_000,
    }


@pytest.mark.parametrize(("variant", "mega_macs"), MEGA_MACS.items())
def test_flops_are_two_per_multiply_accumulate(variant, mega_macs):
    flops = sum(row.flops for row in layer_table(AlexNet(variant), (224, 224, 3)))
    assert flops / 2e6 == pytest.approx(mega_macs, abs=0.05)


def test_layer_table_as_text():
    lines = format_layer_table(layer_table(AlexNet("paper"), (224, 224, 3))).splitlines()
    assert lines[0] == "layer  output     parameters          FLOPs"
    assert lines[1] == "conv1  55x55x96       34,944    210,830,400"
    assert lines[-1] == "total             60,965,224  1,448,813,632"


@pytest.mark.parametrize("variant", VARIANTS)
def test_smallest_images_grey_and_few_classes(variant):
    model = AlexNet(variant, num_classes=7, width=NARROW)
    x = images(63, channels=1)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert variables["params"]["conv1"]["kernel"].shape == (11, 11, 1, 8)
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_params_have_a_kernel_and_a_bias_in_each_layer(variant):
    shapes = jax.eval_shape(AlexNet(variant).init, jax.random.key(0), images())
    layers = {name: set(leaves) for name, leaves in shapes["params"].items()}
    conv_leaves = {"kernel"} if variant == "bn" else {"kernel", "bias"}
    for name in LAYERS:
        assert layers.pop(name) == (conv_leaves if "conv" in name else {"kernel", "bias"})
    norms = [f"bn{n}" for n in range(1, 6)] if variant == "bn" else []
    assert layers == {name: {"scale", "bias"} for name in norms}


@pytest.mark.parametrize(
    ("variant", "width", "units"),
    [
        ("paper", 0.04, [8, 8, 16, 16, 8, 160, 160]),
        ("paper", 8.0, [8 * units for units in (96, 256, 384, 384, 256, 4096, 4096)]),
        ("owt", 8.0, [8 * units for units in (64, 192, 384, 256, 256, 4096, 4096)]),
    ],
)
def test_width_scales_to_multiples_of_eight(variant, width, units):
    rows = layer_table(AlexNet(variant, width=width), (224, 224, 3))
    widths = {row.name: row.output_shape[-1] for row in rows}
    assert [widths[name] for name in LAYERS] == [*units, 1000]


# Bad input


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"variant": "vgg"}, "'vgg'.*paper, single, original, caffenet, owt, bn"),
        ({"initializer": "xavier"}, "'xavier'.*paper, he"),
        ({"dtype": "float16"}, "'float16'.*float32, bfloat16"),
    ],
)
def test_unknown_choices_are_named(fields, named):
    with pytest.raises(UserError, match=named):
        AlexNet(**fields)


def test_unknown_feature_is_named():
    with pytest.raises(UserError, match="'conv9'.*conv1, pool1"):
        jax.eval_shape(lambda x: AlexNet().init({}, x, features=("conv9",)), images())


def test_an_image_that_is_no_batch_is_refused():
    with pytest.raises(UserError, match=r"shape \[B, S, S, C\], not \[224, 224, 3\]"):
        jax.eval_shape(lambda x: AlexNet().init({}, x), jnp.zeros((224, 224, 3)))


def test_too_small_images_are_told_the_least_size():
    with pytest.raises(UserError, match="62x62.*at least 63x63"):
        layer_table(AlexNet(), (62, 62, 3))


# Initial weights


@pytest.mark.parametrize(
    ("variant", "stds"),
    [("paper", [0.01] * 8), ("original", [0.01, 0.01, 0.03, 0.03, 0.03, 0.01, 0.01, 0.01])],
)
def test_initial_weights_of_the_paper(variant, stds):
    params = init(AlexNet(variant, width=0.25), images())["params"]
    for name, std, bias in zip(LAYERS, stds, [0, 1, 0, 1, 1, 1, 1, 0], strict=True):
        kernel = np.asarray(params[name]["kernel"])
        assert kernel.std() == pytest.approx(std, rel=0.05)
        assert abs(kernel.mean()) < 5 * std / np.sqrt(kernel.size)
        assert np.abs(kernel).max() > 3 * std  # not truncated
        assert (np.asarray(params[name]["bias"]) == bias).all()


def test_initial_weights_of_he():
    model = AlexNet("paper", width=0.25, initializer="he", hidden_bias=0.1)
    params = init(model, images())["params"]
    for name, bias in zip(LAYERS, [0, 0.1, 0, 0.1, 0.1, 0.1, 0.1, 0], strict=True):
        kernel = np.asarray(params[name]["kernel"])
        fan_in = np.prod(kernel.shape[:-1])
        assert kernel.std() == pytest.approx(np.sqrt(2 / fan_in), rel=0.05)
        np.testing.assert_allclose(params[name]["bias"], bias, rtol=1e-6)


# Number format


@pytest.mark.parametrize("variant", VARIANTS)
def test_bfloat16_keeps_float32_params_and_logits(variant):
    x = images()
    full, half = (AlexNet(variant, width=NARROW, dtype=d) for d in ("float32", "bfloat16"))
    variables = random_variables(half, x)
    shapes = jax.eval_shape(half.init, jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(shapes)} == {jnp.dtype("float32")}
    exact = apply(full, variables, x)
    rounded, features = apply(half, variables, x, features=FEATURES)
    assert rounded.dtype == jnp.float32
    assert {features[name].dtype for name in FEATURES[:-1]} == {jnp.dtype("bfloat16")}
    assert float(jnp.abs(rounded - exact).max()) < 0.03 * float(jnp.abs(exact).max())


# Features and order


def test_features_are_those_asked_for():
    model, x = AlexNet("paper", width=NARROW), images()
    variables = random_variables(model, x)
    logits, features = apply(model, variables, x, features=("conv1", "pool5", "fc7", "fc8"))
    assert {name: value.shape for name, value in features.items()} == {
        "conv1": (2, 14, 14, 8),
        "pool5": (2, 1, 1, 24),
        "fc7": (2, 408),
        "fc8": (2, 1000),
    }
    assert jnp.array_equal(logits, apply(model, variables, x))
    assert jnp.array_equal(logits, features["fc8"])


@pytest.mark.parametrize("variant", ["paper", "original", "bn"])
def test_features_are_rectified_where_a_relu_follows_directly(variant):
    model, x = AlexNet(variant, width=NARROW), images()
    variables = random_variables(model, x)
    _, features = apply(model, variables, x, features=FEATURES)
    signed = {name for name in FEATURES if float(features[name].min()) < 0}
    assert signed == ({"conv1", "conv5", "fc8"} if variant == "original" else {"fc8"})


@pytest.mark.parametrize(
    ("variant", "size", "padding"),
    [
        ("single", (66, 67), [(2, 2), (0, 0)]),
        ("original", (66, 67), [(0, 1), (0, 0)]),
    ],
)
def test_conv1_pads_both_sides_and_in_the_original_the_end_where_strides_leave_a_rest(
    variant, size, padding
):
    model = AlexNet(variant, width=NARROW)
    x = images(67)[:, : size[0], : size[1]]
    params = random_variables(model, x)["params"]
    conv1 = jax.jit(lambda x: model.apply({"params": params}, x, features=("conv1",))[1]["conv1"])
    want = params["conv1"]["bias"] + jax.lax.conv_general_dilated(
        x,
        params["conv1"]["kernel"],
        (4, 4),
        padding,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    want = want if variant == "original" else np.maximum(want, 0)
    np.testing.assert_allclose(conv1(x), want, rtol=1e-4, atol=1e-4 * float(want.max()))


@pytest.mark.parametrize(
    ("variant", "pool1_of_conv1", "conv2_input_of_pool1"),
    [
        ("paper", lambda a: max_pool(local_response_norm(a, k=2.0, alpha=1e-4)), lambda a: a),
        ("caffenet", max_pool, lambda a: local_response_norm(a, k=1.0, alpha=2e-5)),
        (
            "original",
            lambda a: nn.relu(max_pool(local_response_norm(a, k=2.0, alpha=2e-5, groups=2))),
            lambda a: a,
        ),
    ],
)
def test_paper_normalises_before_pooling_and_caffenet_after(
    variant, pool1_of_conv1, conv2_input_of_pool1
):
    model, x = AlexNet(variant, width=NARROW), images()
    params = random_variables(model, x)["params"]
    _, features = apply(model, {"params": params}, x, features=("conv1", "pool1", "conv2"))
    np.testing.assert_allclose(features["pool1"], pool1_of_conv1(features["conv1"]), rtol=1e-5)
    conv2 = jax.lax.conv_general_dilated(
        conv2_input_of_pool1(features["pool1"]),
        params["conv2"]["kernel"],
        (1, 1),
        [(2, 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
        feature_group_count=2,
    )
    want = np.maximum(conv2 + params["conv2"]["bias"], 0)
    np.testing.assert_allclose(features["conv2"], want, atol=1e-4 * want.max())


# Dropout


@pytest.mark.parametrize(
    ("variant", "at_test", "kept_unit"),
    [("paper", 0.5, 1), ("original", 0.5, 1), ("single", 1, 2), ("caffenet", 1, 2), ("bn", 1, 2)],
)
def test_dropout_scale_and_expectation(variant, at_test, kept_unit):
    """With fc7 all ones and fc8 summing it, a logit is the sum of what dropout leaves."""
    model, x = AlexNet(variant, width=NARROW, num_classes=1), images(batch=64)
    variables = random_variables(model, x)
    params = variables["params"]
    params["fc7"] = jax.tree.map(jnp.zeros_like, params["fc7"]) | {"bias": jnp.ones(408)}
    params["fc8"] = {"kernel": jnp.ones((408, 1)), "bias": jnp.zeros(1)}
    np.testing.assert_allclose(apply(model, variables, x), 408 * at_test, rtol=1e-6)
    logits, _ = apply(model, variables, x, train=True, mutable=["batch_stats"])
    units_kept = np.asarray(logits) / kept_unit
    assert (units_kept == units_kept.round()).all()
    assert len(np.unique(units_kept)) > 10
    assert float(logits.mean()) == pytest.approx(408 * at_test, rel=0.02)


@pytest.mark.parametrize("variant", ["paper", "single", "owt"])
def test_dropout_is_before_fc6_and_fc7_in_owt_and_after_them_elsewhere(variant):
    model, x = AlexNet(variant, width=NARROW), images()
    params = random_variables(model, x)["params"]
    names = ("pool5", "fc6", "fc7")
    logits, features = apply(model, {"params": params}, x, train=True, features=names)
    pool5, fc6, fc7 = (np.asarray(features[name]).reshape(2, -1) for name in names)

    def dense(name: str, values: np.ndarray) -> np.ndarray:
        return values @ params[name]["kernel"] + params[name]["bias"]

    dropped_before_fc6 = not np.allclose(fc6, np.maximum(dense("fc6", pool5), 0), rtol=1e-3)
    dropped_after_fc7 = not np.allclose(logits, dense("fc8", fc7), rtol=1e-3)
    assert (dropped_before_fc6, dropped_after_fc7) == (variant == "owt", variant != "owt")


@pytest.mark.parametrize("variant", ["paper", "single", "owt"])
def test_dropout_of_zero_needs_no_rng(variant):
    model, x = AlexNet(variant, width=NARROW, dropout=0.0), images()
    variables = random_variables(model, x)
    train, test = (
        jax.jit(model.apply, static_argnames="train")(variables, x, train=t) for t in (True, False)
    )
    assert jnp.array_equal(train, test)
