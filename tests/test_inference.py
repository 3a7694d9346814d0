"""A trained network loaded from its workdir: its predictions and features, and damaged files."""

import resource
import shutil

import commands
import jax
import numpy as np
import pytest

from alexnet_jax import inference
from alexnet_jax.data.augment import make_augment
from alexnet_jax.training.metrics import read_metrics
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import init_state, make_eval_step
from alexnet_jax.utils.errors import UserError


def center_views(network, images):
    """Center crops as the network sees them, by NumPy: from 72 to 64 pixels."""
    center = np.s_[4:68, 4:68]
    assert network.config.augment.mean == "image"
    pixels = images[:, *center].astype(np.float32) - network.stats.mean[center]
    return pixels * network.config.augment.pixel_scale


def apply(network, views, **kwargs):
    return jax.jit(lambda v, x: network.model.apply(v, x, train=False, **kwargs))(
        network.variables, views
    )


# ------------------------------------------------------------------------------------------
# Loading and applying a network
# ------------------------------------------------------------------------------------------


def test_workdir_is_loaded_without_its_data(trained_run, tmp_path):
    moved = tmp_path / "elsewhere"
    shutil.copytree(trained_run, moved)
    network = inference.load(moved)
    assert network.class_names == tuple("0123456789")
    assert network.config.model.variant == "bn"
    assert network.stats.mean.shape == (72, 72, 3)
    assert set(network.variables["batch_stats"]) == {"bn1", "bn2", "bn3", "bn4", "bn5"}


def test_best_checkpoint_is_loaded_by_default_and_any_by_its_step(trained_run):
    evaluations = [row for row in read_metrics(trained_run) if row["split"] == "eval"]
    best = max(evaluations, key=lambda row: (row["top1"], row["step"]))["step"]
    assert inference.load(str(trained_run)).step == best
    for step in commands.saved_steps(trained_run):
        network = inference.load(trained_run, step)
        assert network.step == step
        _, state = commands.saved_state(trained_run, step)
        jax.tree.map(np.testing.assert_array_equal, network.variables["params"], state["params"])


def test_predict_returns_the_softmax_of_the_center_crops(network, digit_stores):
    batch = digit_stores["eval"].read(np.arange(43))  # not divisible by 8 devices
    probabilities = network.predict(batch["image"])
    assert probabilities.shape == (43, 10) and probabilities.dtype == np.float32
    np.testing.assert_allclose(probabilities.sum(axis=1), 1, rtol=1e-5)
    logits = np.float64(apply(network, center_views(network, batch["image"])))
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(probabilities, expected, rtol=1e-3, atol=1e-6)
    assert (probabilities.argmax(axis=1) == batch["label"]).mean() > 0.3  # it was trained


def test_predict_averages_ten_views_where_the_config_does(trained_run, digit_stores):
    network = inference.load(trained_run)
    network.config.eval.views = "ten"
    images = digit_stores["eval"].read(np.arange(8))["image"]
    augment = make_augment(network.config, network.stats)
    views = [augment.view(images, place) for place in augment.views]
    expected = np.mean([jax.nn.softmax(apply(network, view)) for view in views], axis=0)
    np.testing.assert_allclose(network.predict(images), expected, rtol=1e-3, atol=1e-6)


def test_features_are_the_outputs_of_layers_for_the_center_crops(network, digit_stores):
    images = digit_stores["eval"].read(np.arange(43))["image"]
    names = ["conv1", "relu1", "pool5", "fc7", "fc8"]
    features = network.features(images, names)
    assert {name: x.shape for name, x in features.items()} == {
        "conv1": (43, 15, 15, 8),
        "relu1": (43, 15, 15, 8),
        "pool5": (43, 1, 1, 24),
        "fc7": (43, 408),
        "fc8": (43, 10),
    }
    logits, expected = apply(network, center_views(network, images), features=names)
    for name, x in features.items():
        assert x.dtype == np.float32
        scale = np.abs(expected[name]).max()
        np.testing.assert_allclose(x, expected[name], rtol=0, atol=1e-4 * scale)
    np.testing.assert_allclose(features["fc8"], logits, rtol=0, atol=1e-4 * np.abs(logits).max())
    assert features["conv1"].min() < 0 and features["relu1"].min() == 0


def test_unknown_feature_is_rejected_with_the_choices(network, digit_stores):
    images = digit_stores["eval"].read(np.arange(8))["image"]
    with pytest.raises(
        UserError, match="unknown layer 'conv9'; the nearest names are conv5, conv4"
    ):
        network.features(images, ["conv9"])


