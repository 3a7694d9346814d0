"""Local response norms, Caffe's pooling and the paper's dropout: what Flax lacks or does slowly."""

import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Shaped

from alexnet_jax.models.cpu_kernels import winograd_conv

POOL_SIZE, POOL_STRIDE = 3, 2  # paper §3.4
LEAST_CHANNELS = 20  # inputs · outputs / (inputs + outputs) of a group


def _window_sum(x: Array, size: int, axis: int) -> Array:
    """Sum over an odd `size` of neighbours centred on each element, clipped at both ends."""
    pad = [(0, 0)] * x.ndim
    pad[axis] = (size // 2, size // 2)
    padded = jnp.pad(x, pad)
    length = x.shape[axis]
    shifted = (jax.lax.slice_in_dim(padded, i, i + length, axis=axis) for i in range(size))
    return functools.reduce(jnp.add, shifted)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3, 4, 5))
def _lrn(x: Array, k: float, alpha: float, beta: float, size: int, groups: int) -> Array:
    return x * _power(k + alpha * _channel_sum(jnp.square(x), size, groups), beta)


def local_response_norm(
    x: Float[Array, "... C"],
    *,
    k: float,
    alpha: float,
    beta: float = 0.75,
    size: int = 5,
    groups: int = 1,
) -> Float[Array, "... C"]:
    """b_i = a_i / (k + alpha * sum of a_j² over `size` neighbouring channels)^beta (paper §3.3).

    `alpha` multiplies each squared term and is not divided by `size`: give 1e-4 / 5 for what
    Caffe, PyTorch and cuda-convnet call alpha = 1e-4. With `groups` > 1 the channels are split
    into that many towers and no window crosses from one to the next. The sum is taken in float32
    or wider, the result is in x's dtype.
    """
    return _lrn(x.astype(_wide(x)), k, alpha, beta, size, groups).astype(x.dtype)


def _lrn_forward(x: Array, *constants: Any) -> tuple[Array, Array]:
    return _lrn(x, *constants), x


def _lrn_backward(
    k: float, alpha: float, beta: float, size: int, groups: int, x: Array, dy: Array
) -> tuple[Array]:
    base = k + alpha * _channel_sum(jnp.square(x), size, groups)
    scaled = dy * _power(base, beta)
    others = _channel_sum(scaled * x / base, size, groups)
    return (scaled - 2 * alpha * beta * x * others,)


_lrn.defvjp(_lrn_forward, _lrn_backward)


def _power(base: Array, beta: float) -> Array:
    """base^-beta; the paper's beta by two roots, which take a tenth of a power's time on CPU."""
    if beta != 0.75:
        return base**-beta
    root = jax.lax.rsqrt(base)
    return root * jnp.sqrt(root)


def _channel_sum(x: Array, size: int, groups: int) -> Array:
    """Sum over windows of an odd number of channels that do not leave their tower."""
    by_slices = functools.partial(channel_sum_by_slices, size=size, groups=groups)
    by_matrix = functools.partial(channel_sum_by_matrix, size=size, groups=groups)
    total: Array = jax.lax.platform_dependent(x, cpu=by_slices, default=by_matrix)
    return total


def channel_sum_by_slices(x: Array, size: int, groups: int) -> Array:
    towers = x.reshape(*x.shape[:-1], groups, x.shape[-1] // groups)
    return _window_sum(towers, size, axis=towers.ndim - 1).reshape(x.shape)


def channel_sum_by_matrix(x: Array, size: int, groups: int) -> Array:
    """What a TPU does best."""
    channels = np.arange(x.shape[-1])
    towers = channels // (x.shape[-1] // groups)
    near = abs(np.subtract.outer(channels, channels)) <= size // 2
    band = jnp.asarray(near & np.equal.outer(towers, towers), x.dtype)
    return jnp.einsum("...c,cd->...d", x, band, precision=jax.lax.Precision.HIGHEST)


def within_map_norm(
    x: Float[Array, "B H W C"], *, alpha: float = 0.001 / 25, beta: float = 0.75, size: int = 5
) -> Float[Array, "B H W C"]:
    """Response norm over a `size` x `size` window of the same channel, clipped at the edges.

    b = a / (1 + alpha * sum of a² in the window)^beta: the `rnorm` layer that run #145 of the
    authors has after conv2 and the paper leaves out. Its scale of 0.001 is divided by size². The
    sum is taken in float32 or wider, the result is in x's dtype.
    """
    wide = x.astype(_wide(x))
    energy = _window_sum(_window_sum(jnp.square(wide), size, axis=1), size, axis=2)
    return (wide * (1.0 + alpha * energy) ** -beta).astype(x.dtype)


def ceil_padding(length: int, size: int, stride: int) -> tuple[int, int]:
    """Padding at the end only, such that windows cover all of `length` (the count rounds up)."""
    steps = max(0, math.ceil((length - size) / stride))
    return 0, steps * stride + size - length


def conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "R R C//{feature_group_count} D"],
    strides: Sequence[int],
    padding: Sequence[tuple[int, int]],
    *,
    feature_group_count: int,
    pool: bool = False,
    **others: Any,
) -> Float[Array, "B height width D"]:
    """`jax.lax.conv_general_dilated`, and `max_pool` of it if that is asked for.

    On CPU it is in float32 to the end, since there bfloat16 only costs conversions, and goes by
    `winograd_conv` where there are enough channels for the products to outweigh the additions.
    """

    def convolved(x: Array, kernel: Array) -> Array:
        return jax.lax.conv_general_dilated(
            x,
            kernel.astype(x.dtype),
            strides,
            padding,
            feature_group_count=feature_group_count,
            **others,
        )

    def pooled(y: Array) -> Array:
        return max_pool(y) if pool else y

    def plain(x: Array, kernel: Array) -> Array:
        return pooled(convolved(x, kernel))

    def on_cpu(x: Array, kernel: Array) -> Array:
        inputs = strides[0] ** 2 * kernel.shape[2]
        outputs = kernel.shape[3] // feature_group_count
        if inputs * outputs / (inputs + outputs) < LEAST_CHANNELS:
            y = convolved(x.astype(_wide(x)), kernel)
        else:
            y = _strided_winograd_conv(x, kernel, strides[0], padding, feature_group_count)
        return pooled(y).astype(x.dtype)

    y: Array = jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)
    return y


