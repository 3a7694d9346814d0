"""`python -m alexnet_jax.predict`: the most probable classes of image files."""

import json
import os
import sys

import commands
import numpy as np
import pytest
from images import encode
from PIL import ExifTags, Image

from alexnet_jax import inference, predict
from alexnet_jax.analysis import prediction
from alexnet_jax.utils.errors import UserError


@pytest.fixture(scope="module")
def examples(digit_stores):
    """The first test digits: uint8[20, 72, 72, 3] and their labels."""
    return digit_stores["eval"].read(np.arange(20))


@pytest.fixture
def folder(examples, tmp_path):
    """A folder with twenty PNG and WebP files in subfolders named after their classes."""
    for number, (image, label) in enumerate(zip(examples["image"], examples["label"], strict=True)):
        kind = "png" if number % 2 else "webp"
        file = tmp_path / "photos" / str(label) / f"{number:02d}.{kind}"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(encode(image, kind.upper(), lossless=True))
    return tmp_path / "photos"


def probabilities(trained_run, images):
    return np.exp(np.asarray(inference.classifier(inference.load(trained_run), "center")(images)))


def run(capsys, *words):
    with pytest.raises(SystemExit) as exited:
        predict.main([str(word) for word in words])
    return exited.value.code, *capsys.readouterr()


def test_files_of_a_folder_have_the_probabilities_of_the_classifier(trained_run, folder, examples):
    (folder / "notes.txt").write_text("not an image")
    (folder / ".hidden").write_text("ignored")
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
    assert f"skipped {folder / 'notes.txt'}: it is not an image" in result.stderr
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


def test_table_has_one_line_for_each_file_of_overlapping_patterns(
    trained_run, folder, examples, capsys
):
    code, out, err = run(capsys, trained_run, folder / "*" / "0[0-4].*", folder / "*" / "00.webp")
    assert (code, err) == (0, "")
    expected = probabilities(trained_run, examples["image"][:5])
    lines = out.splitlines()
    assert len(lines) == 5  # the file that both patterns match is listed once
    for line in lines:
        number = int(line.split()[0].split("/")[-1][:2])
        assert line.split()[1] == f"{100 * expected[number].max():.1f}"
        assert line.split()[3] == str(expected[number].argmax())


def test_exif_orientation_is_applied(trained_run, examples, tmp_path, capsys):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    lying = np.rot90(examples["image"][3])  # orientation 6: turn by 90 degrees clockwise
    (tmp_path / "lying.png").write_bytes(encode(lying, "PNG", exif=exif))
    (tmp_path / "upright.png").write_bytes(encode(examples["image"][3], "PNG"))
    _, out, _ = run(capsys, trained_run, tmp_path, "--json")
    lying, upright = (json.loads(line)["predictions"] for line in out.splitlines())
    assert lying == upright


def test_ten_views_match_the_classifier_of_ten_views(trained_run, folder, examples, capsys):
    file = next(folder.rglob("00.*"))
    _, out, _ = run(capsys, trained_run, file, "--json", "--views", "ten")
    log_probs = inference.classifier(inference.load(trained_run), "ten")(examples["image"][:1])
    (best, *_) = json.loads(out)["predictions"]
    assert best["probability"] == pytest.approx(float(np.exp(log_probs.max())), rel=1e-4)


def test_files_are_read_as_a_stream(trained_run, folder):
    """The first of 400 predictions come before the last file exists."""
    files = [next(folder.rglob("01.*"))] * 399 + [folder / "written later.png"]
    results = prediction.predict_files(inference.load(trained_run), files, "center", 8)
    first = [next(results) for _ in range(8)]
    assert all(isinstance(result, prediction.Prediction) for result in first)
    (folder / "written later.png").write_bytes(files[0].read_bytes())
    rest = list(results)
    assert len(rest) == 392 and isinstance(rest[-1], prediction.Prediction)


def test_panel_has_a_red_bar_for_the_class_of_the_folder(
    examples, trained_run, folder, tmp_path, capsys
):
    named, unnamed = tmp_path / "named.png", tmp_path / "unnamed.png"
    predicted = probabilities(trained_run, examples["image"]).argmax(axis=1)
    correct = np.flatnonzero(predicted == examples["label"])[0]  # a bar that is long enough
    file = next(folder.rglob(f"{correct:02d}.*"))
    elsewhere = tmp_path / f"photo{file.suffix}"
    elsewhere.write_bytes(file.read_bytes())
    assert run(capsys, trained_run, file, "--panel", named)[0] == 0
    assert run(capsys, trained_run, elsewhere, "--panel", unnamed)[0] == 0

    def red(path):
        pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
        return int((pixels[..., 0] > pixels[..., 2] + 60).sum())

    assert red(named) > 0 == red(unnamed)


def test_named_pipe_is_skipped(trained_run, tmp_path, capsys):
    os.mkfifo(tmp_path / "pipe")
    code, _, err = run(capsys, trained_run, tmp_path)
    assert code == 3
    assert f"skipped {tmp_path / 'pipe'}: it is not a regular file" in err


def test_linked_folders_are_followed_unless_they_contain_the_link(folder):
    (folder / "4").mkdir(exist_ok=True)
    files = prediction.find_files([str(folder)])
    elsewhere = folder.parent / "elsewhere"
    folder.rename(elsewhere)
    folder.mkdir()
    for entry in elsewhere.iterdir():
        (folder / entry.name).symlink_to(entry)
    assert prediction.find_files([str(folder)]) == files
    (elsewhere / "4" / "again").symlink_to(elsewhere)
    with pytest.raises(UserError, match="/again is a link to a folder that contains the link"):
        prediction.find_files([str(folder)])


def test_names_that_are_not_utf_8_are_printed_and_drawn(trained_run, examples, tmp_path):
    file = tmp_path / os.fsdecode(b"caf\xe9") / os.fsdecode(b"5\xff.png")
    file.parent.mkdir()
    file.write_bytes(encode(examples["image"][5], "PNG"))
    words = (sys.executable, "-m", "alexnet_jax.predict", trained_run, tmp_path)
    strict = os.environ | {"PYTHONIOENCODING": "utf-8:strict"}
    table = commands.run(*words, f"--panel={file.with_name('panel.png')}", env=strict)
    assert table.returncode == 0, table.stderr
    assert table.stdout.startswith(f"{tmp_path}/caf\\udce9/5\\udcff.png ")
    file.with_name("panel.png").unlink()
    (row,) = commands.run(*words, "--json", env=strict).stdout.splitlines()
    assert json.loads(row)["file"] == str(file)  # with the bytes of the name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["nowhere*.jpg"], "there is no file at nowhere"),
        (["https://example.com/cat.jpg"], "is a URL; download it"),
        (["tests", "--batch-size", "0"], "must be at least 1"),
        (["tests", "--panel", "panel.gif"], "must end in .png"),
    ],
)
def test_wrong_arguments_exit_with_an_error_message(trained_run, words, message, capsys):
    code, _, err = run(capsys, trained_run, *words)
    assert code == 2 and err.startswith("error: ") and message in err


def test_empty_folder_is_rejected(tmp_path):
    with pytest.raises(UserError, match="there is no file at"):
        prediction.find_files([str(tmp_path)])
