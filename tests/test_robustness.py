"""Errors under corruptions and on other photographs: `python -m alexnet_jax.robustness`."""

import csv
import shutil

import numpy as np
import pytest
from images import encode, photograph

from alexnet_jax import inference, robustness
from alexnet_jax.analysis.robustness import (
    SEVERITIES,
    Corrupter,
    Result,
    alexnet_errors,
    corrupt,
    corruption_errors,
    labels_of_folders,
    mean_corruption_error,
    measure,
)
from alexnet_jax.data.wordnet import imagenet_names
from alexnet_jax.utils.errors import UserError

# Hendrycks and Dietterich 2019, Table 1: CE of ResNet-50 in percent, rounded, and its mCE.
RESNET_50 = {
    "gaussian_noise": 80,
    "shot_noise": 82,
    "impulse_noise": 83,
    "defocus_blur": 75,
    "glass_blur": 89,
    "motion_blur": 78,
    "zoom_blur": 80,
    "snow": 78,
    "frost": 75,
    "fog": 66,
    "brightness": 57,
    "contrast": 71,
    "elastic_transform": 85,
    "pixelate": 77,
    "jpeg_compression": 77,
}
RESNET_50_MCE = 76.7
# Its errors from its normalized ones; severities differ, of which only the mean counts.
RESULTS = [
    Result(name, severity, 50_000, ce / 100 * alexnet_errors()[name] * (severity + 2) / 5, 0.0)
    for name, ce in RESNET_50.items()
    for severity in SEVERITIES
]


def test_mce_of_resnet_50_is_the_published_one_up_to_the_rounding_of_the_table():
    errors = corruption_errors(RESULTS)
    assert {name: round(100 * ce) for name, ce in errors.items()} == RESNET_50
    # Each published CE is rounded by up to 0.5, and so is their mean.
    assert 100 * mean_corruption_error(errors) == pytest.approx(RESNET_50_MCE, abs=0.5)


def test_alexnet_itself_has_mce_of_one():
    own = [Result(n, s, 1, e, 0) for n, e in alexnet_errors().items() for s in SEVERITIES]
    assert mean_corruption_error(corruption_errors(own)) == pytest.approx(1)


# Of AlexNet, as ImageNet-C's authors published it with the averages: severities 1 to 5.
ALEXNET_BY_SEVERITY = {
    "gaussian_noise": (0.69528, 0.82542, 0.93554, 0.98138, 0.99452),
    "brightness": (0.45140, 0.48502, 0.54048, 0.62166, 0.72440),
    "jpeg_compression": (0.51002, 0.54718, 0.57294, 0.65458, 0.74778),
}


def test_ce_of_the_published_errors_of_each_severity_of_alexnet_is_one():
    results = [
        Result(name, severity, 50_000, error, 0.0)
        for name, errors in ALEXNET_BY_SEVERITY.items()
        for severity, error in zip(SEVERITIES, errors, strict=True)
    ]
    expected = dict.fromkeys(ALEXNET_BY_SEVERITY, 1.0)
    assert corruption_errors(results) == pytest.approx(expected, abs=1e-9)


def test_ce_needs_all_severities_and_mce_all_corruptions():
    errors = corruption_errors(RESULTS[:-1])
    assert [*errors] == [*RESNET_50][:-1]
    assert mean_corruption_error(errors) is None
    extra = [Result("speckle_noise", s, 1, 0.5, 0) for s in SEVERITIES]
    assert corruption_errors(RESULTS + extra) == corruption_errors(RESULTS)


# ------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------

NAMES = tuple(imagenet_names().values())
FOLDERS = {
    "WordNet IDs of some classes": (NAMES, ["n01440764", "n02012849"], [0, 134]),
    "WordNet IDs of two cranes": (NAMES, ["n02012849", "n03126707"], [134, 517]),
    "numbers in any order": (NAMES, ["0", "10", "999"], [0, 10, 999]),
    "names of classes": (("cat", "dog"), ["dog"], [1]),
    "digits that are names": (tuple("1234567890"), ["0", "1"], [9, 0]),
    "IDs of a network with some classes": (("tench", "crane"), ["n01440764"], [0]),
}