def dot_general(
    x: Float[Array, "B D"], kernel: Float[Array, "D E"], dimensions: Any, **others: Any
) -> Float[Array, "B E"]:
    """`jax.lax.dot_general` in x's dtype, but on CPU in float32, as `conv`."""

    def plain(x: Array, kernel: Array) -> Array:
        return jax.lax.dot_general(x, kernel.astype(x.dtype), dimensions, **others)

    def on_cpu(x: Array, kernel: Array) -> Array:
        return plain(*_gradients_in_turn(x.astype(kernel.dtype), kernel)).astype(x.dtype)

    y: Array = jax.lax.platform_dependent(x, kernel, cpu=on_cpu, default=plain)
    return y


@jax.custom_vjp
def _gradients_in_turn(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Returns both as they are; the kernel's gradient waits for that of x, its last reader.

    So an update that needs the former can be in place. Otherwise XLA's CPU backend copies the
    kernel first: it takes `optimization_barrier` away before it decides, so that only a value
    which depends on the other gradient makes it wait.
    """
    return x, kernel


def _in_turn_backward(_: None, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
    dx, d_kernel = gradients
    return dx, d_kernel + 0.0 * dx[(0,) * dx.ndim]


_gradients_in_turn.defvjp(lambda x, kernel: ((x, kernel), None), _in_turn_backward)


def promote_all_but_kernel(
    x: Array, kernel: Array, bias: Array | None, *, dtype: Any
) -> tuple[Array, Array, Array | None]:
    """Flax's `promote_dtype` for a layer of `conv` or `dot_general`, which cast the kernel."""
    return x.astype(dtype), kernel, bias if bias is None else bias.astype(dtype)


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
    pads = []
    for length, (before, after) in zip(x.shape[1:3], padding, strict=True):
        outputs = (before + length + after - size) // stride + 1
        pads.append((before, (outputs - 1 + taps) * stride - length - before, 0))
    x = jax.lax.pad(x, jnp.zeros((), x.dtype), [(0, 0, 0), *pads, (0, 0, 0)])
    end = (0, taps * stride - size)
    kernel = jnp.pad(kernel, (end, end, (0, 0), (0, 0)))
    batch, height, width, channels = x.shape
    x = x.reshape(batch, height // stride, stride, width // stride, stride, channels)
    kernel = kernel.reshape(taps, stride, taps, stride, *kernel.shape[2:])
    return (
        x.swapaxes(2, 3).reshape(batch, height // stride, width // stride, -1),
        kernel.swapaxes(1, 2).reshape(taps, taps, stride**2 * channels, -1),
    )


def max_pool(x: Float[Array, "B H W C"]) -> Float[Array, "B H//2 W//2 C"]:
    """Overlapping max pooling, 3x3 of stride 2; sizes round up, windows are clipped at the edge."""
    pads = [ceil_padding(length, POOL_SIZE, POOL_STRIDE) for length in x.shape[1:3]]

    def on_cpu(x: Array) -> Array:
        wide = x.astype(_wide(x))
        whole = jnp.pad(wide, [(0, 0), *pads, (0, 0)], constant_values=-jnp.inf)
        return _pool_whole_windows(whole).astype(x.dtype)

    def plain(x: Array) -> Array:
        y: Array = nn.max_pool(x, (POOL_SIZE,) * 2, (POOL_STRIDE,) * 2, pads)
        return y

    y: Array = jax.lax.platform_dependent(x, cpu=on_cpu, default=plain)
    return y


def _wide(x: Array) -> Any:
    return jnp.promote_types(x.dtype, jnp.float32)


@jax.custom_vjp
def _pool_whole_windows(x: Array) -> Array:
    return _pool_axis(_pool_axis(x, 2), 1)


def _pool_forward(x: Array) -> tuple[Array, tuple[Array, Array]]:
    y = _pool_whole_windows(x)
    return y, (x, y)


def _pool_backward(saved: tuple[Array, Array], dy: Array) -> tuple[Array]:
    x, y = saved
    rows = _pool_axis(x, 2)
    return (_unpool_axis(x, rows, _unpool_axis(rows, y, dy, 1), 2),)


_pool_whole_windows.defvjp(_pool_forward, _pool_backward)


def _of_windows(x: Array, axis: int) -> list[Array]:
    """The first, the second and the third elements of all windows along an axis."""
    end = x.shape[axis] - 2
    return [jax.lax.slice_in_dim(x, i, end + i, 2, axis) for i in range(3)]


def _pool_axis(x: Array, axis: int) -> Array:
    return functools.reduce(jnp.maximum, _of_windows(x, axis))


def _unpool_axis(x: Array, y: Array, dy: Array, axis: int) -> Array:
    """Sends each window's gradient to the first of its elements that is its maximum.

    An even element is the first of one window and the third of the one before.
    """
    first, second, _ = (part == y for part in _of_windows(x, axis))
    to_first, to_second, to_third = first, ~first & second, ~(first | second)

    def sent(chosen: Array, before: int, after: int) -> Array:
        pads = [(0, 0)] * x.ndim
        pads[axis] = before, after
        return jnp.pad(jnp.where(chosen, dy, 0), pads)

    even, odd = sent(to_first, 0, 1) + sent(to_third, 1, 0), sent(to_second, 0, 1)
    both = jnp.stack([even, odd], axis + 1)
    both = both.reshape(*x.shape[:axis], -1, *x.shape[axis + 1 :])
    return jax.lax.slice_in_dim(both, 0, x.shape[axis], axis=axis)


def dropout_mask(
    key: Array, rate: float, first: Array | int, shape: tuple[int, int]
) -> Bool[Array, "B D"]:
    """Returns which units are kept, each with probability 1 - rate.

    An image's draws come from the key and its place in the batch alone, so that they are the same
    however many devices share the batch.

    Args:
      first: the place of the first image in the whole batch.
      shape: (B, D).
    """
    keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(first + jnp.arange(shape[0]))
    return jax.vmap(lambda key: jax.random.bernoulli(key, 1.0 - rate, shape[1:]))(keys)


def inverted_dropout(
    x: Float[Array, "B D"], rate: float, kept: Bool[Array, "B D"] | None
) -> Float[Array, "B D"]:
    """Zeros, and the rest divided by 1 - rate, so that nothing is to be done at test.

    Args:
      kept: None at test.
    """
    return x if kept is None else jnp.where(kept, x / (1.0 - rate), 0)


def paper_dropout(
    x: Float[Array, "B D"], rate: float, kept: Bool[Array, "B D"] | None
) -> Float[Array, "B D"]:
    """Dropout as in paper §4.2: zeros with no rescaling in training, x * (1 - rate) at test.

    Its expectation over masks equals its test output, as with inverted dropout; but what the next
    layer sees is (1 - rate) times as large, which matters next to a given weight decay and
    learning rate.

    Args:
      kept: None at test.
    """
    return x * jnp.asarray(1.0 - rate, x.dtype) if kept is None else x * kept.astype(x.dtype)


def to_rows_of_group(x: Shaped[Array, "B D"], axis: str) -> Shaped[Array, "mB D_share"]:
    """Each device's images with all units -> all m devices' images with a share of the units.

    The devices along a mapped axis exchange what they have; that moves each value at most once.
    """
    y: Array = jax.lax.all_to_all(x, axis, split_axis=1, concat_axis=0, tiled=True)
    return y


def split_dot_general(
    x: Float[Array, "mB D_share"],
    kernel: Float[Array, "D_share E"],
    dimensions: Any,
    *,
    axis: str,
    scatter: int,
    **others: Any,
) -> Float[Array, "B E"] | Float[Array, "mB E_share"]:
    """`dot_general` of shares of the inputs, added over a mapped axis of m devices.

    Returns the share of the sum along dimension `scatter` that is this device's.
    """
    partial = dot_general(x, kernel, dimensions, **others)
    y: Array = jax.lax.psum_scatter(partial, axis, scatter_dimension=scatter, tiled=True)
    return y
