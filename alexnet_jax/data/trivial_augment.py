"""TrivialAugment: one random operation of random strength for each image.

Müller and Hutter 2021 (arXiv 2103.10158), with the operations and strengths that torchvision calls
TrivialAugmentWide. `tests/test_trivial_augment.py` compares each with torchvision's.

Which operation an image gets is known only on the device, and `jax.vmap` computes all of them for
each image. So the five geometric ones share a single look-up of pixels, all others are one pass
over the pixels, and what is kept in between has 8 bits.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, UInt8

Pixels = Float32[jax.Array, "S S 3"]  # whole numbers from 0 to 255
Bytes = UInt8[jax.Array, "S S 3"]

MAX_SHIFT = 32  # pixels, whatever the size of the image, as in torchvision
MAX_SHEAR = 0.99
MAX_ANGLE = np.deg2rad(135.0)
GRAY = np.array([0.2989, 0.587, 0.114], np.float32)  # luma of ITU-R BT.601
SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]], np.float32) / 13


def trivial_augment(image: Pixels, key: jax.Array) -> Pixels:
    """Applies a random operation of OPERATIONS, of a random one of 31 strengths.

    Args:
      image: rounded to whole numbers first.
      key: decides about the operation, the strength and the direction.
    """
    operation, strength, direction = jax.random.split(key, 3)
    sign = jnp.where(jax.random.bernoulli(direction), 1.0, -1.0)
    return apply(
        jnp.rint(image).astype(jnp.uint8),
        jax.random.randint(operation, (), 0, len(OPERATIONS)),
        jax.random.randint(strength, (), 0, 31) / 30,
        sign,
    )


def apply(
    image: Bytes, operation: jax.Array | int, strength: jax.Array | float, sign: jax.Array | float
) -> Pixels:
    """Applies one operation.

    Args:
      operation: index into OPERATIONS.
      strength: from 0 to 1.
      sign: 1 or -1, for the operations that have a direction.
    """
    amount = jnp.asarray(sign * strength, jnp.float32)
    pixels = _warp(image, jnp.asarray(operation), amount).astype(jnp.float32)
    changed: jax.Array = jax.lax.switch(
        operation, list(OPERATIONS.values()), pixels, jnp.asarray(strength, jnp.float32), amount
    )
    # torchvision cuts off fractions, since it converts to uint8.
    return jnp.floor(jnp.clip(changed, 0, 255))


# ------------------------------------------------------------------------------------------
# Geometry
# ------------------------------------------------------------------------------------------


def _warp(image: Bytes, operation: jax.Array, amount: jax.Array) -> Bytes:
    """Shears, shifts or rotates the image: each pixel is copied from the nearest old one.

    Black comes in where the image ends. Other operations leave the image as it is.
    """
    size = image.shape[0]
    is_one = {name: operation == list(OPERATIONS).index(name) for name in GEOMETRIC}
    shear = MAX_SHEAR * amount
    shift = jnp.trunc(MAX_SHIFT * amount)
    angle = jnp.where(is_one["rotate"], MAX_ANGLE * amount, 0.0)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    # Where the pixel (x, y) comes from, measured from the point that stays where it is.
    center = jnp.where(is_one["rotate"], size / 2, 0.0)
    x = jnp.arange(size) + 0.5 - center
    y = x[:, None]
    old_x = cos * x - sin * y + jnp.where(is_one["shear_x"], shear, 0.0) * y
    old_y = sin * x + cos * y + jnp.where(is_one["shear_y"], shear, 0.0) * x
    old_x -= jnp.where(is_one["translate_x"], shift, 0.0)
    old_y -= jnp.where(is_one["translate_y"], shift, 0.0)
    column, row = (jnp.rint(old + center - 0.5).astype(jnp.int32) for old in (old_x, old_y))
    is_inside = (column >= 0) & (column < size) & (row >= 0) & (row < size)
    found = jnp.take(image.reshape(-1, 3), row * size + column, axis=0, mode="clip")
    return jnp.where(is_inside[..., None], found, 0)


# ------------------------------------------------------------------------------------------
# Colors
# ------------------------------------------------------------------------------------------


def _same(image: Pixels, strength: jax.Array, amount: jax.Array) -> Pixels:
    return image


def _brightness(image: Pixels, strength: jax.Array, amount: jax.Array) -> Pixels:
    return _blend(image, jnp.zeros(()), amount)


def _color(image: Pixels, strength: jax.Array, amount: jax.Array) -> Pixels:
    return _blend(image, _gray(image)[..., None], amount)


def _contrast(image: Pixels, strength: jax.Array, amount: jax.Array) -> Pixels:
    return _blend(image, _gray(image).mean(), amount)


def _sharpness(image: Pixels, strength: jax.Array, amount: jax.Array) -> Pixels:
    size = image.shape[0]
    inner = sum(
        SMOOTH[i, j] * image[i : size - 2 + i, j : size - 2 + j] for i in range(3) for j in range(3)
    )
    place = jnp.arange(size)
    is_inner = (place > 0) & (place < size - 1)
    is_inner = (is_inner[:, None] & is_inner)[..., None]
    # torchvision leaves the border as it is.
    smooth = jnp.where(is_inner, jnp.pad(jnp.rint(inner), ((1, 1), (1, 1), (0, 0))), image)
    return _blend(image, smooth, amount)


def _posterize(image: Pixels, strength: jax.Array, amount: jax.Array) -> Pixels:
    lost = jnp.rint(6 * strength)  # of the 8 bits
    return jnp.floor(image / 2**lost) * 2**lost


def _solarize(image: Pixels, strength: jax.Array, amount: jax.Array) -> Pixels:
    return jnp.where(image >= 255 * (1 - strength), 255 - image, image)


def _autocontrast(image: Pixels, strength: jax.Array, amount: jax.Array) -> Pixels:
    low, high = image.min(axis=(0, 1)), image.max(axis=(0, 1))
    return jnp.where(high > low, (image - low) * (255 / jnp.maximum(high - low, 1)), image)


def _equalize(image: Pixels, strength: jax.Array, amount: jax.Array) -> Pixels:
    counts = _histograms(image)
    up_to = jnp.cumsum(counts, axis=1)
    # All but the pixels of the brightest value are spread over 255 steps.
    brightest = 255 - jnp.argmax(counts[:, ::-1] > 0, axis=1)
    step = (image.shape[0] ** 2 - counts[jnp.arange(3), brightest]) // 255
    below = up_to - counts
    table = (below + step[:, None] // 2) // jnp.maximum(step, 1)[:, None]
    table = jnp.where(step[:, None] > 0, jnp.clip(table, 0, 255), jnp.arange(256))
    found: jax.Array = jax.lax.platform_dependent(
        image.astype(jnp.int32), table, tpu=_entries_by_products, default=_entries_by_index
    )
    return found


def _blend(image: Pixels, other: jax.Array, amount: jax.Array) -> Pixels:
    """Moves away from another image, or toward it if the amount is negative."""
    factor = 1 + 0.99 * amount
    return factor * image + (1 - factor) * other


def _gray(image: Pixels) -> Float32[jax.Array, "S S"]:
    return jnp.floor((image * GRAY).sum(axis=-1))


def _histograms(image: Pixels) -> Int32[jax.Array, "3 256"]:
    """Returns how often each channel has each value."""
    values = image.reshape(-1, 3).astype(jnp.int32)
    found: jax.Array = jax.lax.platform_dependent(
        values, cpu=_count_one_by_one, tpu=_count_by_products, default=_count_by_comparing
    )
    return found


def _count_one_by_one(values: Int32[jax.Array, "P 3"]) -> Int32[jax.Array, "3 256"]:
    counts = jnp.zeros((3, 256), jnp.int32)
    return counts.at[jnp.arange(3), values].add(1)


def _count_by_comparing(values: Int32[jax.Array, "P 3"]) -> Int32[jax.Array, "3 256"]:
    """Compares each pixel with all values, since accelerators would add up one by one slowly."""
    return (values[:, :, None] == jnp.arange(256)).sum(axis=0, dtype=jnp.int32)


def _count_by_products(values: Int32[jax.Array, "P 3"]) -> Int32[jax.Array, "3 256"]:
    """Counts pairs of digits, which takes a fifteenth of the cycles of comparing on a TPU."""
    high, low = _digits(values)
    counts = jnp.einsum("khp,klp->khl", high, low, preferred_element_type=jnp.float32)
    return counts.reshape(3, 256).astype(jnp.int32)


def _entries_by_index(
    values: Int32[jax.Array, "S S 3"], table: Int32[jax.Array, "3 256"]
) -> Float32[jax.Array, "S S 3"]:
    """Replaces each value by the entry of its channel's table."""
    return jnp.take(table.reshape(-1), values + 256 * jnp.arange(3)).astype(jnp.float32)