@pytest.mark.parametrize("case", FOLDERS)
def test_folders_are_matched_with_classes(case, tmp_path):
    class_names, folders, labels = FOLDERS[case]
    for folder in folders:
        (tmp_path / folder).mkdir()
    (tmp_path / "README").write_text("not a class")
    assert labels_of_folders(tmp_path, class_names) == dict(zip(folders, labels, strict=True))


def test_folder_of_another_class_is_named_with_the_nearest(tmp_path):
    (tmp_path / "dgo").mkdir()
    with pytest.raises(UserError, match="dgo is no class of the network, whose nearest are dog"):
        labels_of_folders(tmp_path, ("cat", "dog"))
    with pytest.raises(UserError, match="has no class folders"):
        labels_of_folders(tmp_path / "dgo", ("cat", "dog"))


def test_only_classes_of_the_folders_can_be_predicted(network):
    pixels = np.stack([photograph(n, 72, 72) for n in range(20)])
    probabilities = network.predict(pixels)
    subset = [2, 5, 7]
    best = np.array(subset)[probabilities[:, subset].argmax(axis=1)]
    labels = np.resize(subset, 20)
    labels[-4:] = -1  # padding
    found = measure(network, iter([(pixels, labels)]), subset)
    assert found.num_images == 16
    assert found.top1_error == pytest.approx((best != labels)[:-4].mean())
    assert found.top5_error == 0


@pytest.fixture(scope="module")
def imagenet_c(digit_stores, tmp_path_factory):
    """Returns digits of 64 pixels in ImageNet-C's layout: the harder the more severe."""
    root = tmp_path_factory.mktemp("imagenet-c")
    store = digit_stores["eval"]
    indices = np.arange(0, 1000, 25)
    batch = store.read(indices)
    rng = np.random.default_rng(0)
    for name in ("gaussian_noise", "fog"):
        for severity in SEVERITIES:
            for index, image, label in zip(indices, batch["image"], batch["label"], strict=True):
                place = root / name / str(severity) / str(label)
                place.mkdir(parents=True, exist_ok=True)
                noise = 30 * severity * rng.normal(size=(64, 64, 3)) if name != "fog" else 0
                pixels = np.clip(image[4:68, 4:68] + noise, 0, 255).astype(np.uint8)
                (place / f"{index}.png").write_bytes(encode(pixels, "PNG"))
    return root


def run(*words):
    with pytest.raises(SystemExit) as end:
        robustness.main([str(word) for word in words])
    return end.value.code


def rows_of(folder):
    with (folder / "robustness.csv").open() as file:
        return list(csv.DictReader(file))


def test_imagenet_cs_layout_is_evaluated_without_another_crop(
    trained_run, network, imagenet_c, digit_stores, tmp_path, capsys
):
    assert not run(trained_run, "--imagenet-c", imagenet_c, "--out", tmp_path)
    rows = rows_of(tmp_path)
    assert [(row["corruption"], int(row["severity"])) for row in rows] == [
        (name, s) for name in ("fog", "gaussian_noise") for s in SEVERITIES
    ]
    # "fog" is no corruption here, and the pictures are the network's own center crops.
    batch = digit_stores["eval"].read(np.arange(0, 1000, 25))
    error = (network.predict(batch["image"]).argmax(axis=1) != batch["label"]).mean()
    assert all(float(row["top1_error"]) == pytest.approx(error) for row in rows[:5])
    assert float(rows[-1]["top1_error"]) > error
    noise = np.mean([float(row["top1_error"]) for row in rows[5:]])
    printed = capsys.readouterr().out
    assert f"{100 * noise / 0.886:5.1f} %" in printed and "mCE" not in printed


