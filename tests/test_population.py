"""Seeds for weights, order and dropout, and `python -m alexnet_jax.population`."""

import json
import subprocess
import sys

import commands
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from alexnet_jax import config as configs
from alexnet_jax import evaluate, inference, population, train
from alexnet_jax.data import pipeline
from alexnet_jax.data.augment import make_augment
from alexnet_jax.models.build import build_model
from alexnet_jax.training.metrics import read_metrics
from alexnet_jax.training.optimizer import make_optimizer
from alexnet_jax.training.train_step import build_state, build_train_step
from alexnet_jax.utils.errors import UserError

FIELDS = (
    *(field for field in (*commands.SMALL, *commands.FEW) if "epochs" not in field),
    # With bn so few images let differences of one rounding grow tenfold every other step.
    "--config.model.variant=paper",
    "--config.schedule.kind=constant",
    "--config.parallel=jit",
    "--config.num_epochs=2",
)


def quickstart(digits, **fields):
    texts = [field.removeprefix("--config.").split("=", 1) for field in FIELDS]
    config = configs.load("quickstart", [("data_dir", str(digits)), *map(tuple, texts)])
    config.update_from_flattened_dict(fields)
    return config


# ------------------------------------------------------------------------------------------
# Seeds
# ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("purpose", ["weights", "order", "dropout"])
def test_each_seed_decides_about_its_own_draws_only(purpose, digits, digit_stores):
    def drawn(**fields):
        config = quickstart(digits, **fields)
        model, tx = build_model(config), make_optimizer(config, 10.0)
        state = jax.jit(lambda: build_state(config, model, tx))()
        order = pipeline.build_order(digit_stores["train"], config)
        return {
            "weights": np.asarray(state.params["conv1"]["kernel"]),
            "order": order.examples(np.arange(10)),
            "dropout": np.asarray(state.key),
        }

    usual, changed = drawn(seed=3), drawn(seed=3, **{f"seeds.{purpose}": 4})
    other = drawn(seed=4)
    for name, value in usual.items():
        expected = other[name] if name == purpose else value
        np.testing.assert_array_equal(changed[name], expected, err_msg=name)
        assert (other[name] != value).any()


# ------------------------------------------------------------------------------------------
# The population
# ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(digits, tmp_path_factory):
    """Returns the folder of three networks, trained for one epoch and then continued to two."""
    folder = tmp_path_factory.mktemp("population")
    population.train_population(quickstart(digits, num_epochs=1), 3, folder)
    population.train_population(quickstart(digits), 3, folder)
    return folder


@pytest.mark.parametrize("shared", [pytest.param(True, marks=pytest.mark.long), False])
def test_step_by_vmap_is_that_of_each_network_in_turns(shared, digits, digit_stores):
    runs = population.members(quickstart(digits), 3)
    model, tx = build_model(runs[0]), make_optimizer(runs[0], 10.0)
    step = build_train_step(runs[0], model, tx, make_augment(runs[0]))
    states = [jax.jit(lambda run=run: build_state(run, model, tx))() for run in runs]
    batches = [digit_stores["train"].read(np.arange(8) + 100 * n) for n in range(3)]
    batch = batches[0] if shared else jax.tree.map(lambda *x: np.stack(x), *batches)
    for by_vmap in (True, False):
        all_states = jax.tree.map(lambda *x: jnp.stack(x), *states)
        together = population.over_networks(step, shared, by_vmap=by_vmap)
        for _ in range(3):
            all_states, metrics = together(all_states, batch)
        for n, state in enumerate(states):
            for _ in range(3):
                state, own = jax.jit(step)(state, batches[0 if shared else n])
            assert float(metrics["loss"][n]) == pytest.approx(float(own["loss"]), rel=1e-5)
            for x, y in zip(
                jax.tree.leaves(state.params), jax.tree.leaves(all_states.params), strict=True
            ):
                limit = 1e-5 * np.abs(x).max() if by_vmap else 0
                np.testing.assert_allclose(y[n], x, rtol=0, atol=limit)


