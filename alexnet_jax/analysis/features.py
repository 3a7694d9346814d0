"""One page with what every layer makes of an image."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from alexnet_jax import inference as trained
from alexnet_jax.data import augment
from alexnet_jax.inference import Trained
from alexnet_jax.models.alexnet import FEATURES

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MOST_MAPS = 36
TILE, GAP = 56, 3  # pixels
STRIP_COLUMNS = 128
PAGE = (
    ("image", "conv1", "pool1"),
    ("conv2", "pool2", "conv3"),
    ("conv4", "conv5", "pool5"),
    ("fc6", "fc7", "fc8"),
)


def all_features(network: Trained, image: UInt8[np.ndarray, "S S 3"]) -> dict[str, np.ndarray]:
    """Returns what each layer of `model.FEATURES` puts out for the image's centre crop.

    float32[H, W, C] for convN and poolN, float32[D] for fcN.
    """
    found = trained.feature_extractor(network, FEATURES)(image[None])
    return {name: np.asarray(x)[0] for name, x in found.items()}


def strongest(maps: Float32[np.ndarray, "H W C"], most: int) -> Int64[np.ndarray, " most"]:
    """Returns the channels with the largest mean magnitude, falling."""
    return np.argsort(-np.abs(maps).mean(axis=(0, 1)), kind="stable")[:most]


def mosaic(maps: Float32[np.ndarray, "H W N"]) -> Float32[np.ndarray, "side side"]:
    """Returns the maps as squares by rows in one square, NaN between them."""
    height, width, count = maps.shape
    side = math.ceil(math.sqrt(count))
    sheet = np.full((side * (TILE + GAP) - GAP,) * 2, np.nan, np.float32)
    rows, columns = (np.arange(TILE) * length // TILE for length in (height, width))
    for place in range(count):
        y, x = (part * (TILE + GAP) for part in divmod(place, side))
        sheet[y : y + TILE, x : x + TILE] = maps[rows[:, None], columns, place]
    return sheet


def features_figure(network: Trained, image: UInt8[np.ndarray, "S S 3"]) -> "Figure":
    """Draws the centre crop of an image and what each layer makes of it.

    A layer's maps share one scale.
    """
    from matplotlib.figure import Figure

    found = all_features(network, image)
    figure = Figure(figsize=(12, 14.6), dpi=100, layout="constrained")
    panels = figure.subplots(4, 3, height_ratios=(4, 4, 4, 2.2))
    for names, row in zip(PAGE, panels, strict=True):
        for name, axes in zip(names, row, strict=True):
            axes.set(xticks=[], yticks=[])
            if name == "image":
                axes.imshow(augment.center_window(image, network.config.augment.crop_size))
                side = network.config.augment.crop_size
                axes.set_title(f"image, {side}×{side}×3")
            elif name == "fc8":
                _draw_answers(axes, found[name], network.class_names)
            elif name in ("fc6", "fc7"):
                _draw_strip(axes, name, found[name])
            else:
                _draw_maps(axes, name, found[name])
    return figure


def _draw_maps(axes: "Axes", name: str, maps: np.ndarray) -> None:
    chosen = strongest(maps, MOST_MAPS)
    told = "all" if len(chosen) == maps.shape[2] else f"the {len(chosen)} strongest"
    axes.imshow(mosaic(maps[..., chosen]), interpolation="nearest", **_scale(maps))
    axes.set_title(f"{name}, {'×'.join(map(str, maps.shape))}, {told}")
    axes.spines[:].set_visible(False)


def _draw_strip(axes: "Axes", name: str, units: np.ndarray) -> None:
    columns = min(STRIP_COLUMNS, len(units))
    padded = np.pad(units, (0, -len(units) % columns), constant_values=np.nan)
    axes.imshow(
        padded.reshape(-1, columns), aspect="auto", interpolation="nearest", **_scale(units)
    )
    axes.set_title(f"{name}, {len(units)} units, {np.mean(units > 0):.0%} of them above 0")


def _draw_answers(axes: "Axes", logits: np.ndarray, class_names: Sequence[str]) -> None:
    probabilities = np.asarray(jax.nn.softmax(logits))
    best = np.argsort(-probabilities, kind="stable")[:5]
    axes.barh(range(len(best)), probabilities[best], color="tab:orange")
    for place, label in enumerate(best):
        told = f"{probabilities[label]:.1%}  {class_names[label]}"
        axes.text(0.02, place, told, va="center", clip_on=True)
    axes.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5), xticks=[0, 0.5, 1])
    axes.set_title(f"fc8, {len(logits)} logits: the first {len(best)} by softmax")


def _scale(values: np.ndarray) -> dict[str, Any]:
    """Colours from 0 up, or for values of both signs with white at 0."""
    most = max(float(np.abs(values).max()), 1e-12)
    if values.min() < 0:
        return {"cmap": "RdBu_r", "vmin": -most, "vmax": most}
    return {"cmap": "magma", "vmin": 0.0, "vmax": most}
