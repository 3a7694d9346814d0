"""AlexNet and its variants: each is a list of layers, in the order in which an image meets them."""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax import Array
from jaxtyping import Bool, Float, Float32

from alexnet_jax.models import layers as ops
from alexnet_jax.utils.errors import UserError

# ------------------------------------------------------------------------------------------
# What a list can contain
# ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Conv:
    """Convolution with `features` filters of size×size pixels.

    Attributes:
      features: number of filters; `AlexNet.width` scales it.
      padding: zeros on each side. None: size // 2, which keeps the resolution at stride 1.
        "ceil": none at the top and left, and at the other edges as many as the last window needs,
        so that the number of windows rounds up.
      groups: parts into which input and output channels are split. The paper's two GPUs are two
        groups (§3.5, Figure 2).
      bias: initial bias, where any value but 0 is `AlexNet.hidden_bias`; None for no bias.
      std: standard deviation of the initial kernel (paper §5: 0.01).
    """

    features: int
    size: int
    stride: int = 1
    padding: int | Literal["ceil"] | None = None
    groups: int = 1
    bias: float | None = 0.0
    std: float = 0.01
    kind: ClassVar[str] = "conv"


@dataclass(frozen=True)
class Local:
    """Locally connected layer: a convolution of stride 1 with another kernel at each position.

    The resolution stays the same. Only networks of the 2012 program for CIFAR-10 have it.

    Attributes:
      features: number of filters at each position; `AlexNet.width` scales it.
      bias: initial bias, as in `Conv`; there is one for each filter and position.
      std: standard deviation of the initial kernels.
    """

    features: int
    size: int
    bias: float = 0.0
    std: float = 0.01
    kind: ClassVar[str] = "local"


@dataclass(frozen=True)
class Dense:
    """Fully connected layer; the first one flattens its input in the order (row, column, channel).

    Attributes:
      features: number of units, scaled by `AlexNet.width`; "classes" is `AlexNet.num_classes`.
      bias: initial bias, as in `Conv`.
      std: standard deviation of the initial kernel.
    """

    features: int | Literal["classes"]
    bias: float = 0.0
    std: float = 0.01
    kind: ClassVar[str] = "fc"


@dataclass(frozen=True)
class ReLU:
    """max(0, x), paper §3.1."""

    kind: ClassVar[str] = "relu"


@dataclass(frozen=True)
class Tanh:
    """The saturating nonlinearity to which the paper compares ReLU (§3.1, Figure 1)."""

    kind: ClassVar[str] = "tanh"


@dataclass(frozen=True)
class LRN:
    """Local response normalization across channels, paper §3.3.

    `alpha` multiplies each squared term. Caffe, PyTorch and the 2012 program divide their alpha
    by the window of 5 first, so their 1e-4 is 1e-4 / 5 here.
    """

    k: float = 2.0
    alpha: float = 1e-4
    groups: int = 1
    size: int = 5
    kind: ClassVar[str] = "lrn"


@dataclass(frozen=True)
class MapNorm:
    """Response normalization within each map, over size×size pixels; in the 2012 program only.

    `alpha` multiplies each squared term; the program divides its own by size² first.
    """

    size: int = 5
    alpha: float = 0.001 / 25
    kind: ClassVar[str] = "mapnorm"


@dataclass(frozen=True)
class BatchNorm:
    """Batch normalization over batch, rows and columns. Replaces the convolution's bias."""

    kind: ClassVar[str] = "bn"


@dataclass(frozen=True)
class MaxPool:
    """Max pooling, overlapping by default (paper §3.4).

    Attributes:
      ceil: whether the number of windows rounds up, as in cuda-convnet and Caffe. Windows are
        then clipped at the bottom and right edges.
    """

    size: int = 3
    stride: int = 2
    ceil: bool = True
    kind: ClassVar[str] = "pool"


