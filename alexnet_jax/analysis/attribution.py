"""What a unit responds to, and which pixels speak for a class.

Activation maximization and saliency: Simonyan et al. 2013 (arXiv 1312.6034). Grad-CAM: Selvaraju et
al. 2016 (arXiv 1610.02391). All use the gradients of `analysis.taps`.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jaxtyping import Float, Float32, Int, UInt8

from alexnet_jax import inference
from alexnet_jax.analysis import fonts
from alexnet_jax.analysis.taps import gradients, responses
from alexnet_jax.data import augment
from alexnet_jax.inference import Trained
from alexnet_jax.models.alexnet import AlexNet, Conv, Variant, kernel_layers, named_layers
from alexnet_jax.models.names import known_names
from alexnet_jax.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Ascent:
    """How an image is changed until it excites a unit.

    Attributes:
      steps: number of updates.
      rate: change of a pixel in one update, as part of the range of pixels, for a gradient of one
        standard deviation.
      jitter: pixels by which the image is shifted at random before each update, in each direction.
      blur: standard deviation in pixels of the Gaussian after each update; falls linearly to 0.
    """

    steps: int = 200
    rate: float = 0.02
    jitter: int = 8
    blur: float = 1.0


DEFAULT_ASCENT = Ascent()


class Attribution(NamedTuple):
    """What speaks for a class in one image.

    Attributes:
      view: the center crop, which is the network's input.
      saliency: the largest gradient of the logit to a pixel's three channels.
      cam: Grad-CAM, at the resolution of the layer it is from.
    """

    view: UInt8[np.ndarray, "S S 3"]
    label: int
    probability: float
    saliency: Float32[np.ndarray, "S S"]
    cam: Float32[np.ndarray, "h w"]


def maximize(
    network: Trained,
    name: str,
    units: Sequence[int],
    ascent: Ascent = DEFAULT_ASCENT,
    seed: int = 0,
) -> UInt8[np.ndarray, "N S S 3"]:
    """Returns for each unit an image that excites it, or on average all places of a map.

    Args:
      name: a tap (`models.names`). Before a ReLU, where a silent unit has a gradient too.
      units: maps of a convolution, or units of a fully connected layer.

    Raises:
      UserError: the network has no such layer or unit.
    """
    size = network.augment.view_size
    model, variables = network.model, network.variables
    start = jnp.zeros((len(units), size, size, 3))
    (like,) = jax.eval_shape(lambda x: responses(model, variables, x, [name]), start).values()
    for unit in units:
        if not 0 <= unit < like.shape[-1]:
            raise UserError(f"{name} has no unit {unit}; choose one from 0 to {like.shape[-1] - 1}")
    mean, scale = network.augment.center_mean, network.augment.scale
    low, high = (jnp.asarray((pixel - mean) * scale) for pixel in (0.0, 255.0))
    own = jax.nn.one_hot(jnp.asarray(units), like.shape[-1])

    def excitation(values: Array) -> Array:
        per_unit = values.astype(jnp.float32).reshape(len(units), -1, like.shape[-1]).mean(1)
        return (per_unit * own).sum()

    @jax.jit
    def ascend(variables: Any, x: Array, key: Array) -> Array:
        def update(step: Array, x: Array) -> Array:
            shift = jax.random.randint(
                jax.random.fold_in(key, step), (2,), -ascent.jitter, ascent.jitter + 1
            )
            x = jnp.roll(x, shift, (1, 2))
            slope = gradients(model, variables, x, (name, excitation), ["input"])["input"]
            slope /= slope.std((1, 2, 3), keepdims=True) + 1e-12
            x = jnp.roll(x + ascent.rate * (high - low) * slope, -shift, (1, 2))
            sigma = ascent.blur * (1 - (step + 1) / ascent.steps)
            return jnp.clip(_blur(x, sigma, math.ceil(3 * ascent.blur)), low, high)

        found: Array = jax.lax.fori_loop(0, ascent.steps, update, x)
        return found

    key = jax.random.key(seed)
    noise = jax.random.uniform(jax.random.fold_in(key, ascent.steps), start.shape)
    x = ascend(variables, low + (0.45 + 0.1 * noise) * (high - low), key)
    return np.asarray(jnp.round(x / scale + mean)).clip(0, 255).astype(np.uint8)


def saliency(
    model: AlexNet,
    variables: Mapping[str, Any],
    x: Float[Array, "B S S C"],
    labels: Int[Array, " B"],
) -> Float[Array, "B S S"]:
    """Returns the largest absolute gradient of each image's logit to the channels of a pixel."""
    slope = gradients(model, variables, x, _logit(model, labels), ["input"])["input"]
    return jnp.abs(slope).max(-1)


