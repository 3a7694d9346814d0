"""The recipes of CONTRIBUTING.md work in a copy of the project."""

import os
import re
import shlex
import shutil
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

pytestmark = pytest.mark.long

ROOT = Path(__file__).parent.parent
SECTIONS = dict(
    section.split("\n", 1) for section in (ROOT / "CONTRIBUTING.md").read_text().split("\n## ")[1:]
)
# The smallest builder that the recipe asks for.
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
    """Inserts text before the first line that starts with `before`."""
    old = file.read_text()
    place = old.index("\n" + before) + 1
    file.write_text(old[:place] + text + old[place:])


def blocks(recipe, language):
    return re.findall(rf"```{language}\n(.*?)```", SECTIONS[recipe], re.S)


def follow(recipe, copy, commands=None):
    """Runs the first `commands` commands of a recipe (default: all) and returns their output."""
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


def number_passed(printed):
    (line,) = re.findall(r"^(\d+) passed.*", printed, re.M)
    return int(line)


def test_run_one_test(copy):
    (printed,) = follow("Run the tests", copy)
    assert number_passed(printed) == 1


def test_add_variant(copy):
    (entry,) = blocks("Add a variant", "python")
    name = re.match(r'"(\w+)"', entry)[1]
    count = re.search(r"[\d,]{9,}", SECTIONS["Add a variant"])[0]
    model, tests = copy / "alexnet_jax/models/alexnet.py", copy / "tests/test_model.py"
    insert(model, '    "single":', textwrap.indent(entry, "    "))
    insert(tests, '    "single":', f'    "{name}": {count.replace(",", "_")},\n')
    insert(copy / "README.md", "| `single` |", f"| `{name}` | without LRN | | | | {count} | |\n")
    (printed,) = follow("Add a variant", copy)
    assert number_passed(printed) > 1  # of test_model and of test_readme


def test_add_data_set(copy):
    package = copy / "alexnet_jax/data/datasets"
    (package / "scikit_digits.py").write_text(BUILDER)
    insert(package / "__init__.py", "from", "from alexnet_jax.data.datasets import scikit_digits\n")
    (printed,) = follow("Add a data set", copy, commands=1)  # other tests draw
    assert re.search(r"scikit_digits/1.0.0 train\n  examples +60 ", printed)


def test_add_config(copy):
    text = (copy / "configs/quickstart.py").read_text()
    (copy / "configs/digits_bn.py").write_text(text.replace('"paper"', '"bn"'))
    insert(copy / "README.md", "| `configs/cifar10.py` |", "| `configs/digits_bn.py` | | |\n")
    (printed,) = follow("Add a config", copy, commands=1)  # other tests train
    assert number_passed(printed) > 1  # of test_config and of test_readme
