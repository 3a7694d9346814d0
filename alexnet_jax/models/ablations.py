"""The paper's ablations: each is a function from a list of layers to another one.

An ablation changes one decision of the network, so that its effect on accuracy can be measured. The
paper reports what LRN (§3.3), overlapping pooling (§3.4), the second tower (§3.5), dropout (§4.2)
and each convolution (§1, §7) contribute.
"""

import dataclasses
import difflib
from collections.abc import Callable, Sequence

from alexnet_jax.models.alexnet import (
    LRN,
    AdaptiveAvgPool,
    AvgPool,
    Conv,
    Dropout,
    Layer,
    Local,
    MaxPool,
    ReLU,
    Tanh,
    Variant,
    has_kernel,
    kernel_layers,
    layers_of,
    named_layers,
)
from alexnet_jax.utils.errors import UserError

REMOVAL = "no_"  # followed by the name of a layer, as in no_conv3


def no_lrn(layers: Variant) -> Variant:
    """No local response normalization. With it the top-1 error was 1.4 % lower (§3.3)."""
    return tuple(layer for layer in layers if not isinstance(layer, LRN))


def pool_2x2(layers: Variant) -> Variant:
    """Pooling without overlap: 2×2 windows. With overlap the top-1 error was 0.4 % lower (§3.4).

    The number of windows rounds down, which gives maps of the same size as the paper's 3×3 windows.
    """

    def small(layer: Layer) -> Layer:
        match layer:
            case MaxPool():
                return MaxPool(size=2, stride=2, ceil=False)
            case AvgPool():
                return AvgPool(size=2, stride=2)
        return layer

    return tuple(map(small, layers))


def tanh(layers: Variant) -> Variant:
    """The saturating nonlinearity to which §3.1 compares ReLU."""
    return tuple(Tanh() if isinstance(layer, ReLU) else layer for layer in layers)


def half_filters(layers: Variant) -> Variant:
    """Half the filters of all convolutions except the last one.

    The paper's footnote 2 keeps the last one, because nearly all parameters are behind it. With
    half the filters on one GPU the top-1 error was 1.7 % higher (§3.5).
    """
    last = max((i for i, layer in enumerate(layers) if isinstance(layer, Conv | Local)), default=-1)

    def half(index: int, layer: Layer) -> Layer:
        if isinstance(layer, Conv | Local) and index != last:
            return dataclasses.replace(layer, features=layer.features // 2)
        return layer

    return tuple(half(*pair) for pair in enumerate(layers))


def one_tower(layers: Variant) -> Variant:
    """Every filter sees all channels: no groups, and so more connections than on two GPUs."""
    return tuple(
        dataclasses.replace(layer, groups=1) if isinstance(layer, Conv | LRN) else layer
        for layer in layers
    )


def no_dropout(layers: Variant) -> Variant:
    """No dropout, without which the network overfits (§4.2)."""
    return tuple(layer for layer in layers if not isinstance(layer, Dropout))


ABLATIONS: dict[str, Callable[[Variant], Variant]] = {
    function.__name__: function
    for function in (no_lrn, pool_2x2, tanh, half_filters, one_tower, no_dropout)
}


def ablate(variant: str | Variant, names: Sequence[str]) -> str | Variant:
    """Returns a variant with ablations applied, or the variant itself if there are none.

    The layers after a removed one are numbered anew: without conv3, conv4 is named conv3.

    Args:
      names: of `ABLATIONS`, or no_LAYER, which removes a layer with a kernel by its name in the
        variant. Removals come first, then the others in the order of `ABLATIONS`.

    Raises:
      UserError: an ablation does not exist, changes nothing, or leaves no network.
    """
    if not names:
        return variant
    removable = [f"{REMOVAL}{name}" for name in kernel_layers(variant)[1:-1]]
    for name in names:
        if name not in ABLATIONS and name not in removable:
            known = [*ABLATIONS, *removable]
            near = difflib.get_close_matches(str(name), known, cutoff=0.5) or known
            raise UserError(
                f"model.ablation: unknown ablation {name!r} of variant {_named(variant)}; the "
                f"nearest are {', '.join(near)}"
            )
    layers = _without(variant, [name.removeprefix(REMOVAL) for name in names if name in removable])
    for name, function in ABLATIONS.items():
        if name in names:
            before, layers = layers, function(layers)
            if layers == before:
                raise UserError(
                    f"model.ablation: {name} changes nothing in variant {_named(variant)}; leave "
                    "it out"
                )
    return layers


def _without(variant: str | Variant, removed: Sequence[str]) -> Variant:
    """Removes layers with what follows each of them, except for pooling.

    Pooling stays, so that the maps after it keep their size.
    """
    kept: list[Layer] = []
    owner = ""
    for name, layer in named_layers(variant).items():
        if has_kernel(layer):
            owner = name
        if owner not in removed or isinstance(layer, MaxPool | AvgPool | AdaptiveAvgPool):
            kept.append(layer)
    try:
        named_layers(tuple(kept))
    except UserError as error:
        names = ", ".join(f"{REMOVAL}{name}" for name in removed)
        raise UserError(
            f"model.ablation: {names} is impossible in variant {_named(variant)}, because two "
            "pooling layers would follow each other; remove another layer"
        ) from error
    return tuple(kept)


def _named(variant: str | Variant) -> str:
    return variant if isinstance(variant, str) else f"of {len(layers_of(variant))} layers"
