"""Configs: files, command line, saved configs, and errors that name the mistake and its fix."""

import argparse
import json
from pathlib import Path

import pytest

from alexnet_jax import config as configs
from alexnet_jax import train
from alexnet_jax.data.augment import make_augment
from alexnet_jax.training import sharding
from alexnet_jax.training.optimizer import make_schedule
from alexnet_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent
FILES = sorted((ROOT / "configs").glob("*.py"))
QUICKSTART = str(ROOT / "configs/quickstart.py")


def parse(*argv):
    return configs.parse(argv, argparse.ArgumentParser())[0]


# ------------------------------------------------------------------------------------------
# Fields
# ------------------------------------------------------------------------------------------


def test_default_config_has_every_documented_field_and_no_other():
    fields = configs.flat(configs.default_config())
    assert set(fields) - {"name"} == set(configs.FIELDS)
    assert {name: configs.FIELDS[name].default for name in configs.FIELDS} == {
        name: value for name, value in fields.items() if name != "name"
    }


@pytest.mark.parametrize("name", configs.FIELDS)
def test_field_has_one_line_of_help_and_a_default_within_its_bounds(name):
    field = configs.FIELDS[name]
    assert field.help.strip() and "\n" not in field.help
    if isinstance(field.default, int | float):
        assert field.least <= field.default <= field.most


def test_default_config_cannot_get_a_field_that_does_not_exist():
    config = configs.default_config()
    with pytest.raises(AttributeError, match="batch_size"):
        config.batchsize = 3


# ------------------------------------------------------------------------------------------
# Bundled configs
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_bundled_config_describes_a_network_that_can_train(path):
    config = configs.load(str(path))
    assert config.name == path.stem
    configs.check_bounds(config)
    _, _, layers = sharding.build_network(config)
    assert layers[-1].output_shape == (config.model.num_classes,)
    make_augment(config)
    make_schedule(config, steps_per_epoch=10.0)


# Design, section 5.
CONTRACT = ("dataset", "data_dir", "batch_size", "num_epochs", "learning_rate", "seed", "parallel")


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_bundled_config_has_the_fields_of_the_contract(path):
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


def test_imagenet_is_the_recipe_of_the_paper():
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


def test_imagenet_pod_is_the_recipe_of_the_lars_paper_at_32k():
    config = configs.load("configs/imagenet_pod.py")
    assert {name: configs.flat(config)[name] for name in LARS_PAPER} == LARS_PAPER


# ------------------------------------------------------------------------------------------
# Which file a name stands for
# ------------------------------------------------------------------------------------------

OWN_CONFIG = """
from ml_collections import ConfigDict
def get_config():
    return ConfigDict({"model": {"variant": "bn"}, "num_epochs": 3})
"""


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
@pytest.mark.parametrize("form", ["{}", "configs/{}.py"])
def test_bundled_config_is_found_by_name_from_any_folder(form, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    found = configs.load(form.format(path.stem))
    assert configs.flat(found) == configs.flat(configs.load(str(path)))


@pytest.mark.parametrize("own", ["mine", "quickstart"])
@pytest.mark.parametrize("form", ["{}", "configs/{}.py"])
def test_name_finds_own_config_before_a_bundled_one(form, own, tmp_path, monkeypatch):
    (tmp_path / "configs").mkdir()
    (tmp_path / "configs" / f"{own}.py").write_text(OWN_CONFIG)
    monkeypatch.chdir(tmp_path)
    config = configs.load(form.format(own))
    assert (config.name, config.model.variant, config.num_epochs) == (own, "bn", 3)


def test_bundled_configs_are_the_files_of_the_folder():
    assert configs.bundled_configs().keys() == {path.stem for path in FILES}


def test_config_of_few_fields_takes_the_others_from_the_default(tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(OWN_CONFIG)
    config = configs.load(str(path))
    changed = {"name": "mine", "model.variant": "bn", "num_epochs": 3}
    assert configs.flat(config) == configs.flat(configs.default_config()) | changed


# ------------------------------------------------------------------------------------------
# load_config
# ------------------------------------------------------------------------------------------


def test_load_config_changes_fields_by_dotted_name():
    config = configs.load_config("quickstart", batch_size=32, **{"model.variant": "bn"})
    changed = {"batch_size": 32, "model.variant": "bn"}
    assert configs.flat(config) == configs.flat(configs.load(QUICKSTART)) | changed


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"batchsize": 3}, "unknown field batchsize.*batch_size"),
        ({"model.variannt": "bn"}, "unknown field model.variannt.*model.variant"),
        ({"batch_size": "32"}, "batch_size='32' must be of type int"),
    ],
)
def test_load_config_rejects_unknown_fields_and_other_types(overrides, message):
    with pytest.raises(UserError, match=message):
        configs.load_config("quickstart", **overrides)


# ------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------

