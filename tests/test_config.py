"""Configs: every one loads, every field can be set, and mistakes are named with the mend."""

import argparse
import json
from pathlib import Path

import pytest

from alexnet_jax import config as configs
from alexnet_jax.training import checks
from alexnet_jax.training import optimizer as optim
from alexnet_jax.training import sharding as parallel
from alexnet_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
QUICKSTART = str(ROOT / "configs/quickstart.py")


def parse(*argv):
    return configs.parse(argv, argparse.ArgumentParser())[0]


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_can_train(path):
    config = configs.load(str(path))
    assert config.name == path.stem
    checks.check_config(config)
    parallel.build_model(config)
    parallel.check(config)


CONTRACT = ("dataset", "data_dir", "batch_size", "num_epochs", "learning_rate", "seed", "parallel")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_every_config_has_the_fields_of_the_contract(path):
    config = configs.load(str(path))
    assert all(field in config for field in CONTRACT)
    assert all(field in config.model for field in ("variant", "num_classes", "dtype"))


PAPER = {
    "batch_size": 128,
    "num_epochs": 90,
    "learning_rate": 0.01,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0.0005,
    "optimizer.bias_learning_rate": 1.0,
    "schedule.kind": "plateau",
    "schedule.factor": 0.1,
    "schedule.max_drops": 3,
    "model.variant": "paper",
    "model.dropout": 0.5,
    "model.init": "paper",
    "model.hidden_bias": 1.0,
    "augment.crop_size": 224,
    "augment.color_noise": 0.1,
    "augment.color_noise_scale": "eigenvalue",
    "augment.mean": "image",
    "image_size": 256,
    "eval.views": "ten",
}


def test_imagenet_is_the_paper_as_written():
    config = configs.load("configs/imagenet.py")
    assert {name: configs.flat(config)[name] for name in PAPER} == PAPER


LARS_PAPER = {
    "batch_size": 32_768,
    "num_epochs": 100,
    "learning_rate": 22.0,
    "optimizer.kind": "lars",
    "optimizer.trust_coefficient": 0.001,
    "optimizer.momentum": 0.9,
    "optimizer.weight_decay": 0.0005,
    "schedule.kind": "polynomial",
    "schedule.power": 2.0,
    "schedule.warmup_epochs": 5.0,
    "schedule.scaling": "none",  # 22 is the rate at 32,768 images, not at another batch size
    "model.variant": "bn",
    "model.dtype": "bfloat16",
    "parallel": "auto",
}


def test_imagenet_pod_is_the_lars_papers_alexnet_bn_at_32k():
    config = configs.load("configs/imagenet_pod.py")
    assert {name: configs.flat(config)[name] for name in LARS_PAPER} == LARS_PAPER


OVERRIDES = [
    (["--config.batch_size=64"], "batch_size", 64),
    (["--config.batch_size", "64"], "batch_size", 64),
    (["--config.learning_rate=1e-3"], "learning_rate", 0.001),
    (["--config.learning_rate=1"], "learning_rate", 1.0),
    (["--config.model.variant=owt"], "model.variant", "owt"),
    (["--config.augment.flip=true"], "augment.flip", True),
    (["--config.schedule.step_epochs=(3, 6)"], "schedule.step_epochs", (3, 6)),
    (["--config.schedule.changes=((1, 'all', 'learning_rate', 0.1),)"], "schedule.changes", None),
    (["--config.dataset=folder:/my photos"], "dataset", "folder:/my photos"),
    (["--config.freeze=conv1, conv2"], "freeze", ("conv1", "conv2")),
    (["--config.freeze=conv1"], "freeze", ("conv1",)),
    (["--config.freeze=('conv1',)"], "freeze", ("conv1",)),
    (["--config.freeze=()"], "freeze", ()),
]


@pytest.mark.parametrize(("argv", "field", "value"), OVERRIDES)
def test_any_field_can_be_set_on_the_command_line(argv, field, value):
    got = configs.flat(parse("--config", QUICKSTART, *argv))[field]
    assert got == (((1, "all", "learning_rate", 0.1),) if value is None else value)
    assert value is None or type(got) is type(value)


MISTAKES = [
    (["--config", "configs/imagnet.py"], "no config file configs/imagnet.py.*configs/imagenet.py"),
    (["--config", "nowhere/x.py"], "no config file nowhere/x.py"),
    (["--config", QUICKSTART, "--config.batchsize=3"], "unknown field batchsize.*batch_size"),
    (["--config", QUICKSTART, "--config.dropout=0"], "unknown field dropout.*model.dropout"),
    (["--config", QUICKSTART, "--config.model=0"], "unknown field model"),
    (["--config", QUICKSTART, "--config.batch_size=many"], "batch_size='many'.*int"),
    (["--config", QUICKSTART, "--config.batch_size=1.5"], "batch_size=1.5.*int"),
    (["--config", QUICKSTART, "--config.augment.flip=perhaps"], "flip.*bool, like true or false"),
    (["--config", QUICKSTART, "--config.schedule.step_epochs=3"], "step_epochs=3.*tuple"),
    (["--config", QUICKSTART, "--config.augment.crop_area=0.2,1.0x"], "crop_area='0.2.*tuple"),
    (["--config", QUICKSTART, "--config.seed"], "--config.seed needs a value"),
    (["--config", QUICKSTART, "--wrokdir=x"], "unknown argument --wrokdir"),
]


