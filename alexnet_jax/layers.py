"""Local response norms, Caffe's pooling and the paper's dropout: what Flax lacks or does slowly."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from alexnet_jax.winograd import winograd_conv


def _window_sum(x: Array, size: int, axis: int) -> Array:
    """Sum over `size` neighbours centred on each element of `axis`, clipped at both ends."""
    before = size // 2
    pad = [(0, 0)] * x.ndim
    pad[axis] = (before, size - 1 - before)
    padded = jnp.pad(x, pad)
    length = x.shape[axis]
    return sum(jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(size))


def local_response_norm(
    x: Array, *, k: float, alpha: float, beta: float = 0.75, size: int = 5, groups: int = 1
) -> Array:
    """b_i = a_i / (k + alpha * sum of a_j² over `size` neighbouring channels)^beta (paper §3.3).

    `alpha` multiplies each squared term and is not divided by `size`: give 1e-4 / 5 for what
    Caffe, PyTorch and cuda-convnet call alpha = 1e-4. With `groups` > 1 the channels are split
    into that many towers and no window crosses from one to the next.

    Args:
      x: float[..., C], C a multiple of `groups`.
    Returns:
      float[..., C] in x's dtype; the sum is taken in float32 or wider.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    towers = wide.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    energy = _window_sum(jnp.square(towers), size, axis=-1 % towers.ndim)
    return (towers * (k + alpha * energy) ** -beta).reshape(x.shape).astype(x.dtype)


def within_map_norm(
    x: Array, *, alpha: float = 0.001 / 25, beta: float = 0.75, size: int = 5
) -> Array:
    """Response norm over a `size` x `size` window of the same channel, clipped at the edges.

    b = a / (1 + alpha * sum of a² in the window)^beta: the `rnorm` layer that the authors' net
    #145 has after conv2 and the paper leaves out. Its scale of 0.001 is divided by size².

    Args:
      x: float[B, H, W, C].
    Returns:
      float[B, H, W, C] in x's dtype; the sum is taken in float32 or wider.
    """
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    energy = _window_sum(_window_sum(jnp.square(wide), size, axis=1), size, axis=2)
    return (wide * (1.0 + alpha * energy) ** -beta).astype(x.dtype)


def ceil_padding(length: int, size: int, stride: int) -> tuple[int, int]:
    """Padding at the end only, such that windows cover all of `length` (the count rounds up)."""
    steps = max(0, math.ceil((length - size) / stride))
    return 0, steps * stride + size - length


def conv(
    x: Array,
    kernel: Array,
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    feature_group_count: int = 1,
    **others: Any,
) -> Array:
    """`jax.lax.conv_general_dilated` of [B, H, W, C] and [R, R, C / groups, D].

    On CPU a convolution that is large enough for it goes by `winograd_conv`.
    """
    plain = functools.partial(
        jax.lax.conv_general_dilated,
        window_strides=strides,
        padding=padding,
        feature_group_count=feature_group_count,
        **others,
    )
    stride = strides[0]
    fewer_products = functools.partial(
        _strided_winograd_conv, stride=stride, padding=padding, groups=feature_group_count
    )
    return jax.lax.platform_dependent(x, kernel, cpu=fewer_products, default=plain)


def _strided_winograd_conv(
    x: Array, kernel: Array, stride: int, padding: Sequence[tuple[int, int]], groups: int
) -> Array:
    if stride > 1:
        x, kernel = _space_to_depth(x, kernel, stride, padding)
        padding = [(0, 0)]
    xs, kernels = jnp.split(x, groups, axis=3), jnp.split(kernel, groups, axis=3)
    ys = [winograd_conv(x, k, padding[0][0]) for x, k in zip(xs, kernels, strict=True)]
    return jnp.concatenate(ys, axis=3)