@dataclass(frozen=True)
class AvgPool:
    """Average pooling; the number of windows rounds up, and they are clipped at the edges."""

    size: int = 3
    stride: int = 2
    kind: ClassVar[str] = "pool"


@dataclass(frozen=True)
class AdaptiveAvgPool:
    """Averages size×size cells of any input, as torch.nn.AdaptiveAvgPool2d does."""

    size: int
    kind: ClassVar[str] = "avgpool"


@dataclass(frozen=True)
class Dropout:
    """Dropout at the rate `AlexNet.dropout`, paper §4.2.

    Attributes:
      inverted: False: zeros units in training and scales all of them at test time, as the paper
        does. True: scales the kept units in training, as PyTorch does. Expected values agree, but
        with False the next layer's inputs, and so its gradients, are smaller in training.
    """

    inverted: bool = False
    kind: ClassVar[str] = "dropout"


Layer = (
    Conv
    | Local
    | Dense
    | ReLU
    | Tanh
    | LRN
    | MapNorm
    | BatchNorm
    | MaxPool
    | AvgPool
    | AdaptiveAvgPool
    | Dropout
)
Variant = tuple[Layer, ...]

# ------------------------------------------------------------------------------------------
# The variants
# ------------------------------------------------------------------------------------------

# Initial biases of 1: paper §5, "the second, fourth, and fifth convolutional layers, as well as
# [...] the fully-connected hidden layers". They give ReLUs positive inputs early in training.
VARIANTS: dict[str, Variant] = {
    # Krizhevsky, Sutskever and Hinton 2012, as §3 to §5 describe it. At 224 pixels padding 2 gives
    # the 55×55 maps of Figure 2; so does padding 0 at 227 pixels.
    "paper": (
        *(Conv(96, 11, stride=4, padding=2), ReLU(), LRN(), MaxPool()),
        *(Conv(256, 5, groups=2, bias=1.0), ReLU(), LRN(), MaxPool()),
        *(Conv(384, 3), ReLU()),
        *(Conv(384, 3, groups=2, bias=1.0), ReLU()),
        *(Conv(256, 3, groups=2, bias=1.0), ReLU(), MaxPool()),
        *(Dense(4096, bias=1.0), ReLU(), Dropout()),
        *(Dense(4096, bias=1.0), ReLU(), Dropout()),
        Dense("classes"),
    ),
    # One tower and no LRN.
    "single": (
        *(Conv(96, 11, stride=4, padding=2), ReLU(), MaxPool()),
        *(Conv(256, 5, bias=1.0), ReLU(), MaxPool()),
        *(Conv(384, 3), ReLU()),
        *(Conv(384, 3, bias=1.0), ReLU()),
        *(Conv(256, 3, bias=1.0), ReLU(), MaxPool()),
        *(Dense(4096, bias=1.0), ReLU(), Dropout(inverted=True)),
        *(Dense(4096, bias=1.0), ReLU(), Dropout(inverted=True)),
        Dense("classes"),
    ),
    # The authors' run #145 as its released code computed it (layers-145.cfg, layer.py): conv1
    # rounds its output size up, LRN sees one tower at a time and follows conv1 directly, and
    # pooling comes before ReLU in blocks 1 and 5.
    "original": (
        *(Conv(96, 11, stride=4, padding="ceil"), LRN(alpha=1e-4 / 5, groups=2), MaxPool(), ReLU()),
        *(Conv(256, 5, groups=2, bias=1.0), ReLU()),
        *(LRN(alpha=1e-4 / 5, groups=2), MapNorm(), MaxPool()),
        *(Conv(384, 3, std=0.03), ReLU()),
        *(Conv(384, 3, groups=2, bias=1.0, std=0.03), ReLU()),
        *(Conv(256, 3, groups=2, bias=1.0, std=0.03), MaxPool(), ReLU()),
        *(Dense(4096, bias=1.0), ReLU(), Dropout()),
        *(Dense(4096, bias=1.0), ReLU(), Dropout()),
        Dense("classes"),
    ),
    # Caffe's bvlc_reference_caffenet: pooling before LRN, whose k is 1 by default in Caffe.
    "caffenet": (
        *(Conv(96, 11, stride=4, padding=2), ReLU(), MaxPool(), LRN(k=1.0, alpha=1e-4 / 5)),
        *(Conv(256, 5, groups=2, bias=1.0), ReLU(), MaxPool(), LRN(k=1.0, alpha=1e-4 / 5)),
        *(Conv(384, 3), ReLU()),
        *(Conv(384, 3, groups=2, bias=1.0), ReLU()),
        *(Conv(256, 3, groups=2, bias=1.0), ReLU(), MaxPool()),
        *(Dense(4096, bias=1.0), ReLU(), Dropout(inverted=True)),
        *(Dense(4096, bias=1.0), ReLU(), Dropout(inverted=True)),
        Dense("classes"),
    ),
    # "One weird trick" (arXiv 1404.5997) as torchvision implements it: pooling rounds down, and
    # adaptive pooling lets the network accept any input size from 63 pixels.
    "owt": (
        *(Conv(64, 11, stride=4, padding=2), ReLU(), MaxPool(ceil=False)),
        *(Conv(192, 5, bias=1.0), ReLU(), MaxPool(ceil=False)),
        *(Conv(384, 3), ReLU()),
        *(Conv(256, 3, bias=1.0), ReLU()),
        *(Conv(256, 3, bias=1.0), ReLU(), MaxPool(ceil=False), AdaptiveAvgPool(6)),
        *(Dropout(inverted=True), Dense(4096, bias=1.0), ReLU()),
        *(Dropout(inverted=True), Dense(4096, bias=1.0), ReLU()),
        Dense("classes"),
    ),
    # AlexNet-BN of the LARS paper (arXiv 1708.03888), on one tower.
    "bn": (
        *(Conv(96, 11, stride=4, padding=2, bias=None), BatchNorm(), ReLU(), MaxPool()),
        *(Conv(256, 5, bias=None), BatchNorm(), ReLU(), MaxPool()),
        *(Conv(384, 3, bias=None), BatchNorm(), ReLU()),
        *(Conv(384, 3, bias=None), BatchNorm(), ReLU()),
        *(Conv(256, 3, bias=None), BatchNorm(), ReLU(), MaxPool()),
        *(Dense(4096, bias=1.0), ReLU(), Dropout(inverted=True)),
        *(Dense(4096, bias=1.0), ReLU(), Dropout(inverted=True)),
        Dense("classes"),
    ),
}