@pytest.mark.parametrize(("argv", "told"), MISTAKES)
def test_a_mistake_on_the_command_line_is_named(argv, told):
    with pytest.raises(UserError, match=told):
        parse(*argv)


START = "from alexnet_jax.config import default_config\n"
BROKEN_FILES = [
    ("x = 1\n", "defines no get_config"),
    ("def get_config():\n    return 3\n", "must return a ConfigDict, not int"),
    ("def get_config(:\n", "line 1: SyntaxError"),
    ("import nothing_like_it\n", "line 1: ModuleNotFoundError.*nothing_like_it"),
    (START + "def get_config():\n    return default_config().no\n", "line 3: AttributeError.*no"),
    (
        START + "def get_config():\n    c = default_config()\n    c.batchsize = 3\n    return c\n",
        "line 4.*batch_size",
    ),
    (
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'model': {'variannt': 'owt'}})\n",
        "unknown field model.variannt.*model.variant",
    ),
    (
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'batch_size': 'big'})\n",
        "batch_size='big' must be of type int",
    ),
]


@pytest.mark.parametrize(("text", "told"), BROKEN_FILES)
def test_a_mistake_in_a_config_file_is_named_with_its_place(tmp_path, text, told):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=told) as refused:
        configs.load(str(path))
    assert "mine.py" in str(refused.value)


def test_a_config_of_few_fields_takes_the_others_from_the_default(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "from ml_collections import ConfigDict\n"
        "def get_config():\n    return ConfigDict({'model': {'variant': 'bn'}, 'num_epochs': 3})\n"
    )
    config = configs.load(str(path))
    assert (config.name, config.model.variant, config.num_epochs) == ("mine", "bn", 3)
    assert config.batch_size == configs.default_config().batch_size


def test_a_field_that_is_newer_than_a_saved_config_has_its_default_there():
    saved = json.loads(configs.to_json(configs.default_config()))
    del saved["augment"]["crop"], saved["storage"]
    config = configs.default_config()
    assert configs.differing_fields(config, saved) == []
    config.storage = "jpeg"
    assert configs.differing_fields(config, saved) == ["storage (raw there, jpeg here)"]


def test_differing_fields_are_those_that_would_train_otherwise():
    saved = json.loads(configs.to_json(configs.load(QUICKSTART)))
    same = parse("--config", QUICKSTART, "--config.data_dir=/x", "--config.log_every_steps=1")
    assert configs.differing_fields(same, saved) == []
    other = parse("--config", QUICKSTART, "--config.seed=9", "--config.model.dropout=0.1")
    assert configs.differing_fields(other, saved) == [
        "model.dropout (0.5 there, 0.1 here)",
        "seed (0 there, 9 here)",
    ]


def test_a_schedule_survives_json():
    config = configs.load("configs/imagenet_2012.py")
    assert configs.differing_fields(config, json.loads(configs.to_json(config))) == []
    optim.make_schedule(config, 10.0)


BAD_VALUES = [
    ("model.variant", "vgg", "vgg.*paper, single, original"),
    ("model.dtype", "float16", "float16.*bfloat16"),
    ("model.init", "xavier", "xavier.*paper, he"),
    ("parallel", "tpu", "auto, jit, pmap"),
    ("schedule.kind", "stairs", "steps"),
    ("schedule.scaling", "square", "none, linear, sqrt"),
    ("schedule.scaling_batch_size", "0", "scaling_batch_size=0"),
    ("optimizer.kind", "adam", "sgd, lars"),
    ("optimizer.trust_coefficient", "0", "trust_coefficient=0.0"),
    ("num_epochs", "0", "num_epochs=0"),
    ("checkpoint.keep", "1", "checkpoint.keep=1"),
    ("eval.every_epochs", "0", "every_epochs"),
    ("batch_size", "-1", "batch_size"),
    ("seed", "-1", "seed=-1 must lie between 0 and"),
    ("model.dropout", "1", "model.dropout=1.0"),
    ("image_size", "0", "image_size=0"),
    ("model.num_classes", "0", "num_classes=0"),
    ("learning_rate", "-0.1", "learning_rate=-0.1"),
    ("schedule.step_epochs", "(1, 'a')", "step_epochs.*numbers"),
    ("schedule.factor", "10", "schedule.factor=10.0"),
    ("schedule.warmup_epochs", "-1", "warmup_epochs=-1.0"),
]


@pytest.mark.parametrize(("field", "value", "told"), BAD_VALUES)
def test_a_value_that_does_not_exist_is_refused_before_any_data_is_touched(field, value, told):
    config = parse("--config", QUICKSTART, f"--config.{field}={value}")
    with pytest.raises(UserError, match=told):
        parallel.build_model(config)
        checks.check_config(config)
