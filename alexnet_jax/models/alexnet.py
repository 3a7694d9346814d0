"""AlexNet and its variants, as one Flax module driven by a table."""

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Float32

from alexnet_jax.models.layers import (
    ceil_padding,
    conv,
    dot_general,
    dropout_mask,
    inverted_dropout,
    local_response_norm,
    max_pool,
    paper_dropout,
    promote_all_but_kernel,
    split_dot_general,
    to_rows_of_group,
    within_map_norm,
)
from alexnet_jax.utils.errors import UserError

LAYERS = ("conv1", "conv2", "conv3", "conv4", "conv5", "fc6", "fc7", "fc8")
FEATURES = (
    *("conv1", "pool1", "conv2", "pool2", "conv3", "conv4", "conv5", "pool5"),
    *("fc6", "fc7", "fc8"),
)
INITIALIZERS = ("paper", "he")
DTYPES = ("float32", "bfloat16")
LEAST_SIZE = 63  # from here on pool5 has a whole window under either rounding (as torchvision)

KERNEL_SIZES = (11, 5, 3, 3, 3)
STRIDES = (4, 1, 1, 1, 1)
HIDDEN_UNITS = 4096
# Paper §5: "the second, fourth, and fifth convolutional layers, as well as [...] the
# fully-connected hidden layers" start with a bias of 1, the others with 0.
HIDDEN_BIAS_LAYERS = ("conv2", "conv4", "conv5", "fc6", "fc7")

Ops = tuple[str, ...]
PLAIN: Ops = ("conv", "relu")
POOLED: Ops = ("conv", "relu", "pool")
# The same values, since bias and ReLU are monotone, of a quarter as many elements.
POOLED_EARLY: Ops = ("conv_and_pool", "relu")
NORMED: Ops = ("conv", "relu", "lrn", "pool")
BN_PLAIN: Ops = ("conv", "bn", "relu")
BN_POOLED: Ops = ("conv", "bn", "relu", "pool")
FEATURE_OF = {"conv": "conv", "pool": "pool", "conv_and_pool": "pool", "fc": "fc"}


@dataclass(frozen=True)
class Lrn:
    """Local response norm: `alpha` per squared term, `groups` towers that no window crosses."""

    k: float = 2.0
    alpha: float = 1e-4
    groups: int = 1


@dataclass(frozen=True)
class Variant:
    """What one published AlexNet does in each of its layers.

    `blocks` lists the operations of conv1 to conv5 in order, `hidden` those of fc6 and fc7.
    """

    blocks: tuple[Ops, ...]
    filters: tuple[int, ...] = (96, 256, 384, 384, 256)
    groups: tuple[int, ...] = (1, 2, 1, 2, 2)
    lrn: Lrn = Lrn()
    hidden: Ops = ("fc", "relu", "dropout")
    paper_dropout: bool = False
    conv1_rounds_up: bool = False
    conv_stds: tuple[float, ...] = (0.01, 0.01, 0.01, 0.01, 0.01)


ONE_TOWER = (1, 1, 1, 1, 1)
VARIANTS: dict[str, Variant] = {
    # Krizhevsky, Sutskever, Hinton 2012, as the paper's §3 to §5 state it.
    "paper": Variant(blocks=(NORMED, NORMED, PLAIN, PLAIN, POOLED), paper_dropout=True),
    # One tower and no LRN.
    "single": Variant(blocks=(POOLED, POOLED, PLAIN, PLAIN, POOLED), groups=ONE_TOWER),
    # The authors' run #145 as its released code computed it (layers-145.cfg, layer.py): LRN
    # divides its scale of 1e-4 by the window of 5 and sees one tower at a time.
    "original": Variant(
        blocks=(
            ("conv", "lrn", "pool", "relu"),
            ("conv", "relu", "lrn", "within_map_norm", "pool"),
            PLAIN,
            PLAIN,
            ("conv", "pool", "relu"),
        ),
        lrn=Lrn(alpha=1e-4 / 5, groups=2),
        paper_dropout=True,
        conv1_rounds_up=True,
        conv_stds=(0.01, 0.01, 0.03, 0.03, 0.03),
    ),
    # Caffe's bvlc_reference_caffenet: pool before LRN; Caffe's LRN layer has k = 1 by default
    # and divides alpha by the window of 5.
    "caffenet": Variant(
        blocks=(
            ("conv", "relu", "pool", "lrn"),
            ("conv", "relu", "pool", "lrn"),
            PLAIN,
            PLAIN,
            POOLED,
        ),
        lrn=Lrn(k=1.0, alpha=1e-4 / 5),
    ),
    # "One weird trick" (arXiv 1404.5997) as torchvision has it.
    "owt": Variant(
        blocks=(POOLED, POOLED, PLAIN, PLAIN, POOLED),
        filters=(64, 192, 384, 256, 256),
        groups=ONE_TOWER,
        hidden=("dropout", "fc", "relu"),
    ),
    # AlexNet-BN, as in the LARS paper (arXiv 1708.03888), on one tower.
    "bn": Variant(blocks=(BN_POOLED, BN_POOLED, BN_PLAIN, BN_PLAIN, BN_POOLED), groups=ONE_TOWER),
}


