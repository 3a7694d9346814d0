"""Names in pictures are drawn as they are: in any script, and with `$`."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from PIL import Image

from alexnet_jax.analysis import features, figures, fonts, occlusion

RARE = "\U0010fffd"  # for private use, so no font has it unless a test makes one
NAMES = [f"{RARE} $1_bill", "US$5_to_$10", RARE, "кот"]
IMAGES = np.full((4, 72, 72, 3), 128, np.uint8)
ROWS = [
    {
        "split": split,
        "step": epoch,
        "epoch": epoch,
        "loss": 3 / epoch,
        "top1": 0.1,
        "learning_rate": 0.01 / epoch,
    }
    for epoch in (1, 2)
    for split in ("train", "eval")
]
CLASSES = [NAMES] * len(NAMES)
OCCLUDED = occlusion.Occlusion(
    IMAGES[0], label=0, probability=0.5, map=np.eye(4, dtype=np.float32), patch=18, stride=18
)
PICTURES = {
    "samples": lambda path: figures.save_sample_grid(IMAGES, NAMES, path),
    "neighbors": lambda path: figures.save_neighbors(
        IMAGES[:2], np.stack([IMAGES[:1]] * 2), [NAMES[:2], NAMES[2:]], path
    ),
    "panel": lambda path: figures.save_predictions(IMAGES, NAMES, CLASSES, np.eye(4), path),
    "confusion": lambda path: figures.save_confusion(np.eye(4, dtype=int), NAMES, path),
    "occlusion": lambda path: occlusion.occlusion_figure(OCCLUDED, NAMES[0]).savefig(path),
    "curves": lambda path: figures.curves_of_runs(dict.fromkeys(NAMES, ROWS)).savefig(path),
}


def draw_all(folder):
    for name, draw in PICTURES.items():
        draw(Path(folder, f"{name}.png"))


def write_font(path):
    """Writes a font that has a black square for `RARE` and nothing else."""
    pen = TTGlyphPen(None)
    for step, corner in enumerate([(50, 0), (50, 800), (950, 800), (950, 0)]):
        (pen.lineTo if step else pen.moveTo)(corner)
    pen.closePath()
    builder = FontBuilder(unitsPerEm=1000)
    builder.setupGlyphOrder([".notdef", "square"])
    builder.setupCharacterMap({ord(RARE): "square"})
    builder.setupGlyf({".notdef": TTGlyphPen(None).glyph(), "square": pen.glyph()})
    builder.setupHorizontalMetrics({".notdef": (1000, 0), "square": (1000, 50)})
    builder.setupHorizontalHeader(ascent=880, descent=-120)
    builder.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    builder.setupOS2()
    builder.setupPost()
    path.parent.mkdir(parents=True)
    builder.save(path)


@pytest.fixture
def without_font(tmp_path, monkeypatch, capsys):
    """Draws every picture; returns their folder and what was printed on stderr."""
    monkeypatch.setattr(fonts, "_said", [])
    folder = tmp_path / "without"
    folder.mkdir()
    draw_all(folder)
    return folder, capsys.readouterr().err


def black_pixels(path):
    return int((np.asarray(Image.open(path).convert("L")) < 40).sum())


def test_missing_glyphs_are_reported_once_and_dollars_are_text(recwarn, without_font):
    _, printed = without_font
    assert not [warning for warning in recwarn if "Glyph" in str(warning.message)]
    assert printed.count("\n") == 1 and ascii(RARE) in printed and "install" in printed


@pytest.mark.skipif(sys.platform != "linux", reason="fonts are in another folder")
def test_an_installed_font_with_the_glyphs_is_used(without_font, tmp_path):
    write_font(tmp_path / "data" / "fonts" / "squares.ttf")
    folder = tmp_path / "with"
    folder.mkdir()
    result = subprocess.run(
        [
            sys.executable,
            "-c",
            "import sys, test_fonts as t; t.draw_all(sys.argv[1])",
            folder,
        ],
        env=os.environ
        | {
            "XDG_DATA_HOME": str(tmp_path / "data"),
            "PYTHONPATH": os.pathsep.join(
                map(str, (Path(__file__).parent, Path(__file__).parent.parent))
            ),
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr
    assert "Glyph" not in result.stderr and "pictures show" not in result.stderr
    for name in PICTURES:
        drawn, boxes = (black_pixels(Path(f, f"{name}.png")) for f in (folder, without_font[0]))
        assert drawn > boxes + 30, name  # a square has more ink than an empty box


def test_features_page_draws_dollars_as_text(network, tmp_path):
    names = tuple(f"US$5_to_${n}" for n in range(10))
    figure = features.features_figure(
        network._replace(class_names=names), np.full((72, 72, 3), 9, np.uint8)
    )
    figure.savefig(tmp_path / "features.png")
