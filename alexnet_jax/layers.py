"""Local response norms, Caffe's pooling and the paper's dropout: what Flax lacks."""

import math

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array


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


def max_pool(x: Array, *, size: int = 3, stride: int = 2) -> Array:
    """Overlapping max pooling; output sizes round up, windows are clipped at the edge (Caffe).

    Args:
      x: float[B, H, W, C].
    Returns:
      float[B, ceil((H - size) / stride) + 1, ceil((W - size) / stride) + 1, C].
    """
    padding = [ceil_padding(length, size, stride) for length in x.shape[1:3]]
    return nn.max_pool(x, (size, size), (stride, stride), padding)


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
