"""The layers' arithmetic, as the paper writes it.

Flax supplies parameters and initialization. This module supplies what Flax lacks (local response
normalization, rounding pooling up, the paper's dropout) and what the network needs to control
(the dtype of gradients). Functions with a faster form on some backend choose it when a program is
lowered for that backend (`jax.lax.platform_dependent`). The forms for CPU are in `cpu_kernels`, and
that of pooling for GPU is in `gpu_kernels`.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float

from alexnet_jax.models import cpu_kernels, gpu_kernels

# ------------------------------------------------------------------------------------------
# Convolutions and fully connected layers
# ------------------------------------------------------------------------------------------


def conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "R R C//{feature_group_count} D"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    feature_group_count: int,
    gradient_dtype: str | None = None,
    **others: Any,
) -> Float[Array, "B height width D"]:
    """Convolution in x's dtype; on CPU by Winograd's algorithm where that is faster.

    Args:
      gradient_dtype: of the kernel's gradient, by default x's. See `_with_gradient_dtype`.
      others: of `jax.lax.conv_general_dilated`.
    """
    window = tuple(strides), tuple((low, high) for low, high in padding), feature_group_count
    y: Array = _conv(x, kernel, *window, gradient_dtype, tuple(others.items()))
    return y


# Outside of `jax.jit`, each of Winograd's thousand additions would be a program of its own, and the
# first call of a network would take a minute. Inside, `inline` makes this jit disappear.
@functools.partial(jax.jit, static_argnums=(2, 3, 4, 5, 6), inline=True)
def _conv(
    x: Array,
    kernel: Array,
    strides: tuple[int, ...],
    padding: tuple[tuple[int, int], ...],
    groups: int,
    gradient_dtype: str | None,
    others: tuple[tuple[str, Any], ...],
) -> Array:
    def convolve(groups: int, x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x, kernel, strides, padding, feature_group_count=groups, **dict(others)
        )

    def default(x: Array, kernel: Array) -> Array:
        all_groups = functools.partial(convolve, groups)
        return _with_gradient_dtype(all_groups, gradient_dtype or str(x.dtype), x, kernel)

    def on_cpu(x: Array, kernel: Array) -> Array:
        one_group = functools.partial(convolve, 1)
        return cpu_kernels.conv(x, kernel, strides[0], padding, groups, one_group)

    y: Array = jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=default)
    return y


def dense(
    x: Float[Array, "B D"], kernel: Float[Array, "D E"], *, gradient_dtype: str | None = None
) -> Float[Array, "B E"]:
    """Matrix product in x's dtype. `gradient_dtype` is as for `conv`."""

    def default(x: Array, kernel: Array) -> Array:
        return _with_gradient_dtype(jnp.matmul, gradient_dtype or str(x.dtype), x, kernel)

    y: Array = jax.lax.platform_dependent(x, kernel, cpu=cpu_kernels.dense, default=default)
    return y


