"""Checkpoints in one process: repeated saves of a step, damage, and restoring for inference."""

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from alexnet_jax.training.checkpoint import Checkpoints, NotFinite
from alexnet_jax.training.train_step import TrainState
from alexnet_jax.utils.errors import UserError

CONFIG = '{"seed": 3, "model": {"variant": "owt"}, "augment": {"crop_size": 64}}'


def random_arrays(tree):
    random = np.random.default_rng(0)
    return jax.tree.map(lambda x: jnp.asarray(1000 * random.normal(size=x.shape), x.dtype), tree)


@pytest.fixture
def state():
    """A small train state with random values, before the first step."""
    params = {"conv1": {"kernel": jnp.ones((11, 11, 3, 8)), "bias": jnp.ones(8)}}
    state = TrainState(
        step=jnp.int32(0),
        params=params,
        batch_stats={"bn1": {"mean": jnp.ones(8)}},
        average={},
        opt_state=optax.sgd(0.1, momentum=0.9).init(params),
        plateau=optax.contrib.reduce_on_plateau().init(params),
        key=jax.random.PRNGKey(0),
    )
    return random_arrays(state).replace(step=jnp.int32(0))


@pytest.fixture
def checkpoints(tmp_path):
    checkpoints = Checkpoints(tmp_path, CONFIG, keep=3)
    yield checkpoints
    checkpoints.close()


def save(checkpoints, state, position, top1):
    checkpoints.save(state, position, top1)
    checkpoints.wait()


def assert_equal(tree, expected):
    assert jax.tree.structure(tree) == jax.tree.structure(expected)
    jax.tree.map(np.testing.assert_array_equal, tree, expected)


def test_first_evaluated_checkpoint_of_a_step_is_kept(checkpoints, state):
    evaluations = ((1, None, 1), (2, None, 1), (3, 0.5, 3), (4, 0.9, 3), (5, None, 3))
    for position, top1, kept in evaluations:
        save(checkpoints, state, {"at": position}, top1)
        assert checkpoints.restore(0, state).position == {"at": kept}
        assert checkpoints.was_evaluated(0) == (position >= 3)


def test_latest_and_best_checkpoints_are_kept(checkpoints, state):
    for step, top1 in ((1, 0.2), (2, 0.9), (3, 0.5), (4, None), (5, None), (6, None)):
        save(checkpoints, state.replace(step=jnp.int32(step)), None, top1)
    assert checkpoints.all_steps == [2, 4, 5, 6]
    assert (checkpoints.best_step, checkpoints.latest_step) == (2, 6)


def test_state_that_is_overwritten_during_a_save_is_saved_as_it_was(checkpoints, state):
    expected = jax.tree.map(np.array, state)
    checkpoints.save(state, None, None)
    add_one = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    jax.block_until_ready(add_one(state))
    checkpoints.wait()
    assert_equal(checkpoints.restore(0, expected).state, expected)


def test_state_with_a_parameter_that_is_not_finite_is_not_saved(checkpoints, state):
    save(checkpoints, state, None, None)
    bias = state.params["conv1"]["bias"].at[3].set(jnp.inf)
    params = {"conv1": {**state.params["conv1"], "bias": bias}}
    with pytest.raises(NotFinite):
        checkpoints.save(state.replace(step=jnp.int32(1), params=params), None, None)
    checkpoints.wait()
    assert checkpoints.all_steps == [0]


def test_failed_save_is_reported_by_the_next_call(tmp_path, state):
    checkpoints = Checkpoints(tmp_path, CONFIG)
    (tmp_path / "checkpoints").rmdir()
    (tmp_path / "checkpoints").write_text("no folder")
    checkpoints.save(state, None, None)
    with pytest.raises(OSError, match="checkpoints"):
        checkpoints.save(state.replace(step=jnp.int32(1)), None, None)
    checkpoints.close()


def test_saved_config_can_be_read_without_this_program(checkpoints, state, tmp_path):
    save(checkpoints, state, None, None)
    (file,) = (tmp_path / "checkpoints" / "0" / "config").glob("metadata")
    assert json.loads(file.read_text()) == json.loads(CONFIG)


