"""The names that programs and the paper give to the taps of a network.

A tap is the output of one operation. Its own name is that of the layer in `named_layers`: `relu5`.
`NAME.input` is what goes into an operation: `relu5.input` is `conv5`, and `conv1.input` is `input`,
the images. `prob` is the softmax of the logits.

| program | names | variants |
| --- | --- | --- |
| this one | conv1, relu1, lrn1, pool1, … dropout7, fc8 | all |
| Caffe | conv1, relu1, norm1, pool1, … drop7, fc8, prob | all |
| the paper | layer 1 … layer 8, last hidden layer | all |
| torchvision | features.0 … features.12, avgpool, classifier.0 … classifier.6 | see below |

torchvision's names exist in `owt`, in `single`, and in other variants whose operations are those of
its alexnet. Caffe computes ReLU and dropout in place, so that its array `conv1` has the values of
`relu1` after a forward pass; here `conv1` is the convolution. "layer 5" has the values of the
paper's neurons: after the nonlinearity, before normalization, pooling and dropout.
"""

import difflib

from alexnet_jax.models.alexnet import (
    INPUT,
    Dropout,
    Variant,
    has_classes,
    kernel_layers,
    named_layers,
)
from alexnet_jax.utils.errors import UserError

PROB = "prob"
CAFFE_KINDS = {"lrn": "norm", "dropout": "drop"}
# The modules of torchvision's alexnet in order, by our names.
TORCHVISION = (
    *("conv1", "relu1", "pool1", "conv2", "relu2", "pool2", "conv3", "relu3", "conv4", "relu4"),
    *("conv5", "relu5", "pool5", "avgpool5"),
    *("dropout5", "fc6", "relu6", "dropout6", "fc7", "relu7", "fc8"),
)
AVGPOOL = TORCHVISION.index("avgpool5")


def taps(variant: str | Variant) -> tuple[str, ...]:
    """Returns the taps of a variant in the order in which they are computed."""
    return INPUT, *named_layers(variant), *((PROB,) if has_classes(variant) else ())


def known_names(variant: str | Variant) -> dict[str, str]:
    """Returns the tap of every name, except those that end in `.input`."""
    names = {tap: tap for tap in taps(variant)}
    names |= {_caffe_name(tap): tap for tap in named_layers(variant)}
    return names | _torchvision_names(variant) | _paper_names(variant)


def find_tap(variant: str | Variant, name: str) -> str:
    """Returns the tap of a name: "relu5" for "features.11", "pool5.input" or "layer 5" of `owt`.

    Raises:
      UserError: the variant has no such operation; the message has the nearest names.
    """
    known = known_names(variant)
    operation = name.removesuffix(".input")
    is_input = operation != name
    tap = known.get(operation)
    # What the paper calls a layer is several operations.
    if tap is None or (is_input and (tap == INPUT or operation in _paper_names(variant))):
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.4) or list(
            named_layers(variant)
        )
        raise UserError(f"unknown layer {name!r}; the nearest names are {', '.join(near)}")
    order = taps(variant)
    return order[order.index(tap) - 1] if is_input else tap


def _caffe_name(tap: str) -> str:
    kind, number = tap.rstrip("0123456789"), tap.lstrip("abcdefghijklmnopqrstuvwxyz")
    return CAFFE_KINDS.get(kind, kind) + number


def _torchvision_names(variant: str | Variant) -> dict[str, str]:
    layers = named_layers(variant)
    operations = [name for name, layer in layers.items() if not isinstance(layer, Dropout)]
    if operations != [name for name in TORCHVISION if name in operations]:
        return {}  # another order, or an operation that torchvision's alexnet does not have
    names = {
        **{f"features.{n}": tap for n, tap in enumerate(TORCHVISION[:AVGPOOL])},
        "avgpool": "avgpool5",
        **{f"classifier.{n}": tap for n, tap in enumerate(TORCHVISION[AVGPOOL + 1 :])},
    }
    return {name: tap for name, tap in names.items() if tap in layers}


def _paper_names(variant: str | Variant) -> dict[str, str]:
    layers = named_layers(variant)
    names = {}
    for number, kernel in enumerate(kernel_layers(variant), start=1):
        outputs = (f"{kind}{number}" for kind in ("relu", "tanh"))
        names[f"layer {number}"] = next((name for name in outputs if name in layers), kernel)
    if has_classes(variant) and len(names) > 1:
        names["last hidden layer"] = names[f"layer {len(names) - 1}"]
    return names
