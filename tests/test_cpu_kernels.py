"""Winograd's convolution against the direct one: values, gradients, accuracy and cost."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from gradients import output_and_gradients

from alexnet_jax.models import cpu_kernels
from alexnet_jax.models.cpu_kernels import MAX_TAPS, PART, tiling, winograd_conv

SHAPES = [  # height, width, channels, filters, taps, padding
    (13, 13, 24, 16, 3, 1),  # conv3 to conv5
    (27, 27, 12, 8, 5, 2),  # conv2
    (57, 57, 48, 8, 3, 0),  # conv1 after space to depth
    (6, 11, 3, 5, 3, 1),
    (5, 3, 4, 4, 5, 2),
    (9, 8, 2, 3, 1, 0),
    (12, 7, 2, 3, 2, 0),
]


def plain_conv(x, kernel, padding):
    return jax.lax.conv_general_dilated(
        x, kernel, (1, 1), [(padding, padding)] * 2, dimension_numbers=("NHWC", "HWIO", "NHWC")
    )


def with_gradients(conv, x, kernel, padding):
    return output_and_gradients(lambda x, kernel: conv(x, kernel, padding), x, kernel)


def operands(height, width, channels, filters, taps, padding, dtype=jnp.float32, batch=2):
    rng = np.random.default_rng(0)
    shapes = (batch, height, width, channels), (taps, taps, channels, filters)
    return *(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes), padding


def relative_error(got, want):
    """Root mean square of the error over that of what is wanted."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    return np.sqrt(((got - want) ** 2).mean() / (want**2).mean())


@pytest.mark.parametrize("taps", range(1, MAX_TAPS + 1))
@pytest.mark.parametrize("length", [1, 2, 3, 13, 27, 55])
def test_tiling_covers_its_axis_and_filters_exactly(length, taps):
    axis = tiling(length, taps)
    assert (axis.tiles - 1) * axis.outputs < length <= axis.tiles * axis.outputs
    rng = np.random.default_rng(0)
    x, f = rng.normal(size=axis.outputs + taps - 1), rng.normal(size=taps)
    got = axis.output @ ((axis.kernel @ f) * (axis.input @ x))
    np.testing.assert_allclose(got, np.correlate(x, f), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize(
    ("length", "taps", "products"), [(13, 3, 21), (27, 5, 63), (55, 3, 77), (3, 3, 5)]
)
def test_number_of_products_along_an_axis(length, taps, products):
    axis = tiling(length, taps)
    assert axis.tiles * (axis.outputs + taps - 1) == products


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_winograd_matches_the_direct_convolution(shape):
    x, kernel, padding = operands(*shape)
    for ours, plain in zip(
        *(with_gradients(conv, x, kernel, padding) for conv in (winograd_conv, plain_conv)),
        strict=True,
    ):
        assert ours.shape == plain.shape
        assert relative_error(ours, plain) < 2e-5


@pytest.mark.parametrize("unrolled", [16, 0])
@pytest.mark.parametrize("batch", [PART, PART + 3, 2 * PART, 3 * PART + 1])
def test_winograd_in_parts_of_the_batch_matches_the_direct_convolution(
    batch, unrolled, monkeypatch
):
    monkeypatch.setattr(cpu_kernels, "MAX_UNROLLED", unrolled)
    x, kernel, padding = operands(5, 5, 2, 3, 3, 1, batch=batch)
    for ours, plain in zip(
        *(with_gradients(conv, x, kernel, padding) for conv in (winograd_conv, plain_conv)),
        strict=True,
    ):
        assert relative_error(ours, plain) < 2e-5


def test_winograd_can_be_exported_for_every_batch_size():
    x, kernel, padding = operands(5, 5, 2, 3, 3, 1, batch=PART + 3)
    (batch,) = jax.export.symbolic_shape("batch")
    shape = jax.ShapeDtypeStruct((batch, *x.shape[1:]), x.dtype)
    program = jax.export.export(jax.jit(lambda x: winograd_conv(x, kernel, padding)))(shape)
    for images in (x, x[:1]):
        assert relative_error(program.call(images), plain_conv(images, kernel, padding)) < 2e-5


@pytest.mark.parametrize("shape", SHAPES[:3], ids=str)
def test_winograd_error_against_float64(shape):
    x, kernel, padding = operands(*shape)
    with jax.enable_x64(True):
        exact = plain_conv(x.astype(jnp.float64), kernel.astype(jnp.float64), padding)
    assert relative_error(winograd_conv(x, kernel, padding), exact) < 1e-5


def test_winograd_reads_bfloat16_and_computes_in_float32():
    x, kernel, padding = operands(*SHAPES[0], dtype=jnp.bfloat16)
    got, *gradients = with_gradients(winograd_conv, x, kernel, padding)
    assert got.dtype == jnp.float32
    wide = [x.astype(jnp.float32) for x in (x, kernel)]
    assert jnp.array_equal(got, with_gradients(winograd_conv, *wide, padding)[0])
    assert [gradient.dtype for gradient in gradients] == [x.dtype, kernel.dtype]


def test_winograd_needs_a_third_of_the_operations():
    x, kernel, padding = operands(27, 27, 64, 192, 5, 2)
    ours, plain = (
        jax.jit(conv, static_argnums=2).lower(x, kernel, padding).cost_analysis()["flops"]
        for conv in (winograd_conv, plain_conv)
    )
    assert ours < plain / 3
