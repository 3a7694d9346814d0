"""The layer table: output shape, parameters and FLOPs of each layer."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp

from alexnet_jax.models.alexnet import (
    AdaptiveAvgPool,
    AlexNet,
    AvgPool,
    Conv,
    Dense,
    Local,
    MaxPool,
    named_layers,
)

# The others change neither shape nor FLOPs.
SHOWN = (Conv, Local, Dense, MaxPool, AvgPool, AdaptiveAvgPool)


@dataclass(frozen=True)
class LayerRow:
    """One line of the layer table.

    Attributes:
      output_shape: of one image, without the batch dimension.
      params: number of parameters; those of a batch norm count with its convolution.
      flops: 2 × multiply-accumulates of one image's forward pass. Pooling, normalization, biases
        and ReLU count as 0.
    """

    name: str
    output_shape: tuple[int, ...]
    params: int
    flops: int


def layer_table(model: AlexNet, input_shape: tuple[int, int, int]) -> list[LayerRow]:
    """Returns a row for each convolution, pooling and fully connected layer; computes no weights.

    Args:
      input_shape: (S, S, C).

    Raises:
      UserError: the input is too small.
    """
    layers = named_layers(model.variant)
    names = [name for name, layer in layers.items() if isinstance(layer, SHOWN)]
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    (_, outputs), variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, features=names), image
    )
    params = variables["params"]

    def row(name: str) -> LayerRow:
        shape = outputs[name].shape[1:]
        owners = [name]
        if isinstance(layers[name], Conv):
            owners += [norm for norm in (name.replace("conv", "bn"),) if norm in layers]
        count = sum(leaf.size for owner in owners for leaf in params.get(owner, {}).values())
        # Every weight of a kernel is used once at each output position, or at one of them.
        positions = 1 if isinstance(layers[name], Local) else math.prod(shape[:-1])
        macs = positions * params[name]["kernel"].size if name in params else 0
        return LayerRow(name, shape, count, 2 * macs)

    return [row(name) for name in names]


def format_layer_table(rows: Sequence[LayerRow]) -> str:
    """Returns the rows as aligned text with a heading and a line of totals."""
    cells = [("layer", "output", "parameters", "FLOPs")]
    for row in rows:
        shape = "x".join(map(str, row.output_shape))
        cells.append((row.name, shape, f"{row.params:,}", f"{row.flops:,}"))
    params, flops = sum(row.params for row in rows), sum(row.flops for row in rows)
    cells.append(("total", "", f"{params:,}", f"{flops:,}"))
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join(
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {count:>{widths[2]}}  {ops:>{widths[3]}}"
        for name, shape, count, ops in cells
    )