# The networks for CIFAR-10 that came with the 2012 program (layers-cifar/), for 32×32 images and
# crops of 24×24. Their names say what they reached: 26 % in 80 seconds, or the error on the test
# images.
CIFAR_VARIANTS: dict[str, Variant] = {
    "cifar_80sec": (
        *(Conv(32, 5, std=1e-4), ReLU(), MaxPool()),
        *(Conv(32, 5), ReLU(), AvgPool()),
        *(Conv(64, 5), ReLU(), AvgPool()),
        *(Dense(64, std=0.1), ReLU()),
        Dense("classes", std=0.1),
    ),
    "cifar_18pct": (
        *(Conv(32, 5, std=1e-4), MaxPool(), ReLU(), MapNorm(3, 5e-5 / 9)),
        *(Conv(32, 5), ReLU(), AvgPool(), MapNorm(3, 5e-5 / 9)),
        *(Conv(64, 5), ReLU(), AvgPool()),
        Dense("classes"),
    ),
    "cifar_13pct": (
        *(Conv(64, 5, std=1e-4), ReLU(), MaxPool()),
        *(Conv(64, 5), ReLU(), MaxPool()),
        *(Local(32, 3, std=0.04), ReLU()),
        *(Local(32, 3, std=0.04), ReLU()),
        Dense("classes"),
    ),
    # With normalization across 9 channels, and twice the filters in local3.
    "cifar_11pct": (
        *(Conv(64, 5, std=1e-4), ReLU(), MaxPool(), LRN(k=1.0, alpha=0.001 / 9, size=9)),
        *(Conv(64, 5), ReLU(), LRN(k=1.0, alpha=0.001 / 9, size=9), MaxPool()),
        *(Local(64, 3, std=0.04), ReLU()),
        *(Local(32, 3, std=0.04), ReLU()),
        Dense("classes"),
    ),
}