OVERRIDES = [
    (["--config.batch_size=64"], "batch_size", 64),
    (["--config.batch_size", "64"], "batch_size", 64),
    (["--config.learning_rate=1e-3"], "learning_rate", 0.001),
    (["--config.learning_rate=1"], "learning_rate", 1.0),
    (["--config.model.variant=owt"], "model.variant", "owt"),
    (["--config.augment.flip=true"], "augment.flip", True),
    (["--config.schedule.step_epochs=(3, 6)"], "schedule.step_epochs", (3, 6)),
    (
        ["--config.schedule.changes=((1, 'all', 'learning_rate', 0.1),)"],
        "schedule.changes",
        ((1, "all", "learning_rate", 0.1),),
    ),
    (["--config.dataset=folder:/my photos"], "dataset", "folder:/my photos"),
    (["--config.freeze=conv1, conv2"], "freeze", ("conv1", "conv2")),
    (["--config.freeze=conv1"], "freeze", ("conv1",)),
    (["--config.freeze=('conv1',)"], "freeze", ("conv1",)),
    (["--config.freeze=()"], "freeze", ()),
]


@pytest.mark.parametrize(("argv", "field", "value"), OVERRIDES)
def test_command_line_sets_any_field(argv, field, value):
    config = configs.flat(parse("--config", QUICKSTART, *argv))
    assert config[field] == value
    assert type(config[field]) is type(value)


