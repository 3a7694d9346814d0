"""What happens to the pixels inside the jitted step: crop, flip, color noise, mean, views.

The sources are the 2012 paper, §4.1, and run #145 of its authors' released program, which differs
in places (`configs/imagenet_2012.py` lists them). The inception crop is that of Szegedy et al. 2014
(arXiv 1409.4842, §6), resized as Pillow resizes.
"""

import functools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float32, Int32, Shaped, UInt8
from ml_collections import ConfigDict

from alexnet_jax.utils.errors import UserError

VIEWS = ("center", "nine", "ten")
BOX_DRAWS = 10  # attempts to draw an inception box, as in torchvision


class Statistics(NamedTuple):
    """What augmentation uses of the training images.

    Attributes:
      mean: mean image or mean RGB, in pixel values 0 to 255.
      noise_basis: RGB eigenvectors in the columns, scaled (see `statistics`).
    """

    mean: Float32[np.ndarray, "S S 3"] | Float32[np.ndarray, " 3"]
    noise_basis: Float32[np.ndarray, "3 3"]


def statistics(store: Any, config: ConfigDict) -> Statistics:
    """Returns the mean and the scaled color eigenvectors of a store, as `config.augment` asks.

    The paper scales the eigenvectors by the eigenvalues. That is a usable amount of noise only if
    pixels run from 0 to 1, so the eigenvalues of such pixels are used, and the noise is scaled
    back to 0 to 255. Run #145 scaled by the standard deviations, the eigenvalues' square roots.

    Args:
      store: a `data.store.Store` of the training split.
    """
    mean = store.mean_channel if config.augment.mean == "channel" else store.mean_image
    if config.augment.color_noise_scale == "eigenvalue":
        scales = np.asarray(store.eigenvalues) / 255.0
    else:
        scales = np.sqrt(np.maximum(store.eigenvalues, 0.0))
    return Statistics(
        mean=np.asarray(mean, np.float32),
        noise_basis=np.asarray(store.eigenvectors * scales, np.float32),
    )


