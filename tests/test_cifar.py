"""The 2012 program's networks for CIFAR-10: shapes, parameters, initial weights, commands."""

import functools
import sys

import commands
import images
import jax
import narrow_model
import numpy as np
import pytest

from alexnet_jax import config as configs
from alexnet_jax import evaluate, predict, visualize
from alexnet_jax.models.alexnet import CIFAR_VARIANTS, AlexNet, kernel_layers
from alexnet_jax.models.layers import local_response_norm, within_map_norm
from alexnet_jax.models.summary import layer_table
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.utils.errors import UserError

# From layers-cifar/ of the released program, and cuda-convnet2's layers-cifar10-11pct.cfg.
NETWORKS = {
    # variant: (crop, parameters, filters and units, sides of the maps, standard deviations)
    "cifar_80sec": (
        *(32, 145_578, (32, 32, 64, 64)),
        *((32, 16, 16, 8, 8, 4), (1e-4, 0.01, 0.01, 0.1, 0.1)),
    ),
    "cifar_18pct": (
        *(32, 89_578, (32, 32, 64)),
        *((32, 16, 16, 8, 8, 4), (1e-4, 0.01, 0.01, 0.01)),
    ),
    "cifar_13pct": (
        *(24, 1_116_490, (64, 64, 32, 32)),
        *((24, 12, 12, 6, 6, 6), (1e-4, 0.01, 0.04, 0.04, 0.01)),
    ),
    "cifar_11pct": (
        *(24, 2_112_970, (64, 64, 64, 32)),
        *((24, 12, 12, 6, 6, 6), (1e-4, 0.01, 0.04, 0.04, 0.01)),
    ),
}
DECAYS = {
    "cifar_80sec": (0.004, 0.004, 0.004, 0.03, 0.03),
    "cifar_18pct": (0.004, 0.004, 0.004, 1.0),
    "cifar_13pct": (0.0, 0.0, 0.004, 0.004, 0.004),
    "cifar_11pct": (0.0, 0.0, 0.004, 0.004, 0.01),
}


def model_and_shape(variant):
    crop, *_ = NETWORKS[variant]
    return AlexNet(variant, num_classes=10), (crop, crop, 3)


@pytest.mark.parametrize("variant", CIFAR_VARIANTS)
def test_parameters_and_maps_are_those_of_the_program(variant):
    _, count, _, sides, _ = NETWORKS[variant]
    rows = layer_table(*model_and_shape(variant))
    assert sum(row.params for row in rows) == count
    assert tuple(row.output_shape[0] for row in rows if len(row.output_shape) == 3) == sides


@pytest.mark.parametrize("variant", CIFAR_VARIANTS)
def test_width_scales_filters_and_units(variant):
    crop, _, units, *_ = NETWORKS[variant]
    rows = layer_table(AlexNet(variant, num_classes=10, width=8.0), (crop, crop, 3))
    widths = {row.name: row.output_shape[-1] for row in rows}
    assert [widths[name] for name in kernel_layers(variant)] == [*(8 * n for n in units), 10]


# variant: {norm: (what it normalizes, how)}
NORMS = {
    "cifar_18pct": {
        name: (source, functools.partial(within_map_norm, alpha=5e-5 / 9, size=3))
        for name, source in (("mapnorm1", "relu1"), ("mapnorm2", "pool2"))
    },
    "cifar_11pct": {
        name: (source, functools.partial(local_response_norm, k=1.0, alpha=0.001 / 9, size=9))
        for name, source in (("lrn1", "pool1"), ("lrn2", "relu2"))
    },
}


@pytest.mark.parametrize("variant", NORMS)
def test_norms_are_those_of_the_program(variant):
    model, (crop, *_) = model_and_shape(variant)
    x = narrow_model.images(crop)
    names = [name for norm, (source, _) in NORMS[variant].items() for name in (norm, source)]
    variables = narrow_model.random_variables(model, x)
    _, outputs = narrow_model.apply(model, variables, x, features=names)
    for name, (source, norm) in NORMS[variant].items():
        want = norm(outputs[source])
        assert float(abs(want - outputs[source]).max()) > 0.1 * float(abs(want).max())
        np.testing.assert_allclose(outputs[name], want, rtol=1e-4, atol=1e-6)