# The convolutions alone, for weights that come without fully connected layers (weights.lpips). Such
# a network has features but no logits.
CONVOLUTIONS: dict[str, Variant] = {
    "owt_conv": VARIANTS["owt"][: VARIANTS["owt"].index(AdaptiveAvgPool(6)) + 1],
}

INITIALIZERS = ("paper", "he")
DTYPES = ("float32", "bfloat16")
MIN_SIZE = 63  # pixels: the smallest input for which torchvision's alexnet has a whole pool5 window
MIN_CIFAR_SIZE = 8

INPUT = "input"  # the tap of the images, before the first layer
Edits = Mapping[str, Callable[[Array], Array]]
NO_EDITS: Edits = MappingProxyType({})


def layers_of(variant: str | Variant) -> Variant:
    """Returns the list of a variant given by name; a list is returned as it is.

    Raises:
      UserError: no variant has this name.
    """
    if not isinstance(variant, str):
        return tuple(variant)
    known = {**VARIANTS, **CIFAR_VARIANTS, **CONVOLUTIONS}
    check_choice("model variant", variant, known)
    return known[variant]


def named_layers(variant: str | Variant) -> dict[str, Layer]:
    """Returns the layers of a variant by name, in order: conv1, relu1, lrn1, pool1, conv2, …, fc8.

    Convolutions and fully connected layers are numbered together from 1. Every other layer carries
    the number of the last of these before it.

    Raises:
      UserError: the list starts with another layer, or two layers get the same name.
    """
    named: dict[str, Layer] = {}
    number = 0
    for layer in layers_of(variant):
        number += has_kernel(layer)
        name = f"{layer.kind}{number}"
        if number == 0 or name in named:
            raise UserError(
                f"a variant starts with Conv or Dense and has at most one {layer.kind} before the "
                f"next one; {layer} does not fit"
            )
        named[name] = layer
    return named


def kernel_layers(variant: str | Variant) -> tuple[str, ...]:
    """Returns the names of the layers that have a kernel: conv1 … conv5, fc6 … fc8."""
    return tuple(name for name, layer in named_layers(variant).items() if has_kernel(layer))


def has_classes(variant: str | Variant) -> bool:
    """Returns whether a variant ends in logits, one for each class."""
    last = layers_of(variant)[-1]
    return isinstance(last, Dense) and last.features == "classes"


def towers(variant: str | Variant) -> int:
    """Returns into how many towers, the paper's GPUs, the filters of a variant are split."""
    return max(getattr(layer, "groups", 1) for layer in layers_of(variant))


def has_kernel(layer: Layer) -> bool:
    """Returns whether a layer is a convolution, locally or fully connected."""
    return isinstance(layer, Conv | Local | Dense)


def check_choice(what: str, value: str, choices: Sequence[str] | dict[str, Any]) -> None:
    """Raises UserError, which lists the choices, if `value` is not one of them."""
    if value not in choices:
        raise UserError(f"unknown {what} {value!r}: choose one of {', '.join(choices)}")


# ------------------------------------------------------------------------------------------
# The network
# ------------------------------------------------------------------------------------------


def _unconstrained(name: str, x: Array) -> Array:
    return x


