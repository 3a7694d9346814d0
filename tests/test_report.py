"""metrics.jsonl and its speeds, and the pictures of a run."""

import json

import numpy as np
import pytest
from PIL import Image

from alexnet_jax.analysis import figures as plots
from alexnet_jax.training.metrics import Meter, Report, read_metrics


def row(step, split="train"):
    common = {"step": step, "epoch": step / 10, "loss": 1.0, "top1": 0.5, "top5": 0.9}
    of_training = {"learning_rate": 0.01, "images_per_s": 100.0, "data_wait": 0.01}
    return common | (of_training if split == "train" else {})


def write(workdir, start, steps):
    report = Report(workdir, start, total_steps=100)
    for step in steps:
        report.train(row(step))
    report.evaluation(row(steps[-1], "eval"))
    report.close()


def test_rows_of_repeated_steps_are_removed(tmp_path):
    write(tmp_path, 0, range(1, 31))
    write(tmp_path, 20, range(21, 41))
    steps = [r["step"] for r in read_metrics(tmp_path) if r["split"] == "train"]
    assert steps == list(range(1, 41))


def test_incomplete_last_line_is_ignored(tmp_path):
    write(tmp_path, 0, range(1, 4))
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 5, "epo')
    assert [r["step"] for r in read_metrics(tmp_path)] == [1, 2, 3, 3]
    write(tmp_path, 3, range(4, 6))
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 3, 4, 5, 5]


def test_each_row_is_a_line_in_a_log_file(tmp_path, capsys):
    write(tmp_path, 0, [20])
    line = capsys.readouterr().out.splitlines()[0]
    for told in ("step     20", "loss 1.000", "top1 50.0%", "lr 0.01", "100 images/s", "1.0%"):
        assert told in line


def test_meter_measures_the_steps_since_the_last_drain():
    meter = Meter(batch_size=10)
    meter._clock -= 5.0  # five seconds ago
    for step in (1, 2, 3):
        meter.add(step, {"loss": np.float32(step)}, waited=0.5, steps_in_flight=2)
    steps, speed = meter.drain()
    assert steps == [(1, {"loss": 1.0}), (2, {"loss": 2.0}), (3, {"loss": 3.0})]
    assert speed["images_per_s"] == pytest.approx(30 / 5, rel=0.01)
    assert speed["data_wait"] == pytest.approx(1.5 / 5, rel=0.01)
    assert meter.drain() == ([], {})


def test_steps_in_flight_are_left_for_the_next_drain():
    meter = Meter(batch_size=10)
    for step in (1, 2, 3):
        meter.add(step, {"loss": np.float32(step)}, waited=0.0, steps_in_flight=2)
    assert meter.drain(5) == ([], {})
    assert [step for step, _ in meter.drain(2)[0]] == [1]
    meter._clock -= 5.0
    meter.add(4, {"loss": np.float32(4)}, waited=0.0, steps_in_flight=2)
    steps, speed = meter.drain()
    assert [step for step, _ in steps] == [2, 3, 4]
    assert speed["images_per_s"] == pytest.approx(30 / 5, rel=0.01)


def test_speed_excludes_steps_before_the_clock_was_restarted():
    meter = Meter(batch_size=10)
    meter.add(1, {"loss": np.float32(1)}, waited=9.0, steps_in_flight=2)  # with compilation
    meter.restart_clock()
    meter._clock -= 5.0
    meter.add(2, {"loss": np.float32(2)}, waited=1.0, steps_in_flight=2)
    steps, speed = meter.drain()
    assert len(steps) == 2
    assert speed["images_per_s"] == pytest.approx(10 / 5, rel=0.01)
    assert speed["data_wait"] == pytest.approx(1 / 5, rel=0.01)


def test_speed_of_the_first_step_alone_includes_its_compilation():
    meter = Meter(batch_size=10)
    meter._created -= 4.0
    meter.add(1, {"loss": np.float32(1)}, waited=0.0, steps_in_flight=2)
    meter.restart_clock()
    assert meter.drain()[1]["images_per_s"] == pytest.approx(2.5, rel=0.01)


def test_sample_grid_shows_each_image_in_its_place(tmp_path):
    images = np.zeros((5, 28, 28, 3), np.uint8)
    for place in range(5):
        images[place] = 50 * place
    names = ["a very long class name of a rare animal"] * 5
    plots.save_sample_grid(images, names, tmp_path / "g.png")
    grid = np.asarray(Image.open(tmp_path / "g.png"))
    side = 112
    for place in range(5):
        y, x = place // 3 * (side + 20) + 2, place % 3 * (side + 4) + 2
        assert (grid[y : y + side, x : x + side] == 50 * place).all()


def test_filters_share_one_scale_with_gray_for_zero(tmp_path):
    kernel = np.zeros((11, 11, 3, 96), np.float32)
    kernel[..., 0], kernel[..., 1] = 2.0, -1.0
    plots.save_filters(kernel, 2, tmp_path / "f.png")
    picture = np.asarray(Image.open(tmp_path / "f.png")).astype(int)
    step = 12 * plots.FILTER_ZOOM
    first, second, third = (picture[8, 8 + step * n, 0] for n in range(3))
    assert (first, second, third) == (255, 63, 127)
