"""The network drawn as the paper's Figure 2 draws it: a box for each layer's output, to scale."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from alexnet_jax.models.alexnet import (
    FEATURE_OF,
    KERNEL_SIZES,
    STRIDES,
    VARIANTS,
    AlexNet,
    Ops,
    layer_table,
)
from alexnet_jax.models.layers import POOL_SIZE, POOL_STRIDE

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Inches on paper.
PITCH = 1.32
IMAGE_HEIGHT, MOST_LENGTH, COLUMN_HEIGHT, COLUMN_WIDTH = 2.1, 0.5, 3.4, 0.16
DEPTH = (0.26, 0.2)  # of a face that goes into the page: right and up, as shares of its height
TOWER_GAP = 0.55
ABOVE, BELOW, LINE = 0.75, 0.4, 0.19
# Size, weight and colour of a layer's name, of its shape, and of all below.
TEXT_STYLES = ((11, "bold", "black"), (9, "normal", "black"), (8.3, "normal", "#444444"))
COLORS = {"image": "#c9c5bd", "conv": "#7da7d1", "pool": "#9fd0b8", "fc": "#f0b27a"}


class Layer(NamedTuple):
    """What is drawn of a layer.

    Attributes:
      name: "image" or out of `model.FEATURES`.
      shape: (H, W, C) or (units,), of one image.
      params: how many.
      operations: what is done from the layer before to this one's end, as told below the box.
      share_seen: of the side of the layer before, what one place here sees; None: all of it.
      towers: into how many parts its maps are drawn.
      apart: whether a tower sees its own part of the layer before only.
    """

    name: str
    shape: tuple[int, ...]
    params: int
    operations: tuple[str, ...]
    share_seen: float | None
    towers: int
    apart: bool

    @property
    def kind(self) -> str:
        return self.name.rstrip("0123456789")

    @property
    def shape_text(self) -> str:
        if len(self.shape) == 1:
            return f"{self.shape[0]:,}"
        *sides, maps = self.shape
        part = (
            f"{maps}"
            if self.towers == 1
            else f"({'+'.join([str(maps // self.towers)] * self.towers)})"
        )
        return "×".join([*map(str, sides), part])


class Box(NamedTuple):
    """A layer's part on the page: where its front lies, and how its side goes into the page."""

    x: float
    y: float
    length: float
    height: float
    right: float
    rise: float

    def on_side(self, along: float, up: float) -> tuple[float, float]:
        """Returns the point at these shares, 0 to 1, of the right face's depth and height."""
        x, y = self.x + self.length, self.y
        return x + along * self.right, y + up * self.height + along * self.rise


def network_layers(model: AlexNet, image_shape: tuple[int, int, int]) -> list[Layer]:
    """Returns what is to be drawn, the image (S, S, C) first."""
    variant = VARIANTS[model.variant]
    towers = max(variant.groups)
    blocks = (*variant.blocks, variant.hidden, variant.hidden, ("fc",))
    operations: dict[str, list[str]] = {}
    for number, ops in enumerate(blocks, start=1):
        operations |= _operations(model, number, ops)
    layers = [Layer("image", image_shape, 0, (), None, 1, False)]
    for row in layer_table(model, image_shape):
        kind, number = row.name[:-1], int(row.name[-1])
        fc, pool = kind == "fc", kind == "pool"
        window = POOL_SIZE if pool else None if fc else KERNEL_SIZES[number - 1]
        layers.append(
            Layer(
                name=row.name,
                shape=row.output_shape,
                params=row.params,
                operations=tuple(operations[row.name]),
                share_seen=window and min(1.0, window / layers[-1].shape[0]),
                towers=1 if fc else towers,
                apart=pool or (not fc and variant.groups[number - 1] > 1),
            )
        )
    return layers


def _operations(model: AlexNet, number: int, ops: Ops) -> dict[str, list[str]]:
    """Tells a block's operations, under the last layer that they follow, or else the first."""
    told: dict[str, list[str]] = {}
    before: list[str] = []
    name = None
    for op in ops:
        if op in FEATURE_OF:
            name = f"{FEATURE_OF[op]}{number}"
            told[name], before = before, []
        if text := _operation(model, number, op):
            (told[name] if name else before).append(text)
    return told


def _operation(model: AlexNet, number: int, op: str) -> str:
    variant = VARIANTS[model.variant]
    match op:
        case "conv":
            size, stride = KERNEL_SIZES[number - 1], STRIDES[number - 1]
            return f"{size}×{size} conv" + (f", stride {stride}" if stride > 1 else "")
        case "pool":
            return f"{POOL_SIZE}×{POOL_SIZE} max, stride {POOL_STRIDE}"
        case "fc":
            return "fully connected"
        case "lrn":
            return "LRN" + (", per tower" if variant.lrn.groups > 1 else "")
        case "within_map_norm":
            return "norm within maps"
        case "dropout":
            return f"dropout {model.dropout:g}" if model.dropout else ""
        case "bn":
            return "batch norm"
        case "relu":
            return "ReLU"
    raise ValueError(f"no operation {op!r}")