@pytest.mark.parametrize("what", ["state", "variables"])
def test_damaged_checksum_is_detected(what, checkpoints, state, tmp_path):
    save(checkpoints, state, None, None)
    path = tmp_path / "checkpoints" / "0" / "progress" / "metadata"
    reader = Checkpoints(tmp_path)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    restore = {
        "state": lambda: checkpoints.restore(0, state).state,
        "variables": lambda: reader.restore_variables(0, variables),
    }[what]
    assert_equal(restore(), {"state": state, "variables": variables}[what])
    saved = json.loads(path.read_text())
    for index in range(1, 1 + len(jax.tree.leaves(variables))):
        damaged = json.loads(path.read_text())
        damaged["checksums"][index] += 1
        path.write_text(json.dumps(damaged))
        with pytest.raises(ValueError, match="its checksum is not that of what was saved"):
            restore()
        path.write_text(json.dumps(saved))
    restore()
    reader.close()


def test_flipped_bits_are_never_returned(checkpoints, state, tmp_path):
    """For some of them TensorStore alone would return other values without an error."""
    save(checkpoints, state, None, None)
    reader = Checkpoints(tmp_path)
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    data = (tmp_path / "checkpoints" / "0" / "state").rglob("d/*")
    file = max(data, key=lambda p: p.stat().st_size)
    content = file.read_bytes()
    messages = []
    for index in np.linspace(0, len(content) - 1, 25).astype(int):
        flipped = bytearray(content)
        flipped[index] ^= 1
        file.write_bytes(flipped)
        try:
            assert_equal(checkpoints.restore(0, state).state, state)
            assert_equal(reader.restore_variables(0, variables), variables)
        except ValueError as error:
            messages.append(str(error))
    reader.close()
    assert "its checksum is not that of what was saved" in messages


def test_variables_that_do_not_fit_are_rejected(checkpoints, state, tmp_path):
    save(checkpoints, state, None, None)
    layer = {
        name: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding)
        for name, x in state.params["conv1"].items()
    }
    reader = Checkpoints(tmp_path)
    other_shape = {"conv1": {**layer, "kernel": layer["bias"]}}
    for params, error, message in (
        ({"conv1": layer, "conv2": layer}, ValueError, r"it has no params\.conv2\.bias"),
        (other_shape, UserError, r"conv1\.kernel has shape .* variant owt at 64 pixels has \[8\]"),
    ):
        with pytest.raises(error, match=message):
            reader.restore_variables(0, {"params": params, "batch_stats": state.batch_stats})
    reader.close()


def test_open_checkpoints_read_only_changes_nothing(checkpoints, state, tmp_path):
    save(checkpoints, state, None, 0.5)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    reader = Checkpoints(tmp_path)
    assert (reader.all_steps, reader.best_step, reader.latest_step) == ([0], 0, 0)
    assert_equal(reader.restore(0, state).state, state)
    reader.close()
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def truncate_largest_file(folder: Path):
    largest = max((p for p in folder.rglob("*") if p.is_file()), key=lambda p: p.stat().st_size)
    largest.write_bytes(largest.read_bytes()[: largest.stat().st_size // 2])


def test_newest_readable_checkpoint_is_restored(checkpoints, state, tmp_path):
    for step in (1, 2, 3):
        save(checkpoints, state.replace(step=jnp.int32(step)), {"next": step}, None)
    folder = tmp_path / "checkpoints"
    truncate_largest_file(folder / "3" / "state")
    shutil.rmtree(folder / "2" / "progress")
    warnings = []
    restored = checkpoints.restore_latest(state, warnings.append)
    assert (int(restored.state.step), restored.position) == (1, {"next": 1})
    assert [line.split(" is damaged")[0] for line in warnings] == [
        "checkpoint of step 3",
        "checkpoint of step 2",
    ]
    assert sorted(p.name for p in (tmp_path / "damaged").iterdir()) == ["2", "3"]
    assert checkpoints.all_steps == [1]
