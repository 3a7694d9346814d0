"""The layer table: receptive fields by gradients, and the CSV of every operation."""

import csv

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrow_model import random_variables

from alexnet_jax import visualize
from alexnet_jax.models.alexnet import AlexNet
from alexnet_jax.models.summary import layer_table, operation_table

IMAGES = 24


def rows_seen(model, size, name, row):
    """Returns the first and last row of pixels that some output in a row depends on."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.uniform(-128, 128, (IMAGES, size, size, 3)), jnp.float32)
    variables = random_variables(model, x)
    variables["params"] = jax.tree.map(np.abs, variables["params"])  # so that no ReLU is closed

    @jax.jit
    @jax.grad
    def slopes(x):
        _, outputs = model.apply(variables, x, features=(name,))
        values = outputs[name][:, row]
        return (values * rng.uniform(1, 2, values.shape)).sum()

    # Pooling depends on the largest value of a window, which is at its edge for some images.
    seen = np.flatnonzero(np.abs(slopes(x)).max((0, 2, 3)))
    return int(seen[0]), int(seen[-1])


@pytest.mark.parametrize(
    ("variant", "name"),
    [
        *(("owt", name) for name in ("conv1", "pool1", "conv2", "pool2", "conv3", "relu4")),
        *(("paper", name) for name in ("lrn2", "pool2")),
        ("original", "mapnorm2"),
        ("cifar_13pct", "local4"),
        ("cifar_80sec", "pool2"),
    ],
)
def test_stride_and_receptive_field_are_those_of_gradients(variant, name):
    is_cifar = variant.startswith("cifar")
    size = 48 if is_cifar else 227
    model = AlexNet(variant, width=0.1)
    row = {row.name: row for row in operation_table(model, (size, size, 3))}[name]
    middle = row.output_shape[0] // 2
    first, last = rows_seen(model, size, name, middle)
    assert last - first + 1 == row.field
    assert rows_seen(model, size, name, middle + 1)[0] - first == row.stride


def test_outputs_of_no_place_have_no_field():
    fields = {row.name: row.field for row in layer_table(AlexNet("owt"), (224, 224, 3))}
    assert fields["pool5"] == fields["avgpool5"] == 195 and fields["fc6"] is None
    averaged = {row.name: row.field for row in layer_table(AlexNet("owt"), (256, 256, 3))}
    assert averaged["pool5"] == 195 and averaged["avgpool5"] is None


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_csv_has_every_operation(dtype, tmp_path, capsys):
    table = tmp_path / "layers.csv"
    words = ("--config.model.variant=bn", f"--config.model.dtype={dtype}")
    with pytest.raises(SystemExit) as ended:
        visualize.main(
            ["network", "--config", "imagenet", *words, f"--csv={table}", f"--out={tmp_path}/n.png"]
        )
    assert not ended.value.code and str(table) in capsys.readouterr().out
    rows = {row["layer"]: row for row in csv.DictReader(table.open())}
    assert [*rows][:4] == ["conv1", "bn1", "relu1", "pool1"] and [*rows][-1] == "fc8"
    assert sum(int(row["parameters"]) for row in rows.values()) == 62_379_720
    size = 4 if dtype == "float32" else 2
    conv2 = rows["conv2"]
    assert (conv2["output"], conv2["stride"], conv2["receptive_field"]) == ("27x27x256", "8", "51")
    macs, inputs, outputs = 27 * 27 * 256 * 5 * 5 * 96, 27 * 27 * 96, 27 * 27 * 256
    assert int(conv2["macs"]) == macs
    assert int(conv2["parameter_bytes"]) == 4 * (5 * 5 * 96 * 256 + 2 * 256)
    assert int(conv2["activation_bytes"]) == size * (inputs + outputs)
    moved = int(conv2["parameter_bytes"]) + int(conv2["activation_bytes"])
    assert float(conv2["flops_per_byte"]) == pytest.approx(2 * macs / moved, rel=1e-3)
    assert (rows["fc7"]["receptive_field"], rows["relu1"]["macs"]) == ("", "0")


def test_csv_needs_its_suffix(tmp_path, capsys):
    with pytest.raises(SystemExit) as ended:
        visualize.main(["network", "--config", "imagenet", f"--csv={tmp_path}/layers.txt"])
    assert ended.value.code == 2
    assert "must name a file that ends in .csv" in capsys.readouterr().err