def network_figure(model: AlexNet, image_shape: tuple[int, int, int]) -> "Figure":
    """Draws the network for images (S, S, C), its two towers one above the other where it has such.

    Lengths are the square roots of pixels, maps and units, since 224 pixels would hide 6.
    """
    from matplotlib.figure import Figure

    layers = network_layers(model, image_shape)
    boxes = _placed(layers)
    top = max(box.y + box.height + box.rise for parts in boxes for box in parts)
    bottom = min(box.y for parts in boxes for box in parts)
    floor = bottom - BELOW - LINE * max(len(_text(layer)) for layer in layers)
    width, height = PITCH * len(layers), top + ABOVE - floor
    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-PITCH / 2, width - PITCH / 2), ylim=(floor, top + ABOVE))
    axes.axis("off")
    for place in range(1, len(layers)):
        _connect(axes, layers[place], boxes[place - 1], boxes[place])
    for place, (layer, parts) in enumerate(zip(layers, boxes, strict=True)):
        for box in parts:
            _draw_box(axes, box, COLORS[layer.kind])
        _tell(axes, layer, place * PITCH, bottom - 0.35)
    _title(axes, model, image_shape, top)
    return figure


def _placed(layers: Sequence[Layer]) -> list[list[Box]]:
    """Lays the layers out from left to right, their parts from top to bottom around y = 0."""
    volumes = [layer for layer in layers if len(layer.shape) == 3]
    most_pixels = max(layer.shape[0] for layer in volumes)
    most_maps = max(layer.shape[2] / layer.towers for layer in volumes)
    most_units = max(layer.shape[0] for layer in layers if len(layer.shape) == 1)

    def part(layer: Layer, x: float, y: float) -> Box:
        if len(layer.shape) == 1:
            length, height = COLUMN_WIDTH, COLUMN_HEIGHT * math.sqrt(layer.shape[0] / most_units)
            right = COLUMN_WIDTH
        else:
            length = MOST_LENGTH * math.sqrt(layer.shape[2] / layer.towers / most_maps)
            height = IMAGE_HEIGHT * math.sqrt(layer.shape[0] / most_pixels)
            right = DEPTH[0] * height
        rise = right * DEPTH[1] / DEPTH[0]
        return Box(x - (length + right) / 2, y - (height + rise) / 2, length, height, right, rise)

    tallest = max((part(layer, 0, 0) for layer in volumes[1:]), key=lambda box: box.height)
    away = (tallest.height + tallest.rise + TOWER_GAP) / 2
    return [
        [part(layer, place * PITCH, y) for y in ((0.0,) if layer.towers == 1 else (away, -away))]
        for place, layer in enumerate(layers)
    ]


def _draw_box(axes: "Axes", box: Box, color: str) -> None:
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Polygon

    low, high = box.on_side(0, 0), box.on_side(0, 1)
    far_low, far_high = box.on_side(1, 0), box.on_side(1, 1)
    front = [(box.x, box.y), low, high, (box.x, high[1])]
    side = [low, far_low, far_high, high]
    top = [(box.x, high[1]), high, far_high, (box.x + box.right, far_high[1])]
    for corners, light in ((front, 1.0), (side, 0.82), (top, 1.12)):
        shade = [min(1.0, light * value) for value in to_rgb(color)]
        axes.add_patch(Polygon(corners, facecolor=shade, edgecolor="#444444", linewidth=0.7))


def _connect(axes: "Axes", layer: Layer, before: list[Box], after: list[Box]) -> None:
    """Draws what one place of each part of a layer sees of the parts of the layer before."""
    for number, source in enumerate(before):
        seen = after[number : number + 1] if layer.apart else after
        for target in seen:
            _draw_view(axes, layer, source, target)


def _draw_view(axes: "Axes", layer: Layer, source: Box, target: Box) -> None:
    from matplotlib.patches import Polygon

    style: dict[str, Any] = {"color": "#888888", "linewidth": 0.6, "zorder": 3}
    if layer.share_seen is None:
        ends = (target.x, target.y), (target.x, target.y + target.height)
        for share, end in zip((0, 1), ends, strict=True):
            start = source.on_side(1, share)
            axes.plot(*zip(start, end, strict=True), linestyle=":", **style)
        return
    low, high = 0.5 - layer.share_seen / 2, 0.5 + layer.share_seen / 2
    corners = [source.on_side(*at) for at in ((low, low), (high, low), (high, high), (low, high))]
    axes.add_patch(
        Polygon(corners, facecolor="white", edgecolor="#444444", linewidth=0.7, zorder=4)
    )
    point = target.x, target.y + 0.55 * target.height
    for corner in corners:
        axes.plot(*zip(corner, point, strict=True), linestyle="--", **style)


def _tell(axes: "Axes", layer: Layer, x: float, y: float) -> None:
    for number, text in enumerate(_text(layer)):
        size, weight, color = TEXT_STYLES[min(number, 2)]
        style: dict[str, Any] = {"size": size, "weight": weight, "color": color, "ha": "center"}
        axes.text(x, y - number * LINE, text, va="baseline", **style)


def _text(layer: Layer) -> list[str]:
    params = [f"{layer.params:,} params"] if layer.params else []
    return [layer.name, layer.shape_text, *layer.operations, *params]


def _title(axes: "Axes", model: AlexNet, image_shape: tuple[int, int, int], top: float) -> None:
    rows = layer_table(model, image_shape)
    params, flops = sum(row.params for row in rows), sum(row.flops for row in rows)
    told = f"AlexNet, variant {model.variant}: {params:,} parameters, {flops:,} FLOPs an image"
    left = -PITCH / 2 + 0.15
    axes.text(left, top + ABOVE - 0.15, told, size=13, weight="bold", va="top")
    scale = (
        "Sizes are square roots of pixels, maps and units. "
        "White: what one place of the next layer sees."
    )
    axes.text(left, top + ABOVE - 0.45, scale, size=9, color="#444444", va="top")
