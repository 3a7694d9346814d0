"""Layers against float64 loops written from the formulas, and against known values."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from gradients import output_and_gradients

from alexnet_jax.models import gpu_kernels
from alexnet_jax.models.layers import (
    adaptive_avg_pool,
    avg_pool,
    ceil_padding,
    channel_sum_by_matrix,
    channel_sum_by_slices,
    conv,
    dense,
    dropout,
    dropout_mask,
    local,
    local_response_norm,
    max_pool,
    relu,
    within_map_norm,
)


@pytest.fixture
def float64():
    with jax.enable_x64(True):
        yield


def activations(shape: tuple[int, ...], scale: float = 100.0) -> np.ndarray:
    """Signed, and large enough for alpha * sum of squares to matter beside k."""
    return np.random.default_rng(0).normal(0, scale, shape)


def lrn_by_loops(a: np.ndarray, k: float, alpha: float, groups: int, size: int) -> np.ndarray:
    """Paper §3.3: the sum runs over max(0, i - n/2) .. min(N - 1, i + n/2), N channels a tower."""
    out = np.zeros_like(a)
    tower = a.shape[-1] // groups
    for index in np.ndindex(a.shape):
        first, i = index[-1] // tower * tower, index[-1] % tower
        near = range(max(0, i - size // 2), min(tower - 1, i + size // 2) + 1)
        total = sum(a[index[:-1] + (first + j,)] ** 2 for j in near)
        out[index] = a[index] / (k + alpha * total) ** 0.75
    return out


@pytest.mark.parametrize(
    ("k", "alpha", "groups", "size"),
    [(2.0, 1e-4, 1, 5), (2.0, 2e-5, 2, 5), (1.0, 2e-5, 1, 5), (1.0, 0.001 / 9, 1, 9)],
    ids=["paper", "original", "caffenet", "cifar_11pct"],
)
def test_lrn_matches_loops_over_the_formula(float64, k, alpha, groups, size):
    a = activations((2, 3, 3, 12))
    got = local_response_norm(jnp.asarray(a), k=k, alpha=alpha, groups=groups, size=size)
    np.testing.assert_allclose(got, lrn_by_loops(a, k, alpha, groups, size), rtol=1e-12)


@pytest.mark.parametrize(
    ("channel", "terms_in_one_tower", "terms_in_two"),
    [(0, 3, 3), (1, 4, 4), (2, 5, 5), (45, 5, 5), (46, 5, 4), (47, 5, 3)]
    + [(48, 5, 3), (49, 5, 4), (50, 5, 5), (93, 5, 5), (94, 4, 4), (95, 3, 3)],
)
def test_lrn_of_ones_counts_the_channels_in_its_window(
    float64, channel, terms_in_one_tower, terms_in_two
):
    ones = jnp.ones((1, 1, 1, 96))
    for groups, terms in ((1, terms_in_one_tower), (2, terms_in_two)):
        value = local_response_norm(ones, k=2.0, alpha=2e-5, groups=groups)[0, 0, 0, channel]
        assert value == pytest.approx((2 + 2e-5 * terms) ** -0.75, rel=1e-12)


@pytest.mark.parametrize("groups", [1, 2])
def test_channel_sums_by_slices_and_by_matrix_agree(float64, groups):
    a = jnp.asarray(activations((2, 3, 3, 12)))
    by_slices, by_matrix = (f(a, 5, groups) for f in (channel_sum_by_slices, channel_sum_by_matrix))
    np.testing.assert_allclose(by_matrix, by_slices, rtol=1e-12, atol=1e-9)


@pytest.mark.parametrize("beta", [0.75, 0.5])
@pytest.mark.parametrize("groups", [1, 2])
def test_lrn_gradient_matches_autodiff_of_the_formula(float64, beta, groups):
    a = jnp.asarray(activations((2, 3, 3, 12)))
    dy = jnp.asarray(activations((2, 3, 3, 12), scale=1.0)[::-1])

    def formula(a):
        index = np.arange(12)
        near = abs(np.subtract.outer(index, index)) <= 2
        same = np.equal.outer(index // (12 // groups), index // (12 // groups))
        return a / (2 + 1e-4 * (a**2 @ (near & same).astype(float))) ** beta

    _, vjp = jax.vjp(
        lambda a: local_response_norm(a, k=2.0, alpha=1e-4, beta=beta, groups=groups), a
    )
    np.testing.assert_allclose(vjp(dy)[0], jax.vjp(formula, a)[1](dy)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("size", "alpha"), [(5, 4e-5), (3, 5e-5 / 9)])
def test_within_map_norm_matches_loops_over_the_formula(float64, size, alpha):
    a = activations((2, 7, 6, 3), scale=500.0)
    want, half = np.zeros_like(a), size // 2
    for b, y, x, c in np.ndindex(a.shape):
        window = a[b, max(0, y - half) : y + half + 1, max(0, x - half) : x + half + 1, c]
        want[b, y, x, c] = a[b, y, x, c] / (1 + alpha * np.sum(window**2)) ** 0.75
    got = within_map_norm(jnp.asarray(a), alpha=alpha, size=size)
    np.testing.assert_allclose(got, want, rtol=1e-12)


def test_within_map_norm_of_ones_counts_the_pixels_in_its_window(float64):
    value = within_map_norm(jnp.ones((1, 27, 27, 1)))
    for (y, x), pixels in {(13, 13): 25, (0, 13): 15, (0, 0): 9, (1, 26): 12}.items():
        assert value[0, y, x, 0] == pytest.approx((1 + 4e-5 * pixels) ** -0.75, rel=1e-12)


@pytest.mark.parametrize(("size", "alpha"), [(5, 4e-3), (3, 0.1)])
def test_within_map_norm_gradient_matches_autodiff_of_the_formula(float64, size, alpha):
    a = jnp.asarray(activations((2, 7, 6, 3)))
    dy = jnp.asarray(activations((2, 7, 6, 3), scale=1.0)[::-1])

    def band(length):
        return (abs(np.subtract.outer(np.arange(length), np.arange(length))) <= size // 2) * 1.0

    def formula(a):
        return a / (1 + alpha * jnp.einsum("ih,bhwc,wj->bijc", band(7), a**2, band(6))) ** 0.75

    _, vjp = jax.vjp(lambda a: within_map_norm(a, alpha=alpha, size=size), a)
    np.testing.assert_allclose(vjp(dy)[0], jax.vjp(formula, a)[1](dy)[0], rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(
    "norm", [lambda a: local_response_norm(a, k=2.0, alpha=1e-4), within_map_norm]
)
def test_norms_in_bfloat16_round_only_the_result(norm):
    a = jnp.asarray(activations((2, 7, 7, 16)), jnp.bfloat16)
    got = norm(a)
    assert got.dtype == jnp.bfloat16
    assert jnp.array_equal(got, norm(a.astype(jnp.float32)).astype(jnp.bfloat16))


def test_lrn_gradient_in_bfloat16_is_near_that_in_float32():
    """One part of it is a sum of rounded terms."""
    a, dy = (jnp.asarray(activations((2, 7, 7, 16), s), jnp.bfloat16) for s in (30.0, 1.0))

    def gradient(a):
        _, vjp = jax.vjp(lambda a: local_response_norm(a, k=2.0, alpha=1e-4), a)
        return vjp(dy.astype(a.dtype))[0]

    want = gradient(a.astype(jnp.float32))
    error = jnp.abs(gradient(a).astype(jnp.float32) - want)
    assert gradient(a).dtype == jnp.bfloat16
    assert float(error.max() / jnp.abs(want).max()) < 2**-8


@pytest.mark.parametrize(
    ("length", "pooled"),
    [(55, 27), (27, 13), (13, 6), (32, 16), (16, 8), (8, 4), (24, 12), (12, 6), (14, 7), (3, 1)],
)
def test_max_pool_rounds_sizes_up(length, pooled):
    assert max_pool(jnp.zeros((1, length, length, 1))).shape == (1, pooled, pooled, 1)


def test_max_pool_clips_windows_at_the_edge():
    a = activations((2, 8, 7, 3)).astype(np.float32) - 1000  # a padding of zeros would win
    got = np.asarray(max_pool(jnp.asarray(a)))
    assert got.shape == (2, 4, 3, 3)
    for b, y, x, c in np.ndindex(got.shape):
        assert got[b, y, x, c] == a[b, 2 * y : 2 * y + 3, 2 * x : 2 * x + 3, c].max()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("ceil", [True, False])
@pytest.mark.parametrize("shape", [(2, 55, 55, 3), (2, 13, 13, 8), (3, 8, 7, 2), (1, 6, 10, 1)])
def test_max_pool_and_its_gradient_match_flax_bitwise(shape, dtype, ceil):
    """On few distinct integers, so that there are many ties and sums are exact in any order."""
    keys = jax.random.split(jax.random.key(0))
    x = jax.random.randint(keys[0], shape, -2, 3).astype(dtype)
    pads = [ceil_padding(length, 3, 2) if ceil else (0, 0) for length in shape[1:3]]
    want, flax_vjp = jax.vjp(lambda x: nn.max_pool(x, (3, 3), (2, 2), pads), x)
    dy = jax.random.randint(keys[1], want.shape, -8, 9).astype(dtype)
    for pool in (
        lambda x: max_pool(x, ceil=ceil),  # here, on CPU
        lambda x: gpu_kernels.max_pool(x, tuple(pads)),
    ):
        got, vjp = jax.vjp(pool, x)
        for ours, flax in ((got, want), (*vjp(dy), *flax_vjp(dy))):
            assert ours.dtype == flax.dtype
            assert jnp.array_equal(ours, flax)


@pytest.mark.parametrize(("platform", "scatters"), [("tpu", 1), ("cuda", 0), ("rocm", 0)])
def test_max_pool_is_flax_s_on_tpu_and_scatters_nothing_on_gpu(platform, scatters):
    """On TPU, select-and-scatter is an instruction that the compiler knows well."""
    gradient = jax.jit(jax.grad(lambda x: max_pool(x).sum()))
    program = gradient.trace(jnp.zeros((2, 8, 7, 3))).lower(lowering_platforms=(platform,))
    assert program.as_text().count('"stablehlo.select_and_scatter"') == scatters


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_relu_and_its_derivatives_are_those_of_jax(dtype):
    x = jnp.array([-np.inf, -2, -0.0, 0, 1e-30, 3, np.inf], dtype)
    t = jnp.arange(1, 8).astype(dtype)
    want, flax_vjp = jax.vjp(nn.relu, x)
    got, vjp = jax.vjp(relu, x)
    np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(vjp(t)[0], flax_vjp(t)[0])
    np.testing.assert_array_equal(jax.jvp(relu, (x,), (t,))[1], flax_vjp(t)[0])


@pytest.mark.parametrize(
    ("shape", "kernel", "stride", "padding", "groups"),
    [
        ((2, 224, 224, 3), (11, 11, 3, 48), 4, [(2, 2), (2, 2)], 1),
        ((2, 227, 227, 3), (11, 11, 3, 48), 4, [(0, 0), (0, 0)], 1),
        ((2, 66, 63, 4), (11, 11, 4, 32), 4, [(0, 1), (0, 0)], 1),
        ((2, 64, 71, 1), (11, 11, 1, 8), 4, [(2, 2), (0, 0)], 1),
        ((1, 8, 9, 10), (3, 3, 10, 40), 2, [(1, 1), (1, 1)], 1),
        ((2, 27, 27, 80), (5, 5, 40, 96), 1, [(2, 2), (2, 2)], 2),
        ((2, 13, 13, 48), (3, 3, 48, 40), 1, [(1, 1), (1, 1)], 1),
        ((2, 32, 32, 3), (5, 5, 3, 32), 1, [(2, 2), (2, 2)], 1),
        ((2, 12, 11, 32), (3, 3, 16, 8), 1, [(1, 1), (0, 2)], 2),
        ((2, 7, 7, 24), (5, 5, 12, 64), 1, [(2, 2), (2, 2)], 2),
    ],
    ids=str,
)
def test_conv_and_its_gradients_match_jax(shape, kernel, stride, padding, groups):
    rng = np.random.default_rng(0)
    x, kernel = (jnp.asarray(rng.normal(size=s), jnp.float32) for s in (shape, kernel))

    settings = {
        "feature_group_count": groups,
        "dimension_numbers": ("NHWC", "HWIO", "NHWC"),
    }

    def of(f):
        return output_and_gradients(
            lambda x, kernel: f(x, kernel, (stride, stride), padding, **settings), x, kernel
        )

    for ours, plain in zip(of(conv), of(jax.lax.conv_general_dilated), strict=True):
        assert ours.shape == plain.shape
        np.testing.assert_allclose(ours, plain, atol=1e-4 * float(jnp.abs(plain).max()))


@pytest.mark.parametrize(
    ("size", "inputs", "outputs", "stride", "groups", "by_winograd"),
    [
        *[(3, 40, 40, 1, 1, True), (3, 40, 39, 1, 1, False), (3, 24, 200, 1, 1, True)],
        *[(3, 20, 400, 1, 1, False), (3, 40, 80, 1, 2, True), (3, 40, 78, 1, 2, False)],
        *[(5, 24, 24, 1, 1, True), (5, 24, 23, 1, 1, False), (5, 16, 400, 1, 1, False)],
        *[(11, 3, 35, 4, 1, True), (11, 3, 34, 4, 1, False)],
    ],
)
def test_conv_with_few_channels_in_a_group_does_not_use_winograd(
    size, inputs, outputs, stride, groups, by_winograd
):
    """Where size times inputs times outputs are less than 60 times the sum of the latter.

    A stride makes more inputs and a smaller kernel.
    """
    settings = {"feature_group_count": groups, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
    x, kernel = jnp.zeros((1, 16, 16, inputs * groups)), jnp.zeros((size, size, inputs, outputs))
    program = jax.jit(lambda *of: conv(*of, (stride, stride), [(0, 0)] * 2, **settings))
    assert ("stablehlo.convolution" in program.lower(x, kernel).as_text()) != by_winograd


@pytest.mark.parametrize(
    ("dtype", "digits", "of_first_input"),
    [("float32", 1e-6, 1.0), ("bfloat16", 1e-2, 1.0), ("float32", 1e-6, 0.0)],
)
def test_dense_and_its_gradients_match_jax(dtype, digits, of_first_input):
    """Also if the first input contributes nothing, so that its gradient is zero."""
    x, kernel = activations((6, 5), 1.0).astype(dtype), np.float32(activations((5, 4), 1.0))
    kernel[0] *= of_first_input
    ours = output_and_gradients(dense, x, kernel)
    plain = output_and_gradients(
        lambda x, kernel: (x.astype("float32") @ kernel).astype(x.dtype), x, kernel
    )
    assert [part.dtype for part in ours] == [dtype, dtype, "float32"]
    for part, wanted in zip(map(np.float32, ours), map(np.float32, plain), strict=True):
        np.testing.assert_allclose(part, wanted, rtol=0, atol=digits * np.abs(wanted).max())


@pytest.mark.parametrize("platform", ["cuda", "tpu"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("gradient_dtype", ["float32", "bfloat16"])
def test_accelerators_compute_kernel_gradients_in_the_dtype_asked_for(
    platform, dtype, gradient_dtype
):
    """Devices add up gradients in the dtype of the product that computes them."""

    def loss(kernels, x):
        settings = {"feature_group_count": 1, "dimension_numbers": ("NHWC", "HWIO", "NHWC")}
        y = conv(x, kernels[0], (1, 1), [(1, 1)] * 2, gradient_dtype=gradient_dtype, **settings)
        return dense(y.reshape(2, -1), kernels[1], gradient_dtype=gradient_dtype).sum()

    kernels = jnp.zeros((3, 3, 4, 6)), jnp.zeros((8 * 8 * 6, 5))
    x = jnp.zeros((2, 8, 8, 4), dtype)
    traced = jax.jit(jax.grad(loss)).trace(kernels, x)
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    short = {"float32": "f32", "bfloat16": "bf16"}[gradient_dtype]
    assert re.search(rf"stablehlo.convolution.*-> tensor<3x3x4x6x{short}>", text)
    assert re.search(rf"stablehlo.dot_general.*-> tensor<(384x5|5x384)x{short}>", text)


# Adaptive average pooling


@pytest.mark.parametrize("shape", [(6, 6), (7, 13), (15, 12), (5, 1), (3, 4)])
def test_adaptive_avg_pool_averages_the_cells_of_the_formula(float64, shape):
    """Cell i covers floor(i H / 6) to ceil((i + 1) H / 6); below 6 rows, cells repeat."""
    a = activations((2, *shape, 3))
    want = np.zeros((2, 6, 6, 3))
    for i, j in np.ndindex(6, 6):
        rows, columns = (
            slice(k * n // 6, -(-(k + 1) * n // 6)) for k, n in zip((i, j), shape, strict=True)
        )
        want[:, i, j] = a[:, rows, columns].mean(axis=(1, 2))
    got = adaptive_avg_pool(jnp.asarray(a), 6)
    np.testing.assert_allclose(got, want, rtol=1e-6)


# Average pooling


@pytest.mark.parametrize("shape", [(16, 16), (8, 7), (6, 5), (2, 3)])
def test_avg_pool_rounds_sizes_up_and_averages_the_pixels_in_the_image(float64, shape):
    a = activations((2, *shape, 3))
    sizes = [-(-(length - 3) // 2) + 1 if length > 3 else 1 for length in shape]
    want = np.zeros((2, *sizes, 3))
    for i, j in np.ndindex(*sizes):
        want[:, i, j] = a[:, 2 * i : 2 * i + 3, 2 * j : 2 * j + 3].mean(axis=(1, 2))
    np.testing.assert_allclose(avg_pool(jnp.asarray(a)), want, rtol=1e-12)


# Local connections


@pytest.mark.parametrize("shape", [(6, 6, 5), (4, 7, 3)])
def test_local_and_its_gradients_match_flax(shape):
    """Flax orders a window's weights by channel first, as its patches are."""
    height, width, channels = shape
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, *shape)).astype(np.float32)
    kernel = rng.normal(size=(height, width, 3, 3, channels, 4)).astype(np.float32)
    layer = nn.ConvLocal(4, (3, 3), padding=((1, 1), (1, 1)), use_bias=False)

    def by_flax(x, kernel):
        ordered = kernel.transpose(0, 1, 4, 2, 3, 5).reshape(height, width, -1, 4)
        return layer.apply({"params": {"kernel": ordered}}, x)

    for got, want in zip(
        output_and_gradients(local, x, kernel),
        output_and_gradients(by_flax, x, kernel),
        strict=True,
    ):
        np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# Padding and dropout


