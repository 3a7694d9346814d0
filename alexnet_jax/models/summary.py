"""The layer table: output shape, receptive field, parameters and FLOPs of each layer."""

import csv
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp

from alexnet_jax.models.alexnet import (
    INPUT,
    AdaptiveAvgPool,
    AlexNet,
    AvgPool,
    BatchNorm,
    Conv,
    Dense,
    Layer,
    Local,
    MapNorm,
    MaxPool,
    named_layers,
)

# The others change neither shape nor FLOPs.
SHOWN = (Conv, Local, Dense, MaxPool, AvgPool, AdaptiveAvgPool)
PARAM_BYTES = 4  # float32
COLUMNS = (
    *("layer", "output", "stride", "receptive_field", "parameters", "macs"),
    *("parameter_bytes", "activation_bytes", "flops_per_byte"),
)


@dataclass(frozen=True)
class LayerRow:
    """One line of the layer table.

    Attributes:
      output_shape: of one image, without the batch dimension.
      params: number of parameters; those of a batch norm count with its convolution.
      flops: 2 × multiply-accumulates of one image's forward pass. Pooling, normalization, biases
        and ReLU count as 0.
      stride: pixels of the image between neighboring outputs; None from the first fully connected
        layer or adaptive pooling on, where outputs are of no place.
      field: side of the receptive field in pixels of the image; None as for `stride`. At edges of
        the image, a part of it is outside.
      activation_bytes: of one image's input and output of the layer, in the network's dtype.
    """

    name: str
    output_shape: tuple[int, ...]
    params: int
    flops: int
    stride: int | None
    field: int | None
    activation_bytes: int

    def intensity(self, batch_size: int = 1) -> float:
        """Returns FLOPs per byte of parameters, which are float32, inputs and outputs."""
        moved = PARAM_BYTES * self.params + batch_size * self.activation_bytes
        return batch_size * self.flops / moved


def layer_table(model: AlexNet, input_shape: tuple[int, int, int]) -> list[LayerRow]:
    """Returns a row for each convolution, pooling and fully connected layer; computes no weights.

    Args:
      input_shape: (S, S, C).

    Raises:
      UserError: the input is too small.
    """
    layers = named_layers(model.variant)
    rows = operation_table(model, input_shape)
    return [row for row in rows if isinstance(layers[row.name], SHOWN)]


def operation_table(model: AlexNet, input_shape: tuple[int, int, int]) -> list[LayerRow]:
    """Returns a row for each operation, as `layer_table` does."""
    layers = named_layers(model.variant)
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    (_, outputs), variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, features=(INPUT, *layers)), image
    )
    params = variables["params"]

    def count_params(name: str) -> int:
        if isinstance(layers[name], BatchNorm):
            return 0
        owners = {name, name.replace("conv", "bn")}
        return sum(leaf.size for owner in owners for leaf in params.get(owner, {}).values())

    def count_flops(name: str) -> int:
        if name not in params or "kernel" not in params[name]:
            return 0
        # Every weight of a kernel is used once at each output position, or at one of them.
        is_local = isinstance(layers[name], Local)
        positions = 1 if is_local else math.prod(outputs[name].shape[1:-1])
        return 2 * positions * int(params[name]["kernel"].size)

    rows = []
    stride: int | None = 1
    field: int | None = 1
    source = outputs[INPUT]
    for name, layer in layers.items():
        output = outputs[name]
        stride, field = _grow(layer, stride, field, source.shape[1:] == output.shape[1:])
        moved = sum(array.size * array.dtype.itemsize for array in (source, output))
        shape = output.shape[1:]
        rows.append(
            LayerRow(name, shape, count_params(name), count_flops(name), stride, field, moved)
        )
        source = output
    return rows


def _grow(
    layer: Layer, stride: int | None, field: int | None, keeps_shape: bool
) -> tuple[int | None, int | None]:
    """Returns stride and receptive field after a layer, given those before it."""
    if stride is None or field is None or isinstance(layer, Dense):
        return None, None
    if isinstance(layer, AdaptiveAvgPool):
        return (stride, field) if keeps_shape else (None, None)
    if isinstance(layer, Conv | Local | MapNorm | MaxPool | AvgPool):
        field += (layer.size - 1) * stride
        stride *= getattr(layer, "stride", 1)
    return stride, field


def write_layer_csv(rows: Iterable[LayerRow], path: Path) -> None:
    """Writes one line for each row, with shapes such as 55x55x96 and counts for one image."""
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(COLUMNS)
        for row in rows:
            table.writerow(
                (
                    *(row.name, _shape(row), row.stride, row.field, row.params, row.flops // 2),
                    *(PARAM_BYTES * row.params, row.activation_bytes, f"{row.intensity():.4g}"),
                )
            )


def format_layer_table(rows: Sequence[LayerRow]) -> str:
    """Returns the rows as aligned text with a heading and a line of totals."""
    cells: list[tuple[str, ...]] = [("layer", "output", "stride", "field", "parameters", "FLOPs")]
    for row in rows:
        place = ("" if value is None else str(value) for value in (row.stride, row.field))
        cells.append((row.name, _shape(row), *place, f"{row.params:,}", f"{row.flops:,}"))
    params, flops = sum(row.params for row in rows), sum(row.flops for row in rows)
    cells.append(("total", "", "", "", f"{params:,}", f"{flops:,}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        "  ".join(
            f"{cell:{'<' if column < 2 else '>'}{width}}"
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        )
        for line in cells
    )


def _shape(row: LayerRow) -> str:
    return "x".join(map(str, row.output_shape))
