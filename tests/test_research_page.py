"""The examples of docs/research.md run and print the output that the page shows."""

import contextlib
import io
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from narrow_model import random_variables

from alexnet_jax import config as configs
from alexnet_jax import inference
from alexnet_jax.config import default_config
from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.build import build_model
from alexnet_jax.weights import lpips

PAGE = (Path(__file__).parent.parent / "docs/research.md").read_text()
EXAMPLE = re.compile(r"```python\n(.*?)```\n(?:\n```text\n(.*?)```)?", re.S)


def create(workdir, config):
    size = config.augment.crop_size
    variables = random_variables(build_model(config), jnp.zeros((1, size, size, 3)))
    for layer in variables["params"].values():
        layer["bias"] *= 0.0  # else they decide about the class
    stats = Statistics(np.full(3, 120, np.float32), np.zeros((3, 3), np.float32))
    config.augment.mean = "channel"
    inference.create(workdir, config, variables, stats, ())
    return variables


@pytest.fixture
def workdirs(tmp_path, monkeypatch):
    """The page's workdirs, with random weights, in the current folder."""
    monkeypatch.chdir(tmp_path)
    create(tmp_path / "runs/quickstart", configs.load("quickstart"))
    convolutions = default_config()
    convolutions.model.variant, convolutions.model.width = "owt_conv", 0.1
    convolutions.model.num_classes = 0
    convolutions.augment.crop_size = 64
    params = create(tmp_path / "runs/convolutions", convolutions)["params"]
    linear = [np.ones(len(layer["bias"]), np.float32) for layer in params.values()]
    lpips.save_linear(tmp_path / "runs/convolutions", linear)


def run_examples(examples):
    names = {}
    for number, (code, output) in enumerate(examples, 1):
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            exec(compile(code, f"example {number}", "exec"), names)
        assert printed.getvalue() == output
    return names


def test_examples_run(workdirs):
    examples = [example for example in EXAMPLE.findall(PAGE) if "foolbox" not in example[0]]
    assert len(examples) == 2
    names = run_examples(examples)
    assert names["distance"] > 0
    assert not np.array_equal(names["without"]["prob"], names["found"]["prob"])


@pytest.mark.torch
def test_foolbox_changes_the_class(workdirs):
    pytest.importorskip("foolbox", reason="pip install -r requirements-torch.txt")
    first, *_, last = EXAMPLE.findall(PAGE)
    names = run_examples([first, last])
    assert names["fooled"].all()
    found = jax.jit(names["logits"])(names["changed"]).argmax(1)
    assert (found != names["labels"]).all()
