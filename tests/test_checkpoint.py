"""Checkpoints in one process: which of two of the same step stays, and what damage is noticed."""

import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_step

from alexnet_jax.training import sharding as parallel
from alexnet_jax.training import train_step as step
from alexnet_jax.training.checkpoint import Checkpoints


@pytest.fixture
def saved(tmp_path):
    """The checkpoints of a run that has made no step, its state, and their folder."""
    config = test_step.config(parallel="jit", **{"model.width": 0.05})
    model = parallel.build_model(config)
    like = jax.eval_shape(lambda: step.init_state(model, config))
    random = np.random.default_rng(0)
    state = jax.tree.map(lambda x: jnp.asarray(random.integers(0, 9, x.shape), x.dtype), like)
    checkpoints = Checkpoints(tmp_path, config)
    yield checkpoints, state.replace(step=jnp.int32(0)), tmp_path / "checkpoints" / "0"
    checkpoints.close()


def save(checkpoints, state, position, top1):
    checkpoints.save(state, position, top1)
    checkpoints.wait()


def test_of_two_of_the_same_step_the_first_that_was_evaluated_stays(saved):
    checkpoints, state, _ = saved
    evaluations = ((1, None, 1), (2, None, 1), (3, 0.5, 3), (4, 0.9, 3), (5, None, 3))
    for position, top1, kept in evaluations:
        save(checkpoints, state, {"at": position}, top1)
        assert checkpoints.restore(0, state).position == {"at": kept}
        assert checkpoints.was_evaluated(0) == (position >= 3)


def test_arrays_that_are_not_those_of_the_checksums_are_damage(saved):
    checkpoints, state, folder = saved
    save(checkpoints, state, None, None)
    restored = checkpoints.restore(0, state).state
    jax.tree.map(np.testing.assert_array_equal, restored, state)
    files = filter(Path.is_file, (folder / "progress").rglob("*"))
    (path,) = (path for path in files if "checksums" in path.read_text())
    progress = json.loads(path.read_text())
    progress["checksums"][0] += 1
    path.write_text(json.dumps(progress))
    with pytest.raises(ValueError, match="its checksum is not that of what was saved"):
        checkpoints.restore(0, state)
