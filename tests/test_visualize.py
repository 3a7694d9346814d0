"""`python -m alexnet_jax.visualize`: the content of every picture, and errors."""

import json
import os
import shutil
import sys

import commands
import images
import jax
import numpy as np
import pytest
from PIL import Image

from alexnet_jax import config as configs
from alexnet_jax import inference, visualize
from alexnet_jax.analysis import diagram, features, figures, occlusion
from alexnet_jax.data.augment import Statistics
from alexnet_jax.models.alexnet import VARIANTS, named_layers
from alexnet_jax.models.build import build_model
from alexnet_jax.utils.errors import EXIT_USER_ERROR


@pytest.fixture
def draw(capsys):
    """Returns a function that runs the command here: its exit code, stdout and stderr."""

    def run(*words):
        with pytest.raises(SystemExit) as ended:
            visualize.main([str(word) for word in words])
        return ended.value.code or 0, *capsys.readouterr()

    return run


@pytest.fixture(scope="module")
def train_store(digit_stores):
    return digit_stores["train"]


def pixels(path):
    return np.asarray(Image.open(path).convert("RGB"))


def figure_pixels(figure, path):
    figure.savefig(path)
    return pixels(path)


def write_image(path, array):
    Image.fromarray(array).save(path)
    return path


def test_filters_show_the_weights_of_conv1(trained_run, network, draw, tmp_path):
    code, printed, _ = draw("filters", trained_run, "--out", tmp_path / "f.png")
    assert code == 0 and printed.strip() == str(tmp_path / "f.png")
    kernel = np.asarray(network.variables["params"]["conv1"]["kernel"])
    assert kernel.shape == (11, 11, 3, 8)
    picture = pixels(tmp_path / "f.png")
    zoom = picture.shape[1] // (4 * 12 + 1)
    small = picture[zoom // 2 :: zoom, zoom // 2 :: zoom].astype(float)
    for number in range(8):  # in two rows of four
        y, x = (1 + 12 * place for place in divmod(number, 4))
        shown = (small[y : y + 11, x : x + 11] - 127.5) / 127.5 * np.abs(kernel).max()
        np.testing.assert_allclose(shown, kernel[..., number], atol=np.abs(kernel).max() / 120)


def test_96_filters_are_arranged_as_in_figure_3(tmp_path):
    """Six rows of sixteen, the first tower's 48 above the second's."""
    kernel = np.zeros((11, 11, 3, 96), np.float32)
    kernel[..., :48], kernel[..., 48:] = 1.0, -1.0
    figures.save_filters(kernel, 2, tmp_path / "f.png")
    picture = pixels(tmp_path / "f.png")
    zoom = figures.FILTER_ZOOM
    assert picture.shape == ((6 * 12 + 1 + figures.TOWER_GAP) * zoom, (16 * 12 + 1) * zoom, 3)
    middles = picture[[(6 + 12 * row + (row > 2) * figures.TOWER_GAP) * zoom for row in range(6)]]
    shades = middles[:, [(6 + 12 * column) * zoom for column in range(16)], 0]
    np.testing.assert_array_equal(shades, np.repeat([[255], [0]], 3, axis=0).repeat(16, axis=1))


@pytest.mark.parametrize(
    ("count", "towers", "columns"), [(96, 2, 16), (96, 1, 16), (64, 1, 16), (24, 2, 6), (8, 2, 4)]
)
def test_filter_rows_are_full_and_belong_to_one_tower(count, towers, columns):
    assert figures.filter_columns(count, towers) == columns


@pytest.mark.parametrize("variant", VARIANTS)
def test_displayed_outputs_follow_the_nonlinearity(variant):
    displayed = features.displayed_outputs(variant)
    layers = named_layers(variant)
    assert [*displayed] == [name for name in layers if name.startswith(("conv", "pool", "fc"))]
    after_pool = variant == "original"  # in its blocks 1 and 5 pooling comes before ReLU
    assert displayed["conv1"] == ("conv1" if after_pool else "relu1")
    assert displayed["pool1"] == ("relu1" if after_pool else "pool1")
    assert displayed["fc7"] == "relu7" and displayed["fc8"] == "fc8"


def test_features_page_shows_the_outputs_of_the_network(
    trained_run, network, train_store, draw, tmp_path
):
    image = train_store.read(np.array([3]))["image"][0]
    file = write_image(tmp_path / "digit.png", image)
    code, printed, _ = draw("features", trained_run, file, "--out", tmp_path / "page.png")
    assert code == 0 and printed.strip() == str(tmp_path / "page.png")
    figure = features.features_figure(network, image)
    drawn = figure_pixels(figure, tmp_path / "expected.png")
    np.testing.assert_array_equal(pixels(tmp_path / "page.png"), drawn)
    apply = jax.jit(
        lambda variables, x: network.model.apply(variables, x, features=("relu1", "relu7"))
    )
    logits, expected = apply(network.variables, network.augment.center(image[None]))
    page = {axes.get_title().split(",")[0]: axes for axes in figure.axes}
    pools = ("pool1", "pool2", "pool5")
    assert {*page} == {"image", *pools, *(f"conv{n}" for n in range(1, 6)), "fc6", "fc7", "fc8"}
    np.testing.assert_array_equal(page["image"].images[0].get_array(), image[4:68, 4:68])
    maps = np.asarray(expected["relu1"][0])
    assert page["conv1"].get_title() == "conv1, 15×15×8, all"
    by_strength = np.argsort(-np.abs(maps).mean((0, 1)))
    first = page["conv1"].images[0].get_array()[: features.TILE, : features.TILE]
    stretched = np.arange(features.TILE) * 15 // features.TILE
    strongest = maps[stretched[:, None], stretched, by_strength[0]]
    np.testing.assert_allclose(first, strongest, atol=1e-4)
    units = np.asarray(expected["relu7"][0])
    shown = page["fc7"].images[0].get_array().compressed()
    np.testing.assert_allclose(shown, units, atol=1e-4)
    shares = np.sort(jax.nn.softmax(logits[0]))[::-1][:5]
    bars = [bar.get_width() for bar in page["fc8"].patches]
    np.testing.assert_allclose(bars, shares, atol=1e-5)


def test_mosaic_fills_rows_and_separates_maps_by_nan():
    maps = np.arange(5, dtype=np.float32) * np.ones((2, 2, 1), np.float32)
    sheet = features.mosaic(maps)
    step = features.TILE + features.GAP
    assert sheet.shape == (3 * step - features.GAP,) * 2
    middles = sheet[features.TILE // 2 :: step, features.TILE // 2 :: step]
    np.testing.assert_array_equal(middles[:2], [[0, 1, 2], [3, 4, np.nan]])
    assert np.isnan(sheet[features.TILE])[: 3 * step].all()


def test_training_image_is_its_own_nearest_neighbor(trained_run, train_store, draw, tmp_path):
    chosen, odd = [11, 3999], os.fsdecode(b"\xe9")  # not UTF-8
    found = train_store.read(np.array(chosen))
    files = [
        write_image(tmp_path / f"{n}{odd}.png", image)
        for n, image in zip(chosen, found["image"], strict=True)
    ]
    out = tmp_path / f"n{odd}.png"
    code, printed, _ = draw("neighbors", trained_run, *files, "--out", out)
    assert code == 0
    lines = printed.splitlines()
    assert lines[-1] == f"{tmp_path}/n\\udce9.png"
    picture = pixels(out)
    side, row, start = 144, 144 + 20, 148 + 12  # 72 pixels, doubled
    for place, label in enumerate(found["label"]):
        name, _, others = lines[place].partition(": ")
        assert name == f"{chosen[place]}\\udce9.png"
        nearest = [caption.split("  ") for caption in others.split(", ")]
        assert nearest[0][0] == train_store.class_names[label]
        distances = [float(distance) for _, distance in nearest]
        assert len(distances) == 6 and distances == sorted(distances)
        assert distances[0] < 1e-3 < distances[1]
        shown = [picture[2 + place * row :, 2 + x :][:side:2, :side:2] for x in (0, start)]
        np.testing.assert_array_equal(shown[0], found["image"][place])
        np.testing.assert_array_equal(shown[1], found["image"][place])


def test_neighbors_without_images_are_of_the_eval_split(
    trained_run, digits, digit_stores, draw, tmp_path
):
    moved = tmp_path / "moved"
    shutil.copytree(trained_run, moved)
    code, _, error = draw("neighbors", moved, "--data-dir", tmp_path)
    assert code == EXIT_USER_ERROR and "--data-dir" in error and str(tmp_path) in error
    code, printed, _ = draw("neighbors", moved, "--data-dir", digits)
    assert code == 0
    lines = printed.splitlines()
    assert len(lines) == 6 and lines[-1] == str(moved / "neighbors.png")
    split = digit_stores["eval"]
    expected = [split.class_names[split.labels[place]] for place in (0, 249, 499, 749, 999)]
    assert [line.split(": ")[0] for line in lines[:5]] == expected


@pytest.fixture(scope="module")
def corner_run(tmp_path_factory):
    """A network whose first class is the more probable the brighter the upper left corner is."""
    config = configs.load(
        "configs/quickstart.py",
        [("model.variant", "single"), ("model.width", "0.001"), ("model.num_classes", "2")]
        + [("image_size", "140"), ("augment.crop_size", "128")],
    )
    shapes = inference.state_shapes(config, build_model(config))
    params = jax.tree.map(lambda x: np.zeros(x.shape, np.float32), shapes.params)
    params["conv1"]["kernel"][..., 0] = 1 / 363
    for layer in ("conv2", "conv3", "conv4", "conv5"):
        kernel = params[layer]["kernel"]
        kernel[kernel.shape[0] // 2, kernel.shape[1] // 2, 0, 0] = 1.0
    params["fc6"]["kernel"][0, 0] = params["fc7"]["kernel"][0, 0] = (
        1.0  # the first position of pool5
    )
    params["fc8"]["kernel"][0] = 2.0, -2.0
    mean = np.full((140, 140, 3), 100, np.float32)
    stats = Statistics(mean, np.eye(3, dtype=np.float32))
    workdir = tmp_path_factory.mktemp("corner") / "run"
    inference.create(workdir, config, {"params": params}, stats, ["bright", "dark"])
    return workdir


def test_occluding_the_decisive_corner_lowers_the_probability(corner_run, draw, tmp_path):
    picture = np.full((140, 140, 3), 100, np.uint8)
    picture[12:30, 12:30] = 255
    picture[100:130, 100:130] = 255  # has no effect on the class
    file = write_image(tmp_path / "corner.png", picture)
    found = occlusion.occlude(inference.load(corner_run), picture)
    assert found.map.shape == (32, 32) and (found.patch, found.stride) == (32, 4)
    assert found.label == 0 and found.probability > 0.9
    assert found.map[4, 4] == pytest.approx(0.5)  # only the mean is left
    least, row, column = found.largest_change()
    assert least == found.map.min() and row < 32 and column < 32
    np.testing.assert_allclose(found.map[20:, :], found.probability, rtol=1e-5)
    code, printed, _ = draw("occlusion", corner_run, file)
    assert code == 0
    first, path = printed.splitlines()
    assert path == str(corner_run / "occlusion.png")
    assert first == (
        f"bright: probability {found.probability:.3f}, and {least:.3f} with a square of 32x32 "
        f"pixels around row {row}, column {column} of the center crop"
    )
    expected = figure_pixels(occlusion.occlusion_figure(found, "bright"), tmp_path / "e.png")
    np.testing.assert_array_equal(pixels(path), expected)
    code, printed, _ = draw(
        *("occlusion", corner_run, file, "--class", "dark"),
        *("--patch", 64, "--stride", 32, "--out", tmp_path / "dark.png"),
    )
    assert code == 0
    assert printed.startswith(f"dark: probability {1 - found.probability:.3f}")
    assert "64x64" in printed


def test_squares_of_one_stride_cover_each_pixel_of_the_crop_once(corner_run):
    picture = images.photograph(1, 140, 140)
    batches = occlusion.occluded_batches(inference.load(corner_run), picture, patch=30, stride=30)
    shown = np.concatenate(list(batches))
    np.testing.assert_array_equal(shown[0], picture)
    hidden = (shown[1:26] != picture).any(axis=-1)  # 5 x 5 positions, the last clipped
    assert hidden.sum(axis=0).max() == 1
    assert not hidden[:, :6].any() and not hidden[:, 134:].any()
    assert hidden[:, 6:134, 6:134].sum(axis=0).mean() > 0.99  # some pixels equal the mean
    assert (shown[1:26][hidden] == 100).all()
    np.testing.assert_array_equal(shown[26:], np.broadcast_to(picture, shown[26:].shape))


def write_metrics(workdir, rate, epochs, cut=""):
    """Writes a metrics.jsonl that ends in `cut`, an incomplete line; returns its rows."""
    workdir.mkdir()
    rows = []
    for epoch in range(1, epochs + 1):
        common = {"step": epoch, "epoch": epoch, "loss": rate / epoch, "top1": 1 - rate / epoch}
        rows.append({**common, "split": "train", "learning_rate": rate})
        rows.append({**common, "split": "eval", "top1": 1 - rate / epoch / 2})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (workdir / "metrics.jsonl").write_text(text + cut)
    return rows


def test_curves_show_the_metrics_of_each_run(draw, tmp_path):
    fast = write_metrics(tmp_path / "fast", 0.5, 4)
    slow = write_metrics(
        tmp_path / "slow", 0.1, 9, cut='{"step": 10, "epo'
    )  # as in a run that is writing
    code, printed, _ = draw("curves", tmp_path / "fast", tmp_path / "slow")
    assert code == 0 and printed.strip() == str(tmp_path / "fast" / "compared.png")
    figure = figures.curves_of_runs({"fast": fast, "slow": slow})
    drawn = figure_pixels(figure, tmp_path / "expected.png")
    np.testing.assert_array_equal(pixels(tmp_path / "fast" / "compared.png"), drawn)
    loss, error, rate = figure.axes
    lines = [np.array(line.get_data()) for line in error.lines]
    for line, (most, epochs, part) in zip(
        lines, [(0.5, 4, 1), (0.5, 4, 2), (0.1, 9, 1), (0.1, 9, 2)], strict=True
    ):
        numbers = np.arange(1, epochs + 1)
        np.testing.assert_allclose(line, [numbers, 100 * most / numbers / part])
    assert [line.get_ydata()[0] for line in rate.lines] == [0.5, 0.1]
    assert loss.lines[0].get_color() == loss.lines[1].get_color() != loss.lines[3].get_color()
    (legend,) = figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["fast", "slow", "train", "eval"]


def test_curves_leave_out_rows_of_few_steps():
    of_step = {20: 2.0, 40: 1.5, 59: 1.2, 60: 0.1, 80: 1.0}  # an evaluation after step 59
    rows = [
        {"step": step, "epoch": step / 59, "loss": loss, "top1": 0.5, "split": "train"}
        for step, loss in of_step.items()
    ]
    figure = figures.curves_of_runs({"run": [row | {"learning_rate": 0.1} for row in rows]})
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), [2.0, 1.5, 1.2, 1.0])


def test_runs_of_the_same_name_are_labeled_by_their_paths(draw, tmp_path):
    for parent, rate in (("a", 0.5), ("b", 0.1)):
        (tmp_path / parent).mkdir()
        write_metrics(tmp_path / parent / "run", rate, 3)
    runs = [tmp_path / "a" / "run", tmp_path / "b" / "run"]
    assert draw("curves", *runs, "--out", tmp_path / "c.png")[0] == 0
    rows = {str(run): [json.loads(line) for line in (run / "metrics.jsonl").open()] for run in runs}
    expected = figure_pixels(figures.curves_of_runs(rows), tmp_path / "e.png")
    np.testing.assert_array_equal(pixels(tmp_path / "c.png"), expected)


def test_network_is_drawn_from_a_workdir_or_a_config(trained_run, network, draw, tmp_path):
    expected = diagram.network_figure(network.model, (64, 64, 3))
    drawn = figure_pixels(expected, tmp_path / "e.png")
    of_config = ("--config", "configs/quickstart.py", *commands.SMALL)
    for what in ((trained_run,), of_config):
        code, printed, _ = draw("network", *what, "--out", tmp_path / "n.png")
        assert code == 0 and printed.strip() == str(tmp_path / "n.png")
        np.testing.assert_array_equal(pixels(tmp_path / "n.png"), drawn)


def test_grayscale_photograph_is_accepted(trained_run, draw, tmp_path):
    gray = tmp_path / "gray.jpg"
    gray.write_bytes(images.encode(images.photograph(0), mode="L"))
    words = ("--patch", 64, "--stride", 32, "--out", tmp_path / "o.png")
    code, printed, _ = draw("occlusion", trained_run, gray, *words)
    assert code == 0 and "probability" in printed


WRONG_INPUT = {
    "no image": (["features", "RUN", "text.jpg"], "text.jpg cannot be read (it is not an image)"),
    "half an image": (["features", "RUN", "half.jpg"], "half.jpg cannot be read"),
    "no file": (
        ["occlusion", "RUN", "none.jpg"],
        "none.jpg cannot be read ([Errno 2] No",
    ),
    "a folder": (
        ["neighbors", "RUN", "folder"],
        "folder cannot be read (it is not a",
    ),
    "no class": (
        ["occlusion", "RUN", "good.jpg", "--class", "cat"],
        "there is no class 'cat'; some that exist",
    ),
    "a patch": (["occlusion", "RUN", "good.jpg", "--patch", "65"], "stride <= patch <= 64"),
    "a stride": (["occlusion", "RUN", "good.jpg", "--stride", "0"], "1 <= stride"),
    "no run": (["filters", "folder"], "no trained network in folder"),
    "no step": (["filters", "RUN", "--step", "7"], "no checkpoint of step 7"),
    "a name": (["filters", "RUN", "--out", "f.jpg"], "--out=f.jpg must name a file"),
    "out": (["filters", "RUN", "--out", "text.jpg/f.png"], "cannot write text.jpg"),
    "no rows": (["curves", "folder"], "folder/metrics.jsonl has no rows yet"),
    "no file of rows": (["curves", "RUN", "odd"], "odd/metrics.jsonl cannot be read"),
    "other rows": (["curves", "RUN", "bad"], "bad/metrics.jsonl, line 2, is not a row of metrics"),
    "no network": (["network"], "name either a workdir or --config NAME"),
    "two networks": (
        ["network", "RUN", "--config", "configs/quickstart.py"],
        "name either a workdir or --config NAME",
    ),
    "no config": (["filters", "RUN", "--config.seed=1"], "--config.seed needs --config NAME"),
}


@pytest.mark.parametrize("name", WRONG_INPUT)
def test_wrong_input_is_a_one_line_error_and_writes_nothing(
    name, trained_run, draw, tmp_path, monkeypatch
):
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "good.jpg").write_bytes(images.encode(images.photograph(0)))
    (tmp_path / "half.jpg").write_bytes(images.encode(images.photograph(0))[:2000])
    (tmp_path / "folder").mkdir()
    row = {"split": "eval", "epoch": 1, "step": 1, "loss": 1.0, "top1": 0.5}
    (tmp_path / "odd" / "metrics.jsonl").mkdir(parents=True)
    (tmp_path / "bad").mkdir()
    (tmp_path / "bad" / "metrics.jsonl").write_text(f"{json.dumps(row)}\n5\n")
    monkeypatch.chdir(tmp_path)
    words, message = WRONG_INPUT[name]
    before = images.contents(tmp_path)
    code, _, error = draw(*(trained_run if word == "RUN" else word for word in words))
    assert code == EXIT_USER_ERROR
    (line,) = error.splitlines()
    assert line.startswith("error: ") and message in line
    assert images.contents(tmp_path) == before


