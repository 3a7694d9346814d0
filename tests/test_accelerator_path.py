"""Training by the code that GPUs run, on CPU, against training by the code for CPUs.

The layers select their code by `jax.lax.platform_dependent` when a program is lowered. Here it
selects the code for `cuda`, so that CPU runs it. Nothing else is
changed: data, augmentation, the loop, evaluation and checkpoints are those of any training.
"""

import functools

import jax
import numpy as np
import pytest

from alexnet_jax import config as configs
from alexnet_jax.models.build import build_model
from alexnet_jax.train import train_and_evaluate
from alexnet_jax.training.metrics import read_metrics
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import init_state
from alexnet_jax.utils import process

STEPS = 4
FIELDS = {
    "train_split": "train[:96]",
    "eval_split": "test[:96]",
    "batch_size": str(96 // STEPS),
    "num_epochs": "1",
    "learning_rate": "0.002",
    "log_every_steps": "1",
    "parallel": "jit",
    "model.width": "0.5",  # enough channels for Winograd's algorithm on CPU
}
LOSS_TOLERANCE = 1e-5
# Of the final parameters, relative to how much training changed them.
TOLERANCE = 1e-3
# The corners of digits are black, so conv1's outputs are 0 there. On CPU they are a rounding error
# above or below 0, which decides whether ReLU passes the gradient. Only the bias depends on that.
CONV1_BIAS_TOLERANCE = 0.1
# The functions whose code for GPUs must have run, by variant.
CONV, DENSE, POOL = "_conv", "dense", "max_pool"
LRN = "channel_sum_by_slices"
CROP = "_crop_by_slices"
USED = {
    "paper": {CROP, CONV, DENSE, POOL, LRN},
    "owt": {CROP, CONV, DENSE, POOL},
    "bn": {CROP, CONV, DENSE, POOL},
}


def load_config(variant, data_dir):
    fields = FIELDS | {"data_dir": str(data_dir), "model.variant": variant}
    return configs.load("quickstart", list(fields.items()))


def train(config, workdir):
    """Returns the loss of each step and of the evaluation, and the final parameters."""
    jax.clear_caches()  # which contain layers as traced with the other code
    state = train_and_evaluate(config, workdir)
    losses = [row["loss"] for row in read_metrics(workdir)]
    return losses, jax.tree.map(np.asarray, state.params)


def initial_params(config):
    tx = make_optimizer(config, steps_per_epoch=1.0)
    shape = (config.augment.crop_size, config.augment.crop_size, 3)
    init = functools.partial(init_state, build_model(config), tx, config.seed, shape)
    return jax.tree.map(np.asarray, process.run_once(init).params)


@pytest.fixture
def accelerator_code(monkeypatch):
    """Makes the layers use their code for accelerators; returns the names of what they used."""
    used = set()

    def select_cuda(*args, default, cuda=None, **others):
        function = cuda or default
        partial = isinstance(function, functools.partial)
        name = function.func.__name__ if partial else function.__qualname__
        used.add(name.split(".")[0])
        return function(*args)

    def use():
        monkeypatch.setattr(jax.lax, "platform_dependent", select_cuda)
        return used

    yield use
    monkeypatch.undo()
    jax.clear_caches()


@pytest.mark.parametrize(
    "variant",
    ["paper", *(pytest.param(variant, marks=pytest.mark.long) for variant in ("owt", "bn"))],
)
def test_training_by_the_code_of_accelerators_equals_training_by_that_of_cpus(
    variant, accelerator_code, digits, tmp_path
):
    config = load_config(variant, digits)
    start = initial_params(config)
    expected_losses, expected = train(config, tmp_path / "cpu")
    used = accelerator_code()
    losses, params = train(config, tmp_path / "accelerator")
    assert used == USED[variant]
    assert len(losses) == STEPS + 1
    np.testing.assert_allclose(losses, expected_losses, rtol=LOSS_TOLERANCE)
    differences = jax.tree.map(
        lambda a, b, c: float(np.linalg.norm(a - b) / np.linalg.norm(b - c)),
        params,
        expected,
        start,
    )
    assert differences["conv1"].pop("bias", 0.0) < CONV1_BIAS_TOLERANCE
    assert max(jax.tree.leaves(differences)) < TOLERANCE, differences
