"""Faster forms of convolution, matrix product and max pooling for XLA's CPU backend.

XLA's CPU backend multiplies matrices well but convolves slowly, and turns the gradient of max
pooling into a slow scatter. Nothing here changes what a layer computes beyond rounding; `layers`
chooses these forms when a program is lowered for CPU.

- Convolution by Winograd's minimal filtering (Lavin and Gray 2015, arXiv 1509.09308): a tile of m
  outputs of an r-tap filter takes m + r - 1 products instead of m·r along each axis, about a third
  in two dimensions. The rest is additions, and the products are matrix products over channels.
- bfloat16 arrays are computed in float32, since x86 CPUs convert bfloat16 for every operation.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Float64

# ------------------------------------------------------------------------------------------
# Convolution
# ------------------------------------------------------------------------------------------

# Winograd's additions cost more than the products that they save where a group has few channels or
# few taps. It was faster from this value of taps · inputs · outputs / (inputs + outputs) on.
MIN_SAVED = 60
# XLA computes a kernel's gradient as a convolution with a kernel as large as a map. Where the map
# is large and the kernel has few input channels, matrix products are up to six times as fast.
MAX_FEW_CHANNELS, MIN_LARGE_MAP = 16, 100

Convolve = Callable[[Array, Array], Array]


def conv(
    x: Float[Array, "B H W C"],
    kernel: Float[Array, "R R C//{groups} D"],
    stride: int,
    padding: Sequence[tuple[int, int]],
    groups: int,
    convolve: Convolve,
) -> Float[Array, "B height width D"]:
    """Convolution in float32, returned in x's dtype.

    Args:
      convolve: the ordinary convolution of one group, for kernels with few channels.
    """
    taps = -(-kernel.shape[0] // stride)
    inputs, outputs = stride**2 * kernel.shape[2], kernel.shape[3] // groups
    has_few = (
        stride == 1 and inputs <= MAX_FEW_CHANNELS and x.shape[1] * x.shape[2] >= MIN_LARGE_MAP
    )
    uses_winograd = not has_few and taps * inputs * outputs / (inputs + outputs) >= MIN_SAVED
    y = x
    if uses_winograd and stride > 1:
        y, kernel = _space_to_depth(y, kernel, stride, padding)
        padding = [(0, 0)]

    def of_group(y: Array, kernel: Array) -> Array:
        if uses_winograd:
            return winograd_conv(y, kernel, padding[0][0])
        if has_few:
            return _conv_of_few_channels(y.astype(wide(y)), kernel, padding, convolve)
        return convolve(y.astype(wide(y)), kernel)

    # One group at a time: XLA needs ten times as long for the gradient of a kernel with groups.
    ys, kernels = jnp.split(y, groups, axis=3), jnp.split(kernel, groups, axis=3)
    found = [of_group(y, kernel) for y, kernel in zip(ys, kernels, strict=True)]
    return jnp.concatenate(found, axis=3).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv_of_few_channels(
    x: Array, kernel: Array, padding: Sequence[tuple[int, int]], convolve: Convolve
) -> Array:
    return convolve(x, kernel)


def _few_forward(
    x: Array, kernel: Array, padding: Sequence[tuple[int, int]], convolve: Convolve
) -> tuple[Array, tuple[Array, Array]]:
    return convolve(x, kernel), (x, kernel)


def _few_backward(
    padding: Sequence[tuple[int, int]],
    convolve: Convolve,
    saved: tuple[Array, Array],
    dy: Array,
) -> tuple[Array, Array]:
    x, kernel = saved
    (dx,) = jax.linear_transpose(lambda x: convolve(x, kernel), x)(dy)
    # One product for each row of the kernel, of all its columns at once.
    size, (height, width) = kernel.shape[0], dy.shape[1:3]
    padded = jnp.pad(x, ((0, 0), *padding, (0, 0)))
    columns = jnp.concatenate([padded[:, :, i : i + width] for i in range(size)], axis=3)
    rows = [columns[:, i : i + height] for i in range(size)]
    d_kernel = jnp.stack([jnp.einsum("bhwc,bhwd->cd", row, dy) for row in rows])
    return dx, d_kernel.reshape(kernel.shape).astype(kernel.dtype)


_conv_of_few_channels.defvjp(_few_forward, _few_backward)


def _space_to_depth(
    x: Array, kernel: Array, stride: int, padding: Sequence[tuple[int, int]]
) -> tuple[Array, Array]:
    """Returns images and a kernel whose convolution with stride 1 equals the given one.

    Each stride×stride square of pixels becomes one pixel with stride² times the channels.
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


