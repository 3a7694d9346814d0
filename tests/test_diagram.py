"""The network's picture tells what its layer table does."""

import pytest

from alexnet_jax.analysis import diagram as network_picture
from alexnet_jax.models.alexnet import VARIANTS, AlexNet, layer_table


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_network_is_drawn_with_the_shapes_and_parameters_of_its_table(variant):
    model, size = AlexNet(variant, num_classes=10, width=0.25), (227, 227, 3)
    figure = network_picture.network_figure(model, size)
    told = [text.get_text() for text in figure.axes[0].texts]
    towers = max(VARIANTS[variant].groups)
    for row in layer_table(model, size):
        *sides, maps = row.output_shape
        part = "+".join([str(maps // towers)] * towers)
        shape = "×".join([*map(str, sides), f"({part})" if towers > 1 else part])
        assert row.name in told and (shape if sides else f"{maps:,}") in told
        assert not row.params or f"{row.params:,} params" in told
    total = sum(row.params for row in layer_table(model, size))
    assert any(f"variant {variant}: {total:,} parameters" in text for text in told)
    layers = {layer.name: layer for layer in network_picture.network_layers(model, size)}
    assert [layers[f"conv{n}"].apart for n in range(1, 6)] == [
        groups > 1 for groups in VARIANTS[variant].groups
    ]


def test_operations_stand_below_the_layer_they_follow():
    def told(variant, dropout=0.5):
        model = AlexNet(variant, dropout=dropout)
        layers = network_picture.network_layers(model, (224, 224, 3))
        return {layer.name: layer.operations for layer in layers}

    assert told("paper")["conv1"] == ("11×11 conv, stride 4", "ReLU", "LRN")
    assert told("caffenet")["pool1"] == ("3×3 max, stride 2", "LRN")
    original = told("original")
    assert original["conv2"][1:] == ("ReLU", "LRN, per tower", "norm within maps")
    assert original["pool1"] == ("3×3 max, stride 2", "ReLU")
    assert told("owt")["fc6"] == ("dropout 0.5", "fully connected", "ReLU")
    assert told("owt", dropout=0.0)["fc6"] == ("fully connected", "ReLU")
    assert told("bn")["conv3"] == ("3×3 conv", "batch norm", "ReLU")
