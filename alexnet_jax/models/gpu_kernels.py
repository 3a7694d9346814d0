"""Max pooling for XLA's GPU backend, whose own gradient of it is slow.

XLA would keep the place of each window's maximum in four int32 arrays, and add gradients up by
atomic operations. Here the forward pass keeps one byte per window. The backward pass is one kernel
in which each element collects the gradients of the windows that it won, at most four. It does not
need the values that were pooled, so they are not stored.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array
from jaxtyping import Float, UInt8

SIZE, STRIDE = 3, 2
PLACES = tuple(itertools.product(range(SIZE), repeat=2))  # rows and columns within a window
NO_WINDOW = 255  # is no place


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def max_pool(
    x: Float[Array, "B H W C"], pads: Sequence[tuple[int, int]]
) -> Float[Array, "B height width C"]:
    """Max pooling of 3×3 windows with stride 2.

    Args:
      pads: padding of rows and columns, at the end only.
    """
    return functools.reduce(jnp.maximum, _elements(x, pads))


def _forward(
    x: Array, pads: Sequence[tuple[int, int]]
) -> tuple[Array, tuple[UInt8[Array, "B height width C"], tuple[int, ...]]]:
    largest, *others = _elements(x, pads)
    place = jnp.zeros(largest.shape, jnp.uint8)
    for (row, column), element in zip(PLACES[1:], others, strict=True):
        # Of equal elements the first one wins, as in XLA.
        place = jnp.where(element > largest, jnp.uint8(_code(row, column)), place)
        largest = jnp.maximum(largest, element)
    return largest, (place, x.shape[1:3])


def _backward(
    pads: Sequence[tuple[int, int]], saved: tuple[Array, tuple[int, ...]], dy: Array
) -> tuple[Array]:
    place, lengths = saved
    rows, columns = (jnp.arange(length) % STRIDE for length in lengths)

    def sent_by(above: int, before: int) -> Array:
        """The gradient from the window that starts `above` strides above and `before` to the left.

        An even row is the first of one window and the last of the window above it.
        """
        code = _code(rows[:, None] + STRIDE * above, columns + STRIDE * before)
        won = _of_window(place, lengths, above, before, NO_WINDOW) == code[:, :, None]
        return jnp.where(won, _of_window(dy, lengths, above, before, 0), 0)

    windows = itertools.product(range(STRIDE), repeat=2)
    return (functools.reduce(jnp.add, (sent_by(*window) for window in windows)),)


max_pool.defvjp(_forward, _backward)


def _code(row: Any, column: Any) -> Any:
    """The byte that stands for a place. Rows and columns up to 3 have different ones."""
    return 4 * row + column


def _elements(x: Array, pads: Sequence[tuple[int, int]]) -> list[Array]:
    """Returns the elements of all windows, one array for each of PLACES."""
    x = jnp.pad(x, [(0, 0), *pads, (0, 0)], constant_values=-jnp.inf)
    ends = [length - SIZE + 1 for length in x.shape[1:3]]
    return [
        x[:, row : row + ends[0] : STRIDE, column : column + ends[1] : STRIDE]
        for row, column in PLACES
    ]


def _of_window(
    y: Array, lengths: tuple[int, ...], above: int, before: int, nothing: int
) -> Float[Array, "B H W C"]:
    """Returns y of one of each element's windows, `nothing` where there is no such window."""
    counts = [-(-length // STRIDE) for length in lengths]
    shifts = [
        (shift, count - length - shift, 0)
        for shift, count, length in zip((above, before), counts, y.shape[1:3], strict=True)
    ]
    y = jax.lax.pad(y, jnp.asarray(nothing, y.dtype), [(0, 0, 0), *shifts, (0, 0, 0)])
    # Repeats rows and columns. XLA computes a broadcast inside of the kernel that needs it.
    batch, height, width, channels = y.shape
    repeated = (batch, height, STRIDE, width, STRIDE, channels)
    y = jnp.broadcast_to(y[:, :, None, :, None], repeated)
    y = y.reshape(batch, height * STRIDE, width * STRIDE, channels)
    return y[:, : lengths[0], : lengths[1]]
