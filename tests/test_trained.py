"""A workdir as what it is for afterwards: a network, its pixel statistics and its class names."""

import functools
import resource
import shutil

import commands
import jax
import numpy as np
import pytest

from alexnet_jax import inference as trained
from alexnet_jax.training import train_step as step
from alexnet_jax.utils import process as runtime
from alexnet_jax.utils.errors import UserError


def test_a_workdir_is_loaded_without_its_data(trained_run, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained_run, moved)
    network = trained.load(moved)
    assert network.class_names == tuple("0123456789")
    assert network.config.model.variant == "bn"
    assert network.stats.mean.shape == (72, 72, 3)
    assert network.step in commands.saved_steps(trained_run)
    assert set(network.variables["batch_stats"]) == {"bn1", "bn2", "bn3", "bn4", "bn5"}


@pytest.mark.parametrize("views", ["center", "ten"])
def test_all_devices_find_what_the_evaluation_step_finds_on_one(trained_run, digit_stores, views):
    network = trained.load(trained_run)
    network.config.eval.views = views
    batch = digit_stores["eval"].read(np.arange(43))  # divides over no 8 devices
    log_probs = np.asarray(trained.classifier(network, views)(batch["image"]))
    assert log_probs.shape == (43, 10)
    initial = functools.partial(step.init_state, network.model, network.config)
    state = runtime.run_once(initial).replace(**network.variables)
    eval_step = step.make_eval_step(network.model, network.config, network.stats)
    sums = jax.jit(eval_step)(state, batch)
    np.testing.assert_allclose(
        -log_probs[np.arange(43), batch["label"]].sum(), sums["loss"], rtol=1e-5
    )
    assert (log_probs.argmax(1) == batch["label"]).sum() == sums["top1"]


def test_what_is_created_is_what_is_loaded(trained_run, tmp_path):
    network = trained.load(trained_run)
    new = tmp_path / "new"
    trained.create(new, network.config, network.variables, network.stats, network.class_names)
    again = trained.load(new)
    assert again.step == 0 and again.class_names == network.class_names
    jax.tree.map(np.testing.assert_array_equal, again.variables, network.variables)
    jax.tree.map(np.testing.assert_array_equal, again.stats, network.stats)


def test_a_creation_that_was_killed_is_not_in_the_way(trained_run, tmp_path):
    network = trained.load(trained_run)
    (tmp_path / ".new.part" / "checkpoints" / "0").mkdir(parents=True)
    rest = network.variables, network.stats, network.class_names
    trained.create(tmp_path / "new", network.config, *rest)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


# Orbax's threads tell of each write that fails after the first.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_a_network_is_created_whole_or_not_at_all(trained_run, tmp_path):
    network = trained.load(trained_run)
    rest = network.variables, network.stats, network.class_names
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*new: file too large"):
            trained.create(tmp_path / "new", network.config, *rest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_training_goes_on_from_a_network_that_was_created(trained_run, digits, tmp_path):
    network = trained.load(trained_run)
    place = tmp_path / "new"
    network.config.parallel = "auto"  # as train.py has it
    trained.create(place, network.config, network.variables, network.stats, network.class_names)
    result = commands.train(digits, place, "--config.num_epochs=2")
    assert result.returncode == 0, result.stderr
    assert "going on from step 0 of 40" in result.stdout


FAULTS = {
    "no config.json": lambda run: (run / "config.json").unlink(),
    "config.json cannot be read": lambda run: (run / "config.json").write_text("{"),
    "it holds no config": lambda run: (run / "config.json").write_text("[]"),
    "unknown field": lambda run: (run / "config.json").write_text('{"colour": 1}'),
    "no checkpoint yet": lambda run: shutil.rmtree(run / "checkpoints"),
    "statistics.npz cannot be read": lambda run: (run / "statistics.npz").write_bytes(b"PK"),
}


@pytest.mark.parametrize("told", FAULTS)
def test_a_workdir_that_cannot_be_used_is_refused_by_name(trained_run, tmp_path, told):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    FAULTS[told](run)
    with pytest.raises(UserError, match=told):
        trained.load(run)


def test_a_damaged_checkpoint_and_one_that_is_not_there_are_refused(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    with pytest.raises(UserError, match="no checkpoint of step 7; there are .*40"):
        trained.load(run, step=7)
    for part in (run / "checkpoints" / "40" / "state").rglob("*"):
        if part.is_file() and part.stat().st_size > 1000:
            part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoint of step 40 in .* cannot be read"):
        trained.load(run, step=40)


def test_only_a_network_that_fits_goes_into_a_folder_that_is_empty(trained_run, tmp_path):
    network = trained.load(trained_run)
    rest = network.stats, network.class_names
    with pytest.raises(UserError, match="is not empty"):
        trained.create(trained_run, network.config, network.variables, *rest)
    params = dict(network.variables["params"], fc8={"kernel": np.zeros((3, 4))})
    with pytest.raises(UserError, match="not of variant bn: fc8.bias has shape none, not"):
        trained.create(tmp_path / "new", network.config, {"params": params}, *rest)
