"""The compiled training step of `owt`: guards against slow operations that no test times."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import pytest

from alexnet_jax.analysis import step_costs, targets
from alexnet_jax.config import default_config, load_config
from alexnet_jax.data.augment import make_augment
from alexnet_jax.models.build import build_model
from alexnet_jax.models.summary import layer_table
from alexnet_jax.training import sharding
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.sharding import make_parallel
from alexnet_jax.training.train_step import (
    build_state,
    build_train_step,
    init_state,
    make_train_step,
)
from alexnet_jax.utils import process

BATCH = 128
# Activations that gradients need (580 MB), and one gradient of fc6 (151 MB).
MAX_TEMPORARY_BYTES = 800e6
MAX_FUSIONS = 600
CONVOLUTIONS = 5 + 5 + 4  # forward; kernel gradients; input gradients, except the image's
PRODUCTS = 3 + 3 + 3


def step_and_inputs(dtype="float32", **fields):
    """The training step as train.py compiles it for one device, and the shapes of its arguments."""
    config = default_config()
    config.model.variant, config.model.dtype = "owt", dtype
    config.update_from_flattened_dict(fields)
    model, tx = build_model(config), make_optimizer(config, 100.0)
    state = jax.eval_shape(lambda: init_state(model, tx, 0, (224, 224, 3)))
    parallel = make_parallel("jit")
    step = make_train_step(
        model, tx, make_augment(config), log_grad_norm=bool(config.optimizer.clip_norm)
    )
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, 256, 256, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    return parallel.compile_train_step(step, state), state, batch


@pytest.fixture(scope="module")
def compiled():
    train_step, *inputs = step_and_inputs()
    return train_step.lower(*inputs).compile(compiler_options=process.CPU_OPTIONS)


@pytest.fixture(scope="module")
def operations(compiled):
    """Opcodes of the instructions, including those inside fusions."""
    return Counter(re.findall(r"^ +(?:ROOT )?%\S+ = .*? ([\w-]+)\(", compiled.as_text(), re.M))


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_cpu_uses_our_pooling_and_convolutions(operations):
    assert operations["dot"] > 0
    assert operations["select-and-scatter"] == 0
    assert operations["convolution"] == 0


def test_state_is_updated_in_place(compiled):
    _, state, _ = step_and_inputs()
    assert compiled.memory_analysis().alias_size_in_bytes == bytes_of(state)


def test_no_large_parameter_is_copied(compiled):
    """Convolution kernels may be, 10 MB. The fc kernels are 96 % of all bytes."""
    copies = re.findall(r"= f32\[([\d,]*)\]\S* copy\(%state_", compiled.as_text())
    copied = sum(4 * math.prod(map(int, filter(None, shape.split(",")))) for shape in copies)
    assert copied < 0.05 * bytes_of(step_and_inputs()[1].params)


def test_nothing_is_float64(compiled):
    assert not re.search(r"\b(f64|c128)\[", compiled.as_text())


def test_temporary_memory_and_number_of_fusions(compiled, operations):
    assert compiled.memory_analysis().temp_size_in_bytes < MAX_TEMPORARY_BYTES
    assert operations["fusion"] < MAX_FUSIONS


@functools.cache
def traced(dtype):
    train_step, *inputs = step_and_inputs(dtype)
    return train_step.trace(*inputs)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("dtype", "element"),
    [pytest.param("float32", "f32", marks=pytest.mark.long), ("bfloat16", "bf16")],
)
def test_accelerators_get_ordinary_convolutions_and_products(platform, dtype, element):
    """In the model's dtype, without loops, calls to the host, float64 or layout changes."""
    text = traced(dtype).lower(lowering_platforms=(platform,)).as_text()
    operations = Counter(re.findall(r"= \"?stablehlo\.(\w+)", text))
    assert operations["convolution"] == CONVOLUTIONS
    # The color noise of the images; on TPU also their crops.
    assert operations["dot_general"] == PRODUCTS + 1 + 2 * (platform == "tpu")
    layers = r"stablehlo\.(?:convolution|dot_general).* -> tensor<(?:\d+x)+(\w+)>"
    assert Counter(re.findall(layers, text))[element] >= CONVOLUTIONS + PRODUCTS
    assert operations["scatter"] == 2  # the gradient of optax's loss, on the logits
    assert not {"while", "custom_call", "fft"} & operations.keys()
    assert not re.search(r"\bf64\b", text)
    images = re.findall(r"stablehlo.transpose .*tensor<(\d+)x\d+x\d+x\d+x\w+>", text)
    assert images.count(str(BATCH)) == (platform == "tpu")  # its crops are products