def _check_choice(what: str, value: str, choices: Sequence[str]) -> None:
    if value not in choices:
        raise UserError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")


def _check_input(shape: tuple[int, ...]) -> None:
    if len(shape) != 4:
        raise UserError(f"the model takes images of shape [B, S, S, C], not {list(shape)}")
    height, width = shape[1:3]
    if min(height, width) < LEAST_SIZE:
        raise UserError(
            f"images of {height}x{width} pixels are too small for AlexNet: "
            f"resize them to at least {LEAST_SIZE}x{LEAST_SIZE}"
        )


class AlexNet(nn.Module):
    """AlexNet in one of the six forms of `VARIANTS`.

    Parameters are float32[...] under conv1..conv5, fc6..fc8, each with `kernel` (HWIO, with
    I = inputs / groups; [inputs, outputs] for fc) and `bias`. Variant `bn` has `bn1`..`bn5`
    (`scale`, `bias`, and the collection `batch_stats`) in place of the biases of conv1..conv5,
    which its mean subtraction would cancel.

    Attributes:
      variant: a key of `VARIANTS`.
      num_classes: length of the logits.
      dtype: what layers compute in, "float32" or "bfloat16".
      dropout: probability that a hidden unit of fc6, fc7 is zeroed; 0 needs no rng.
      initializer: "paper", N(0, 0.01²) but for `original`, or "he", He normal by fan-in.
      hidden_bias: initial bias in conv2, conv4, conv5, fc6, fc7 (0 elsewhere).
      width: factor on all filter counts and on the 4096s, rounded to multiples of 8.
      batch_axes: mapped axes over which the batch is split: `bn` averages its statistics over them.
      fc_axis: the one of them along which the fc layers are split too, as in "One weird trick"
        (arXiv 1404.5997): their kernels are a device's share of the inputs, [D / m, E], and
        their features a share of the units for the images of all m devices, [m B, E / m].
      frozen: of LAYERS; their batch norms use and keep their running statistics in training too.

    Raises:
      UserError: an attribute, a feature name or an image size that does not exist here.
    """

    variant: str = "paper"
    num_classes: int = 1000
    dtype: str = "float32"
    dropout: float = 0.5
    initializer: str = "paper"
    hidden_bias: float = 1.0
    width: float = 1.0
    batch_axes: tuple[str, ...] = ()
    fc_axis: str | None = None
    frozen: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_choice("model variant", self.variant, tuple(VARIANTS))
        _check_choice("model initializer", self.initializer, INITIALIZERS)
        _check_choice("model dtype", self.dtype, DTYPES)
        super().__post_init__()

    @nn.compact
    def __call__(
        self, x: Float[Array, "B S S C"], train: bool = False, features: Sequence[str] = ()
    ) -> Float32[Array, "B classes"] | tuple[Float32[Array, "B classes"], dict[str, Array]]:
        """Logits of a batch, and on request what the layers inside made of it.

        A feature is the output of the convolution, pooling or fc layer of that name, with the
        batch norm and ReLU that directly follow it. So `conv1` comes after ReLU and before LRN
        and pooling, `fc6` after ReLU and before dropout; but in `original`, whose blocks 1 and
        5 have their ReLU behind the pooling, conv1 and conv5 are signed and pool1 and pool5
        rectified. `fc8` is the logits.

        Args:
          x: mean subtracted; S is at least 63. Convolutions round down, pooling rounds up.
          train: whether dropout drops (rng stream "dropout") and batch norm uses the batch.
          features: names out of `FEATURES`, returned in a dict beside the logits, in the model's
            dtype: [B, H, W, C] for convN and poolN, [B, D] for fcN.
        """
        _check_input(x.shape)
        for name in features:
            _check_choice("feature", name, FEATURES)
        variant = VARIANTS[self.variant]
        found: dict[str, Array] = {}
        x = x.astype(self.dtype)
        for number, ops in enumerate(variant.blocks, start=1):
            if ops == POOLED and f"conv{number}" not in features:
                ops = POOLED_EARLY
            x = self._block(ops, number, x, train, found)
        x = x.reshape(x.shape[0], -1)
        if axis := self._split_axis():
            x = to_rows_of_group(x, axis)
        for number, ops in ((6, variant.hidden), (7, variant.hidden), (8, ("fc",))):
            x = self._block(ops, number, x, train, found)
        logits = found["fc8"] = x.astype(jnp.float32)
        if not features:
            return logits
        return logits, {name: found[name] for name in features}

    def _block(
        self, ops: Ops, number: int, x: Array, train: bool, found: dict[str, Array]
    ) -> Array:
        feature = None
        for op in ops:
            x = self._apply_op(op, number, x, train)
            if op in FEATURE_OF:
                feature = f"{FEATURE_OF[op]}{number}"
            elif op not in ("bn", "relu"):
                feature = None
            if feature:
                found[feature] = x
        return x

    def _apply_op(self, op: str, number: int, x: Array, train: bool) -> Array:
        variant = VARIANTS[self.variant]
        match op:
            case "conv":
                return self._conv(number, x)
            case "conv_and_pool":
                return self._conv(number, x, pool=True)
            case "fc":
                return self._dense(number, x)
            case "relu":
                return nn.relu(x)
            case "pool":
                return max_pool(x)
            case "lrn":
                lrn = variant.lrn
                return local_response_norm(x, k=lrn.k, alpha=lrn.alpha, groups=lrn.groups)
            case "within_map_norm":
                return within_map_norm(x)
            case "bn":
                normed: Array = nn.BatchNorm(
                    use_running_average=not train or f"conv{number}" in self.frozen,
                    momentum=0.9,
                    dtype=self.dtype,
                    axis_name=self.batch_axes or None,  # type: ignore[arg-type]  # several may be
                    name=f"bn{number}",
                )(x)
                return normed
            case "dropout":
                return self._dropout(x, train)
        raise ValueError(f"no operation {op!r}")

    def _conv(self, number: int, x: Array, pool: bool = False) -> Array:
        variant = VARIANTS[self.variant]
        size = KERNEL_SIZES[number - 1]
        return nn.Conv(
            self._scaled(variant.filters[number - 1]),
            (size, size),
            strides=STRIDES[number - 1],
            padding=self._conv1_padding(x) if number == 1 else size // 2,
            feature_group_count=variant.groups[number - 1],
            use_bias="bn" not in variant.blocks[number - 1],
            dtype=self.dtype,
            kernel_init=self._kernel_init(variant.conv_stds[number - 1]),
            bias_init=self._bias_init(f"conv{number}"),
            promote_dtype=promote_all_but_kernel,  # type: ignore[arg-type]  # not of *args
            conv_general_dilated=functools.partial(conv, pool=pool),
            name=f"conv{number}",
        )(x)

    def _conv1_padding(self, x: Array) -> list[tuple[int, int]]:
        # 224 needs padding to give 55 rows, 227 must have none. Run #145 let the last windows
        # of a 224 crop reach 3 pixels past the bottom and right edges (layer.py: 1 + ceil).
        if VARIANTS[self.variant].conv1_rounds_up:
            return [ceil_padding(length, 11, 4) for length in x.shape[1:3]]
        return [(0, 0) if (length - 11) % 4 == 0 else (2, 2) for length in x.shape[1:3]]

    def _dense(self, number: int, x: Array) -> Array:
        product: Callable[..., Array] = dot_general
        promote: Callable[..., Any] = promote_all_but_kernel
        if axis := self._split_axis():
            last = number == 8
            product = functools.partial(split_dot_general, axis=axis, scatter=0 if last else 1)
            promote = promote_all_but_kernel if last else self._promote_share_of_bias
        return nn.Dense(
            self.num_classes if number == 8 else self._scaled(HIDDEN_UNITS),
            dtype=self.dtype,
            kernel_init=self._kernel_init(0.01),
            bias_init=self._bias_init(f"fc{number}"),
            promote_dtype=promote,
            dot_general=product,
            name=f"fc{number}",
        )(x)

    def _promote_share_of_bias(
        self, x: Array, kernel: Array, bias: Array, *, dtype: str
    ) -> tuple[Array, Array, Array | None]:
        share = len(bias) // jax.lax.axis_size(self.fc_axis)
        start = jax.lax.axis_index(self.fc_axis) * share
        bias = jax.lax.dynamic_slice_in_dim(bias, start, share)
        return promote_all_but_kernel(x, kernel, bias, dtype=dtype)

    def _dropout(self, x: Array, train: bool) -> Array:
        dropout = paper_dropout if VARIANTS[self.variant].paper_dropout else inverted_dropout
        return dropout(x, self.dropout, self._kept(x.shape) if train and self.dropout else None)

    def _kept(self, shape: tuple[int, ...]) -> Bool[Array, "B D"]:
        key = self.make_rng("dropout")
        axis = self._split_axis()
        parts = jax.lax.axis_size(axis) if axis else 1
        own = shape[0] // parts, shape[1] * parts
        first = jax.lax.axis_index(self.batch_axes) * own[0] if self.batch_axes else 0
        kept = dropout_mask(key, self.dropout, first, own)
        return to_rows_of_group(kept, axis) if axis else kept

    def _split_axis(self) -> str | None:
        """Parameters are made whole, where no axis is mapped."""
        return None if self.is_initializing() else self.fc_axis

    def _scaled(self, units: int) -> int:
        return max(8, 8 * round(units * self.width / 8))

    def _kernel_init(self, std: float) -> nn.initializers.Initializer:
        if self.initializer == "he":
            return nn.initializers.he_normal()
        return nn.initializers.normal(std)

    def _bias_init(self, layer: str) -> nn.initializers.Initializer:
        bias = self.hidden_bias if layer in HIDDEN_BIAS_LAYERS else 0.0
        return nn.initializers.constant(bias)


