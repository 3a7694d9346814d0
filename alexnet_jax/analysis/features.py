"""The outputs of every layer for one image, drawn on one page."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float32, Int64, UInt8

from alexnet_jax import inference
from alexnet_jax.analysis import figures, fonts
from alexnet_jax.data import augment
from alexnet_jax.inference import Trained
from alexnet_jax.models.alexnet import (
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Local,
    MaxPool,
    ReLU,
    Tanh,
    Variant,
    has_classes,
    named_layers,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MAX_MAPS = 36
TILE, GAP = 56, 3  # pixels
UNITS_PER_ROW = 128
COLUMNS = 3
MAPS_HEIGHT, UNITS_HEIGHT = 4.0, 2.2  # inches of a row


def displayed_outputs(variant: str | Variant) -> dict[str, str]:
    """Returns the name of the output to display for each convolution, pooling and dense layer.

    It is the output after the batch norm and nonlinearity that follow the layer directly: relu1
    for conv1 in most variants. In `original`, where LRN follows conv1, it is conv1 itself, and
    relu1 is displayed for pool1.
    """
    displayed = {}
    layer_name = None
    for name, layer in named_layers(variant).items():
        if isinstance(layer, Conv | Local | MaxPool | AvgPool | Dense):
            layer_name = name
        elif not isinstance(layer, BatchNorm | ReLU | Tanh):
            layer_name = None
        if layer_name:
            displayed[layer_name] = name
    return displayed


def layer_outputs(network: Trained, image: UInt8[np.ndarray, "S S 3"]) -> dict[str, np.ndarray]:
    """Returns the displayed output of each layer for an image's center crop.

    The values are float32[H, W, C], or float32[D] for dense layers.
    """
    names = displayed_outputs(network.model.variant)
    outputs = inference.feature_extractor(network, list(names.values()))(image[None])
    return {layer: np.asarray(outputs[name])[0] for layer, name in names.items()}


def strongest(maps: Float32[np.ndarray, "H W C"], count: int) -> Int64[np.ndarray, " count"]:
    """Returns the channels with the largest mean magnitude, in descending order."""
    return np.argsort(-np.abs(maps).mean(axis=(0, 1)), kind="stable")[:count]


def mosaic(maps: Float32[np.ndarray, "H W N"]) -> Float32[np.ndarray, "side side"]:
    """Returns the maps as tiles of a square image, scaled to equal sides, with NaN between them."""
    height, width, count = maps.shape
    rows, columns = (np.arange(TILE) * length // TILE for length in (height, width))
    tiles = np.moveaxis(maps[rows[:, None], columns], -1, 0)
    per_row = math.ceil(math.sqrt(count))
    sheet = figures.tile(tiles, per_row, GAP, np.nan)
    missing = sheet.shape[1] - sheet.shape[0]  # of rows that have no map
    return np.pad(sheet, ((0, missing), (0, 0)), constant_values=np.nan)


def features_figure(network: Trained, image: UInt8[np.ndarray, "S S 3"]) -> "Figure":
    """Returns a figure of an image's center crop and the output of each layer.

    All maps of a layer share one scale.
    """
    from matplotlib.figure import Figure

    size = network.augment.view_size
    outputs = layer_outputs(network, image)
    panels = [("image", augment.center_window(image, size)), *outputs.items()]
    rows = [panels[start : start + COLUMNS] for start in range(0, len(panels), COLUMNS)]
    heights = [
        MAPS_HEIGHT if any(output.ndim == 3 for _, output in row) else UNITS_HEIGHT for row in rows
    ]
    figure = Figure(figsize=(12, sum(heights) + 0.4), dpi=100, layout="constrained")
    grid = figure.subplots(len(rows), COLUMNS, height_ratios=heights, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.axis("off")
    for axes, (name, output) in zip(grid.flat, panels, strict=False):
        axes.set(xticks=[], yticks=[])
        if name == "image":
            axes.imshow(output)
            axes.set_title(f"image, {size}×{size}×3")
        elif name == panels[-1][0] and has_classes(network.model.variant):
            _draw_classes(axes, name, output, network.class_names)
        elif output.ndim == 1:
            _draw_units(axes, name, output)
        else:
            _draw_maps(axes, name, output)
    return fonts.prepare(figure)


def _draw_maps(axes: "Axes", name: str, maps: np.ndarray) -> None:
    channels = strongest(maps, MAX_MAPS)
    which = "all" if len(channels) == maps.shape[2] else f"the {len(channels)} strongest"
    axes.imshow(mosaic(maps[..., channels]), interpolation="nearest", **_color_scale(maps))
    axes.set_title(f"{name}, {'×'.join(map(str, maps.shape))}, {which}")
    axes.spines[:].set_visible(False)


def _draw_units(axes: "Axes", name: str, units: np.ndarray) -> None:
    columns = min(UNITS_PER_ROW, len(units))
    padded = np.pad(units, (0, -len(units) % columns), constant_values=np.nan)
    style = {"aspect": "auto", "interpolation": "nearest", **_color_scale(units)}
    axes.imshow(padded.reshape(-1, columns), **style)
    axes.set_title(f"{name}, {len(units)} units, {np.mean(units > 0):.0%} of them above 0")


def _draw_classes(axes: "Axes", name: str, logits: np.ndarray, class_names: Sequence[str]) -> None:
    probabilities = np.asarray(jax.nn.softmax(logits))
    best = np.argsort(-probabilities, kind="stable")[:5]
    axes.barh(range(len(best)), probabilities[best], color="tab:orange")
    for rank, label in enumerate(best):
        text = f"{probabilities[label]:.1%}  {class_names[label]}"
        axes.text(0.02, rank, text, va="center", clip_on=True)
    axes.set(xlim=(0, 1), ylim=(len(best) - 0.5, -0.5), xticks=[0, 0.5, 1])
    axes.set_title(f"{name}, {len(logits)} logits: the top {len(best)} after softmax")


def _color_scale(values: np.ndarray) -> dict[str, Any]:
    """Returns colors from 0 upward, or with white at 0 if there are negative values."""
    limit = max(float(np.abs(values).max()), 1e-12)
    if values.min() < 0:
        return {"cmap": "RdBu_r", "vmin": -limit, "vmax": limit}
    return {"cmap": "magma", "vmin": 0.0, "vmax": limit}