class AlexNet(nn.Module):
    """AlexNet: applies the layers of a variant one after the other.

    Parameters are float32 under conv1 … conv5 and fc6 … fc8, each with `kernel` (HWIO with
    I = input channels / groups; [inputs, outputs] for fc) and `bias`. The variant `bn` has
    bn1 … bn5 (`scale`, `bias`, and the collection `batch_stats`) instead of the convolutions'
    biases, which subtracting the batch mean would cancel.

    Input size: the numbers of the paper hold at 224 pixels with conv1 padding 2 and at 227 with
    `conv1_padding=0`. At any other size from 63 the same rule applies: convolutions round the
    number of windows down (conv1 of `original` rounds up), max pooling rounds it up (`owt` rounds
    down). fc6 then has as many inputs as pool5 has values, so a network is tied to the size at
    which it was initialized; only `owt`, which averages pool5 to 6×6, accepts every size.

    Example:
      >>> model = AlexNet("owt", num_classes=10)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 224, 224, 3)))
      >>> logits = model.apply(variables, jnp.zeros((8, 224, 224, 3)))  # float32[8, 10]

    Attributes:
      variant: a key of `VARIANTS`, or a list of layers.
      num_classes: length of the logits.
      dtype: of the arithmetic, "float32" or "bfloat16". Parameters and logits are float32.
      gradient_dtype: of the kernels' gradients, by default `dtype`. Devices add up gradients in
        this dtype, so "bfloat16" halves what they send (docs/pods.md). Without effect on CPU.
      dropout: probability that a unit is dropped. At 0, training needs no "dropout" rng.
      initializer: "paper", N(0, std²) with each layer's own std, or "he", He normal by fan-in.
      hidden_bias: replaces every initial bias in the list that is not 0.
      width: factor on all numbers of filters and hidden units, rounded to multiples of 8.
      conv1_padding: replaces conv1's padding; -1 keeps the variant's.
      frozen: names of layers whose batch norm uses its running statistics in training too.
      axis_name: mapped axis over which the batch is split, under pmap only. Under jit the
        compiler sees the global batch, whatever its sharding.
      constrain: called as `constrain(name, x)` on the flattened input of fc6 ("flatten") and on
        the products of the fully connected layers (their names) before the bias is added. The
        hybrid parallel kind adds sharding constraints there (`training.sharding`).

    Raises:
      UserError: an attribute, a feature name or an image size does not exist here.
    """

    variant: str | Variant = "paper"
    num_classes: int = 1000
    dtype: str = "float32"
    gradient_dtype: str | None = None
    dropout: float = 0.5
    initializer: str = "paper"
    hidden_bias: float = 1.0
    width: float = 1.0
    conv1_padding: int = -1
    frozen: tuple[str, ...] = ()
    axis_name: str | None = None
    constrain: Callable[[str, Array], Array] = _unconstrained

    def __post_init__(self) -> None:
        named_layers(self.variant)
        check_choice("model initializer", self.initializer, INITIALIZERS)
        check_choice("model dtype", self.dtype, DTYPES)
        check_choice("optimizer.gradient_dtype", self.gradient_dtype or self.dtype, DTYPES)
        super().__post_init__()

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B S S C"],
        train: bool = False,
        features: Sequence[str] = (),
        edits: Edits = NO_EDITS,
    ) -> Float32[Array, "B classes"] | tuple[Float32[Array, "B classes"], dict[str, Array]]:
        """Returns the logits and, on request, the outputs of layers by name.

        Args:
          x: images, mean subtracted, S ≥ 63.
          train: whether dropout drops units (rng stream "dropout") and batch norm uses the
            statistics of the batch.
          features: names of layers (`named_layers`) whose outputs are returned too, in a dict:
            [B, H, W, C] before the first fully connected layer and [B, D] from it on, in `dtype`.
            `conv1` is the convolution's own output with its bias, `relu1` follows ReLU. "input" is
            what conv1 sees.
          edits: for names as in `features`, functions that replace an output before the next layer
            and `features` see it. They keep its shape and dtype.
        """
        layers = named_layers(self.variant)
        is_large = getattr(layers.get("conv1"), "stride", 1) > 1  # not one for CIFAR-10
        _check_input(x.shape, MIN_SIZE if is_large else MIN_CIFAR_SIZE)
        tapped = {*features, *edits}
        for name in (*features, *edits):
            check_choice("feature", name, (INPUT, *layers))
        outputs: dict[str, Array] = {}

        def tap(name: str, x: Array) -> Array:
            if name in edits:
                x = edits[name](x)
            if name in features:
                outputs[name] = x
            return x

        x = tap(INPUT, x.astype(self.dtype))
        for name, layer in _pool_early(layers, tapped).items():
            x = tap(name, self._apply(name, layer, x, train))
        logits = x.astype(jnp.float32)
        return (logits, outputs) if features else logits

    def _apply(self, name: str, layer: "Layer | _PooledConv", x: Array, train: bool) -> Array:
        match layer:
            case _PooledConv():
                return self._conv(name, layer.conv, x, layer.pool)
            case Conv():
                return self._conv(name, layer, x)
            case Local():
                return self._local(name, layer, x)
            case Dense():
                return self._dense(name, layer, x)
            case ReLU():
                # After batch norm the input need not be stored: what batch norm stores gives it.
                normalized = BatchNorm() in layers_of(self.variant)
                return nn.relu(x) if normalized else ops.relu(x)
            case Tanh():
                return jnp.tanh(x)
            case LRN(k, alpha, groups, size):
                return ops.local_response_norm(x, k=k, alpha=alpha, groups=groups, size=size)
            case MapNorm(size, alpha):
                return ops.within_map_norm(x, alpha=alpha, size=size)
            case BatchNorm():
                return self._batch_norm(name, x, train)
            case MaxPool(size, stride, ceil):
                pooled: Array = ops.max_pool(x, size, stride, ceil)
                return pooled
            case AvgPool(size, stride):
                return ops.avg_pool(x, size, stride)
            case AdaptiveAvgPool(size):
                return ops.adaptive_avg_pool(x, size)
            case Dropout(inverted):
                kept = self._kept_units(x.shape) if train and self.dropout else None
                return ops.dropout(x, self.dropout, kept, inverted)

    def _conv(self, name: str, layer: Conv, x: Array, pool: MaxPool | None = None) -> Array:
        padding = layer.padding
        if name == "conv1" and self.conv1_padding >= 0:
            padding = self.conv1_padding
        if padding == "ceil":
            pads = [ops.ceil_padding(length, layer.size, layer.stride) for length in x.shape[1:3]]
        else:
            pads = [(layer.size // 2,) * 2 if padding is None else (padding,) * 2] * 2

        def convolve(x: Array, kernel: Array, *args: Any, **kwargs: Any) -> Array:
            y = ops.conv(x, kernel, *args, gradient_dtype=self.gradient_dtype, **kwargs)
            return ops.max_pool(y, pool.size, pool.stride, pool.ceil) if pool else y

        return nn.Conv(
            self._scaled(layer.features),
            (layer.size, layer.size),
            strides=layer.stride,
            padding=pads,
            feature_group_count=layer.groups,
            use_bias=layer.bias is not None,
            dtype=self.dtype,
            kernel_init=self._kernel_init(layer.std),
            bias_init=self._bias_init(layer.bias),
            promote_dtype=ops.promote_all_but_kernel,  # type: ignore[arg-type]  # not of *args
            conv_general_dilated=convolve,
            name=name,
        )(x)

    def _local(self, name: str, layer: Local, x: Array) -> Array:
        features = self._scaled(layer.features)
        connected: Array = LocallyConnected(
            features,
            layer.size,
            kernel_init=self._kernel_init(layer.std),
            bias_init=self._bias_init(layer.bias),
            name=name,
        )(x)
        return connected

    def _dense(self, name: str, layer: Dense, x: Array) -> Array:
        if x.ndim > 2:
            x = self.constrain("flatten", x.reshape(x.shape[0], -1))

        def product(x: Array, kernel: Array, dimensions: Any, **kwargs: Any) -> Array:
            return self.constrain(name, ops.dense(x, kernel, gradient_dtype=self.gradient_dtype))

        return nn.Dense(
            self.num_classes if layer.features == "classes" else self._scaled(layer.features),
            dtype=self.dtype,
            kernel_init=self._kernel_init(layer.std),
            bias_init=self._bias_init(layer.bias),
            promote_dtype=ops.promote_all_but_kernel,  # type: ignore[arg-type]  # not of *args
            dot_general=product,
            name=name,
        )(x)

    def _batch_norm(self, name: str, x: Array, train: bool) -> Array:
        normed: Array = nn.BatchNorm(
            use_running_average=not train or name.replace("bn", "conv") in self.frozen,
            momentum=0.9,
            dtype=self.dtype,
            axis_name=self.axis_name,
            name=name,
        )(x)
        return normed

    def _kept_units(self, shape: tuple[int, ...]) -> Bool[Array, "B D"]:
        # Each image draws from a key of its own, so that masks do not depend on how many devices
        # share the batch. Under pmap `shape` is one device's part of it.
        first = jax.lax.axis_index(self.axis_name) * shape[0] if self.axis_name else 0
        return ops.dropout_mask(self.make_rng("dropout"), self.dropout, first, shape)

    def _scaled(self, units: int) -> int:
        return max(8, 8 * round(units * self.width / 8))

    def _kernel_init(self, std: float) -> nn.initializers.Initializer:
        if self.initializer == "he":
            return nn.initializers.he_normal()
        return nn.initializers.normal(std)

    def _bias_init(self, bias: float | None) -> nn.initializers.Initializer:
        return nn.initializers.constant(self.hidden_bias if bias else 0.0)


class LocallyConnected(nn.Module):
    """The layer `Local`, with `kernel` [H, W, R, R, C, D] and `bias` [H, W, D]."""

    features: int
    size: int
    kernel_init: nn.initializers.Initializer
    bias_init: nn.initializers.Initializer

    @nn.compact
    def __call__(self, x: Float[Array, "B H W C"]) -> Float[Array, "B H W D"]:
        place, window = x.shape[1:3], (self.size, self.size, x.shape[3])
        kernel = self.param("kernel", self.kernel_init, (*place, *window, self.features))
        bias = self.param("bias", self.bias_init, (*place, self.features))
        return ops.local(x, kernel) + bias.astype(x.dtype)


@dataclass(frozen=True)
class _PooledConv:
    """A convolution whose output is pooled before the bias is added."""

    conv: Conv
    pool: MaxPool


def _pool_early(
    named: dict[str, Layer], tapped: Collection[str]
) -> "dict[str, Layer | _PooledConv]":
    """Moves max pooling in front of bias and ReLU where neither output is tapped.

    Both are monotone, so max(relu(x + b)) = relu(max(x) + b): the values are the same, and bias,
    ReLU and their gradients process a quarter of the elements.
    """
    moved: dict[str, Layer | _PooledConv] = dict(named)
    names = list(named)
    for conv, relu, pool in zip(names, names[1:], names[2:], strict=False):
        match named[conv], named[relu], named[pool]:
            case Conv() as c, ReLU(), MaxPool() as p if not {conv, relu} & {*tapped}:
                moved[conv] = _PooledConv(c, p)
                del moved[relu]
                moved[pool] = ReLU()  # what it returns is still the output of the pooling layer
    return moved


def _check_input(shape: tuple[int, ...], least: int) -> None:
    if len(shape) != 4:
        raise UserError(f"the model takes images of shape [B, S, S, C], not {list(shape)}")
    height, width = shape[1:3]
    if min(height, width) < least:
        raise UserError(
            f"images of {height}x{width} pixels are too small for AlexNet: "
            f"resize them to at least {least}x{least}"
        )
