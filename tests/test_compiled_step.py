"""What XLA makes of the whole training step of `owt`: what is timed nowhere must not creep back."""

import functools
import math
import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax.config import default_config
from alexnet_jax.data import augment
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import sharding as parallel
from alexnet_jax.training import train_step as step
from alexnet_jax.utils import process as runtime

BATCH = 128
# Beside the state: what gradients need of the activations (580 MB), and one gradient of fc6 (151).
MOST_TEMPORARY_BYTES = 800e6
MOST_FUSIONS = 600
CONVOLUTIONS = 5 + 5 + 4  # forward; gradients of the kernels; of the inputs, but not of the image
PRODUCTS = 3 + 3 + 3


def step_and_inputs(dtype="float32"):
    """The training step as train.py compiles it, and the shapes of what it takes."""
    config = default_config()
    config.model.variant, config.model.dtype, config.parallel = "owt", dtype, "jit"
    model = parallel.build_model(config)
    stats = augment.Statistics(np.zeros(3, np.float32), np.eye(3, dtype=np.float32))
    schedule = optim.make_schedule(config, 100.0)
    steps = parallel.compile_steps(config, model, stats, schedule)
    state = jax.eval_shape(lambda: step.init_state(model, config))
    batch = {
        "image": jax.ShapeDtypeStruct((BATCH, 256, 256, 3), jnp.uint8),
        "label": jax.ShapeDtypeStruct((BATCH,), jnp.int32),
    }
    return steps.train_step, state, batch


@pytest.fixture(scope="module")
def compiled():
    train_step, *inputs = step_and_inputs()
    return train_step.lower(*inputs).compile(compiler_options=runtime.CPU_OPTIONS)


@pytest.fixture(scope="module")
def operations(compiled):
    """Opcodes of the instructions, those inside of fusions too."""
    return Counter(re.findall(r"^ +(?:ROOT )?%\S+ = .*? ([\w-]+)\(", compiled.as_text(), re.M))


def bytes_of(tree):
    return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(tree))


def test_pooling_and_convolutions_are_ours_on_cpu(operations):
    assert operations["dot"] > 0
    assert operations["select-and-scatter"] == 0
    assert operations["convolution"] == 0


def test_the_state_is_updated_in_place(compiled):
    _, state, _ = step_and_inputs()
    assert compiled.memory_analysis().alias_size_in_bytes == bytes_of(state)


def test_no_large_parameter_is_copied(compiled):
    """Kernels of convolutions may be, 10 MB; those of the fc layers take 96 % of all bytes."""
    copies = re.findall(r"= f32\[([\d,]*)\]\S* copy\(%state_", compiled.as_text())
    copied = sum(4 * math.prod(map(int, filter(None, shape.split(",")))) for shape in copies)
    assert copied < 0.05 * bytes_of(step_and_inputs()[1].params)


def test_nothing_is_float64(compiled):
    assert not re.search(r"\b(f64|c128)\[", compiled.as_text())


def test_temporary_memory_and_number_of_fusions(compiled, operations):
    assert compiled.memory_analysis().temp_size_in_bytes < MOST_TEMPORARY_BYTES
    assert operations["fusion"] < MOST_FUSIONS


@functools.cache
def traced(dtype):
    train_step, *inputs = step_and_inputs(dtype)
    return train_step.trace(*inputs)


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize(
    ("dtype", "element"),
    [pytest.param("float32", "f32", marks=pytest.mark.slow), ("bfloat16", "bf16")],
)
def test_accelerators_get_plain_convolutions_and_products(platform, dtype, element):
    """In the model's dtype, and beside them no loop, call to the host, float64 or layout change."""
    text = traced(dtype).lower(lowering_platforms=(platform,)).as_text()
    operations = Counter(re.findall(r"= \"?stablehlo\.(\w+)", text))
    assert operations["convolution"] == CONVOLUTIONS
    assert operations["dot_general"] == PRODUCTS + 1  # the colour noise of the images
    layers = r"stablehlo\.(?:convolution|dot_general).* -> tensor<(?:\d+x)+(\w+)>"
    assert Counter(re.findall(layers, text))[element] >= CONVOLUTIONS + PRODUCTS
    assert operations["scatter"] == 2  # the gradient of optax's loss, on the logits
    assert not {"while", "custom_call", "fft"} & operations.keys()
    assert not re.search(r"\bf64\b", text)
    images = re.findall(r"stablehlo.transpose .*tensor<(\d+)x\d+x\d+x\d+x\w+>", text)
    assert str(BATCH) not in images