@pytest.mark.parametrize("views", ["center", "ten"])
def test_classifier_on_all_devices_equals_the_evaluation_step_on_one(
    trained_run, digit_stores, views
):
    network = inference.load(trained_run)
    network.config.eval.views = views
    batch = digit_stores["eval"].read(np.arange(43))  # not divisible by 8 devices
    log_probs = np.asarray(inference.classifier(network, views)(batch["image"]))
    assert log_probs.shape == (43, 10)
    state = jax.eval_shape(
        lambda: init_state(network.model, make_optimizer(network.config, 1.0), 0, (64, 64, 3))
    ).replace(**network.variables)
    eval_step = make_eval_step(network.model, make_augment(network.config, network.stats))
    sums = jax.jit(lambda variables, batch: eval_step(state.replace(**variables), batch))(
        network.variables, batch
    )
    np.testing.assert_allclose(
        -log_probs[np.arange(43), batch["label"]].sum(), sums["loss"], rtol=1e-5
    )
    assert (log_probs.argmax(1) == batch["label"]).sum() == sums["top1"]


# ------------------------------------------------------------------------------------------
# Creating a workdir
# ------------------------------------------------------------------------------------------


def test_created_network_is_loaded_bitwise(trained_run, tmp_path):
    network = inference.load(trained_run)
    new = tmp_path / "new"
    inference.create(new, network.config, network.variables, network.stats, network.class_names)
    again = inference.load(new)
    assert again.step == 0 and again.class_names == network.class_names
    jax.tree.map(np.testing.assert_array_equal, again.variables, network.variables)
    jax.tree.map(np.testing.assert_array_equal, again.stats, network.stats)


def test_leftovers_of_a_killed_creation_do_not_matter(trained_run, tmp_path):
    network = inference.load(trained_run)
    (tmp_path / ".new.part" / "checkpoints" / "0").mkdir(parents=True)
    rest = network.variables, network.stats, network.class_names
    inference.create(tmp_path / "new", network.config, *rest)
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


# Orbax's threads report each write that fails after the first.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
def test_network_that_cannot_be_written_leaves_no_workdir(trained_run, tmp_path):
    network = inference.load(trained_run)
    rest = network.variables, network.stats, network.class_names
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(UserError, match="cannot write .*new: file too large"):
            inference.create(tmp_path / "new", network.config, *rest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert not (tmp_path / "new").exists()


@pytest.mark.slow
def test_training_resumes_from_a_created_network(trained_run, digits, tmp_path):
    network = inference.load(trained_run)
    workdir = tmp_path / "new"
    network.config.parallel = "auto"  # as train.py has it
    rest = network.variables, network.stats, network.class_names
    inference.create(workdir, network.config, *rest)
    result = commands.train(digits, workdir, "--config.num_epochs=2")
    assert result.returncode == 0, result.stderr
    assert "resuming from step 0 of 40" in result.stdout


# ------------------------------------------------------------------------------------------
# Workdirs that cannot be used
# ------------------------------------------------------------------------------------------

FAULTS = {
    "no config.json": lambda run: (run / "config.json").unlink(),
    "config.json cannot be read": lambda run: (run / "config.json").write_text("{"),
    "it holds no config": lambda run: (run / "config.json").write_text("[]"),
    "unknown field": lambda run: (run / "config.json").write_text('{"colour": 1}'),
    "no checkpoint yet": lambda run: shutil.rmtree(run / "checkpoints"),
    "statistics.npz cannot be read": lambda run: (run / "statistics.npz").write_bytes(b"PK"),
}


@pytest.mark.parametrize("message", FAULTS)
def test_unusable_workdir_is_rejected(trained_run, tmp_path, message):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    FAULTS[message](run)
    with pytest.raises(UserError, match=message):
        inference.load(run)


def test_file_as_workdir_is_rejected(tmp_path):
    (tmp_path / "notes.txt").touch()
    with pytest.raises(UserError, match="no trained network in .*notes.txt"):
        inference.load(tmp_path / "notes.txt")


def test_damaged_and_missing_checkpoints_are_rejected(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    with pytest.raises(UserError, match="no checkpoint of step 7; there are .*40"):
        inference.load(run, step=7)
    for part in (run / "checkpoints" / "40" / "state").rglob("*"):
        if part.is_file() and part.stat().st_size > 1000:
            part.write_bytes(part.read_bytes()[:100])
    with pytest.raises(UserError, match="checkpoint of step 40 in .* cannot be read"):
        inference.load(run, step=40)


def test_create_rejects_a_folder_with_files_and_arrays_of_another_network(trained_run, tmp_path):
    network = inference.load(trained_run)
    rest = network.stats, network.class_names
    with pytest.raises(UserError, match="is not empty"):
        inference.create(trained_run, network.config, network.variables, *rest)
    params = dict(network.variables["params"], fc8={"kernel": np.zeros((3, 4))})
    with pytest.raises(UserError, match="not of variant bn: fc8.bias has shape none, not"):
        inference.create(tmp_path / "new", network.config, {"params": params}, *rest)
