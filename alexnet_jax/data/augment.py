"""What happens to the pixels inside the jitted step: crop, flip, color noise, mean, mixing, views.

The sources are the 2012 paper, §4.1, and run #145 of its authors' released program, which differs
in places (`configs/imagenet_2012.py` lists them). The inception crop is that of Szegedy et al. 2014
(arXiv 1409.4842, §6), resized as Pillow resizes. Later augmentations are off by default.
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
from scipy.stats import beta

from alexnet_jax.data import preprocess
from alexnet_jax.data.trivial_augment import trivial_augment
from alexnet_jax.utils.errors import UserError

VIEWS = ("center", "nine", "ten")
BOX_DRAWS = 10  # attempts to draw an inception box, as in torchvision
# Of random erasing, as in torchvision: share of the area, and width over height.
ERASED_AREA, ERASED_ASPECT = (0.02, 0.33), (0.3, 3.3)
# Folded into an image's key for the draws that came later, which leaves the first three as they
# were.
TRIVIAL, ERASE, MIX = 3, 4, 5
# A loop that draws from a beta distribution by rejection takes longer than the mixing, so its
# quantiles are computed once, and one of these is drawn.
QUANTILES = 4096

Examples = dict[str, jax.Array]


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
      crop_size: of training crops, in pixels, before the first of `size_changes`.
      view_size: the same in evaluation.
      eval_views: "center", "nine" or "ten", which `views` there are.
      stats: of the training images.
      dtype: in which the network computes. On TPU images may be rounded to it before the crop.
      noise_changes: (step, standard deviation) pairs, rising; each holds from its step on.
      size_changes: the same for the crop size in pixels.
    """

    fields: ConfigDict
    image_size: int
    crop_size: int
    view_size: int
    eval_views: str
    stats: Statistics
    dtype: str
    noise_changes: tuple[tuple[int, float], ...] = ()
    size_changes: tuple[tuple[int, int], ...] = ()

    def crop_size_at(self, step: int) -> int:
        """Returns the size of the network's input in a training step, in pixels."""
        sizes = [self.crop_size, *(size for start, size in self.size_changes if step >= start)]
        return sizes[-1]

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
        self,
        images: UInt8[jax.Array, "B S W 3"],
        keys: jax.Array,
        step: jax.Array | int = 0,
        sizes: Int32[jax.Array, "B 2"] | None = None,
    ) -> Float32[jax.Array, "B crop_size crop_size 3"]:
        """Crops, flips and recolors a training batch at random and subtracts the mean.

        Args:
          images: squares, or whole photographs as `data.store.to_canvas` describes them.
          keys: a random key for each image. What happens to an image thus does not depend on the
            device or the place in the batch that it is given.
          step: decides about `color_noise`.
          sizes: height and width of whole photographs.
        """
        noise = self.color_noise(step)
        return jax.vmap(
            lambda image, key, size: self._augment_one(image, key, noise, size),
            in_axes=(0, 0, None if sizes is None else 0),
        )(images, keys, sizes)

    def mix(
        self, images: Float32[jax.Array, "B H W 3"], labels: jax.Array, keys: jax.Array
    ) -> Examples:
        """Mixes each image with its partner, if `mixup` or `cutmix` is set.

        The partner of image i is image i XOR 1, which is on the same device. Both are mixed in the
        same proportion. MixUp (Zhang et al. 2017, arXiv 1710.09412) averages all pixels; CutMix
        (Yun et al. 2019, arXiv 1905.04899) takes a rectangle from the partner. If both are set, a
        pair gets either one.

        Args:
          labels: int32[B].
          keys: of the images; the first of a pair decides.

        Returns {"image": …, "label": …} and, if images are mixed, {"partner_label": int32[B],
        "share": float32[B]}: the share that an image keeps of itself.
        """
        mixup, cutmix = self.fields.mixup, self.fields.cutmix
        if not mixup and not cutmix:
            return {"image": images, "label": labels}
        size = images.shape[1]
        quantiles = [_beta_quantiles(alpha) for alpha in (mixup, cutmix)]

        def own_share(key: jax.Array) -> tuple[jax.Array, jax.Array]:
            kind_key, share_key, center_key = jax.random.split(jax.random.fold_in(key, MIX), 3)
            is_cut = jax.random.bernoulli(kind_key, 0.5 if mixup and cutmix else float(cutmix > 0))
            index = jax.random.randint(share_key, (), 0, QUANTILES)
            share = jnp.where(is_cut, quantiles[1][index], quantiles[0][index])
            box = cutmix_box(share, jax.random.randint(center_key, (2,), 0, size), size)
            outside = 1.0 - _in_box(box, size)
            return jnp.where(is_cut, outside, share), jnp.where(is_cut, outside.mean(), share)

        shares, share = jax.vmap(own_share)(keys[::2])  # of pixels float32[B / 2, S, S], of pairs
        pairs = images.reshape(-1, 2, *images.shape[1:])
        shares = shares[:, None, :, :, None]
        mixed = shares * pairs + (1 - shares) * pairs[:, ::-1]
        return {
            "image": mixed.reshape(images.shape),
            "label": labels,
            "partner_label": labels.reshape(-1, 2)[:, ::-1].reshape(-1),
            "share": jnp.repeat(share, 2),
        }

    def _augment_one(
        self, image: jax.Array, key: jax.Array, noise: jax.Array, size: jax.Array | None
    ) -> jax.Array:
        crop_key, flip_key, noise_key = jax.random.split(key, 3)
        flip = self.fields.flip & jax.random.bernoulli(flip_key)
        image = image.astype(jnp.float32)

        # The paper subtracts the mean image before it crops, so that each pixel loses the mean of
        # its own place. Run #145 subtracts the center of the mean image from every crop instead,
        # after it may have flipped it.
        if self.fields.mean == "image":
            image = image - self.stats.mean
        image = self._random_crop(crop_key, flip, image, size)
        if self.fields.trivial:
            image = trivial_augment(image, jax.random.fold_in(key, TRIVIAL))
        if self.fields.mean != "image":
            image = image - self._center_mean(self.crop_size)

        # §4.1: add Σ_i α_i λ_i p_i to every pixel, one draw of α ~ N(0, noise²) for each image.
        image = image + self.stats.noise_basis @ (noise * jax.random.normal(noise_key, (3,)))
        if self.fields.color_noise_shrink:
            image = image / (1.0 + noise)
        if self.fields.erase:
            image = self._erase(jax.random.fold_in(key, ERASE), image)
        return image * self.scale

    def _random_crop(
        self, key: jax.Array, flip: jax.Array, image: jax.Array, whole: jax.Array | None
    ) -> jax.Array:
        fields, size = self.fields, self.crop_size
        if fields.crop == "inception":
            sides = jnp.full(2, self.image_size) if whole is None else whole
            box = inception_box(key, sides, fields.crop_area, fields.crop_aspect)
            if whole is None:
                return resize(image, box, (jnp.array(False), flip), size, self.dtype)
            # A portrait is stored transposed, and so are its box and its crop at first.
            is_portrait = whole[0] > whole[1]
            top, left, height, width = box
            box = jnp.where(is_portrait, jnp.stack([left, top, width, height]), box)
            flips = (flip & is_portrait, flip & ~is_portrait)
            resized = resize(image, box, flips, size, self.dtype)
            return jnp.where(is_portrait, resized.swapaxes(0, 1), resized)
        offset = jax.random.randint(key, (2,), 0, self.image_size - size + 1)
        slices = functools.partial(_crop_by_slices, size=size)
        # bfloat16 holds pixels from 0 to 255, but not pixels minus a mean image.
        is_exact = fields.mean != "image" or self.dtype == "bfloat16"
        products = functools.partial(_crop_by_products, size=size) if is_exact else slices
        crop: jax.Array = jax.lax.platform_dependent(
            image, offset, flip, tpu=products, default=slices
        )
        return crop

    def _erase(self, key: jax.Array, image: jax.Array) -> jax.Array:
        """Erases a rectangle with probability `erase` (Zhong et al. 2017, arXiv 1708.04896).

        Its pixels become the mean, as in torchvision, where images are normalized before.
        """
        draw_key, box_key = jax.random.split(key)
        box = inception_box(box_key, jnp.array(image.shape[:2]), ERASED_AREA, ERASED_ASPECT)
        is_erased = jax.random.bernoulli(draw_key, self.fields.erase)
        return jnp.where(is_erased, erase(image, box), image)

    @property
    def views(self) -> Int32[np.ndarray, "V 3"]:
        """The top, the left and whether it is mirrored of each view that evaluation averages.

        The paper's ten views (§4.1) are top left, top right, center, bottom left, bottom right,
        then the same five mirrored; the order is that of the released program. Its networks for
        CIFAR-10 were tested with nine views: three by three, not mirrored.
        """
        end = self.image_size - self.view_size
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
    ) -> Float32[jax.Array, "B view_size view_size 3"]:
        """Returns one of the `views` of each image, the mean subtracted."""
        top, left, mirrored = place
        window = self._window(images, top, left)
        return jnp.where(mirrored == 1, window[:, :, ::-1], window)

    def center(
        self, images: UInt8[jax.Array, "B S S 3"]
    ) -> Float32[jax.Array, "B view_size view_size 3"]:
        """Returns the mean-subtracted center crops."""
        border = self.image_size - self.view_size
        return self._window(images, border // 2, border // 2)

    def _window(self, images: jax.Array, y: jax.Array | int, x: jax.Array | int) -> jax.Array:
        shape = (self.view_size, self.view_size, 3)
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
        return self._center_mean(self.view_size)

    def _center_mean(self, size: int) -> np.ndarray:
        mean = self.stats.mean
        return mean if mean.ndim == 1 else center_window(mean, size)


def make_augment(
    config: ConfigDict, statistics: Statistics | None = None, steps_per_epoch: float = math.inf
) -> Augment:
    """Returns the augmentation of a config.

    Args:
      statistics: of the training images; None for a mean of 0 and no color noise.
      steps_per_epoch: needed in training if `config.schedule.changes` changes the color noise or
        the crop size.

    Raises:
      UserError: a field has a value that does not exist.
    """
    _check(config)
    if statistics is None:
        like_mean = (config.image_size,) * 2 + (3,) if config.augment.mean != "channel" else (3,)
        statistics = Statistics(np.zeros(like_mean, np.float32), np.zeros((3, 3), np.float32))

    def changes(field: str) -> tuple[tuple[int, Any], ...]:
        return tuple(
            (math.ceil(epoch * steps_per_epoch), value)
            for epoch, _, changed, value in config.schedule.changes
            if changed == field and math.isfinite(steps_per_epoch)
        )

    return Augment(
        fields=config.augment,
        image_size=config.image_size,
        crop_size=config.augment.crop_size,
        view_size=preprocess.view_size(config),
        eval_views=config.eval.views,
        stats=statistics,
        dtype=config.model.dtype,
        noise_changes=changes("color_noise"),
        size_changes=changes("crop_size"),
    )


def other_crop_sizes(config: ConfigDict) -> dict[str, int]:
    """Returns the crop sizes besides `augment.crop_size`, by the names of their fields."""
    sizes = {
        f"schedule.changes: crop_size={value} of epoch {epoch:g}": value
        for epoch, _, field, value in config.schedule.changes
        if field == "crop_size"
    }
    if config.eval.crop_size:
        sizes[f"eval.crop_size={config.eval.crop_size}"] = config.eval.crop_size
    return sizes


def _check(config: ConfigDict) -> None:
    preprocess.check(config)
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
    if config.stored == "whole" and (
        (config.augment.crop, config.augment.mean) != ("inception", "channel")
        or config.preprocess != "2012"
    ):
        raise UserError(
            "stored=whole keeps photographs of different shapes, which only the inception crop "
            "uses and which have no mean image; set --config.augment.crop=inception, "
            "--config.augment.mean=channel and --config.preprocess=2012"
        )
    if config.augment.trivial and config.augment.mean == "image":
        raise UserError(
            "augment.trivial needs pixels from 0 to 255, but with augment.mean=image the mean is "
            "subtracted first; set --config.augment.mean=channel"
        )
    training = {f"augment.crop_size={config.augment.crop_size}": config.augment.crop_size}
    for name, size in (training | other_crop_sizes(config)).items():
        if not isinstance(size, int) or not 0 < size <= config.image_size:
            raise UserError(f"{name} must lie between 1 and image_size={config.image_size}")
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
    columns = offset[1] + _order(flip, size)[:, None] == old
    rows, image, columns = (x.astype(jnp.bfloat16) for x in (rows, image, columns))
    return jnp.einsum("iy,yxc,jx->ijc", rows, image, columns).astype(jnp.float32)


# ------------------------------------------------------------------------------------------
# The inception crop
# ------------------------------------------------------------------------------------------


def inception_box(
    key: jax.Array,
    sides: Int32[jax.Array, " 2"],
    area: tuple[float, float],
    aspect: tuple[float, float],
) -> Int32[jax.Array, " 4"]:
    """Draws the part of an image that an inception crop shows.

    As in torchvision's RandomResizedCrop, this is the first of ten draws that fits into the image.
    If none fits it is the largest box of the allowed aspect nearest to the image's.

    Args:
      sides: height and width of the image in pixels.
      area: least and largest share of the image's area; uniform between them.
      aspect: least and largest width / height; log-uniform between them.

    Returns:
      Top, left, height and width in pixels.
    """
    area_key, aspect_key, offset_key = jax.random.split(key, 3)
    low, high = np.log(aspect)
    shares = jax.random.uniform(area_key, (BOX_DRAWS,), minval=area[0], maxval=area[1])
    logs = jax.random.uniform(aspect_key, (BOX_DRAWS,), minval=low, maxval=high)
    whole = sides.astype(jnp.float32)
    geometric_mean = jnp.sqrt(whole[0] * whole[1])
    drawn = jnp.round(geometric_mean * jnp.sqrt(shares) * jnp.exp(jnp.stack([-logs, logs]) / 2))
    fits = ((drawn >= 1) & (drawn <= whole[:, None])).all(axis=0)
    nearest = jnp.clip(whole[1] / whole[0], *aspect)
    largest = jnp.minimum(whole, whole[::-1] * jnp.stack([1 / nearest, nearest]))
    largest = jnp.maximum(1, jnp.round(largest))
    box = jnp.where(fits.any(), drawn[:, jnp.argmax(fits)], largest).astype(jnp.int32)
    offset = jax.random.randint(offset_key, (2,), 0, sides - box + 1)
    return jnp.concatenate([offset, box])


def resize(
    image: Float32[jax.Array, "H W 3"],
    box: Int32[jax.Array, " 4"],
    flips: tuple[Bool[jax.Array, ""], Bool[jax.Array, ""]],
    size: int,
    dtype: str = "float32",
) -> Float32[jax.Array, "{size} {size} 3"]:
    """Resizes a box of an image as Pillow's BILINEAR does, and mirrors it.

    Args:
      box: top, left, height and width in pixels.
      flips: whether to reverse the order of the rows, and of the columns.
      dtype: to which the result will be rounded. On TPU it determines how exact the sums are.
    """
    products = functools.partial(_resize_by_products, size=size, dtype=dtype)
    taps = functools.partial(_resize_by_taps, size=size)
    resized: jax.Array = jax.lax.platform_dependent(image, box, flips, tpu=products, default=taps)
    return resized


def _resize_by_taps(
    image: Float32[jax.Array, "H W 3"],
    box: Int32[jax.Array, " 4"],
    flips: tuple[Bool[jax.Array, ""], Bool[jax.Array, ""]],
    size: int,
) -> Float32[jax.Array, "{size} {size} 3"]:
    """Adds up the few pixels that make a new pixel. A GPU does this in one pass over a batch."""
    top, left, height, width = box
    for axis, start, length in ((1, left, width), (0, top, height)):
        new = _order(flips[axis], size)
        count = math.ceil(2 * max(1, image.shape[axis] / size))  # most pixels in a weight's reach
        pixels, weights = _taps(start, length, new, count)
        weights = weights.reshape(size, count, *(1,) * (2 - axis))
        taps = (
            weights[:, t] * jnp.take(image, pixels[:, t], axis, mode="clip") for t in range(count)
        )
        image = functools.reduce(jnp.add, taps)
    return image


def _resize_by_products(
    image: Float32[jax.Array, "H W 3"],
    box: Int32[jax.Array, " 4"],
    flips: tuple[Bool[jax.Array, ""], Bool[jax.Array, ""]],
    size: int,
    dtype: str,
) -> Float32[jax.Array, "{size} {size} 3"]:
    """The same as two matrix products, since a TPU collects pixels one by one."""
    top, left, height, width = box
    rows = _weights(jnp.arange(image.shape[0]) - top, height, _order(flips[0], size))
    columns = _weights(jnp.arange(image.shape[1]) - left, width, _order(flips[1], size))
    # By default TPUs would round weights and pixels to bfloat16. HIGH adds up three products of
    # bfloat16 parts, which leaves an error far below bfloat16's; HIGHEST adds up six.
    precision = jax.lax.Precision.HIGH if dtype == "bfloat16" else jax.lax.Precision.HIGHEST
    return jnp.einsum("iy,yxc,jx->ijc", rows, image, columns, precision=precision)


def _order(flip: Bool[jax.Array, ""], size: int) -> Int32[jax.Array, " {size}"]:
    """Returns the rows or columns of a crop in the order in which it shows them.

    To reverse the finished crop would take longer than everything else: XLA's CPU backend computes
    each pixel again for each place that it may go to.
    """
    places = jnp.arange(size)
    return jnp.where(flip, places[::-1], places)


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


# ------------------------------------------------------------------------------------------
# Erasing and mixing
# ------------------------------------------------------------------------------------------


def erase(
    image: Float32[jax.Array, "S S 3"], box: Int32[jax.Array, " 4"]
) -> Float32[jax.Array, "S S 3"]:
    """Sets a box (top, left, height, width) of an image to 0."""
    top, left, height, width = box
    inside = _in_box((top, left, top + height, left + width), len(image))
    return image * (1.0 - inside[..., None])


def cutmix_box(
    share: jax.Array | float, center: Int32[jax.Array, " 2"], size: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Returns top, left, bottom and right of what CutMix takes from the partner.

    Args:
      share: what the image keeps of itself, where the image's border does not cut off the box.
      center: row and column of the box's center.
      size: of the image in pixels.
    """
    half = jnp.floor(0.5 * jnp.sqrt(1.0 - share) * size).astype(jnp.int32)
    top, left = jnp.maximum(center - half, 0)
    bottom, right = jnp.minimum(center + half, size)
    return top, left, bottom, right


def _in_box(box: Sequence[jax.Array], size: int) -> Float32[jax.Array, "{size} {size}"]:
    """Returns 1 inside a box (top, left, bottom, right) and 0 elsewhere."""
    top, left, bottom, right = box
    place = jnp.arange(size)
    rows = (place >= top) & (place < bottom)
    columns = (place >= left) & (place < right)
    return (rows[:, None] & columns).astype(jnp.float32)


def _beta_quantiles(alpha: float) -> Float32[jax.Array, " QUANTILES"]:
    """Returns equally probable values of Beta(alpha, alpha), rising; ones if alpha is 0."""
    if not alpha:
        return jnp.ones(QUANTILES)
    probabilities = (np.arange(QUANTILES) + 0.5) / QUANTILES
    return jnp.asarray(beta.ppf(probabilities, alpha, alpha), jnp.float32)