@pytest.mark.parametrize(
    ("length", "size", "stride", "end"),
    [(224, 11, 4, 3), (227, 11, 4, 0), (32, 3, 2, 1), (1, 3, 2, 2)],
)
def test_ceil_padding_is_at_the_end_only(length, size, stride, end):
    assert ceil_padding(length, size, stride) == (0, end)


def test_dropout_of_the_paper_zeros_units_without_rescaling():
    a = jnp.asarray(activations((100, 100)), jnp.float32)
    kept = dropout_mask(jax.random.key(0), 0.3, 0, a.shape)
    assert jnp.array_equal(dropout(a, 0.3, kept, inverted=False), jnp.where(kept, a, 0))
    assert float(kept.mean()) == pytest.approx(0.7, abs=0.02)


def test_inverted_dropout_matches_flax():
    a = jnp.asarray(activations((4, 5)), jnp.float32)
    kept = dropout_mask(jax.random.key(0), 0.3, 0, a.shape)
    got = dropout(a, 0.3, kept, inverted=True)
    np.testing.assert_allclose(got, jnp.where(kept, a / 0.7, 0))
    assert dropout(a, 0.3, None, inverted=True) is a
    ours, flaxs = (
        np.asarray(drop(jnp.ones((300, 300))))
        for drop in (
            lambda x: dropout(x, 0.3, dropout_mask(jax.random.key(1), 0.3, 0, x.shape), True),
            lambda x: nn.Dropout(0.3).apply({}, x, False, rngs={"dropout": jax.random.key(1)}),
        )
    )
    assert set(np.unique(ours)) == set(np.unique(flaxs))
    assert ours.mean() == pytest.approx(flaxs.mean(), abs=0.01)


def test_dropout_masks_depend_on_the_index_of_an_image_and_differ():
    key = jax.random.key(0)
    whole = dropout_mask(key, 0.5, 0, (8, 64))
    shares = [dropout_mask(key, 0.5, first, (2, 64)) for first in range(0, 8, 2)]
    assert jnp.array_equal(jnp.concatenate(shares), whole)
    assert len(np.unique(whole, axis=0)) == 8


def test_dropout_of_the_paper_scales_at_test_time():
    a = jnp.asarray(activations((4, 5)), jnp.float32)
    np.testing.assert_allclose(dropout(a, 0.3, None, inverted=False), a * 0.7, rtol=1e-6)


def test_dropout_with_rate_zero_changes_nothing():
    a = jnp.asarray(activations((4, 5)), jnp.float32)
    assert jnp.array_equal(dropout(a, 0.0, None, inverted=False), a)
    assert jnp.array_equal(
        dropout(a, 0.0, dropout_mask(jax.random.key(0), 0.0, 0, a.shape), inverted=False), a
    )