def local(
    x: Float[Array, "B H W C"], kernel: Float[Array, "H W R R C D"]
) -> Float[Array, "B H W D"]:
    """A convolution, of stride 1 and the same resolution, with another kernel at each position.

    One matrix product for each position. With the positions first, XLA computes all of them as one
    batch of products and transposes nothing but x and the output.
    """
    height, width, size = kernel.shape[:3]
    padded = jnp.pad(x, ((0, 0), (size // 2,) * 2, (size // 2,) * 2, (0, 0))).transpose(1, 2, 0, 3)
    windows = [
        padded[row : row + height, column : column + width]
        for row in range(size)
        for column in range(size)
    ]
    matrices = kernel.astype(x.dtype).reshape(height, width, -1, kernel.shape[-1])
    return jnp.matmul(jnp.concatenate(windows, axis=3), matrices).transpose(2, 0, 1, 3)


Product = Callable[[Array, Array], Array]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _with_gradient_dtype(product: Product, dtype: str, x: Array, kernel: Array) -> Array:
    """Returns product(x, kernel) in x's dtype, whose kernel gradient is computed in `dtype`.

    Where the batch is sharded, the compiler adds up the devices' kernel gradients right where they
    are computed, before any cast that follows. So the dtype of this one product decides whether
    devices exchange, and round, float32 or bfloat16. Automatic differentiation would always give
    x's dtype.
    """
    return product(x, kernel.astype(x.dtype))


def _product_forward(
    product: Product, dtype: str, x: Array, kernel: Array
) -> tuple[Array, tuple[Array, Array]]:
    return product(x, kernel.astype(x.dtype)), (x, kernel)


def _product_backward(
    product: Product, dtype: str, saved: tuple[Array, Array], dy: Array
) -> tuple[Array, Array]:
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: product(x, kernel.astype(x.dtype)), x)(dy)
    # The cast of x is exact where dtype is wider, and TPUs multiply float32 as bfloat16 anyway.
    like = jax.ShapeDtypeStruct(kernel.shape, dtype)
    (d_kernel,) = jax.linear_transpose(lambda k: product(x.astype(dtype), k), like)(
        dy.astype(dtype)
    )
    return dx, d_kernel.astype(kernel.dtype)


_with_gradient_dtype.defvjp(_product_forward, _product_backward)


def promote_all_but_kernel(
    x: Array, kernel: Array, bias: Array | None, *, dtype: Any
) -> tuple[Array, Array, Array | None]:
    """Flax's `promote_dtype` for layers that use `conv` or `dense`, which cast the kernel."""
    return x.astype(dtype), kernel, bias if bias is None else bias.astype(dtype)


def ceil_padding(length: int, size: int, stride: int) -> tuple[int, int]:
    """Returns the padding, at the end only, with which the number of windows rounds up."""
    steps = max(0, math.ceil((length - size) / stride))
    return 0, steps * stride + size - length


# ------------------------------------------------------------------------------------------
# Nonlinearity
# ------------------------------------------------------------------------------------------


@jax.custom_jvp
def relu(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """max(0, x), with a gradient of 0 at 0.

    Unlike `jax.nn.relu`, its gradient depends on the output, which the next layer stores anyway.
    So the input is not stored, and GPUs apply ReLU inside the convolution before it.
    """
    return jnp.maximum(x, 0)


@relu.defjvp
def _relu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    # XLA knows that y > 0 where x > 0, and would store x after all; a barrier hides that.
    y = jax.lax.optimization_barrier(relu(*primals))
    return y, jnp.where(y > 0, tangents[0], 0)


# ------------------------------------------------------------------------------------------
# Normalization
# ------------------------------------------------------------------------------------------


def local_response_norm(
    x: Float[Array, "... C"],
    *,
    k: float,
    alpha: float,
    beta: float = 0.75,
    size: int = 5,
    groups: int = 1,
) -> Float[Array, "... C"]:
    """b_i = a_i / (k + α Σ_j a_j²)^β over `size` neighboring channels j (paper §3.3).

    `alpha` is not divided by `size` (see `alexnet.LRN`). With `groups` > 1 the channels are split
    into as many towers and no window crosses from one to the next. The sum is computed in float32
    or wider, the result is in x's dtype.
    """
    window_sum = functools.partial(_channel_sum, size=size, groups=groups)
    return _normalize(x, window_sum, k, alpha, beta)


def within_map_norm(
    x: Float[Array, "B H W C"], *, alpha: float = 0.001 / 25, beta: float = 0.75, size: int = 5
) -> Float[Array, "B H W C"]:
    """b = a / (1 + α Σ a²)^β over a `size`×`size` window of the same channel, clipped at edges.

    This is the `rnorm` layer that the authors' run #145 has after conv2 and the paper does not
    mention. Its scale of 0.001 is divided by size². The sum is computed in float32 or wider, the
    result is in x's dtype.
    """
    return _normalize(x, functools.partial(_map_sum, size=size), 1.0, alpha, beta)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4))
def _normalize(
    x: Array, window_sum: Callable[[Array], Array], k: float, alpha: float, beta: float
) -> Array:
    """a_i / (k + α Σ_j a_j²)^β, where i is in the window of j if j is in the window of i."""
    a = x.astype(cpu_kernels.wide(x))
    return (a * _power(k + alpha * window_sum(jnp.square(a)), beta)).astype(x.dtype)


def _normalize_forward(x: Array, *constants: Any) -> tuple[Array, Array]:
    return _normalize(x, *constants), x


def _normalize_backward(
    window_sum: Callable[[Array], Array], k: float, alpha: float, beta: float, x: Array, dy: Array
) -> tuple[Array]:
    # With s_i = k + α Σ_j a_j², the gradient is dy_i s_i^-β - 2 α β a_i Σ_j dy_j a_j s_j^(-β-1),
    # where j runs over the same window. Only x is kept from the forward pass, in its own dtype:
    # computing s again is cheaper than storing it. XLA would find that it is the same s each time
    # and store it after all, so barriers hide that.
    wide = cpu_kernels.wide(x)

    def parts(x: Array) -> tuple[Array, Array, Array]:
        a = x.astype(wide)
        base = k + alpha * window_sum(jnp.square(a))
        return a, base, dy.astype(wide) * _power(base, beta)

    a, base, scaled = parts(jax.lax.optimization_barrier(x))
    # GPUs write these terms to memory before they add them up. This part of the gradient is small,
    # so that rounding the terms to x's dtype changes the gradient less than rounding x did.
    terms, x = jax.lax.optimization_barrier(((scaled * a / base).astype(x.dtype), x))
    others = window_sum(terms.astype(wide))
    a, _, scaled = parts(x)
    return ((scaled - 2 * alpha * beta * a * others).astype(x.dtype),)


_normalize.defvjp(_normalize_forward, _normalize_backward)


def _power(base: Array, beta: float) -> Array:
    """base^-β; two roots compute the paper's β in a tenth of a power's time on CPU."""
    if beta != 0.75:
        return base**-beta
    root = jax.lax.rsqrt(base)
    return root * jnp.sqrt(root)


def _channel_sum(x: Array, size: int, groups: int) -> Array:
    """Sum over windows of an odd number of channels, clipped at the edges of each tower."""
    by_slices = functools.partial(channel_sum_by_slices, size=size, groups=groups)
    by_matrix = functools.partial(channel_sum_by_matrix, size=size, groups=groups)
    total: Array = jax.lax.platform_dependent(x, tpu=by_matrix, default=by_slices)
    return total


def channel_sum_by_slices(x: Array, size: int, groups: int) -> Array:
    """The sum as additions of shifted slices."""
    towers = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return _window_sum(towers, size, towers.ndim - 1, (size // 2,) * 2).reshape(x.shape)


def channel_sum_by_matrix(x: Array, size: int, groups: int) -> Array:
    """The sum as a product with a band matrix of ones, for a TPU's matrix units."""
    channels = np.arange(x.shape[-1])
    towers = channels // (x.shape[-1] // groups)
    near = abs(np.subtract.outer(channels, channels)) <= size // 2
    band = jnp.asarray(near & np.equal.outer(towers, towers), x.dtype)
    return jnp.einsum("...c,cd->...d", x, band, precision=jax.lax.Precision.HIGHEST)


def _map_sum(x: Array, size: int) -> Array:
    """Sum over windows of an odd number of rows and columns, clipped at the edges."""
    padding = (size // 2,) * 2
    return _window_sum(_window_sum(x, size, 1, padding), size, 2, padding)


def _window_sum(x: Array, size: int, axis: int, padding: tuple[int, int], stride: int = 1) -> Array:
    """Sum over windows of `size` elements along one axis, with zeros at its ends."""
    pads = [(0, 0)] * x.ndim
    pads[axis] = padding
    padded = jnp.pad(x, pads)
    end = padded.shape[axis] - size + 1  # of the first elements of windows
    shifted = (jax.lax.slice_in_dim(padded, i, end + i, stride, axis) for i in range(size))
    return functools.reduce(jnp.add, shifted)


# ------------------------------------------------------------------------------------------
# Pooling
# ------------------------------------------------------------------------------------------


@functools.partial(jax.jit, static_argnames=("size", "stride", "ceil"), inline=True)
def max_pool(
    x: Float[Array, "B H W C"], size: int = 3, stride: int = 2, ceil: bool = True
) -> Float[Array, "B height width C"]:
    """Max pooling over size×size windows; overlapping where `stride` < `size` (paper §3.4).

    Args:
      ceil: whether the number of windows rounds up, the last ones being clipped at the edges.
        Otherwise it rounds down, and rows and columns without a window are ignored.
    """
    pads = [ceil_padding(length, size, stride) if ceil else (0, 0) for length in x.shape[1:3]]

    def by_flax(x: Array) -> Array:
        y: Array = nn.max_pool(x, (size,) * 2, (stride,) * 2, pads)
        return y

    if (size, stride) != (3, 2):
        return by_flax(x)
    on_cpu = functools.partial(cpu_kernels.max_pool, pads=pads)
    on_gpu = functools.partial(gpu_kernels.max_pool, pads=tuple(pads))
    y: Array = jax.lax.platform_dependent(x, cpu=on_cpu, cuda=on_gpu, rocm=on_gpu, default=by_flax)
    return y


def avg_pool(
    x: Float[Array, "B H W C"], size: int = 3, stride: int = 2
) -> Float[Array, "B height width C"]:
    """Average pooling, of which the number of windows rounds up.

    Windows are clipped at the edges, and an average is that of the pixels in the image, as in
    cuda-convnet.
    """
    # As sums of slices: XLA's CPU backend needs ten times as long for the gradient of Flax's.
    y = x.astype(cpu_kernels.wide(x))
    for axis in (1, 2):
        window = size, axis, ceil_padding(x.shape[axis], size, stride), stride
        inside = jnp.ones([x.shape[axis] if i == axis else 1 for i in range(x.ndim)], y.dtype)
        y = _window_sum(y, *window) / _window_sum(inside, *window)
    return y.astype(x.dtype)


def adaptive_avg_pool(x: Float[Array, "B H W C"], size: int) -> Float[Array, "B {size} {size} C"]:
    """Averages over size×size cells, as torch.nn.AdaptiveAvgPool2d does.

    Cell i covers the rows floor(i H / size) to ceil((i + 1) H / size) - 1, and columns likewise.
    Cells overlap where H is no multiple of `size`, and repeat where H is smaller.
    """
    if x.shape[1:3] == (size, size):
        return x
    rows, columns = (_cell_weights(length, size) for length in x.shape[1:3])
    # By default accelerators would round the values to bfloat16 or TF32.
    exact = jax.lax.Precision.HIGHEST
    wide = x.astype(cpu_kernels.wide(x))
    return jnp.einsum("ih,bhwc,jw->bijc", rows, wide, columns, precision=exact).astype(x.dtype)


def _cell_weights(length: int, size: int) -> Float[np.ndarray, "size length"]:
    weights = np.zeros((size, length), np.float32)
    for i in range(size):
        start, end = i * length // size, -(-(i + 1) * length // size)
        weights[i, start:end] = 1 / (end - start)
    return weights


# ------------------------------------------------------------------------------------------
# Dropout
# ------------------------------------------------------------------------------------------


def dropout_mask(
    key: Array, rate: float, first: Array | int, shape: tuple[int, ...]
) -> Bool[Array, "B D"]:
    """Returns which units are kept, each with probability 1 - rate.

    Image i draws from `key` and first + i alone, so that its mask does not depend on how many
    devices share the batch.

    Args:
      first: index of the first image in the global batch.
      shape: (B, D).
    """
    keys = jax.vmap(lambda index: jax.random.fold_in(key, index))(first + jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape[1:]))(keys)


def dropout(
    x: Float[Array, "B D"], rate: float, kept: Bool[Array, "B D"] | None, inverted: bool
) -> Float[Array, "B D"]:
    """Zeros the units that are not kept.

    Args:
      kept: None at test time.
      inverted: False: paper §4.2, which multiplies all units by 1 - rate at test time. True:
        divides the kept units by 1 - rate in training instead.
    """
    if inverted:
        return x if kept is None else jnp.where(kept, x / (1.0 - rate), 0)
    return x * jnp.asarray(1.0 - rate, x.dtype) if kept is None else x * kept.astype(x.dtype)
