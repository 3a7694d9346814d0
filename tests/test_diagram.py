"""The diagram shows what the layer table and the list of layers say."""

import pytest

from alexnet_jax.analysis import diagram
from alexnet_jax.models.alexnet import (
    LRN,
    VARIANTS,
    AlexNet,
    Conv,
    Dense,
    ReLU,
    Tanh,
    named_layers,
)
from alexnet_jax.models.summary import layer_table


@pytest.mark.parametrize("variant", VARIANTS)
def test_diagram_has_the_shapes_and_parameters_of_the_layer_table(variant):
    model, size = AlexNet(variant, num_classes=10, width=0.25), (227, 227, 3)
    figure = diagram.network_figure(model, size)
    texts = [text.get_text() for text in figure.axes[0].texts]
    convolutions = {n: c for n, c in named_layers(variant).items() if isinstance(c, Conv)}
    towers = max(layer.groups for layer in convolutions.values())
    for row in layer_table(model, size):
        *sides, channels = row.output_shape
        per_tower = "+".join([str(channels // towers)] * towers)
        shape = "×".join([*map(str, sides), f"({per_tower})" if towers > 1 else per_tower])
        assert row.name in texts and (shape if sides else f"{channels:,}") in texts
        assert not row.params or f"{row.params:,} params" in texts
    total = sum(row.params for row in layer_table(model, size))
    assert any(f"variant {variant}: {total:,} parameters" in text for text in texts)
    drawn = {layer.name: layer for layer in diagram.drawn_layers(model, size)}
    for name, layer in convolutions.items():
        assert drawn[name].separate == (layer.groups > 1)


def operations(variant, **fields):
    layers = diagram.drawn_layers(AlexNet(variant, **fields), (224, 224, 3))
    return {layer.name: layer.operations for layer in layers}


@pytest.mark.parametrize(
    ("variant", "layer", "expected"),
    [
        ("paper", "conv1", ("11×11 conv, stride 4", "ReLU", "LRN")),
        ("caffenet", "pool1", ("3×3 max, stride 2", "LRN")),
        ("original", "conv2", ("5×5 conv", "ReLU", "LRN, per tower", "norm within maps")),
        ("original", "pool1", ("3×3 max, stride 2", "ReLU")),
        ("owt", "avgpool5", ("average to 6×6", "dropout 0.5")),
        ("owt", "fc7", ("fully connected", "ReLU")),
        ("bn", "conv3", ("3×3 conv", "batch norm", "ReLU")),
    ],
)
def test_operations_are_below_the_layer_that_they_follow(variant, layer, expected):
    assert operations(variant)[layer] == expected


def test_dropout_of_zero_is_not_shown():
    assert operations("paper", dropout=0.0)["fc6"] == ("fully connected", "ReLU")


def test_diagram_of_an_edited_list():
    edited = tuple(
        Tanh() if isinstance(layer, ReLU) else layer
        for layer in VARIANTS["paper"]
        if not isinstance(layer, LRN)
    )
    assert operations(edited)["conv1"] == ("11×11 conv, stride 4", "tanh")
    figure = diagram.network_figure(AlexNet(edited), (224, 224, 3))
    assert "custom variant: 60,965,224 parameters" in figure.axes[0].texts[-2].get_text()


def test_window_is_relative_to_the_previous_layer():
    variant = (Conv(96, 11, stride=4), ReLU(), Dense("classes"))
    image, conv1, fc2 = diagram.drawn_layers(AlexNet(variant), (220, 220, 3))
    assert (image.window, conv1.window, fc2.window) == (None, 11 / 220, None)
