"""`python -m alexnet_jax.evaluate`: accuracy of networks alone, averaged, and by class."""

import csv
import json
import os
import sys

import commands
import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import evaluate, inference
from alexnet_jax.analysis import evaluation, figures
from alexnet_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def store(digit_stores):
    return digit_stores["eval"]


@pytest.fixture(scope="module")
def other_run(trained_run, tmp_path_factory):
    """The workdir of a less accurate network of the same shape: fc8 with noise added."""
    network = inference.load(trained_run)
    kernel = network.variables["params"]["fc8"]["kernel"]
    noise = 0.3 * kernel.std() * jax.random.normal(jax.random.key(1), kernel.shape)
    network.variables["params"]["fc8"]["kernel"] = kernel + noise
    place = tmp_path_factory.mktemp("trained") / "other"
    inference.create(place, network.config, network.variables, network.stats, network.class_names)
    return place


def probabilities(workdir, store, views):
    """Returns the network's softmax of every example, in float64."""
    images = store.read(np.arange(store.num_examples))["image"]
    classify = inference.classifier(inference.load(workdir), views)
    return np.exp(np.asarray(classify(images), np.float64))


def scores(probs, labels):
    first_five = np.argsort(-probs, axis=1)[:, :5]
    own = probs[np.arange(len(labels)), labels]
    return {
        "count": len(labels),
        "top1": (first_five[:, 0] == labels).mean(),
        "top5": (first_five == labels[:, None]).any(axis=1).mean(),
        "loss": -np.log(own).mean(),
    }


def test_command_evaluates_each_network_and_their_average(
    trained_run, other_run, digits, store, tmp_path
):
    result = commands.run(
        *(sys.executable, "-m", "alexnet_jax.evaluate", trained_run, other_run),
        *("--views", "center", "ten", "--batch-size", "96", "--out", tmp_path / "out"),
        *("--data-dir", digits),
        env=os.environ | {"XLA_FLAGS": ""},  # unoptimized programs take longer for 22,000 views
    )
    assert result.returncode == 0, result.stderr
    rows = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    runs = [str(trained_run), str(other_run), "average of 2"]
    assert [(row["network"], row["views"]) for row in rows] == [
        (run, views) for views in ("center", "ten") for run in runs
    ]
    for row in rows:
        chosen = [row["network"]] if row["network"] in runs[:2] else runs[:2]
        probs = np.mean([probabilities(run, store, row["views"]) for run in chosen], axis=0)
        expected = scores(probs, store.labels)
        assert {key: row[key] for key in expected} == pytest.approx(expected, rel=1e-5)
        assert f"{100 * expected['top1']:.2f} %" in result.stdout
    with (tmp_path / "out" / "per_class.csv").open() as file:
        per_class = list(csv.DictReader(file))
    assert [row["class"] for row in per_class] == list("0123456789")
    assert sum(int(row["count"]) for row in per_class) == 1000
    right = sum(int(row["count"]) * float(row["top1"]) for row in per_class)
    assert right / 1000 == pytest.approx(rows[-1]["top1"])
    assert "average of 2, ten views, by class" in result.stdout


def test_evaluation_equals_the_one_during_training(trained_run, store):
    network = inference.load(trained_run)
    ensembles = evaluation.all_ensembles([trained_run], ["center"])
    (result,) = evaluation.evaluate([network], store, 64, ensembles)
    metrics = map(json.loads, (trained_run / "metrics.jsonl").read_text().splitlines())
    (row,) = [r for r in metrics if r["split"] == "eval" and r["step"] == network.step]
    found = result.summary()
    assert (found["top1"], found["top5"]) == (row["top1"], row["top5"])
    assert found["loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1000, 77])
def test_every_example_is_counted_once_at_any_batch_size(trained_run, store, batch_size):
    ensembles = evaluation.all_ensembles([trained_run], ["center"])
    network = inference.load(trained_run)
    (result,) = evaluation.evaluate([network], store, batch_size, ensembles)
    np.testing.assert_array_equal(result.confusion.sum(axis=1), np.bincount(store.labels))


def test_per_class_rows_and_loss_match_hand_counted_values():
    metrics = evaluation.ClassificationMetrics(3)
    metrics.update(
        np.array([[0, 1], [1, 0], [1, 2], [0, 1]]), np.log([0.5, 0.5, 0.5, 0.5]), np.full(4, 0)
    )
    metrics.update(np.array([[1, 0]]), np.log([0.25]), np.array([1]))
    cat, dog = metrics.per_class(["cat", "dog", "eel"])  # there is no example of an eel
    assert cat == {"class": "cat", "count": 4, "top1": 0.5, "top5": 0.75, "taken_for": "dog"}
    assert dog == {"class": "dog", "count": 1, "top1": 1.0, "top5": 1.0, "taken_for": ""}
    assert metrics.summary()["loss"] == pytest.approx(np.log(2 * 2 * 2 * 2 * 4) / 5)
    table = evaluate.format_per_class([cat, dog]).splitlines()
    assert [line.split()[0] for line in table] == ["class", "cat", "dog"]


def test_table_of_many_classes_has_the_least_accurate_ones():
    rows = [
        {"class": f"c{n}", "count": 1, "top1": n / 30, "top5": 1.0, "taken_for": ""}
        for n in range(30)
    ]
    lines = evaluate.format_per_class(rows[::-1]).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [f"c{n}" for n in range(20)]
    assert lines[-1] == "… and 10 more classes"


def test_confusion_matrix_has_labels_as_rows(tmp_path):
    confusion = np.zeros((100, 100), int)
    confusion[:, 99] = 5  # every example is predicted as the last class
    figures.save_confusion(confusion, [str(n) for n in range(100)], tmp_path / "many.png")
    dark = (np.asarray(Image.open(tmp_path / "many.png").convert("RGB")) == (8, 48, 107)).all(-1)
    columns = np.flatnonzero(dark.sum(axis=0) > 300)
    assert len(columns) < 20 and dark[:, columns].sum() > 1000


def with_fields(network, **fields):
    """Returns the network with a changed copy of its config."""
    config = network.config.copy_and_resolve_references()
    for name, value in fields.items():
        config[name] = value
    return network._replace(config=config)


def test_networks_with_other_classes_or_image_size_are_rejected(trained_run, store):
    network = inference.load(trained_run)
    other = with_fields(network)
    other.config.model.num_classes = 11
    for networks, message in (
        ([network, other], "b has 11 classes, a has 10 and the data has 10"),
        ([network, with_fields(network, image_size=80)], "stored at 80 pixels"),
        ([network._replace(class_names=tuple("abcdefghij"))], "on the classes a, b, c, …"),
    ):
        with pytest.raises(UserError, match=message):
            evaluation.check_comparable(["a", "b"][: len(networks)], networks, store)
    unnamed = tuple(map(inference.unnamed, range(10)))
    evaluation.check_comparable(["a"], [network._replace(class_names=unnamed)], store)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "no trained network in nowhere"),
        (["RUN", "--step", "3"], "no checkpoint of step 3"),
        (["RUN", "--batch-size", "0"], "batch_size=0 must lie between"),
    ],
)
def test_wrong_arguments_exit_with_an_error_message(trained_run, arguments, message, capsys):
    arguments = [str(trained_run) if word == "RUN" else word for word in arguments]
    with pytest.raises(SystemExit) as exited:
        evaluate.main(arguments)
    assert exited.value.code == 2
    assert message in capsys.readouterr().err