def test_each_network_equals_the_one_trained_alone(trained, digits, tmp_path):
    train.train_and_evaluate(quickstart(digits, seed=1), tmp_path)
    (step, alone), (_, together) = (commands.saved_state(w) for w in (tmp_path, trained / "seed1"))
    assert step == 40
    for (path, x), y in zip(
        jax.tree.leaves_with_path(alone["params"]), jax.tree.leaves(together["params"]), strict=True
    ):
        np.testing.assert_allclose(y, x, rtol=0, atol=1e-6 * np.abs(x).max(), err_msg=str(path))
    rows = [
        [r for r in read_metrics(w) if r["split"] == "eval"] for w in (tmp_path, trained / "seed1")
    ]
    for own, other in zip(*rows, strict=True):
        assert own["step"] == other["step"] and own["epoch"] == other["epoch"]
        assert other["loss"] == pytest.approx(own["loss"], rel=1e-4)
    (_, first), (_, last) = (commands.saved_state(trained / f"seed{n}") for n in (0, 2))
    assert (first["params"]["conv1"]["kernel"] != last["params"]["conv1"]["kernel"]).any()


def test_workdirs_are_those_of_single_runs(trained, digits, tmp_path, capsys):
    workdirs = [trained / f"seed{n}" for n in range(3)]
    with pytest.raises(SystemExit):
        evaluate.main([*map(str, workdirs), "--out", str(tmp_path), "--data-dir", str(digits)])
    found = json.loads((tmp_path / "evaluation.json").read_text())
    assert [row["network"] for row in found] == [*map(str, workdirs), "average of 3"]
    for row, workdir in zip(found, workdirs, strict=False):
        best = inference.load(workdir)
        assert best.config.seed == int(workdir.name[-1])
        (own,) = [
            r for r in read_metrics(workdir) if r["split"] == "eval" and r["step"] == best.step
        ]
        assert row["top1"] == pytest.approx(own["top1"])
    # Training the same config there has nothing left to do.
    train.train_and_evaluate(quickstart(digits, seed=2), workdirs[2])
    assert "resuming from step 40 of 40" in capsys.readouterr().out


@pytest.mark.slow
def test_killed_population_finishes_with_the_same_command(digits, tmp_path):
    argv = (
        *(sys.executable, "-m", "alexnet_jax.population", "--config", "quickstart"),
        *("--count=2", f"--workdir={tmp_path}", f"--config.data_dir={digits}", *FIELDS),
        "--config.seeds.order=0",
    )
    process = subprocess.Popen(argv, cwd=commands.ROOT, stdout=subprocess.PIPE, text=True)
    with process.stdout:
        for line in process.stdout:
            if line.startswith("step     20"):
                process.kill()
    assert process.wait() == -9
    result = commands.run(*argv)
    assert result.returncode == 0, result.stderr
    for n in range(2):
        steps = [r["step"] for r in read_metrics(tmp_path / f"seed{n}") if r["split"] == "eval"]
        assert steps == [20, 40]


@pytest.mark.parametrize(
    ("fields", "count", "message"),
    [
        ({}, 0, "--count=0 must be at least 1"),
        ({"schedule.kind": "plateau"}, 2, "schedule.kind=plateau would give each network another"),
        ({"init_from": "runs/x"}, 2, "init_from gives all networks the same weights"),
    ],
)
def test_what_cannot_be_trained_together_is_rejected(fields, count, message, digits, tmp_path):
    with pytest.raises(UserError, match=message):
        population.train_population(quickstart(digits, **fields), count, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_run_of_another_config_is_kept(trained, digits):
    with pytest.raises(UserError, match="seed0 holds a run of another config"):
        population.train_population(quickstart(digits, learning_rate=0.5), 3, trained)