MISTAKES = [
    (["--config", "configs/imagnet.py"], "no config file configs/imagnet.py.*configs/imagenet.py"),
    (["--config", "imagnet"], "no config file imagnet; the nearest are: imagenet"),
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


@pytest.mark.parametrize(("argv", "message"), MISTAKES)
def test_mistake_on_the_command_line_is_named(argv, message):
    with pytest.raises(UserError, match=message):
        parse(*argv)


def help_of_train(capsys, *argv):
    """Returns the lines that `train.py ARGV` prints before it exits with code 0."""
    with pytest.raises(SystemExit) as exited:
        train.main(argv)
    assert exited.value.code == 0
    return capsys.readouterr().out.splitlines()


@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help_lists_the_bundled_configs_with_their_summaries(flag, capsys):
    lines = help_of_train(capsys, flag)
    assert any("--workdir" in line for line in lines)
    for path in FILES:
        summary = path.read_text().removeprefix('"""').splitlines()[0].removesuffix('"""')
        (line,) = [line for line in lines if line.split()[:1] == [path.stem]]
        assert line.endswith(summary)


def test_help_with_a_config_lists_each_of_its_fields_with_value_and_description(capsys):
    lines = help_of_train(capsys, "--config", "quickstart", "--help", "--config.batch_size=33")
    for name, value in configs.flat(configs.load(QUICKSTART)).items():
        if name != "name":
            value = 33 if name == "batch_size" else value
            assert lines[lines.index(f"  {name} = {value!r}") + 1].strip() == (
                configs.FIELDS[name].help
            )


def test_help_with_an_unknown_config_is_an_error(capsys):
    with pytest.raises(SystemExit) as exited:
        train.main(["--config", "quikstart", "--help"])
    assert exited.value.code == 2
    assert "no config file quikstart; the nearest are: quickstart" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------
# Mistakes in a config file
# ------------------------------------------------------------------------------------------

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


@pytest.mark.parametrize(("text", "message"), BROKEN_FILES)
def test_mistake_in_a_config_file_is_named_with_file_and_line(tmp_path, text, message):
    path = tmp_path / "mine.py"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as raised:
        configs.load(str(path))
    assert "mine.py" in str(raised.value)


BAD_VALUES = [
    ("model.variant", "vgg", "vgg.*paper, single, original"),
    ("model.dtype", "float16", "float16.*bfloat16"),
    ("optimizer.gradient_dtype", "float16", "gradient_dtype 'float16'.*float32, bfloat16"),
    ("model.init", "xavier", "xavier.*paper, he"),
    ("parallel", "tpu", "auto, jit, pmap"),
    ("schedule.kind", "stairs", "steps"),
    ("schedule.scaling", "square", "none, linear, sqrt"),
    ("schedule.scaling_batch_size", "0", "scaling_batch_size=0"),
    ("optimizer.kind", "adam", "sgd, sgdw, lars"),
    ("optimizer.trust_coefficient", "0", "trust_coefficient=0.0"),
    ("num_epochs", "0", "num_epochs=0"),
    ("checkpoint.keep", "1", "checkpoint.keep=1"),
    ("eval.every_epochs", "0", "every_epochs"),
    ("eval.views", "five", "eval.views='five'.*center, nine, ten"),
    ("batch_size", "-1", "batch_size"),
    ("seed", "-1", "seed=-1 must lie between 0 and"),
    ("model.dropout", "1", "model.dropout=1.0"),
    ("model.conv1_padding", "-2", "conv1_padding=-2"),
    ("image_size", "0", "image_size=0"),
    ("augment.crop_size", "73", "crop_size=73.*image_size=72"),
    ("model.num_classes", "0", "num_classes=0"),
    ("learning_rate", "-0.1", "learning_rate=-0.1"),
    ("schedule.step_epochs", "(1, 'a')", "step_epochs.*numbers"),
    ("schedule.factor", "10", "schedule.factor=10.0"),
    ("schedule.warmup_epochs", "-1", "warmup_epochs=-1.0"),
]


@pytest.mark.parametrize(("field", "value", "message"), BAD_VALUES)
def test_bad_value_is_rejected_before_data_or_workdir_are_touched(field, value, message, tmp_path):
    config = parse("--config", QUICKSTART, f"--config.{field}={value}")
    config.data_dir = str(tmp_path / "data")
    with pytest.raises(UserError, match=message):
        train.train_and_evaluate(config, tmp_path / "run")
    assert list(tmp_path.iterdir()) == []


# ------------------------------------------------------------------------------------------
# Saved configs
# ------------------------------------------------------------------------------------------


def saved(config):
    """The content of a workdir's config.json."""
    return json.loads(configs.to_json(config))


@pytest.mark.parametrize("path", FILES, ids=lambda p: p.stem)
def test_config_survives_json(path):
    config = configs.load(str(path))
    assert configs.differing_fields(config, saved(config)) == []
    again = configs.from_saved(saved(config), "config.json")
    if config.dataset == "folder:photographs":  # the config is read from other folders too
        config.dataset = f"folder:{Path.cwd()}/photographs"
    assert again.to_dict() == config.to_dict()
    make_schedule(again, 10.0)


def test_field_newer_than_a_saved_config_has_its_default():
    old = saved(configs.default_config())
    del old["augment"]["crop"], old["storage"]
    config = configs.default_config()
    assert configs.differing_fields(config, old) == []
    assert configs.from_saved(old, "config.json").to_dict() == config.to_dict()
    config.storage = "jpeg"
    assert configs.differing_fields(config, old) == ["storage (raw there, jpeg here)"]


# Version 0.1 had no conv1_padding: conv1 had no padding where its windows fit the input evenly,
# except in the two variants whose geometry did not depend on the size.
PADDING_OF_0_1 = [
    ("paper", 227, 0),
    ("paper", 224, -1),
    ("bn", 63, 0),
    ("bn", 64, -1),
    ("single", 131, 0),
    ("caffenet", 227, 0),
    ("original", 227, -1),
    ("owt", 227, -1),
    ("owt", 224, -1),
]


@pytest.mark.parametrize(("variant", "crop_size", "padding"), PADDING_OF_0_1)
def test_config_saved_by_0_1_keeps_its_conv1_padding(variant, crop_size, padding):
    config = configs.default_config()
    config.model.variant, config.augment.crop_size = variant, crop_size
    old = saved(config)
    del old["model"]["conv1_padding"]
    assert configs.from_saved(old, "config.json").model.conv1_padding == padding
    config.model.conv1_padding = padding
    assert configs.differing_fields(config, old) == []
    config.model.conv1_padding = 1
    assert configs.differing_fields(config, old) == [
        f"model.conv1_padding ({padding} there, 1 here)"
    ]


def test_path_of_a_folder_of_images_does_not_differ():
    here, there = configs.default_config(), configs.default_config()
    here.dataset, there.dataset = "folder:photos", "folder:/disk2/photos"
    assert configs.differing_fields(here, saved(there)) == []
    there.dataset = "cifar10"
    assert len(configs.differing_fields(here, saved(there))) == 1


def test_differing_fields_are_those_that_change_the_training():
    there = saved(configs.load(QUICKSTART))
    free = ("data_dir=/x", "log_every_steps=1", "parallel=mesh.zero", "hybrid_group=2")
    free += ("optimizer.accumulate_steps=2", "heartbeat_timeout_s=500")
    same = parse("--config", QUICKSTART, *(f"--config.{field}" for field in free))
    assert configs.differing_fields(same, there) == []
    other = parse("--config", QUICKSTART, "--config.seed=9", "--config.model.dropout=0.1")
    assert configs.differing_fields(other, there) == [
        "model.dropout (0.5 there, 0.1 here)",
        "seed (0 there, 9 here)",
    ]


@pytest.mark.parametrize(
    ("kind", "epochs", "may_resume"),
    [
        ("constant", 20, True),
        ("steps", 20, True),
        ("plateau", 20, True),
        ("cosine", 20, False),  # its rates depend on num_epochs
        ("polynomial", 20, False),
        ("constant", 10, False),
    ],
)
def test_run_may_resume_with_more_epochs(kind, epochs, may_resume):
    config = configs.default_config()
    config.schedule.kind, config.num_epochs = kind, 15
    there = saved(config)
    config.num_epochs = epochs
    expected = [] if may_resume else [f"num_epochs (15 there, {epochs} here)"]
    assert configs.differing_fields(config, there) == expected


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([], "config.json is damaged: it holds no config"),
        ({"colour": 1}, "config.json: unknown field colour"),
        ({"batch_size": "big"}, "config.json: batch_size='big' must be of type int"),
        ({"model": {}, "augment": 3}, "config.json: unknown field augment"),
        ({"model": {}, "augment": {"crop_size": "x"}}, "crop_size='x' must be of type int"),
    ],
)
def test_damaged_saved_config_is_rejected(content, message):
    with pytest.raises(UserError, match=message):
        configs.from_saved(content, "config.json")
