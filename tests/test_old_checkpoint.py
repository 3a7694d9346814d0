"""A workdir that version 0.1 wrote can still be loaded and resumed.

`data/workdir_0.1.tar.xz` has config.json, statistics.npz and the checkpoint of step 10 of this run
of version 0.1 (commit 8353764), and `expected_logits.npy`, the logits of IMAGES by the same
version:

    python train.py --config=configs/quickstart.py --config.model.variant=bn \\
        --config.model.width=0.01 --config.image_size=64 --config.train_split=train[:480] \\
        --config.eval_split=test[:480] --config.batch_size=48 --config.num_epochs=2 \\
        --config.parallel=jit --config.log_every_steps=1 --config.schedule.kind=plateau \\
        --config.schedule.warmup_epochs=0 --config.schedule.patience=1 --workdir=run

The variant bn has parameters, running statistics and the state of a plateau schedule, and the same
geometry at 64 pixels in both versions.
"""

import json
import re
import sys
import tarfile
from contextlib import closing

import jax
import numpy as np
import pytest
from commands import ROOT, run, saved_state, saved_steps

from alexnet_jax import __version__, build_model, default_config, inference, init_state
from alexnet_jax.config import to_json
from alexnet_jax.training.checkpoint import Checkpoints
from alexnet_jax.training.optimizer import make_optimizer

ROWS, COLUMNS, CHANNELS = np.indices((64, 64, 3))
IMAGES = np.stack([4 * ROWS, 255 - COLUMNS * (CHANNELS + 1)]).astype(np.uint8)
STEPS = range(11, 21)


@pytest.fixture
def workdir(tmp_path):
    folder = tmp_path / "run"
    with tarfile.open(ROOT / "tests" / "data" / "workdir_0.1.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder


def test_logits_are_those_of_version_0_1(workdir):
    network = inference.load(workdir)
    assert network.step == 10
    assert network.class_names == tuple("0123456789")
    logits = network.features(IMAGES, ["fc8"])["fc8"]
    np.testing.assert_allclose(logits, np.load(workdir / "expected_logits.npy"), rtol=1e-4)


@pytest.mark.long
def test_training_resumes(workdir, digits):
    _, before = saved_state(workdir)
    fields = {
        "model.variant": "bn",
        "model.width": 0.01,
        "image_size": 64,
        "train_split": "train[:480]",
        "eval_split": "test[:480]",
        "batch_size": 48,
        "num_epochs": 2,
        "parallel": "jit",
        "log_every_steps": 1,
        "schedule.kind": "plateau",
        "schedule.warmup_epochs": 0,
        "schedule.patience": 1,
        "data_dir": digits,
    }
    overrides = [f"--config.{name}={value}" for name, value in fields.items()]
    command = (sys.executable, "train.py", "--config", "configs/quickstart.py", *overrides)
    done = run(*command, f"--workdir={workdir}")
    assert done.returncode == 0, done.stderr
    assert "resuming from step 10 of 20" in done.stdout
    assert saved_steps(workdir) == [10, 20]
    _, after = saved_state(workdir)
    assert jax.tree.structure(after) == jax.tree.structure(before)
    rows = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows if row["split"] == "train"] == list(STEPS)
    # It resumes with the trained weights: version 0.1 had a loss of 6.5 at its first steps, and
    # 2.3 at these.
    assert np.mean([row["loss"] for row in rows if row["split"] == "train"]) < 3


def test_velocity_of_a_run_with_frozen_layers_is_restored(tmp_path):
    """Version 0.1 stored the velocity of the layers that train, and no entry for the others."""
    config = default_config()
    config.model.width, config.model.num_classes, config.freeze = 0.01, 10, ("conv1", "conv2")
    model, tx = build_model(config), make_optimizer(config, 1.0)
    new = init_state(model, tx, 0, (64, 64, 3))
    config.freeze = ()
    chain = make_optimizer(config, 1.0)
    trained = {name: x for name, x in new.params.items() if name not in ("conv1", "conv2")}
    velocity = jax.tree.map(lambda x: x + 1.0, chain.init(trained))
    with closing(Checkpoints(tmp_path, to_json(config))) as checkpoints:
        checkpoints.save(new.replace(opt_state=velocity), position=None)
        checkpoints.wait()
        restored = checkpoints.restore_latest(jax.eval_shape(lambda: new)).state
    assert jax.tree.structure(restored) == jax.tree.structure(new)
    for got, want in zip(*map(jax.tree.leaves, (restored.opt_state, velocity)), strict=True):
        np.testing.assert_array_equal(got, want)


def test_other_shapes_are_one_sentence_with_variant_size_and_version(workdir):
    """As for version 0.1's `owt` at most sizes: here the config is changed to another size."""
    config = json.loads((workdir / "config.json").read_text())
    config["image_size"] = config["augment"]["crop_size"] = 128
    (workdir / "config.json").write_text(json.dumps(config))
    done = run(sys.executable, "-m", "alexnet_jax.evaluate", workdir)
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1, done.stderr
    expected = rf"fc6.kernel has shape .* variant bn at 64 pixels has .* in version {__version__};"
    assert re.search(expected, done.stderr)
