"""What happens to the pixels inside the jitted step: crop, flip, colour noise, mean, ten views.

Sources: the 2012 paper, section 4.1, and run #145 of its authors' released program, which did
some things otherwise (`configs/imagenet_2012.py` lists them). The inception crop is that of Szegedy
et al. 2014 (arXiv 1409.4842, section 6), resized as Pillow resizes.
"""

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32, Int32, Shaped, UInt8
from ml_collections import ConfigDict

from alexnet_jax.utils.errors import UserError

if TYPE_CHECKING:
    from alexnet_jax.data.store import Store

TEN_VIEWS = 10
BOX_DRAWS = 10


class Statistics(NamedTuple):
    """What the augmentation knows of the train split.

    Attributes:
      mean: in pixel values 0 to 255.
      noise_basis: its columns are the RGB eigenvectors, scaled.
    """

    mean: Float32[np.ndarray, "S S 3"] | Float32[np.ndarray, " 3"]
    noise_basis: Float32[np.ndarray, "3 3"]


def statistics(store: "Store", config: ConfigDict) -> Statistics:
    """Returns the train store's mean and scaled colour eigenvectors, as `config.augment` asks.

    The paper scales the eigenvectors by the eigenvalues. That is a usable amount of noise only
    where pixels run from 0 to 1, so the eigenvalues are taken of such pixels and the noise is
    scaled back to 0 to 255. Run #145 scaled by the standard deviations, the eigenvalues' roots.

    Raises UserError if a field of `config.augment` has a value that does not exist.
    """
    check(config)
    mean = store.mean_channel if config.augment.mean == "channel" else store.mean_image
    scales = {
        "eigenvalue": np.asarray(store.eigenvalues) / 255.0,
        "std": np.sqrt(np.maximum(store.eigenvalues, 0.0)),
    }[config.augment.color_noise_scale]
    return Statistics(
        mean=np.asarray(mean, np.float32),
        noise_basis=np.asarray(store.eigenvectors * scales, np.float32),
    )


def check(config: ConfigDict) -> None:
    """Raises UserError if a field of `config.augment` has a value that does not exist."""
    for field, values in {
        "crop": ("random", "inception"),
        "mean": ("image", "image_center", "channel"),
        "color_noise_scale": ("eigenvalue", "std"),
    }.items():
        if config.augment[field] not in values:
            raise UserError(
                f"augment.{field}={config.augment[field]!r}; it can be {', '.join(values)}"
            )
    if config.eval.views not in ("center", "ten"):
        raise UserError(f"eval.views={config.eval.views!r}; it can be center or ten")
    if not 0 < config.augment.crop_size <= config.image_size:
        raise UserError(
            f"augment.crop_size={config.augment.crop_size} must lie between 1 and "
            f"image_size={config.image_size}"
        )
    scales = config.augment.channel_scale
    if len(scales) != 3 or not all(isinstance(s, int | float) and s > 0 for s in scales):
        raise UserError(f"augment.channel_scale={scales} must be three numbers above 0")
    _check_range("crop_area", config.augment.crop_area, 1.0, "0 < low <= high <= 1")
    _check_range("crop_aspect", config.augment.crop_aspect, np.inf, "0 < low <= high")


def scale(config: ConfigDict) -> Float32[np.ndarray, " 3"]:
    """Returns what multiplies the mean-subtracted pixels, for each channel."""
    fields = config.augment
    return np.float32(fields.pixel_scale) * np.asarray(fields.channel_scale, np.float32)


def _check_range(field: str, values: Sequence[Any], most: float, told: str) -> None:
    numbers = len(values) == 2 and all(isinstance(value, int | float) for value in values)
    if not (numbers and 0 < values[0] <= values[1] <= most):
        raise UserError(f"augment.{field}={values} must be two numbers (low, high), {told}")


def augment(
    images: UInt8[jax.Array, "B S S 3"],
    keys: jax.Array,
    color_noise: Float32[jax.Array, ""],
    stats: Statistics,
    config: ConfigDict,
) -> Float32[jax.Array, "B crop_size crop_size 3"]:
    """Crops, flips and colours a training batch at random and subtracts the mean.

    Args:
      keys: one random key for each image, so that an image's fate does not depend on which
        device or which place of the batch it comes to.
      color_noise: the standard deviation of the paper's alpha.
    """
    fields = config.augment

    def augment_one(image: jax.Array, key: jax.Array) -> jax.Array:
        crop_key, flip_key, noise_key = jax.random.split(key, 3)
        crop = _drawn_crop(crop_key, config)
        flip = fields.flip & jax.random.bernoulli(flip_key)
        image = image.astype(jnp.float32)
        image = crop(image - stats.mean if fields.mean == "image" else image)
        image = jnp.where(flip, image[:, ::-1], image)
        if fields.mean != "image":
            image = image - _central_mean(stats, fields.crop_size)
        alpha = color_noise * jax.random.normal(noise_key, (3,))
        image = image + stats.noise_basis @ alpha
        if fields.color_noise_shrink:
            image = image / (1.0 + color_noise)
        return image * scale(config)

    return jax.vmap(augment_one)(images, keys)