@pytest.mark.parametrize("platform", [pytest.param("cuda", marks=pytest.mark.long), "tpu"])
def test_modern_recipe_adds_no_loop_and_no_scatter_over_pixels(platform):
    config = load_config("imagenet_modern", parallel="jit", batch_size=8)
    parallel, model, _ = sharding.build_network(config)
    tx = make_optimizer(config, 100.0)
    state = jax.eval_shape(lambda: build_state(config, model, tx))
    step = build_train_step(config, model, tx, make_augment(config))
    jitted = parallel.compile_train_step(step, state)
    lowered = jitted.trace(state, parallel.batch_like(config)).lower(lowering_platforms=(platform,))
    text = lowered.as_text()
    operations = Counter(re.findall(r"= \"?stablehlo\.(\w+)", text))
    assert not {"while", "fft"} & operations.keys()
    scattered = re.findall(r"stablehlo.scatter[^\n]*\n(?:[^\n]*\n){,8}?.*-> tensor<(\S+)>", text)
    # The gradients of the two losses, on the logits.
    assert set(scattered) <= {"8x1000xf32", "8x1xf32"}
    assert not re.search(r"\bf64\b", text)


GB_MOVED = {  # by a step in bfloat16, at most; docs/performance.md has what there is now
    ("owt", 256): 4.4,
    ("paper", 256): 9.0,
    ("bn", 1024): 22.0,
}


@pytest.mark.plan
@pytest.mark.parametrize(
    ("variant", "batch"),
    [("owt", 256), *(pytest.param(*case, marks=pytest.mark.long) for case in [*GB_MOVED][1:])],
)
def test_step_compiled_for_a_gpu(variant, batch):
    """No scatter, transposed image or float32 convolution comes back unnoticed."""
    pytest.importorskip("jax_plugins.xla_cuda12")
    target, devices = targets.topology_devices("h100:1")
    config = default_config()
    config.update_from_flattened_dict({"model.variant": variant, "model.dtype": "bfloat16"})
    config.parallel, config.batch_size = "jit", batch
    step = step_costs.compile_step(config, devices, target.compiler_options)
    text = step.program.as_text()
    scatters = re.findall(r"= (\S+?)\{?[\d,]*\}? scatter\(", text)
    assert set(scatters) == {f"f32[{batch},1000]"}  # the gradient of optax's loss, on the logits
    transposed = re.findall(rf"= \w+\[{batch},(\d+),\d+,\d+\]\S* transpose\(", text)
    assert {*transposed} <= {"3", "5", "11"}  # kernels of as many filters
    assert set(re.findall(r"= \((\w+)\[\S+, \S+\) custom-call\(.*cudnn\$conv", text)) == {"bf16"}
    costs = step_costs.step_costs(step, target)
    assert costs["bytes_moved"] / 1e9 < GB_MOVED[variant, batch]
    layers = layer_table(build_model(config), (224, 224, 3))
    # Forward, the kernel's gradient, and the input's except for the images.
    expected = batch * (3 * sum(layer.flops for layer in layers) - layers[0].flops)
    assert costs["flops"]["bf16"] == pytest.approx(expected, rel=0.01)


FROZEN = [
    # The kernel gradients of conv2 and conv3, with 8 and 16 inputs, are matrix products on CPU.
    ({}, CONVOLUTIONS - 2),
    # Kernel gradients of conv4 and conv5 and the input gradient of conv5 remain.
    ({"freeze": ("conv1", "conv2", "conv3")}, 5 + 2 + 1),
    ({"freeze": ("conv1", "conv2", "conv3", "conv4", "conv5")}, 5),
    # The norm for clipping, and the one that is logged, leave frozen layers out.
    ({"freeze": ("conv1", "conv2", "conv3"), "optimizer.clip_norm": 1.0}, 5 + 2 + 1),
    ({"freeze": ("conv1", "conv2", "conv3"), "optimizer.accumulate_steps": 2}, 5 + 2 + 1),
]


@pytest.mark.parametrize(("fields", "convolutions"), FROZEN, ids=str)
def test_gradients_of_frozen_layers_are_not_computed(fields, convolutions):
    """On a network that is too narrow for Winograd, so that convolutions can be counted."""
    train_step, *inputs = step_and_inputs(**{"model.width": 0.1, **fields})
    text = train_step.lower(*inputs).compile().as_text()
    assert len(re.findall(r" convolution\(", text)) == convolutions
