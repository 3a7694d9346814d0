"""The six variants: shapes, parameters, initial weights, outputs of layers, dropout, batch norm."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from narrow_model import NARROW, apply, images, init, random_variables

from alexnet_jax.models.alexnet import (
    LRN,
    VARIANTS,
    AlexNet,
    Dropout,
    MaxPool,
    ReLU,
    Tanh,
    kernel_layers,
    named_layers,
)
from alexnet_jax.models.layers import local_response_norm, max_pool
from alexnet_jax.models.summary import format_layer_table, layer_table
from alexnet_jax.utils.errors import UserError

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
PARAMS = {
    "paper": 60_965_224,
    "single": 62_378_344,
    "original": 60_965_224,
    "caffenet": 60_965_224,
    "owt": 61_100_840,
    # `single`, less the 1,376 biases of its convolutions, plus a scale and a bias for each.
    "bn": 62_378_344 - 1_376 + 2 * 1_376,
}
FILTERS = {"paper": (96, 256, 384, 384, 256), "owt": (64, 192, 384, 256, 256)}
MEGA_MACS = {"paper": 724.4, "original": 724.4, "caffenet": 724.4, "owt": 714.2}


# Shapes and counts


@pytest.mark.parametrize("size", [224, 227])
@pytest.mark.parametrize("variant", VARIANTS)
def test_output_shapes(variant, size):
    c1, c2, c3, c4, c5 = FILTERS.get(variant, FILTERS["paper"])
    model = AlexNet(variant, conv1_padding=0 if size == 227 else -1)
    rows = layer_table(model, (size, size, 3))
    assert {row.name: row.output_shape for row in rows if row.name != "avgpool5"} == {
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
    assert lines[0] == "layer  output     stride  field  parameters          FLOPs"
    assert lines[1] == "conv1  55x55x96        4     11      34,944    210,830,400"
    assert lines[-1] == "total                            60,965,224  1,448,813,632"


@pytest.mark.parametrize("variant", VARIANTS)
def test_smallest_images_with_one_channel_and_few_classes(variant):
    model = AlexNet(variant, num_classes=7, width=NARROW)
    x = images(63, channels=1)
    logits, variables = jax.eval_shape(model.init_with_output, jax.random.key(0), x)
    assert variables["params"]["conv1"]["kernel"].shape == (11, 11, 1, 8)
    assert logits.shape == (2, 7)


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_has_a_kernel_and_a_bias(variant):
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
        *(
            (v, 8.0, [8 * n for n in (*FILTERS.get(v, FILTERS["paper"]), 4096, 4096)])
            for v in VARIANTS
        ),
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
        ({"gradient_dtype": "float16"}, "'float16'.*float32, bfloat16"),
    ],
)
def test_unknown_choices_are_rejected_with_the_known_ones(fields, named):
    with pytest.raises(UserError, match=named):
        AlexNet(**fields)


def test_unknown_feature_is_rejected_with_the_known_ones():
    with pytest.raises(UserError, match="'conv9'.*conv1, relu1, lrn1, pool1"):
        jax.eval_shape(lambda x: AlexNet().init({}, x, features=("conv9",)), images())


def test_an_image_without_a_batch_dimension_is_rejected():
    with pytest.raises(UserError, match=r"shape \[B, S, S, C\], not \[224, 224, 3\]"):
        jax.eval_shape(lambda x: AlexNet().init({}, x), jnp.zeros((224, 224, 3)))


def test_too_small_images_are_rejected_with_the_least_size():
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
    rounded, features = apply(half, variables, x, features=tuple(named_layers(variant)))
    assert rounded.dtype == jnp.float32
    assert {value.dtype for value in features.values()} == {jnp.dtype("bfloat16")}
    assert float(jnp.abs(rounded - exact).max()) < 0.03 * float(jnp.abs(exact).max())


# Outputs of layers


NAMES = {
    "paper": "conv1 relu1 lrn1 pool1 conv2 relu2 lrn2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 "
    "pool5 fc6 relu6 dropout6 fc7 relu7 dropout7 fc8",
    "original": "conv1 lrn1 pool1 relu1 conv2 relu2 lrn2 mapnorm2 pool2 conv3 relu3 conv4 relu4 "
    "conv5 pool5 relu5 fc6 relu6 dropout6 fc7 relu7 dropout7 fc8",
    "owt": "conv1 relu1 pool1 conv2 relu2 pool2 conv3 relu3 conv4 relu4 conv5 relu5 pool5 avgpool5 "
    "dropout5 fc6 relu6 dropout6 fc7 relu7 fc8",
    "bn": "conv1 bn1 relu1 pool1 conv2 bn2 relu2 pool2 conv3 bn3 relu3 conv4 bn4 relu4 conv5 bn5 "
    "relu5 pool5 fc6 relu6 dropout6 fc7 relu7 dropout7 fc8",
}


@pytest.mark.parametrize(("variant", "names"), NAMES.items())
def test_every_layer_has_a_name(variant, names):
    assert list(named_layers(variant)) == names.split()
    assert kernel_layers(variant) == LAYERS


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_output_is_available_and_asking_for_it_changes_no_logit(variant):
    """Without features, max pooling may run before bias and ReLU."""
    model, x = AlexNet(variant, width=NARROW), images(96)
    variables = random_variables(model, x)
    logits, outputs = apply(model, variables, x, features=tuple(named_layers(variant)))
    assert set(outputs) == set(named_layers(variant))
    scale = float(jnp.abs(logits).max())
    np.testing.assert_allclose(apply(model, variables, x), logits, rtol=0, atol=1e-5 * scale)
    _, alone = apply(model, variables, x, features=("pool1", "pool5"))
    for name, value in alone.items():
        limit = 1e-5 * float(jnp.abs(value).max())
        np.testing.assert_allclose(value, outputs[name], rtol=0, atol=limit)


def test_features_are_those_asked_for():
    model, x = AlexNet("paper", width=NARROW), images()
    variables = random_variables(model, x)
    logits, features = apply(model, variables, x, features=("conv1", "pool5", "relu7", "fc8"))
    assert {name: value.shape for name, value in features.items()} == {
        "conv1": (2, 15, 15, 8),
        "pool5": (2, 1, 1, 24),
        "relu7": (2, 408),
        "fc8": (2, 1000),
    }
    np.testing.assert_array_equal(logits, features["fc8"])


def test_conv1_is_the_convolution_and_relu1_its_positive_part():
    model, x = AlexNet("paper", width=NARROW), images(67)
    variables = random_variables(model, x)
    _, outputs = apply(model, variables, x, features=("conv1", "relu1"))
    assert float(outputs["conv1"].min()) < 0
    np.testing.assert_array_equal(outputs["relu1"], np.maximum(outputs["conv1"], 0))


@pytest.mark.parametrize(
    ("variant", "conv1_padding", "padding"),
    [
        ("single", -1, [(2, 2), (2, 2)]),
        ("single", 0, [(0, 0), (0, 0)]),
        ("owt", 1, [(1, 1), (1, 1)]),
        ("original", -1, [(0, 1), (0, 0)]),
        ("original", 2, [(2, 2), (2, 2)]),
    ],
)
def test_padding_of_conv1(variant, conv1_padding, padding):
    """2 on each side; `original` pads the end where the windows do not fit; or what is set."""
    model = AlexNet(variant, width=NARROW, conv1_padding=conv1_padding)
    x = images(67)[:, :66]
    params = random_variables(model, x)["params"]
    conv1 = apply(model, {"params": params}, x, features=("conv1",))[1]["conv1"]
    want = params["conv1"]["bias"] + jax.lax.conv_general_dilated(
        x, params["conv1"]["kernel"], (4, 4), padding, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )
    np.testing.assert_allclose(conv1, want, rtol=1e-4, atol=1e-4 * float(want.max()))


@pytest.mark.parametrize(
    ("variant", "pool1_of_conv1", "conv2_input_of_pool1"),
    [
        (
            "paper",
            lambda a: max_pool(local_response_norm(nn.relu(a), k=2.0, alpha=1e-4)),
            lambda a: a,
        ),
        (
            "caffenet",
            lambda a: max_pool(nn.relu(a)),
            lambda a: local_response_norm(a, k=1.0, alpha=2e-5),
        ),
        (
            "original",
            lambda a: max_pool(local_response_norm(a, k=2.0, alpha=2e-5, groups=2)),
            nn.relu,
        ),
    ],
)
def test_order_of_normalization_pooling_and_relu(variant, pool1_of_conv1, conv2_input_of_pool1):
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
    want = conv2 + params["conv2"]["bias"]
    np.testing.assert_allclose(features["conv2"], want, atol=1e-4 * float(jnp.abs(want).max()))


# Edited lists


def edited(variant, edit):
    return tuple(new for layer in VARIANTS[variant] for new in edit(layer))


ABLATIONS = {
    "no LRN": lambda layer: [] if isinstance(layer, LRN) else [layer],
    "tanh": lambda layer: [Tanh() if isinstance(layer, ReLU) else layer],
    "non-overlapping": lambda layer: [MaxPool(2, 2) if isinstance(layer, MaxPool) else layer],
}


@pytest.mark.parametrize("name", ABLATIONS)
def test_an_ablation_is_an_edit_of_the_list(name):
    model = AlexNet(edited("paper", ABLATIONS[name]), num_classes=10, width=NARROW)
    x = images(96)
    variables = random_variables(model, x)
    whole = AlexNet("paper", num_classes=10, width=NARROW)
    assert set(variables["params"]) == set(random_variables(whole, x)["params"])
    logits = apply(model, variables, x)
    assert logits.shape == (2, 10)
    assert bool(jnp.isfinite(logits).all())


def test_without_a_layer_the_later_ones_move_up():
    layers = list(VARIANTS["single"])
    del layers[9:11]  # conv4 and its ReLU
    model = AlexNet(tuple(layers), width=NARROW)
    shapes = jax.eval_shape(model.init, jax.random.key(0), images())["params"]
    assert set(shapes) == {"conv1", "conv2", "conv3", "conv4", "fc5", "fc6", "fc7"}


def test_a_list_whose_layers_cannot_be_named_is_rejected():
    with pytest.raises(UserError, match="at most one relu"):
        AlexNet((*VARIANTS["paper"][:2], ReLU()))
    with pytest.raises(UserError, match="starts with Conv or Dense"):
        AlexNet((ReLU(), *VARIANTS["paper"]))


# Batch norm


def test_batch_norm_statistics_follow_the_batch():
    model, x = AlexNet("bn", width=NARROW, dropout=0.0), images(batch=4)
    variables = random_variables(model, x)
    _, new = apply(model, variables, x, train=True, mutable=["batch_stats"])
    conv1 = jax.lax.conv_general_dilated(
        x,
        variables["params"]["conv1"]["kernel"],
        (4, 4),
        [(2, 2)] * 2,
        dimension_numbers=("NHWC", "HWIO", "NHWC"),
    )
    stats = new["batch_stats"]["bn1"]
    np.testing.assert_allclose(stats["mean"], 0.9 + 0.1 * conv1.mean((0, 1, 2)), atol=1e-4)
    np.testing.assert_allclose(stats["var"], 0.9 + 0.1 * conv1.var((0, 1, 2)), rtol=1e-4)


def test_batch_norm_over_a_mapped_axis_equals_the_whole_batch():
    x = images(batch=4)
    whole, mapped = (
        AlexNet("bn", width=NARROW, dropout=0.0, axis_name=name) for name in (None, "batch")
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


# Dropout


@pytest.mark.parametrize(
    ("variant", "at_test", "kept_unit"),
    [("paper", 0.5, 1), ("original", 0.5, 1), ("single", 1, 2), ("caffenet", 1, 2), ("bn", 1, 2)],
)
def test_dropout_scale_and_expectation(variant, at_test, kept_unit):
    """With fc7 all ones and fc8 summing it, a logit is the sum of what the last dropout leaves."""
    assert len({layer for layer in VARIANTS[variant] if isinstance(layer, Dropout)}) == 1
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
    names = ("avgpool5" if variant == "owt" else "pool5", "fc6", "relu7")
    logits, features = apply(model, {"params": params}, x, train=True, features=names)
    pooled, fc6, relu7 = (np.asarray(features[name]).reshape(2, -1) for name in names)

    def dense(name: str, values: np.ndarray) -> np.ndarray:
        return values @ params[name]["kernel"] + params[name]["bias"]

    dropped_before_fc6 = not np.allclose(fc6, dense("fc6", pooled), rtol=1e-3, atol=1e-2)
    dropped_after_fc7 = not np.allclose(logits, dense("fc8", relu7), rtol=1e-3, atol=1e-2)
    assert (dropped_before_fc6, dropped_after_fc7) == (variant == "owt", variant != "owt")


@pytest.mark.parametrize("variant", ["paper", "single", "owt"])
def test_dropout_of_zero_needs_no_rng(variant):
    model, x = AlexNet(variant, width=NARROW, dropout=0.0), images()
    variables = random_variables(model, x)
    train, test = (
        jax.jit(model.apply, static_argnames="train")(variables, x, train=t) for t in (True, False)
    )
    assert jnp.array_equal(train, test)