def inception_box(
    key: jax.Array, size: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Int32[jax.Array, " 4"]:
    """Draws the part of a size×size image that an inception crop shows.

    As torchvision's RandomResizedCrop does: the first of ten draws that fits into the image, else
    the largest box of the aspect nearest to the image's own, which is the whole image wherever
    `aspect` includes 1.

    Args:
      area: least and largest share of the image's area; uniform between them.
      aspect: least and largest width over height; its logarithm is uniform between theirs.

    Returns top, left, height and width in pixels.
    """
    area_key, aspect_key, offset_key = jax.random.split(key, 3)
    low, high = np.log(aspect)
    shares = jax.random.uniform(area_key, (BOX_DRAWS,), minval=area[0], maxval=area[1])
    logs = jax.random.uniform(aspect_key, (BOX_DRAWS,), minval=low, maxval=high)
    drawn = jnp.round(size * jnp.sqrt(shares) * jnp.exp(jnp.stack([-logs, logs]) / 2))
    fits = ((drawn >= 1) & (drawn <= size)).all(axis=0)
    nearest = np.clip(1.0, *aspect)
    largest = np.maximum(1, np.round(size * np.minimum(1, [1 / nearest, nearest])))
    sides = jnp.where(fits.any(), drawn[:, jnp.argmax(fits)], largest).astype(jnp.int32)
    offset = jax.random.randint(offset_key, (2,), 0, size - sides + 1)
    return jnp.concatenate([offset, sides])


def center_crop(
    images: UInt8[jax.Array, "B S S 3"], stats: Statistics, config: ConfigDict
) -> Float32[jax.Array, "B crop_size crop_size 3"]:
    """Returns the images' mean-subtracted centres."""
    border = config.image_size - config.augment.crop_size
    return _view(images, border // 2, border // 2, stats, config)


def center_window(
    image: Shaped[np.ndarray, "S S ..."], size: int
) -> Shaped[np.ndarray, "{size} {size} ..."]:
    """Returns the part of an image that `center_crop` keeps."""
    start = (len(image) - size) // 2
    return image[start : start + size, start : start + size]


def ten_views(
    images: UInt8[jax.Array, "B S S 3"], stats: Statistics, config: ConfigDict
) -> Float32[jax.Array, "10 B crop_size crop_size 3"]:
    """Returns the paper's test views.

    Top left, top right, centre, bottom left, bottom right, then the same five mirrored
    (section 4.1; the order is the released program's).
    """
    end = config.image_size - config.augment.crop_size
    corners = [(0, 0), (0, end), (end // 2, end // 2), (end, 0), (end, end)]
    views = jnp.stack([_view(images, y, x, stats, config) for y, x in corners])
    return jnp.concatenate([views, views[..., ::-1, :]])


def _view(images: jax.Array, y: int, x: int, stats: Statistics, config: ConfigDict) -> jax.Array:
    size = config.augment.crop_size
    view = images[:, y : y + size, x : x + size].astype(jnp.float32)
    if config.augment.mean == "image":
        view = view - stats.mean[y : y + size, x : x + size]
    else:
        view = view - _central_mean(stats, size)
    return view * scale(config)


def _drawn_crop(key: jax.Array, config: ConfigDict) -> Callable[[jax.Array], jax.Array]:
    """Draws a crop as `config.augment` asks and returns what takes it out of float32[S, S, 3]."""
    fields = config.augment
    if fields.crop == "inception":
        box = inception_box(key, config.image_size, fields.crop_area, fields.crop_aspect)
        return lambda image: _resized(image, box, fields.crop_size)
    offset = jax.random.randint(key, (2,), 0, config.image_size - fields.crop_size + 1)
    return lambda image: _crop(image, offset, fields.crop_size)


def _resized(
    image: Float32[jax.Array, "S S 3"], box: Int32[jax.Array, " 4"], size: int
) -> Float32[jax.Array, "{size} {size} 3"]:
    """Resizes the box of an image by Pillow's BILINEAR."""
    top, left, height, width = box
    rows = _resize_weights(top, height, image.shape[0], size)
    columns = _resize_weights(left, width, image.shape[1], size)
    # By default accelerators would round the pixels to bfloat16 or TF32.
    exact = jax.lax.Precision.HIGHEST
    return jnp.einsum("iy,yxc,jx->ijc", rows, image, columns, precision=exact)


def _resize_weights(
    start: jax.Array, length: jax.Array, stored: int, size: int
) -> Float32[jax.Array, "{size} {stored}"]:
    """Returns the matrix that resizes an axis's pixels [start, start + length).

    A pixel's weight falls linearly with its distance from the new pixel's centre, to zero at one
    pixel, old or new, whichever is larger; each row sums to 1. Distances are in whole units of
    1 / (2 size) old pixels, so that none is rounded.
    """
    pixels = 2 * (jnp.arange(stored) - start) + 1
    centers = (2 * jnp.arange(size) + 1) * length
    distances = jnp.abs(size * pixels - centers[:, None])
    in_box = (pixels > 0) & (pixels < 2 * length)
    weights = jnp.where(in_box, jnp.maximum(2 * jnp.maximum(length, size) - distances, 0), 0)
    return weights / weights.sum(axis=1, keepdims=True)


def _crop(image: jax.Array, offset: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (size, size, image.shape[-1]))


def _central_mean(stats: Statistics, size: int) -> np.ndarray:
    """Run #145 took the mean image's central window whatever the crop's offset."""
    return stats.mean if stats.mean.ndim == 1 else center_window(stats.mean, size)