@dataclass(frozen=True, eq=False)
class Augment:
    """The augmentation of a run: call it on a training batch; `views` is for evaluation.

    Attributes:
      fields: `config.augment`.
      image_size: S, of stored images, in pixels.
      eval_views: "center", "nine" or "ten", which `views` there are.
      stats: of the training images.
      dtype: in which the network computes. On TPU images may be rounded to it before the crop.
      noise_changes: (step, standard deviation) pairs, rising; each holds from its step on.
    """

    fields: ConfigDict
    image_size: int
    eval_views: str
    stats: Statistics
    dtype: str
    noise_changes: tuple[tuple[int, float], ...] = ()

    @property
    def crop_size(self) -> int:
        """Size of the network's input in pixels."""
        size: int = self.fields.crop_size
        return size

    @property
    def scale(self) -> Float32[np.ndarray, " 3"]:
        """Factor on the mean-subtracted pixels of each channel."""
        channels = np.asarray(self.fields.channel_scale, np.float32)
        return np.float32(self.fields.pixel_scale) * channels

    def color_noise(self, step: jax.Array | int) -> Float32[jax.Array, ""]:
        """Returns the standard deviation of the paper's α at a step."""
        value: Any = self.fields.color_noise
        for start, changed in self.noise_changes:
            value = jnp.where(step >= start, changed, value)
        return jnp.asarray(value, jnp.float32)

    def __call__(
        self, images: UInt8[jax.Array, "B S S 3"], keys: jax.Array, step: jax.Array | int = 0
    ) -> Float32[jax.Array, "B crop_size crop_size 3"]:
        """Crops, flips and recolors a training batch at random and subtracts the mean.

        Args:
          keys: a random key for each image. What happens to an image thus does not depend on the
            device or the place in the batch that it is given.
          step: decides about `color_noise`.
        """
        noise = self.color_noise(step)
        return jax.vmap(lambda image, key: self._augment_one(image, key, noise))(images, keys)

    def _augment_one(self, image: jax.Array, key: jax.Array, noise: jax.Array) -> jax.Array:
        crop_key, flip_key, noise_key = jax.random.split(key, 3)
        flip = self.fields.flip & jax.random.bernoulli(flip_key)
        image = image.astype(jnp.float32)

        # The paper subtracts the mean image before it crops, so that each pixel loses the mean of
        # its own place. Run #145 subtracts the center of the mean image from every crop instead,
        # after it may have flipped it.
        if self.fields.mean == "image":
            image = image - self.stats.mean
        image = self._random_crop(crop_key, flip, image)
        if self.fields.mean != "image":
            image = image - self.center_mean

        # §4.1: add Σ_i α_i λ_i p_i to every pixel, one draw of α ~ N(0, noise²) for each image.
        image = image + self.stats.noise_basis @ (noise * jax.random.normal(noise_key, (3,)))
        if self.fields.color_noise_shrink:
            image = image / (1.0 + noise)
        return image * self.scale

    def _random_crop(self, key: jax.Array, flip: jax.Array, image: jax.Array) -> jax.Array:
        fields, size = self.fields, self.fields.crop_size
        if fields.crop == "inception":
            box = inception_box(key, self.image_size, fields.crop_area, fields.crop_aspect)
            return resize(image, box, flip, size, self.dtype)
        offset = jax.random.randint(key, (2,), 0, self.image_size - size + 1)
        slices = functools.partial(_crop_by_slices, size=size)
        # bfloat16 holds pixels from 0 to 255, but not pixels minus a mean image.
        is_exact = fields.mean != "image" or self.dtype == "bfloat16"
        products = functools.partial(_crop_by_products, size=size) if is_exact else slices
        crop: jax.Array = jax.lax.platform_dependent(
            image, offset, flip, tpu=products, default=slices
        )
        return crop

    @property
    def views(self) -> Int32[np.ndarray, "V 3"]:
        """The top, the left and whether it is mirrored of each view that evaluation averages.

        The paper's ten views (§4.1) are top left, top right, center, bottom left, bottom right,
        then the same five mirrored; the order is that of the released program. Its networks for
        CIFAR-10 were tested with nine views: three by three, not mirrored.
        """
        end = self.image_size - self.crop_size
        offsets = (0, end // 2, end)
        grid = [(top, left) for top in offsets for left in offsets]
        places, mirrored = {
            "center": (grid[4:5], (0,)),
            "nine": (grid, (0,)),
            "ten": (grid[::2], (0, 1)),  # the corners and the center
        }[self.eval_views]
        return np.array([(*place, m) for m in mirrored for place in places], np.int32)

    def view(
        self, images: UInt8[jax.Array, "B S S 3"], place: Int32[jax.Array, " 3"]
    ) -> Float32[jax.Array, "B crop_size crop_size 3"]:
        """Returns one of the `views` of each image, the mean subtracted."""
        top, left, mirrored = place
        window = self._window(images, top, left)
        return jnp.where(mirrored == 1, window[:, :, ::-1], window)

    def center(
        self, images: UInt8[jax.Array, "B S S 3"]
    ) -> Float32[jax.Array, "B crop_size crop_size 3"]:
        """Returns the mean-subtracted center crops."""
        border = self.image_size - self.crop_size
        return self._window(images, border // 2, border // 2)

    def _window(self, images: jax.Array, y: jax.Array | int, x: jax.Array | int) -> jax.Array:
        shape = (self.crop_size, self.crop_size, 3)
        window = jax.lax.dynamic_slice(images, (0, y, x, 0), (images.shape[0], *shape))
        if self.fields.mean == "image":
            mean: Any = jax.lax.dynamic_slice(jnp.asarray(self.stats.mean), (y, x, 0), shape)
        else:
            mean = self.center_mean
        view: jax.Array = (window.astype(jnp.float32) - mean) * self.scale
        return view

    @property
    def center_mean(self) -> np.ndarray:
        """What is subtracted from a center crop: the mean image's own, or the channel means."""
        mean = self.stats.mean
        return mean if mean.ndim == 1 else center_window(mean, self.crop_size)


def make_augment(
    config: ConfigDict, statistics: Statistics | None = None, steps_per_epoch: float = math.inf
) -> Augment:
    """Returns the augmentation of a config.

    Args:
      statistics: of the training images; None for a mean of 0 and no color noise.
      steps_per_epoch: needed in training if `config.schedule.changes` changes the color noise.

    Raises:
      UserError: a field has a value that does not exist.
    """
    _check(config)
    if statistics is None:
        like_mean = (config.image_size,) * 2 + (3,) if config.augment.mean != "channel" else (3,)
        statistics = Statistics(np.zeros(like_mean, np.float32), np.zeros((3, 3), np.float32))
    changes = [
        (math.ceil(epoch * steps_per_epoch), value)
        for epoch, _, field, value in config.schedule.changes
        if field == "color_noise" and math.isfinite(steps_per_epoch)
    ]
    return Augment(
        config.augment,
        config.image_size,
        config.eval.views,
        statistics,
        config.model.dtype,
        tuple(changes),
    )


def _check(config: ConfigDict) -> None:
    for field, values in {
        "crop": ("random", "inception"),
        "mean": ("image", "image_center", "channel"),
        "color_noise_scale": ("eigenvalue", "std"),
    }.items():
        if config.augment[field] not in values:
            raise UserError(
                f"augment.{field}={config.augment[field]!r} does not exist; choose one of "
                f"{', '.join(values)}"
            )
    if config.eval.views not in VIEWS:
        raise UserError(
            f"eval.views={config.eval.views!r} does not exist; choose one of {', '.join(VIEWS)}"
        )
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


def _check_range(field: str, values: Sequence[Any], most: float, rule: str) -> None:
    numbers = len(values) == 2 and all(isinstance(value, int | float) for value in values)
    if not (numbers and 0 < values[0] <= values[1] <= most):
        raise UserError(f"augment.{field}={values} must be two numbers (low, high), {rule}")


def center_window(
    image: Shaped[np.ndarray, "S S ..."], size: int
) -> Shaped[np.ndarray, "{size} {size} ..."]:
    """Returns the part of a stored image that `Augment.center` keeps."""
    start = (len(image) - size) // 2
    return image[start : start + size, start : start + size]


# ------------------------------------------------------------------------------------------
# The random crop
# ------------------------------------------------------------------------------------------


def _crop_by_slices(
    image: Float32[jax.Array, "S S 3"],
    offset: Int32[jax.Array, " 2"],
    flip: Bool[jax.Array, ""],
    size: int,
) -> Float32[jax.Array, "{size} {size} 3"]:
    crop = jax.lax.dynamic_slice(image, (*offset, 0), (size, size, 3))
    return jnp.where(flip, crop[:, ::-1], crop)


def _crop_by_products(
    image: Float32[jax.Array, "S S 3"],
    offset: Int32[jax.Array, " 2"],
    flip: Bool[jax.Array, ""],
    size: int,
) -> Float32[jax.Array, "{size} {size} 3"]:
    """The same as two products with matrices of zeros and ones, in bfloat16.

    A TPU slices a batch at different offsets in a loop over its images, which takes as long as a
    third of the network. Each value is multiplied by 1 and added to zeros, so none is rounded
    except to bfloat16.
    """
    old, new = jnp.arange(len(image)), jnp.arange(size)
    rows = offset[0] + new[:, None] == old
    columns = offset[1] + _columns(flip, size)[:, None] == old
    rows, image, columns = (x.astype(jnp.bfloat16) for x in (rows, image, columns))
    return jnp.einsum("iy,yxc,jx->ijc", rows, image, columns).astype(jnp.float32)


# ------------------------------------------------------------------------------------------
# The inception crop
# ------------------------------------------------------------------------------------------


def inception_box(
    key: jax.Array, size: int, area: tuple[float, float], aspect: tuple[float, float]
) -> Int32[jax.Array, " 4"]:
    """Draws the part of a size×size image that an inception crop shows.

    As in torchvision's RandomResizedCrop, this is the first of ten draws that fits into the image.
    If none fits it is the largest box of the allowed aspect nearest to 1.

    Args:
      area: least and largest share of the image's area; uniform between them.
      aspect: least and largest width / height; log-uniform between them.

    Returns:
      Top, left, height and width in pixels.
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


def resize(
    image: Float32[jax.Array, "S S 3"],
    box: Int32[jax.Array, " 4"],
    flip: Bool[jax.Array, ""],
    size: int,
    dtype: str = "float32",
) -> Float32[jax.Array, "{size} {size} 3"]:
    """Resizes a box of an image as Pillow's BILINEAR does, and mirrors it if `flip`.

    Args:
      box: top, left, height and width in pixels.
      dtype: to which the result will be rounded. On TPU it determines how exact the sums are.
    """
    products = functools.partial(_resize_by_products, size=size, dtype=dtype)
    taps = functools.partial(_resize_by_taps, size=size)
    resized: jax.Array = jax.lax.platform_dependent(image, box, flip, tpu=products, default=taps)
    return resized


def _resize_by_taps(
    image: Float32[jax.Array, "S S 3"],
    box: Int32[jax.Array, " 4"],
    flip: Bool[jax.Array, ""],
    size: int,
) -> Float32[jax.Array, "{size} {size} 3"]:
    """Adds up the few pixels that make a new pixel. A GPU does this in one pass over a batch."""
    top, left, height, width = box
    count = math.ceil(2 * max(1, len(image) / size))  # most pixels within the reach of a weight
    for axis, start, length, new in (
        (1, left, width, _columns(flip, size)),
        (0, top, height, jnp.arange(size)),
    ):
        pixels, weights = _taps(start, length, new, count)
        weights = weights.reshape(size, count, *(1,) * (2 - axis))
        taps = (
            weights[:, t] * jnp.take(image, pixels[:, t], axis, mode="clip") for t in range(count)
        )
        image = functools.reduce(jnp.add, taps)
    return image


def _resize_by_products(
    image: Float32[jax.Array, "S S 3"],
    box: Int32[jax.Array, " 4"],
    flip: Bool[jax.Array, ""],
    size: int,
    dtype: str,
) -> Float32[jax.Array, "{size} {size} 3"]:
    """The same as two matrix products, since a TPU collects pixels one by one."""
    top, left, height, width = box
    old = jnp.arange(len(image))
    rows = _weights(old - top, height, jnp.arange(size))
    columns = _weights(old - left, width, _columns(flip, size))
    # By default TPUs would round weights and pixels to bfloat16. HIGH adds up three products of
    # bfloat16 parts, which leaves an error far below bfloat16's; HIGHEST adds up six.
    precision = jax.lax.Precision.HIGH if dtype == "bfloat16" else jax.lax.Precision.HIGHEST
    return jnp.einsum("iy,yxc,jx->ijc", rows, image, columns, precision=precision)


def _columns(flip: Bool[jax.Array, ""], size: int) -> Int32[jax.Array, " {size}"]:
    """Returns the columns of a crop in the order in which it shows them.

    To reverse the finished crop would take longer than everything else: XLA's CPU backend computes
    each pixel again for each place that it may go to.
    """
    columns = jnp.arange(size)
    return jnp.where(flip, columns[::-1], columns)


def _taps(
    start: jax.Array, length: jax.Array, new: Int32[jax.Array, " size"], count: int
) -> tuple[Int32[jax.Array, "size {count}"], Float32[jax.Array, "size {count}"]]:
    """Returns the pixels within the reach of the weights of the new pixels, and the weights."""
    size = len(new)
    centers = (2 * new + 1) * length
    first = (centers - 2 * jnp.maximum(length, size) - size) // (2 * size) + 1
    pixels = first[:, None] + jnp.arange(count)
    return start + pixels, _weights(pixels, length, new)


def _weights(
    pixels: Int32[jax.Array, "*size N"], length: jax.Array, new: Int32[jax.Array, " size"]
) -> Float32[jax.Array, "size N"]:
    """Returns how much pixels, counted from the start of the box, add to the new pixels.

    A weight falls linearly with the distance from the center of the new pixel, to 0 at one pixel,
    old or new, whichever is larger. Pixels outside of the box weigh nothing. The sum over each row
    is 1. Distances are in whole units of 1 / (2 size) old pixels, so none is rounded.
    """
    size = len(new)
    centers = (2 * new + 1) * length
    distances = jnp.abs(size * (2 * pixels + 1) - centers[:, None])
    in_box = (pixels >= 0) & (pixels < length)
    weights = jnp.where(in_box, jnp.maximum(2 * jnp.maximum(length, size) - distances, 0), 0)
    return weights / weights.sum(axis=1, keepdims=True)