def test_command_prints_the_path_of_the_picture(trained_run, tmp_path):
    run = tmp_path / "run"
    shutil.copytree(trained_run, run)
    photograph = tmp_path / "photograph.jpg"
    photograph.write_bytes(images.encode(images.photograph(1)))
    command = (sys.executable, "-m", "alexnet_jax.visualize", "features", run, photograph)
    done = commands.run(*command)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == str(run / "features.png")
    assert pixels(run / "features.png").std() > 20


def test_full_disk_keeps_the_previous_picture(tmp_path):
    out = tmp_path / "network.png"
    out.write_bytes(b"an older one")
    command = (sys.executable, "-m", "alexnet_jax.visualize", "network")
    done = commands.run_with_file_limit(
        8, *command, "--config", "configs/quickstart.py", "--out", out
    )
    assert done.returncode == EXIT_USER_ERROR, done.stdout + done.stderr
    assert "cannot write" in done.stderr and "Traceback" not in done.stderr
    assert images.contents(tmp_path) == {"network.png": b"an older one"}


def test_help_lists_every_picture(draw):
    code, printed, _ = draw("--help")
    assert code == 0
    for what in ("data", "filters", "features", "neighbors", "occlusion", "curves", "network"):
        assert f"\n  {what} " in printed
        assert draw(what, "--help")[0] == 0