def test_a_local_layer_multiplies_each_weight_once():
    rows = {row.name: row for row in layer_table(*model_and_shape("cifar_13pct"))}
    weights = 6 * 6 * (3 * 3 * 64 * 32)
    assert rows["local3"].params == weights + 6 * 6 * 32
    assert rows["local3"].flops == 2 * weights
    assert rows["conv2"].flops == 2 * 12 * 12 * (5 * 5 * 64 * 64)


@pytest.mark.parametrize("variant", CIFAR_VARIANTS)
def test_initial_weights(variant):
    model, shape = model_and_shape(variant)
    params = jax.jit(model.init)(jax.random.key(0), np.zeros((1, *shape), np.float32))["params"]
    *_, stds = NETWORKS[variant]
    for name, std in zip(kernel_layers(variant), stds, strict=True):
        assert params[name]["kernel"].std() == pytest.approx(std, rel=0.1), name
        assert not params[name]["bias"].any()


@pytest.mark.parametrize("variant", CIFAR_VARIANTS)
def test_weight_decay_of_each_layer(variant):
    """With a gradient of 0, the first update is the decay times the rate of 0.001."""
    config = configs.load(f"configs/cifar10_{variant.removeprefix('cifar_')}.py")
    assert config.model.variant == variant
    params = {
        name: {"kernel": np.ones(1, np.float32), "bias": np.ones(1, np.float32)}
        for name in kernel_layers(variant)
    }
    tx = make_optimizer(config, steps_per_epoch=390.625)
    zeros = jax.tree.map(np.zeros_like, params)
    updates, _ = tx.update(zeros, tx.init(params), params, step=0, plateau_scale=np.float32(1))
    decays = [-updates[name]["kernel"][0] / 0.001 for name in params]
    np.testing.assert_allclose(decays, DECAYS[variant], rtol=1e-5)
    assert not any(updates[name]["bias"].any() for name in params)


def test_images_smaller_than_a_window_are_refused():
    with pytest.raises(UserError, match="4x4 pixels are too small.*at least 8x8"):
        jax.eval_shape(AlexNet("cifar_18pct").init, jax.random.key(0), np.zeros((1, 4, 4, 3)))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns (photographs, workdir): the 11 % network after a few steps on its nine views."""
    folder = tmp_path_factory.mktemp("cifar")
    for split, count in {"train": 32, "val": 8}.items():
        images.write_marks(folder / "photographs" / split, count, classes=10)
    result = commands.run(
        *(sys.executable, "train.py", "--config=configs/cifar10_11pct.py"),
        *(f"--config.dataset=folder:{folder / 'photographs'}", "--config.eval_split=val"),
        *(f"--config.data_dir={folder}", f"--workdir={folder / 'run'}"),
        *("--config.batch_size=8", "--config.num_epochs=2", "--config.model.width=0.25"),
    )
    assert result.returncode == 0, result.stderr
    assert "evaluation: loss 2.30" in result.stdout
    return folder / "photographs", folder / "run"


def call(main, *words):
    """Runs a command in this process."""
    with pytest.raises(SystemExit) as end:
        main([*map(str, words)])
    assert not end.value.code


def test_a_trained_network_is_evaluated_drawn_and_predicts(run, capsys, tmp_path):
    photographs, workdir = run
    call(evaluate.main, workdir, "--views", "center", "nine", "--out", tmp_path)
    assert "nine views" in capsys.readouterr().out
    file = next(photographs.glob("val/*/*.png"))
    call(predict.main, workdir, file)
    assert "class" in capsys.readouterr().out
    for what, *more in (["filters"], ["features", file]):
        picture = tmp_path / f"{what}.png"
        call(visualize.main, what, workdir, *more, "--out", picture)
        assert picture.stat().st_size > 1000
