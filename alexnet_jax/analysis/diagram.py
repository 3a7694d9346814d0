"""The network drawn like the paper's Figure 2: a box for the output of each layer, to scale."""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

from alexnet_jax.models.alexnet import (
    LRN,
    AdaptiveAvgPool,
    AlexNet,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Dropout,
    Layer,
    Local,
    MapNorm,
    MaxPool,
    ReLU,
    Tanh,
    named_layers,
)
from alexnet_jax.models.summary import LayerRow, layer_table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Lengths are in inches.
PITCH = 1.32  # from one layer to the next
IMAGE_HEIGHT, MAX_LENGTH, COLUMN_HEIGHT, COLUMN_WIDTH = 2.1, 0.5, 3.4, 0.16
DEPTH = (0.26, 0.2)  # offset of a box's rear face to the right and up, relative to its height
TOWER_GAP = 0.55
ABOVE, BELOW, LINE = 0.75, 0.4, 0.19
# Size, weight and color of a layer's name, of its shape, and of the lines below.
TEXT_STYLES = ((11, "bold", "black"), (9, "normal", "black"), (8.3, "normal", "#444444"))
COLORS = {
    "image": "#c9c5bd",
    "conv": "#7da7d1",
    "pool": "#9fd0b8",
    "avgpool": "#9fd0b8",
    "fc": "#f0b27a",
}


class DrawnLayer(NamedTuple):
    """What is drawn for the image and for each row of the layer table.

    Attributes:
      kind: key of COLORS.
      shape: (H, W, C) or (units,) of one image.
      operations: texts below the box: the layer's own operation and those that follow it.
      window: side of the window that one output position sees, relative to the side of the
        previous layer's output; None if it sees everything.
      towers: number of parts into which the channels are drawn.
      separate: whether a tower sees only its own part of the previous layer.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    params: int
    operations: tuple[str, ...]
    window: float | None
    towers: int
    separate: bool

    @property
    def shape_text(self) -> str:
        if len(self.shape) == 1:
            return f"{self.shape[0]:,}"
        *sides, channels = self.shape
        per_tower = "+".join([str(channels // self.towers)] * self.towers)
        return "×".join([*map(str, sides), f"({per_tower})" if self.towers > 1 else per_tower])


class Box(NamedTuple):
    """Position and size of one tower of a layer on the page.

    Attributes:
      x, y: lower left corner of the front face.
      length: width of the front face.
      height: of the front face.
      right, rise: offset of the rear face.
    """

    x: float
    y: float
    length: float
    height: float
    right: float
    rise: float

    def on_side(self, depth: float, height: float) -> tuple[float, float]:
        """Returns the point of the right face at these shares, 0 to 1, of its depth and height."""
        x, y = self.x + self.length, self.y
        return x + depth * self.right, y + height * self.height + depth * self.rise


def drawn_layers(model: AlexNet, input_shape: tuple[int, int, int]) -> list[DrawnLayer]:
    """Returns the image (S, S, C), then each row of the network's layer table."""
    layers = named_layers(model.variant)
    rows = layer_table(model, input_shape)
    operations = _operations(model, rows)
    towers = max((layer.groups for layer in layers.values() if isinstance(layer, Conv)), default=1)
    drawn = [DrawnLayer("image", "image", input_shape, 0, (), None, 1, False)]
    for row in rows:
        layer = layers[row.name]
        side = drawn[-1].shape[0]
        window = None
        if isinstance(layer, Conv | Local | MaxPool | AvgPool):
            window = min(1.0, layer.size / side)
        elif isinstance(layer, AdaptiveAvgPool):
            window = math.ceil(side / layer.size) / side
        drawn.append(
            DrawnLayer(
                name=row.name,
                kind=layer.kind,
                shape=row.output_shape,
                params=row.params,
                operations=tuple(operations[row.name]),
                window=window,
                towers=1 if isinstance(layer, Dense) else towers,
                separate=layer.groups > 1
                if isinstance(layer, Conv)
                else not isinstance(layer, Dense),
            )
        )
    return drawn


def _operations(model: AlexNet, rows: Sequence[LayerRow]) -> dict[str, list[str]]:
    """Returns the texts of each drawn layer and of the layers between it and the next."""
    texts: dict[str, list[str]] = {row.name: [] for row in rows}
    drawn = rows[0].name
    for name, layer in named_layers(model.variant).items():
        drawn = name if name in texts else drawn
        if text := _operation(model, layer):
            texts[drawn].append(text)
    return texts


def _operation(model: AlexNet, layer: Layer) -> str:
    match layer:
        case Conv(size=size, stride=stride):
            return f"{size}×{size} conv" + (f", stride {stride}" if stride > 1 else "")
        case Local(size=size):
            return f"{size}×{size} local"
        case AvgPool(size=size, stride=stride):
            return f"{size}×{size} average, stride {stride}"
        case MaxPool(size=size, stride=stride):
            return f"{size}×{size} max, stride {stride}"
        case AdaptiveAvgPool(size=size):
            return f"average to {size}×{size}"
        case Dense():
            return "fully connected"
        case LRN(groups=groups):
            return "LRN" + (", per tower" if groups > 1 else "")
        case MapNorm():
            return "norm within maps"
        case Dropout():
            return f"dropout {model.dropout:g}" if model.dropout else ""
        case BatchNorm():
            return "batch norm"
        case ReLU():
            return "ReLU"
        case Tanh():
            return "tanh"