@dataclass(frozen=True)
class LayerRow:
    """One line of the layer table; the shape is one image's, without the batch."""

    name: str
    output_shape: tuple[int, ...]
    params: int
    flops: int


def layer_table(model: AlexNet, input_shape: tuple[int, int, int]) -> list[LayerRow]:
    """Output shape, parameters and FLOPs of each layer, found without making any weights.

    FLOPs are 2 x multiply-accumulates of one image's forward pass in convolutions and fc
    layers; pooling, norms, biases and ReLU count as 0. The parameters of a batch norm are
    counted with its convolution.

    Args:
      input_shape: (S, S, C).
    """
    image = jax.ShapeDtypeStruct((1, *input_shape), jnp.float32)
    (_, outputs), variables = jax.eval_shape(
        lambda x: model.init_with_output(jax.random.key(0), x, features=FEATURES), image
    )
    return [_layer_row(name, outputs[name].shape[1:], variables["params"]) for name in FEATURES]


def _layer_row(name: str, output_shape: tuple[int, ...], params: dict[str, Any]) -> LayerRow:
    own = params.get(name, {})
    norm = params.get(name.replace("conv", "bn"), {}) if name.startswith("conv") else {}
    count = sum(math.prod(leaf.shape) for leaf in (*own.values(), *norm.values()))
    macs = math.prod(output_shape[:-1]) * math.prod(own["kernel"].shape) if own else 0
    return LayerRow(name, output_shape, count, 2 * macs)


def format_layer_table(rows: Sequence[LayerRow]) -> str:
    """The rows as aligned text, with a heading and a line of totals."""
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
