"""Similarity of representations: formulas, and `python -m alexnet_jax.similarity`."""

import csv

import jax
import numpy as np
import pytest
from images import encode, photograph
from scipy.spatial.distance import pdist
from scipy.stats import spearmanr

from alexnet_jax import inference, similarity
from alexnet_jax.analysis import representations
from alexnet_jax.analysis.representations import linear_cka, rdm, rdm_correlation


def random(seed, shape, kind="normal"):
    x = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return np.maximum(x, 0) if kind == "relu" else x


PAIRS = {
    "few units": (random(1, (40, 5)), random(2, (40, 7))),
    "more units than images": (random(3, (20, 300)), random(4, (20, 200))),
    "after ReLU": (random(5, (30, 50), "relu"), random(6, (30, 40), "relu")),
    "far from zero": (100 + random(7, (25, 9)), -40 + random(8, (25, 9))),
    "related": (random(9, (30, 8)), random(9, (30, 8)) + 0.3 * random(10, (30, 8))),
    "with ties": (np.repeat(random(11, (6, 4)), 3, axis=0), random(12, (18, 3))),
}


@pytest.mark.parametrize("pair", PAIRS)
def test_rdm_and_its_correlation_are_those_of_scipy(pair):
    x, y = PAIRS[pair]
    expected = [pdist(a.astype(np.float64), "correlation") for a in (x, y)]
    np.testing.assert_allclose(rdm(x), expected[0], atol=1e-9)
    # Rounded, because distances that are equal by the formula differ by their rounding.
    if pair != "with ties":
        assert rdm_correlation(x, y) == pytest.approx(spearmanr(*expected).statistic, abs=1e-9)
    ranks = np.array([3.0, 1.0, 3.0, 2.0, 3.0])
    assert representations._ranks(ranks).tolist() == [4, 1, 4, 2, 4]


@pytest.mark.parametrize("pair", PAIRS)
def test_cka_is_the_formula_of_features(pair):
    x, y = (a.astype(np.float64) - a.mean(axis=0, dtype=np.float64) for a in PAIRS[pair])
    cross = np.linalg.norm(y.T @ x, "fro") ** 2
    expected = cross / (np.linalg.norm(x.T @ x, "fro") * np.linalg.norm(y.T @ y, "fro"))
    assert linear_cka(*PAIRS[pair]) == pytest.approx(expected, rel=1e-6)


def test_cka_ignores_rotation_scale_and_offset_and_rdm_an_order_of_units():
    x = random(1, (30, 12))
    rotation, _ = np.linalg.qr(random(2, (12, 12)))
    assert linear_cka(x, 3 * x @ rotation + 5) == pytest.approx(1)
    assert linear_cka(x, random(3, (30, 12))) < 0.7
    assert rdm_correlation(x, 2 * x[:, ::-1] + 1) == pytest.approx(1)


def test_image_without_any_response_has_distance_one():
    x = random(1, (4, 6))
    x[2] = 0
    np.testing.assert_allclose(rdm(x)[[1, 3, 5]], 1)


@pytest.fixture(scope="module")
def workdirs(trained_run, tmp_path_factory):
    """Returns a trained network, the same with its hidden units in another order, and a worse."""
    network = inference.load(trained_run)
    order = np.random.default_rng(0).permutation(network.variables["params"]["fc7"]["bias"].size)
    place = tmp_path_factory.mktemp("networks")
    found = [trained_run]
    for name in ("shuffled", "noisy"):
        variables = jax.tree.map(np.asarray, network.variables)
        fc7, fc8 = (dict(variables["params"][layer]) for layer in ("fc7", "fc8"))
        if name == "shuffled":
            fc7 = {"kernel": fc7["kernel"][:, order], "bias": fc7["bias"][order]}
            fc8["kernel"] = fc8["kernel"][order]
        else:
            fc7["kernel"] = fc7["kernel"] + random(1, fc7["kernel"].shape) * fc7["kernel"].std()
        variables["params"] = variables["params"] | {"fc7": fc7, "fc8": fc8}
        inference.create(
            place / name, network.config, variables, network.stats, network.class_names
        )
        found.append(place / name)
    return found


def run(*words):
    with pytest.raises(SystemExit) as end:
        similarity.main([str(word) for word in words])
    return end.value.code


def test_command_writes_a_matrix_of_networks_on_their_store(workdirs, digits, tmp_path, capsys):
    out = tmp_path / "out"
    code = run(*workdirs, "--layer", "fc7", "--count", "50", "--data-dir", digits, "--out", out)
    assert not code
    with (out / "similarity.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["metric"], row["network"]) for row in rows] == [
        (metric, workdir.name) for metric in ("rdm", "cka") for workdir in workdirs
    ]
    for row in rows[::3]:
        same, shuffled, noisy = (float(row[workdir.name]) for workdir in workdirs)
        assert same == 1 and shuffled == pytest.approx(1, abs=1e-5) and 0.1 < noisy < 0.9999
    assert (out / "similarity.png").read_bytes().startswith(b"\x89PNG")
    assert "fc7 of 50 images" in capsys.readouterr().out


def test_command_compares_responses_to_the_files_of_a_folder(workdirs, tmp_path):
    (tmp_path / "photos").mkdir()
    for n in range(5):
        (tmp_path / "photos" / f"{n}.jpg").write_bytes(encode(photograph(n, 90, 120)))
    words = ("--layer", "relu6", "--metric", "cka", "--batch-size", "2", "--out", tmp_path)
    assert not run(*workdirs[:2], "--images", tmp_path / "photos", *words)
    network = inference.load(workdirs[0])
    shown = similarity.from_files(network, [str(tmp_path / "photos")], 2)
    found = representations.responses(network, "relu6", shown)
    whole = network.features(np.concatenate(shown), ["relu6"])["relu6"]
    np.testing.assert_allclose(found, whole, rtol=1e-4, atol=1e-4)
    assert "1.000000" in (tmp_path / "similarity.csv").read_text()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([0], "name at least two workdirs"),
        ([0, 1, "--layer", "fc9"], "unknown layer 'fc9'; the nearest are fc"),
        ([0, 1, "--count", "2"], "the networks saw 2 images; all must see the same, and at least"),
        ([0, 1, "--images", "nowhere"], "there is no file at nowhere"),
        ([0, 1, "--images", __file__], "cannot be read (it is not an image); remove it"),
    ],
)
def test_what_cannot_be_compared_is_rejected(words, message, workdirs, digits, tmp_path, capsys):
    words = [workdirs[word] if isinstance(word, int) else word for word in words]
    assert run(*words, "--data-dir", digits, "--out", tmp_path) == 2
    assert message in capsys.readouterr().err