def _entries_by_products(
    values: Int32[jax.Array, "S S 3"], table: Int32[jax.Array, "3 256"]
) -> Float32[jax.Array, "S S 3"]:
    """The same on a TPU, which looks up one by one: the first digit picks 16 entries of a table."""
    high, low = _digits(values.reshape(-1, 3))
    entries = jnp.einsum("khl,khp->klp", table.reshape(3, 16, 16).astype(jnp.bfloat16), high)
    return (entries * low).sum(axis=1).T.reshape(values.shape).astype(jnp.float32)


def _digits(values: Int32[jax.Array, "P 3"]) -> tuple[jax.Array, jax.Array]:
    """Returns where each of the two hexadecimal digits has each value, bfloat16[3, 16, P].

    bfloat16 holds whole numbers up to 256, and of all terms of a sum here one is not zero.
    """
    digits = jnp.arange(16)[:, None]
    high, low = (digit.T[:, None] == digits for digit in (values // 16, values % 16))
    return high.astype(jnp.bfloat16), low.astype(jnp.bfloat16)


GEOMETRIC = ("shear_x", "shear_y", "translate_x", "translate_y", "rotate")
# The geometric ones are done before, by `_warp`.
OPERATIONS: dict[str, Callable[[Pixels, jax.Array, jax.Array], Pixels]] = {
    "identity": _same,
    **dict.fromkeys(GEOMETRIC, _same),
    "brightness": _brightness,
    "color": _color,
    "contrast": _contrast,
    "sharpness": _sharpness,
    "posterize": _posterize,
    "solarize": _solarize,
    "autocontrast": _autocontrast,
    "equalize": _equalize,
}