def network_figure(model: AlexNet, input_shape: tuple[int, int, int]) -> "Figure":
    """Returns a figure of the network for images (S, S, C).

    The towers of a grouped network are drawn one above the other. Lengths are square roots of
    pixels, channels and units, because 6 would be invisible next to 224.
    """
    from matplotlib.figure import Figure

    layers = drawn_layers(model, input_shape)
    boxes = _place(layers)
    top = max(box.y + box.height + box.rise for parts in boxes for box in parts)
    bottom = min(box.y for parts in boxes for box in parts)
    floor = bottom - BELOW - LINE * max(len(_lines(layer)) for layer in layers)
    width, height = PITCH * len(layers), top + ABOVE - floor
    figure = Figure(figsize=(width, height), dpi=100)
    axes = figure.add_axes((0, 0, 1, 1))
    axes.set(xlim=(-PITCH / 2, width - PITCH / 2), ylim=(floor, top + ABOVE))
    axes.axis("off")
    for index in range(1, len(layers)):
        _connect(axes, layers[index], boxes[index - 1], boxes[index])
    for index, (layer, parts) in enumerate(zip(layers, boxes, strict=True)):
        for box in parts:
            _draw_box(axes, box, COLORS[layer.kind])
        _write_lines(axes, layer, index * PITCH, bottom - 0.35)
    _write_title(axes, model, input_shape, top)
    return figure


def _place(layers: Sequence[DrawnLayer]) -> list[list[Box]]:
    """Places the layers from left to right, and their towers from top to bottom around y = 0."""
    volumes = [layer for layer in layers if len(layer.shape) == 3]
    max_pixels = max(layer.shape[0] for layer in volumes)
    max_channels = max(layer.shape[2] / layer.towers for layer in volumes)
    max_units = max((layer.shape[0] for layer in layers if len(layer.shape) == 1), default=1)

    def box(layer: DrawnLayer, x: float, y: float) -> Box:
        if len(layer.shape) == 1:
            length, height = COLUMN_WIDTH, COLUMN_HEIGHT * math.sqrt(layer.shape[0] / max_units)
            right = COLUMN_WIDTH
        else:
            length = MAX_LENGTH * math.sqrt(layer.shape[2] / layer.towers / max_channels)
            height = IMAGE_HEIGHT * math.sqrt(layer.shape[0] / max_pixels)
            right = DEPTH[0] * height
        rise = right * DEPTH[1] / DEPTH[0]
        return Box(x - (length + right) / 2, y - (height + rise) / 2, length, height, right, rise)

    heights = (part.height + part.rise for part in (box(layer, 0, 0) for layer in volumes[1:]))
    offset = (max(heights, default=0.0) + TOWER_GAP) / 2
    return [
        [box(layer, index * PITCH, y) for y in ((0.0,) if layer.towers == 1 else (offset, -offset))]
        for index, layer in enumerate(layers)
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


def _connect(axes: "Axes", layer: DrawnLayer, before: list[Box], after: list[Box]) -> None:
    """Draws what one position of each tower sees of the towers of the previous layer."""
    for tower, source in enumerate(before):
        targets = after[tower : tower + 1] if layer.separate and len(before) > 1 else after
        for target in targets:
            _draw_view(axes, layer, source, target)


def _draw_view(axes: "Axes", layer: DrawnLayer, source: Box, target: Box) -> None:
    from matplotlib.patches import Polygon

    style: dict[str, Any] = {"color": "#888888", "linewidth": 0.6, "zorder": 3}
    if layer.window is None:
        ends = (target.x, target.y), (target.x, target.y + target.height)
        for height, end in zip((0, 1), ends, strict=True):
            start = source.on_side(1, height)
            axes.plot(*zip(start, end, strict=True), linestyle=":", **style)
        return
    low, high = 0.5 - layer.window / 2, 0.5 + layer.window / 2
    corners = [source.on_side(*at) for at in ((low, low), (high, low), (high, high), (low, high))]
    axes.add_patch(
        Polygon(corners, facecolor="white", edgecolor="#444444", linewidth=0.7, zorder=4)
    )
    point = target.x, target.y + 0.55 * target.height
    for corner in corners:
        axes.plot(*zip(corner, point, strict=True), linestyle="--", **style)


def _lines(layer: DrawnLayer) -> list[str]:
    params = [f"{layer.params:,} params"] if layer.params else []
    return [layer.name, layer.shape_text, *layer.operations, *params]


def _write_lines(axes: "Axes", layer: DrawnLayer, x: float, y: float) -> None:
    for index, text in enumerate(_lines(layer)):
        size, weight, color = TEXT_STYLES[min(index, 2)]
        style: dict[str, Any] = {"size": size, "weight": weight, "color": color, "ha": "center"}
        axes.text(x, y - index * LINE, text, va="baseline", **style)


def _write_title(
    axes: "Axes", model: AlexNet, input_shape: tuple[int, int, int], top: float
) -> None:
    rows = layer_table(model, input_shape)
    params, flops = sum(row.params for row in rows), sum(row.flops for row in rows)
    name = f"variant {model.variant}" if isinstance(model.variant, str) else "custom variant"
    title = f"AlexNet, {name}: {params:,} parameters, {flops:,} FLOPs per image"
    left = -PITCH / 2 + 0.15
    axes.text(left, top + ABOVE - 0.15, title, size=13, weight="bold", va="top")
    legend = (
        "Sizes are square roots of pixels, channels and units. "
        "White: what one position of the next layer sees."
    )
    axes.text(left, top + ABOVE - 0.45, legend, size=9, color="#444444", va="top")