def grad_cam(
    model: AlexNet,
    variables: Mapping[str, Any],
    x: Float[Array, "B S S C"],
    labels: Int[Array, " B"],
    name: str | None = None,
) -> Float[Array, "B h w"]:
    """Returns max(0, Σ_k a_k A_k) over the maps A_k of a tap.

    a_k is the mean of the gradient of the image's logit with respect to A_k.

    Args:
      name: of a tap with maps; by default the nonlinearity after the last convolution.
    """
    name = name or last_maps(model.variant)
    maps = responses(model, variables, x, [name])[name]
    if maps.ndim != 4:
        raise UserError(f"{name} has no maps; choose a layer before the first fully connected one")
    slope = gradients(model, variables, x, _logit(model, labels), [name])[name]
    return jax.nn.relu((maps * slope.mean((1, 2), keepdims=True)).sum(-1))


def last_maps(variant: str | Variant) -> str:
    """Returns the tap after the last convolution and its nonlinearity: relu5."""
    layers, kernels = named_layers(variant), kernel_layers(variant)
    number = max(n for n, name in enumerate(kernels, 1) if isinstance(layers[name], Conv))
    return known_names(variant)[f"layer {number}"]


def attribute(
    network: Trained, image: UInt8[np.ndarray, "S S 3"], label: int | None = None
) -> Attribution:
    """Returns saliency and Grad-CAM of an image's center crop.

    Args:
      image: S is the config's `image_size`.
      label: the class; by default the most probable one.
    """
    (log_probs,) = np.asarray(inference.classifier(network, "center")(image[None]))
    label = int(log_probs.argmax()) if label is None else label

    @jax.jit
    def maps(variables: Any, images: Array) -> tuple[Array, Array]:
        inputs = network.model, variables, network.augment.center(images), jnp.array([label])
        return saliency(*inputs)[0], grad_cam(*inputs)[0]

    found = maps(network.variables, image[None])
    view = augment.center_window(image, network.augment.view_size)
    return Attribution(
        view, label, float(np.exp(log_probs[label])), *(np.asarray(x, np.float32) for x in found)
    )


def attribution_figure(found: Attribution, class_name: str) -> "Figure":
    """Returns a figure of the image, its saliency, and Grad-CAM over the image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 4.6), dpi=100, layout="constrained")
    image, pixels, cam = figure.subplots(1, 3)
    side = len(found.view)
    whole = {"extent": (0, side, side, 0)}
    image.imshow(found.view, **whole)
    # A few pixels are far above all others.
    pixels.imshow(
        found.saliency, cmap="magma", vmin=0, vmax=np.quantile(found.saliency, 0.995), **whole
    )
    cam.imshow(found.view.mean(axis=2), cmap="gray", **whole)
    cam.imshow(found.cam, cmap="jet", alpha=0.45, interpolation="bilinear", **whole)
    for axes, title in ((image, "image"), (pixels, "saliency"), (cam, "Grad-CAM")):
        axes.set(xticks=[], yticks=[], title=title)
    figure.suptitle(f"{class_name}: probability {found.probability:.3f}")
    return fonts.prepare(figure)


def _logit(model: AlexNet, labels: Array) -> tuple[str, Any]:
    *_, last = kernel_layers(model.variant)
    return last, lambda x: jnp.take_along_axis(x, labels[:, None], axis=1).sum()


def _blur(x: Float[Array, "B S S C"], sigma: Array, radius: int) -> Float[Array, "B S S C"]:
    """Gaussian blur, whose kernel ends at `radius`; edges are repeated."""
    offsets = jnp.arange(-radius, radius + 1)
    weights = jnp.exp(-jnp.square(offsets) / (2 * jnp.square(jnp.maximum(sigma, 1e-3))))
    weights /= weights.sum()
    for axis in (1, 2):
        pads = [(radius, radius) if i == axis else (0, 0) for i in range(x.ndim)]
        padded = jnp.pad(x, pads, mode="edge")
        shifted = [
            jax.lax.slice_in_dim(padded, n, n + x.shape[axis], axis=axis)
            for n in range(2 * radius + 1)
        ]
        x = sum((w * s for w, s in zip(weights, shifted, strict=True)), jnp.zeros_like(x))
    return x