def _space_to_depth(
    x: Array, kernel: Array, stride: int, padding: Sequence[tuple[int, int]]
) -> tuple[Array, Array]:
    """An image and a kernel whose convolution of stride 1 is theirs of stride `stride`.

    Each square of stride x stride pixels becomes one pixel of stride² times the channels.
    """
    size = kernel.shape[0]
    taps = -(-size // stride)
    pads = [(0, 0)]
    for length, (before, after) in zip(x.shape[1:3], padding, strict=True):
        outputs = (before + length + after - size) // stride + 1
        pads.append((before, (outputs - 1 + taps) * stride - length - before, 0))
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads[1:], (0, 0, 0)])
    end = (0, taps * stride - size)
    kernel = jnp.pad(kernel, (end, end, (0, 0), (0, 0)))
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // stride, stride, width // stride, stride, channels)
    kernel = kernel.reshape(taps, stride, taps, stride, *kernel.shape[2:])
    return (
        x.swapaxes(2, 3).reshape(batch, height // stride, width // stride, -1),
        kernel.swapaxes(1, 2).reshape(taps, taps, stride**2 * channels, -1),
    )


def max_pool(x: Array) -> Array:
    """Overlapping max pooling, 3x3 of stride 2; sizes round up, windows are clipped at the edge.

    Args:
      x: float[B, H, W, C].
    Returns:
      float[B, ceil((H - 3) / 2) + 1, ceil((W - 3) / 2) + 1, C].
    """
    pads = [ceil_padding(length, 3, 2) for length in x.shape[1:3]]
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=-jnp.inf)
    return _max_pool(x)


@jax.custom_vjp
def _max_pool(x: Array) -> Array:
    return _pool_axis(_pool_axis(x, 2), 1)


def _pool_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = _max_pool(x)
    return y, (x, y)


def _pool_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    x, y = saved
    rows = _pool_axis(x, 2)
    return (_unpool_axis(x, rows, _unpool_axis(rows, y, dy, 1), 2),)


_max_pool.defvjp(_pool_forward, _pool_backward)


def _thirds(x: Array, axis: int) -> list[Array]:
    """The first, second and third elements of all windows along an axis of odd length."""
    end = x.shape[axis] - 2
    return [jax.lax.slice_in_dim(x, i, end + i, 2, axis) for i in range(3)]


def _pool_axis(x: Array, axis: int) -> Array:
    return functools.reduce(jnp.maximum, _thirds(x, axis))


def _unpool_axis(x: Array, y: Array, dy: Array, axis: int) -> Array:
    """Sends each window's gradient to the first of its elements that has the window's maximum."""
    first, second, third = _thirds(x, axis)
    to_first = first == y
    to_second = ~to_first & (second == y)
    to_third = ~(to_first | to_second)
    one_more = [(0, 0)] * x.ndim
    one_more[axis] = (0, 1)
    one_before = [(0, 0)] * x.ndim
    one_before[axis] = (1, 0)
    even = jnp.pad(jnp.where(to_first, dy, 0), one_more) + jnp.pad(
        jnp.where(to_third, dy, 0), one_before
    )
    odd = jnp.pad(jnp.where(to_second, dy, 0), one_more)
    both = jnp.stack([even, odd], axis + 1)
    both = both.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return jax.lax.slice_in_dim(both, 0, x.shape[axis], axis=axis)


def paper_dropout(x: Array, rate: float, key: Array | None) -> Array:
    """Dropout as in paper §4.2: zeros with no rescaling in training, x * (1 - rate) at test.

    Its expectation over masks equals its test output, as with inverted dropout (`nn.Dropout`);
    but what the next layer sees is (1 - rate) times as large, which matters next to a given
    weight decay and learning rate.

    Args:
      x: float[...].
      key: a PRNG key in training, None at test.
    """
    if key is None:
        return x * jnp.asarray(1.0 - rate, x.dtype)
    return x * jax.random.bernoulli(key, 1.0 - rate, x.shape).astype(x.dtype)
