"""`python -m alexnet_jax.evaluate`: every example once, alone and averaged, by class."""

import csv
import json
import sys

import commands
import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import evaluate
from alexnet_jax import inference as trained
from alexnet_jax.analysis import figures as plots


@pytest.fixture(scope="module")
def store(digit_stores):
    return digit_stores["eval"]


@pytest.fixture(scope="module")
def other_run(trained_run, tmp_path_factory):
    """A worse network of the same shape."""
    network = trained.load(trained_run)
    kernel = network.variables["params"]["fc8"]["kernel"]
    noise = 0.3 * kernel.std() * jax.random.normal(jax.random.key(1), kernel.shape)
    network.variables["params"]["fc8"]["kernel"] = kernel + noise
    place = tmp_path_factory.mktemp("trained") / "other"
    trained.create(place, network.config, network.variables, network.stats, network.class_names)
    return place


def probabilities(workdir, store, views):
    """Softmax of every example by the network, in float64."""
    images = store.read(np.arange(store.num_examples))["image"]
    classify = trained.classifier(trained.load(workdir), views)
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


def test_the_command_counts_each_network_and_their_average(
    trained_run, other_run, digits, store, tmp_path
):
    result = commands.run(
        *(sys.executable, "-m", "alexnet_jax.evaluate", trained_run, other_run),
        *("--views", "center", "ten", "--batch-size", "96", "--out", tmp_path / "out"),
        *("--data-dir", digits),
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


def test_the_training_found_the_same(trained_run, store):
    network = trained.load(trained_run)
    (tally,) = evaluate.evaluate(
        [network], store, 64, evaluate.contestants([trained_run], ["center"])
    )
    metrics = map(json.loads, (trained_run / "metrics.jsonl").read_text().splitlines())
    (row,) = [r for r in metrics if r["split"] == "eval" and r["step"] == network.step]
    found = tally.summary()
    assert (found["top1"], found["top5"]) == (row["top1"], row["top5"])
    assert found["loss"] == pytest.approx(row["loss"], rel=1e-5)


@pytest.mark.parametrize("batch_size", [1000, 77])
def test_every_example_counts_once_whatever_the_batch(trained_run, store, batch_size):
    contest = evaluate.contestants([trained_run], ["center"])
    (tally,) = evaluate.evaluate([trained.load(trained_run)], store, batch_size, contest)
    np.testing.assert_array_equal(tally.confusion.sum(axis=1), np.bincount(store.labels))


def test_the_table_of_classes_names_what_each_is_taken_for():
    tally = evaluate.Tally(3)
    tally.add(
        np.array([[0, 1], [1, 0], [1, 2], [0, 1]]), np.log([0.5, 0.5, 0.5, 0.5]), np.full(4, 0)
    )
    tally.add(np.array([[1, 0]]), np.log([0.25]), np.array([1]))
    cat, dog = tally.per_class(["cat", "dog", "eel"])  # no eel was shown
    assert cat == {"class": "cat", "count": 4, "top1": 0.5, "top5": 0.75, "taken_for": "dog"}
    assert dog == {"class": "dog", "count": 1, "top1": 1.0, "top5": 1.0, "taken_for": ""}
    assert tally.summary()["loss"] == pytest.approx(np.log(2 * 2 * 2 * 2 * 4) / 5)
    table = evaluate.format_per_class([cat, dog]).splitlines()
    assert [line.split()[0] for line in table] == ["class", "cat", "dog"]


def test_of_many_classes_the_worst_are_shown():
    rows = [
        {"class": f"c{n}", "count": 1, "top1": n / 30, "top5": 1.0, "taken_for": ""}
        for n in range(30)
    ]
    lines = evaluate.format_per_class(rows[::-1]).splitlines()
    assert [line.split()[0] for line in lines[1:-1]] == [f"c{n}" for n in range(20)]
    assert lines[-1] == "… and 10 classes more"


def test_a_confusion_matrix_is_drawn_with_labels_as_rows(tmp_path):
    confusion = np.zeros((100, 100), int)
    confusion[:, 99] = 5  # everything is taken for the last class
    plots.save_confusion(confusion, [str(n) for n in range(100)], tmp_path / "many.png")
    dark = (np.asarray(Image.open(tmp_path / "many.png").convert("RGB")) == (8, 48, 107)).all(-1)
    columns = np.flatnonzero(dark.sum(axis=0) > 300)
    assert len(columns) < 20 and dark[:, columns].sum() > 1000


def moved(network, **fields):
    config = network.config.copy_and_resolve_references()
    for name, value in fields.items():
        config[name] = value
    return network._replace(config=config)


def test_networks_that_do_not_know_the_same_classes_are_refused(trained_run, store):
    network = trained.load(trained_run)
    other = moved(network)
    other.config.model.num_classes = 11
    for networks, told in (
        ([network, other], "11 classes apart"),
        ([network, moved(network, image_size=80)], "stored at 80 pixels"),
        ([network._replace(class_names=tuple("abcdefghij"))], "knows the classes a, b, c"),
    ):
        with pytest.raises(evaluate.UserError, match=told):
            evaluate.check_together(["a", "b"][: len(networks)], networks, store)
    unnamed = tuple(map(trained.unnamed, range(10)))
    evaluate.check_together(["a"], [network._replace(class_names=unnamed)], store)


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["nowhere"], "no trained network in nowhere"),
        (["RUN", "--step", "3"], "no checkpoint of step 3"),
        (["RUN", "--batch-size", "0"], "batch_size=0 must lie between"),
    ],
)
def test_what_cannot_be_evaluated_is_told_in_a_sentence(trained_run, arguments, told, capsys):
    arguments = [str(trained_run) if word == "RUN" else word for word in arguments]
    with pytest.raises(SystemExit) as exited:
        evaluate.main(arguments)
    assert exited.value.code == 2
    assert told in capsys.readouterr().err
