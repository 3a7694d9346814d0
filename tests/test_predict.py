"""`python -m alexnet_jax.predict`: files in, the five most probable classes out."""

import json
import os
import sys

import commands
import numpy as np
import pytest
from images import encode
from PIL import ExifTags, Image

from alexnet_jax import inference as trained
from alexnet_jax import predict
from alexnet_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def examples(digit_stores):
    """The first test digits: uint8[20, 72, 72, 3] and their labels."""
    return digit_stores["eval"].read(np.arange(20))


@pytest.fixture
def folder(examples, tmp_path):
    """Twenty files in folders of their classes, of two kinds; nothing else."""
    for number, (image, label) in enumerate(zip(examples["image"], examples["label"], strict=True)):
        kind = "png" if number % 2 else "webp"
        file = tmp_path / "photos" / str(label) / f"{number:02d}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image, kind.upper(), lossless=True))
    return tmp_path / "photos"


def probabilities(trained_run, images):
    return np.exp(np.asarray(trained.classifier(trained.load(trained_run), "center")(images)))


def run(capsys, *words):
    with pytest.raises(SystemExit) as exited:
        predict.main([str(word) for word in words])
    return exited.value.code, *capsys.readouterr()


def test_every_file_of_a_folder_gets_the_networks_probabilities(trained_run, folder, examples):
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").write_text("not looked at")
    cut = encode(examples["image"][0], "PNG")[:-200]
    (folder / "truncated.png").write_bytes(cut)
    result = commands.run(
        *(sys.executable, "-m", "alexnet_jax.predict", trained_run, folder),
        *("--json", "--batch-size", "8", "--panel", folder.parent / "panel.png"),
    )
    assert result.returncode == 3, result.stderr
    rows = [json.loads(line) for line in result.stdout.splitlines()]
    assert len(rows) == 22
    wrong = {row["file"] for row in rows if "error" in row}
    assert wrong == {str(folder / "notes.txt"), str(folder / "truncated.png")}
    assert f"skipped {folder / 'notes.txt'}: it is no image" in result.stderr
    assert f"skipped {folder / 'truncated.png'}: " in result.stderr
    assert ".hidden" not in result.stdout + result.stderr
    expected = probabilities(trained_run, examples["image"])
    seen = [row for row in rows if "error" not in row]
    assert len(seen) == 20
    for row in seen:
        number = int(row["file"].split("/")[-1][:2])
        found = {p["label"]: p["probability"] for p in row["predictions"]}
        assert list(found) == list(np.argsort(-expected[number])[:5])
        np.testing.assert_allclose(list(found.values()), -np.sort(-expected[number])[:5], rtol=1e-4)
        assert [p["class"] for p in row["predictions"]] == [str(label) for label in found]
    assert Image.open(folder.parent / "panel.png").width > 1000
    assert "Traceback" not in result.stderr


def test_the_table_has_a_line_for_each_file_that_a_pattern_names(
    trained_run, folder, examples, capsys
):
    code, out, err = run(capsys, trained_run, folder / "*" / "0[0-4].*", folder / "*" / "00.webp")
    assert (code, err) == (0, "")
    expected = probabilities(trained_run, examples["image"][:5])
    lines = out.splitlines()
    assert len(lines) == 5  # the file that is named twice comes once
    for line in lines:
        number = int(line.split()[0].split("/")[-1][:2])
        assert line.split()[1] == f"{100 * expected[number].max():.1f}"
        assert line.split()[3] == str(expected[number].argmax())


def test_a_photograph_is_seen_as_its_exif_says(trained_run, examples, tmp_path, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    lying = np.rot90(examples["image"][3])  # to be turned by 90 degrees clockwise
    (tmp_path / "lying.png").write_bytes(encode(lying, "PNG", exif=exif))
    (tmp_path / "upright.png").write_bytes(encode(examples["image"][3], "PNG"))
    _, out, _ = run(capsys, trained_run, tmp_path, "--json")
    lying, upright = (json.loads(line)["predictions"] for line in out.splitlines())
    assert lying == upright


def test_ten_views_are_averaged(trained_run, folder, examples, capsys):
    file = next(folder.rglob("00.*"))
    _, out, _ = run(capsys, trained_run, file, "--json", "--views", "ten")
    log_probs = trained.classifier(trained.load(trained_run), "ten")(examples["image"][:1])
    (best, *_) = json.loads(out)["predictions"]
    assert best["probability"] == pytest.approx(float(np.exp(log_probs.max())), rel=1e-4)


def test_what_no_batch_can_hold_is_read_as_it_is_needed(trained_run, folder):
    """Of 400 files, the first predictions come before the last files are read."""
    files = [next(folder.rglob("01.*"))] * 399 + [folder / "made later.png"]
    results = predict.predictions(trained.load(trained_run), files, "center", 8)
    first = [next(results) for _ in range(8)]
    assert all(isinstance(result, predict.Prediction) for result in first)
    (folder / "made later.png").write_bytes(files[0].read_bytes())
    rest = list(results)
    assert len(rest) == 392 and isinstance(rest[-1], predict.Prediction)


def test_bars_of_the_right_class_are_red(examples, trained_run, folder, tmp_path, capsys):
    named, unnamed = tmp_path / "named.png", tmp_path / "unnamed.png"
    file = next(folder.rglob("00.*"))
    elsewhere = tmp_path / "photo.webp"
    elsewhere.write_bytes(file.read_bytes())
    assert run(capsys, trained_run, file, "--panel", named)[0] == 0
    assert run(capsys, trained_run, elsewhere, "--panel", unnamed)[0] == 0

    def red(path):
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        return int((pixels[..., 0] > pixels[..., 2] + 60).sum())

    assert red(named) > 0 == red(unnamed)


def test_a_pipe_is_not_an_image(trained_run, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run(capsys, trained_run, tmp_path)
    assert code == 3
    assert f"skipped {tmp_path / 'pipe'}: it is not a regular file" in err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["nowhere*.jpg"], "no file at nowhere"),
        (["https://example.com/cat.jpg"], "is a URL; download it"),
        (["tests", "--batch-size", "0"], "must be at least 1"),
        (["tests", "--panel", "panel.gif"], "must end in .png"),
    ],
)
def test_what_cannot_be_done_is_told_in_a_sentence(trained_run, words, told, capsys):
    code, _, err = run(capsys, trained_run, *words)
    assert code == 2 and err.startswith("error: ") and told in err


def test_an_empty_folder_is_told(tmp_path):
    with pytest.raises(UserError, match="no file at"):
        predict.find_files([str(tmp_path)])
