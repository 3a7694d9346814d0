"""What happens to the pixels inside the jitted step: crop, flip, colour noise, mean, ten views.

Sources: the 2012 paper, section 4.1, and run #145 of its authors' released program, which did
some things otherwise (`configs/imagenet_2012.py` lists them).
"""

from typing import TYPE_CHECKING, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from ml_collections import ConfigDict

from alexnet_jax.errors import UserError

if TYPE_CHECKING:
    from alexnet_jax.store import Store

TEN_VIEWS = 10


class Statistics(NamedTuple):
    """What the augmentation knows of the train split.

    Attributes:
      mean: float32[S, S, 3] or float32[3], in pixel values 0 to 255.
      noise_basis: float32[3, 3]; its columns are the RGB eigenvectors, scaled.
    """

    mean: np.ndarray
    noise_basis: np.ndarray


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


def augment(
    images: jax.Array,
    keys: jax.Array,
    color_noise: jax.Array,
    stats: Statistics,
    config: ConfigDict,
) -> jax.Array:
    """Crops, flips and colours a training batch at random and subtracts the mean.

    Args:
      images: uint8[B, S, S, 3].
      keys: one random key for each image, so that an image's fate does not depend on which
        device or which place of the batch it comes to.
      color_noise: float32[], the standard deviation of the paper's alpha.

    Returns float32[B, crop_size, crop_size, 3].
    """
    fields = config.augment
    border = config.image_size - fields.crop_size

    def augment_one(image: jax.Array, key: jax.Array) -> jax.Array:
        crop_key, flip_key, noise_key = jax.random.split(key, 3)
        offset = jax.random.randint(crop_key, (2,), 0, border + 1)
        flip = fields.flip & jax.random.bernoulli(flip_key)
        image = _crop(image, offset, fields.crop_size).astype(jnp.float32)
        if fields.mean == "image":
            image = image - _crop(stats.mean, offset, fields.crop_size)
            image = jnp.where(flip, image[:, ::-1], image)
        else:
            image = jnp.where(flip, image[:, ::-1], image) - _central_mean(stats, fields.crop_size)
        alpha = color_noise * jax.random.normal(noise_key, (3,))
        image = image + stats.noise_basis @ alpha
        if fields.color_noise_shrink:
            image = image / (1.0 + color_noise)
        return image * fields.pixel_scale

    return jax.vmap(augment_one)(images, keys)


def center_crop(images: jax.Array, stats: Statistics, config: ConfigDict) -> jax.Array:
    """Returns the mean-subtracted central float32[B, crop_size, crop_size, 3] of uint8 images."""
    border = config.image_size - config.augment.crop_size
    return _view(images, border // 2, border // 2, stats, config)


def ten_views(images: jax.Array, stats: Statistics, config: ConfigDict) -> jax.Array:
    """Returns the paper's test views of uint8[B, S, S, 3]: float32[10, B, crop, crop, 3].

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
    return view * config.augment.pixel_scale


def _crop(image: jax.Array, offset: jax.Array, size: int) -> jax.Array:
    return jax.lax.dynamic_slice(image, (offset[0], offset[1], 0), (size, size, image.shape[-1]))


def _central_mean(stats: Statistics, size: int) -> np.ndarray:
    """Run #145 took the mean image's central window whatever the crop's offset."""
    if stats.mean.ndim == 1:
        return stats.mean
    start = (stats.mean.shape[0] - size) // 2
    return stats.mean[start : start + size, start : start + size]