# Winograd's transforms evaluate polynomials at these points. More points would save more products
# and lose more digits.
POINTS = (0.0, 1.0, -1.0, 2.0, -2.0, 0.5, -0.5)
MAX_TAPS = len(POINTS) - 1
PART = 32  # images whose products are in memory at once
# The loop over at most this many parts is unrolled, over consecutive images. XLA then fuses reading
# a part with the additions that follow, which saves a tenth of a training step. More parts are a
# loop of the compiled program, because every backend traces this code, also with a pod's batch.
MAX_UNROLLED = 16


class Tiling(NamedTuple):
    """How one axis is cut into tiles; in each, y = output @ ((kernel @ filter) * (input @ x)).

    Attributes:
      length: number of outputs along the axis.
      tiles: number of tiles; the last one may reach past the end.
      outputs: outputs per tile.
    """

    length: int
    tiles: int
    outputs: int
    input: Float64[np.ndarray, "products products"]
    kernel: Float64[np.ndarray, "products taps"]
    output: Float64[np.ndarray, "outputs products"]


@functools.cache
def tiling(length: int, taps: int) -> Tiling:
    """Returns the tiling F(m, taps) of an axis with the m that needs the fewest products."""
    tiles = {m: -(-length // m) for m in range(1, len(POINTS) + 2 - taps)}
    outputs = min(tiles, key=lambda m: tiles[m] * (m + taps - 1))
    products = outputs + taps - 1
    points = np.array(POINTS[: products - 1])

    def values(degree: int) -> np.ndarray:  # monomials at the points and at infinity
        return np.vstack([np.vander(points, degree, increasing=True), np.eye(degree)[-1]])

    def with_roots(roots: np.ndarray) -> np.ndarray:  # coefficients, constant term first
        return np.atleast_1d(np.poly(roots))[::-1]

    others = [np.delete(points, i) for i in range(len(points))]
    lagrange = [np.append(with_roots(roots), 0.0) for roots in others]
    scales = [np.prod(p - q) for p, q in zip(points, others, strict=True)]
    return Tiling(
        length=length,
        tiles=tiles[outputs],
        outputs=outputs,
        input=np.vstack([*lagrange, with_roots(points)]),
        kernel=values(taps) / np.append(scales, 1.0)[:, None],
        output=values(outputs).T,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def winograd_conv(
    x: Float[Array, "B H W C"], kernel: Float[Array, "R R C D"], padding: int
) -> Float32[Array, "B H+2*{padding}-R+1 W+2*{padding}-R+1 D"]:
    """Convolution with stride 1, computed in float32 for any dtypes of x and kernel.

    The relative root mean square error of the outputs is about 4e-6, against 4e-7 for the direct
    sum.

    Args:
      kernel: R is at most MAX_TAPS.
      padding: zeros on each side.
    """
    tilings = _tilings(x, kernel, padding)
    kernels = _of_kernel(kernel, tilings)

    def convolve_part(x: Array) -> Array:
        products = jnp.einsum("jibtuc,jicd->jibtud", _of_inputs(x, tilings, padding), kernels)
        return _outputs(products, tilings)

    return _map_parts(convolve_part, x)


def _forward(x: Array, kernel: Array, padding: int) -> tuple[Array, tuple[Array, Array]]:
    return winograd_conv(x, kernel, padding), (x, kernel)


def _backward(padding: int, saved: tuple[Array, Array], dy: Array) -> tuple[Array, Array]:
    x, kernel = saved
    tilings = _tilings(x, kernel, padding)

    def products_of_part(x: Array, dy: Array) -> Array:
        return jnp.einsum(
            "jibtuc,jibtud->jicd",
            _of_inputs(x, tilings, padding),
            _of_output_gradients(dy, tilings),
        )

    products = _sum_parts(products_of_part, x, dy)
    d_kernel = _kernel_gradient(products, tilings).astype(kernel.dtype)
    turned = kernel[::-1, ::-1].swapaxes(2, 3)
    dx = winograd_conv(dy, turned, kernel.shape[0] - 1 - padding).astype(x.dtype)
    return dx, d_kernel


winograd_conv.defvjp(_forward, _backward)

# For rows, with products i and tiles t, and for columns, with products j and tiles u.
Tilings = tuple[Tiling, Tiling]


def _tilings(x: Array, kernel: Array, padding: int) -> Tilings:
    taps = kernel.shape[0]
    rows, columns = (tiling(length + 2 * padding - taps + 1, taps) for length in x.shape[1:3])
    return rows, columns


def _map_parts(function: Callable[[Array], Array], x: Array) -> Array:
    """Returns function(x), computed for PART images at a time to bound its memory."""
    parts, rest = _parts(x.shape[0])
    if parts <= MAX_UNROLLED:
        return jnp.concatenate([function(part) for part in _consecutive(x, parts)])
    split = _split(x, parts)

    def compute_part(part: Array, y: Array) -> Array:
        updated: Array = jax.lax.dynamic_update_index_in_dim(
            y, function(_part(split, part)), part, 1
        )
        return updated

    of_part = jax.eval_shape(lambda: function(_part(split, 0)))
    empty = jnp.zeros((PART, parts, *of_part.shape[1:]), of_part.dtype)
    y = jax.lax.fori_loop(0, parts, compute_part, empty)
    y = y.reshape(-1, *y.shape[2:])
    return jnp.concatenate([y, function(x[-rest:])]) if rest else y


def _sum_parts(function: Callable[[Array, Array], Array], x: Array, y: Array) -> Array:
    """Returns function(x, y), a sum over images, computed for PART images at a time."""
    parts, rest = _parts(x.shape[0])
    if parts <= MAX_UNROLLED:
        of_parts = map(function, _consecutive(x, parts), _consecutive(y, parts))
        return functools.reduce(jnp.add, of_parts)
    xs, ys = _split(x, parts), _split(y, parts)

    def add_part(part: Array, total: Array) -> Array:
        return total + function(_part(xs, part), _part(ys, part))

    total: Array = jax.lax.fori_loop(1, parts, add_part, function(_part(xs, 0), _part(ys, 0)))
    return total + function(x[-rest:], y[-rest:]) if rest else total


def _consecutive(x: Array, parts: int) -> list[Array]:
    """Returns PART consecutive images each; all at once if `parts` is 0."""
    if parts == 0:
        return [x]
    return [x[first : first + PART] for first in range(0, x.shape[0], PART)]


def _parts(batch: int) -> tuple[int, int]:
    """Returns the number of whole parts and of images left over.

    There are none in a program that is exported for every batch size, which processes the batch
    at once.
    """
    if jax.export.is_symbolic_dim(batch) or batch <= PART:
        return 0, 0
    return divmod(batch, PART)


def _split(x: Array, parts: int) -> Array:
    """Reshapes [B, …] to [PART, parts, …]. Part i is x[:, i], every parts-th image.

    Consecutive images as parts would be on one device each where the batch is sharded, so that the
    devices would take turns. This way each part is sharded as the batch is. It is a loop of the
    compiled program rather than of Python because every backend traces this code, also with a
    pod's 32,768 images.
    """
    return x[: PART * parts].reshape(PART, parts, *x.shape[1:])


def _part(split: Array, part: Array | int) -> Array:
    taken: Array = jax.lax.dynamic_index_in_dim(split, part, 1, keepdims=False)
    return taken


def _of_inputs(
    x: Float[Array, "B H W C"], tilings: Tilings, padding: int
) -> Float32[Array, "j i B t u C"]:
    rows, columns = tilings
    return _cut(_cut(x, rows, rows.input, 1, padding), columns, columns.input, 3, padding)


def _of_output_gradients(
    dy: Float[Array, "B height width D"], tilings: Tilings
) -> Float32[Array, "j i B t u D"]:
    rows, columns = tilings
    return _cut(_cut(dy, rows, rows.output.T, 1), columns, columns.output.T, 3)


def _of_kernel(kernel: Float[Array, "R R C D"], tilings: Tilings) -> Float32[Array, "j i C D"]:
    rows, columns = tilings
    return _combine(columns.kernel, _combine(rows.kernel, kernel).swapaxes(0, 1))


def _kernel_gradient(
    products: Float32[Array, "j i C D"], tilings: Tilings
) -> Float32[Array, "R R C D"]:
    rows, columns = tilings
    return _combine(rows.kernel.T, _combine(columns.kernel.T, products).swapaxes(0, 1))


def _outputs(
    products: Float32[Array, "j i B t u D"], tilings: Tilings
) -> Float32[Array, "B height width D"]:
    rows, columns = tilings
    y = _combine(rows.output, _combine(columns.output, products, axis=4), axis=2)
    y = y.reshape(y.shape[0], rows.tiles * rows.outputs, columns.tiles * columns.outputs, -1)
    return y[:, : rows.length, : columns.length]


def _cut(x: Array, tiling: Tiling, matrix: np.ndarray, axis: int, before: int = 0) -> Array:
    """Multiplies each tile along an axis by `matrix`, whose rows become a new first axis."""
    stride, length = tiling.outputs, matrix.shape[1]
    first_of_last = stride * (tiling.tiles - 1)
    pad = [(0, 0)] * x.ndim
    pad[axis] = (before, first_of_last + length - before - x.shape[axis])
    x = jnp.pad(x, pad)
    ends = [i + first_of_last + 1 for i in range(length)]
    return _combine(
        matrix, [jax.lax.slice_in_dim(x, i, end, stride, axis) for i, end in enumerate(ends)]
    )


def _combine(matrix: np.ndarray, parts: Sequence[Array] | Array, axis: int = 0) -> Array:
    """Returns matrix @ parts in float32, as sums without the zero terms, on a new axis."""
    parts = [part.astype(jnp.promote_types(part.dtype, jnp.float32)) for part in parts]
    sums = [
        sum(float(factor) * part for factor, part in zip(row, parts, strict=True) if factor)
        for row in matrix
    ]
    return jnp.stack(sums, axis)


# ------------------------------------------------------------------------------------------
# Matrix product
# ------------------------------------------------------------------------------------------


def dense(x: Float[Array, "B D"], kernel: Float[Array, "D E"]) -> Float[Array, "B E"]:
    """Matrix product in the kernel's dtype, returned in x's dtype."""
    y = jnp.matmul(*_gradients_in_turn(x.astype(kernel.dtype), kernel))
    return y.astype(x.dtype)


@jax.custom_vjp
def _gradients_in_turn(x: Array, kernel: Array) -> tuple[Array, Array]:
    """Returns its arguments, and orders their gradients: the kernel's waits for x's.

    x's gradient is the last reader of the kernel, so the optimizer can then update the kernel in
    place. Otherwise XLA's CPU backend copies it first. `optimization_barrier` does not help: XLA
    removes it before it decides. Only a data dependency makes the update wait.
    """
    return x, kernel


def _in_turn_backward(_: None, gradients: tuple[Array, Array]) -> tuple[Array, Array]:
    dx, d_kernel = gradients
    return dx, d_kernel + 0.0 * dx[(0,) * dx.ndim]


_gradients_in_turn.defvjp(lambda x, kernel: ((x, kernel), None), _in_turn_backward)


# ------------------------------------------------------------------------------------------
# Max pooling, 3×3 with stride 2
# ------------------------------------------------------------------------------------------


def max_pool(
    x: Float[Array, "B H W C"], pads: Sequence[tuple[int, int]]
) -> Float[Array, "B height width C"]:
    """Max pooling of 3×3 windows with stride 2, first along rows and then along columns.

    Args:
      pads: padding of rows and columns, at the end only.
    """
    filled = jnp.pad(x.astype(wide(x)), [(0, 0), *pads, (0, 0)], constant_values=-jnp.inf)
    # Rows and columns that no window reaches, where the number of windows rounds down.
    height, width = (length - (length - 3) % 2 for length in filled.shape[1:3])
    return _pool_whole_windows(filled[:, :height, :width]).astype(x.dtype)


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
    """Returns the first, second and third elements of all windows along an axis."""
    end = x.shape[axis] - 2
    return [jax.lax.slice_in_dim(x, i, end + i, 2, axis) for i in range(3)]


def _pool_axis(x: Array, axis: int) -> Array:
    return functools.reduce(jnp.maximum, _of_windows(x, axis))


def _unpool_axis(x: Array, y: Array, dy: Array, axis: int) -> Array:
    """Sends each window's gradient to the first of its elements that equals the maximum.

    An even element is the first of one window and the third of the window before it.
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


def wide(x: Array) -> Any:
    """Returns the dtype to compute in: float32, or x's if that is wider."""
    return jnp.promote_types(x.dtype, jnp.float32)
