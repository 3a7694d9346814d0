"""The network that a config describes: a variant with the config's ablations."""

from typing import Any

from ml_collections import ConfigDict

from alexnet_jax.models.ablations import ablate
from alexnet_jax.models.alexnet import AlexNet, Variant


def variant_of(config: ConfigDict) -> str | Variant:
    """Returns the variant of `config.model`: its name, or a list of layers if it is ablated.

    Raises:
      UserError: an ablation does not exist or is impossible in the variant.
    """
    ablated: str | Variant = ablate(config.model.variant, config.model.ablation)
    return ablated


def variant_name(config: ConfigDict) -> str:
    """Returns for example "paper" or "paper with no_lrn, tanh"."""
    ablations = ", ".join(config.model.ablation)
    return f"{config.model.variant}{f' with {ablations}' if ablations else ''}"


def build_model(config: ConfigDict, **devices: Any) -> AlexNet:
    """Returns the network of `config.model`.

    Args:
      devices: attributes of `AlexNet` that depend on devices (`Parallel.model_options`).

    Raises:
      UserError: a value of `config.model` does not exist.
    """
    fields = config.model
    return AlexNet(
        variant=variant_of(config),
        num_classes=fields.num_classes,
        dtype=fields.dtype,
        dropout=fields.dropout,
        initializer=fields.init,
        hidden_bias=fields.hidden_bias,
        width=fields.width,
        conv1_padding=fields.conv1_padding,
        frozen=tuple(config.freeze),
        **devices,
    )
