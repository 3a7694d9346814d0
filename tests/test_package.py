"""What `pip install .` gives: the dependencies of the requirements files, commands and configs."""

import ast
import importlib
import inspect
import re
import sys
import tomllib
from importlib.metadata import packages_distributions
from pathlib import Path

import pytest

from alexnet_jax import config as configs
from alexnet_jax.utils.errors import UserError

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
HELD_BY = {
    "requirements.txt": PROJECT["dependencies"] + EXTRAS["test"],
    "requirements-serve.txt": EXTRAS["serve"] + EXTRAS["browser"],
    **{f"requirements-{extra}.txt": EXTRAS[extra] for extra in ("docs", "torch", "tpu")},
}
# Not those that pip could not resolve beside the others, which so no extra can name.
FILES = [f for f in ROOT.glob("requirements*.txt") if "pip install --no-deps" not in f.read_text()]


def required(file):
    lines = [re.sub(r"(^|\s+)#.*", "", line) for line in file.read_text().splitlines()]
    return [line for line in lines if line]


def canonical(requirement):
    return re.match(r"[\w-]+", requirement)[0].lower().replace("_", "-")


@pytest.mark.parametrize("file", sorted(FILES), ids=lambda file: file.name)
def test_a_file_of_requirements_holds_what_the_package_asks_for(file):
    assert required(file) == HELD_BY[file.name]


def imported(folder):
    """The names of other packages' modules that are imported, anywhere in a file."""
    nodes = [
        node for file in folder.rglob("*.py") for node in ast.walk(ast.parse(file.read_text()))
    ]
    whole = [alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names]
    parts = [node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module]
    return {name.split(".")[0] for name in whole + parts} - sys.stdlib_module_names


def test_all_that_the_package_imports_is_asked_for():
    asked = {canonical(one) for file in ROOT.glob("requirements*.txt") for one in required(file)}
    givers = packages_distributions()
    modules = imported(ROOT / "alexnet_jax") | imported(ROOT / "configs")
    assert "jax" in modules
    for module in modules - {"alexnet_jax", "jaxlib"}:  # jaxlib is a part of JAX
        # What is not installed has the name of its module: gradio, torch.
        assert asked & {canonical(name) for name in givers.get(module, [module])}, module


def test_every_requirement_has_a_lowest_version():
    asked = PROJECT["dependencies"] + [one for extra in EXTRAS.values() for one in extra]
    assert [one for one in asked if not re.search(r"[>=]=\d", one)] == []


def test_nothing_to_test_with_comes_with_the_package():
    tools = {canonical(one) for one in EXTRAS["test"] + EXTRAS["browser"]}
    assert {"pytest", "ruff"} <= tools
    assert tools.isdisjoint(canonical(one) for one in PROJECT["dependencies"])


def test_every_module_that_can_be_run_is_a_console_command():
    runnable = {
        file.stem
        for file in (ROOT / "alexnet_jax").glob("*.py")
        if 'if __name__ == "__main__":' in file.read_text()
    }
    assert PROJECT["scripts"] == {
        f"alexnet-{module}": f"alexnet_jax.{module}:main" for module in runnable
    }


@pytest.mark.parametrize("target", PROJECT["scripts"].values())
def test_a_console_command_can_be_called_without_arguments(target):
    module, function = target.split(":")
    inspect.signature(getattr(importlib.import_module(module), function)).bind()


def test_our_configs_are_found_from_any_folder(tmp_path, monkeypatch):
    here = configs.load("configs/imagenet.py")
    monkeypatch.chdir(tmp_path)
    assert configs.load("configs/imagenet.py") == here


THEIRS = """
from alexnet_jax.config import default_config
def get_config():
    config = default_config()
    config.seed = 7
    return config
"""


def test_a_config_of_the_folder_comes_before_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("configs").mkdir()
    Path("configs/imagenet.py").write_text(THEIRS)
    assert configs.load("configs/imagenet.py").seed == 7
    assert configs.load("configs/imagenet_pod.py").optimizer.kind == "lars"


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("configs/imagnet.py", "no config file configs/imagnet.py; there are: configs/imagenet.py"),
        ("imagenet_2012.py", "no config file imagenet_2012.py; there are: configs/imagenet_2012"),
        ("elsewhere/configs/imagenet.py", "no config file elsewhere/configs/imagenet.py"),
    ],
)
def test_a_config_that_is_nowhere_is_told_of_with_ours(name, told, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=told):
        configs.load(name)