def test_class_folders_are_evaluated_by_the_networks_preprocessing(
    trained_run, imagenet_c, tmp_path, capsys
):
    folder = tmp_path / "some"
    folder.mkdir()
    for label in ("3", "8"):
        shutil.copytree(imagenet_c / "fog" / "1" / label, folder / label)
    assert not run(trained_run, "--images", folder, "--out", tmp_path, "--batch-size", "3")
    (row,) = rows_of(tmp_path)
    files = sorted(folder.rglob("*.png"))
    assert int(row["num_images"]) == len(files)
    (folder / "3" / "notes.txt").write_text("no image")
    assert run(trained_run, "--images", folder, "--out", tmp_path) == 2
    assert "notes.txt cannot be read (it is not an image); remove it" in capsys.readouterr().err


# ------------------------------------------------------------------------------------------
# Corruptions on the fly
# ------------------------------------------------------------------------------------------


@pytest.mark.corruptions
@pytest.mark.parametrize("name", alexnet_errors())
def test_corruptions_change_an_image_the_more_the_more_severe_and_most_reproducibly(name):
    image = photograph(1, 64, 64)
    mild, severe = (corrupt(image, name, severity, seed=7) for severity in (1, 5))
    assert mild.shape == image.shape and mild.dtype == np.uint8
    if name not in ("impulse_noise", "glass_blur"):
        np.testing.assert_array_equal(corrupt(image, name, 1, seed=7), mild)
    changes = [np.abs(image.astype(float) - x).mean() for x in (mild, severe)]
    assert 0 < changes[0] < changes[1]


@pytest.mark.corruptions
def test_command_corrupts_the_eval_split(trained_run, network, digits, tmp_path, capsys):
    words = ("--corruptions", "gaussian_noise", "--count", "30", "--batch-size", "16")
    assert not run(trained_run, *words, "--data-dir", digits, "--out", tmp_path)
    rows = rows_of(tmp_path)
    assert [row["severity"] for row in rows] == list("012345")
    assert all(row["num_images"] == "30" for row in rows)
    assert "gaussian_noise" in capsys.readouterr().out


@pytest.mark.corruptions
def test_corrupted_images_are_center_crops_of_the_store(digit_stores):
    store = digit_stores["eval"]
    with Corrupter(store, 64, 5, 4) as corrupter:
        plain = list(corrupter.images("", 0))
        noisy = list(corrupter.images("contrast", 3))
    indices = np.linspace(0, 999, 5).round().astype(int)
    expected = store.read(indices)
    np.testing.assert_array_equal(plain[0][0], expected["image"][:4, 4:68, 4:68])
    assert [labels.tolist() for _, labels in plain] == [
        expected["label"][:4].tolist(),
        [expected["label"][4], -1, -1, -1],
    ]
    own = corrupt(plain[0][0][2], "contrast", 3, int(indices[2]))
    np.testing.assert_array_equal(noisy[0][0][2], own)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--corruptions", "fogg"], "unknown corruption 'fogg'; the nearest are fog"),
        (["--imagenet-c", "EMPTY"], "has no folders CORRUPTION/SEVERITY/CLASS"),
        (["--images", "EMPTY"], "has no class folders"),
        (["--images", "nowhere"], "no folder nowhere"),
        (["--images", "EMPTY", "--count", "0"], "must be at least 1"),
    ],
)
def test_what_cannot_be_evaluated_is_rejected(words, message, trained_run, tmp_path, capsys):
    words = [tmp_path if word == "EMPTY" else word for word in words]
    assert run(trained_run, *words, "--out", tmp_path / "out") == 2
    assert message in capsys.readouterr().err


def test_missing_package_is_explained(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "imagecorruptions", None)
    with pytest.raises(UserError, match="pip install --no-deps -r requirements-robustness.txt"):
        robustness.robustness.check_corruptions(["fog"])


def test_network_is_unchanged_by_another_preprocessing(network):
    assert inference.with_preprocess(network, None) is network
