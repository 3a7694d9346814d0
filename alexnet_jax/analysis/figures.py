"""Pictures of runs: images with captions, conv1's filters, training curves; and of a plan.

Drawn without pyplot, whose backend is the caller's: a notebook goes on showing its own pictures.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float32, Int, UInt8
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

LEAST_TILE = 112  # pixels: room enough for a class name
CAPTION_HEIGHT = 16
FILTER_ZOOM = 4  # at least; more where filters are few
FILTERS_WIDTH = 700  # pixels, about
TOWER_GAP = 2  # pixels before zooming, between the filters of two towers
PANEL_COLUMNS = 8
MOST_NAMED = 40  # classes whose names and counts a confusion matrix has room for


def save_sample_grid(
    images: UInt8[np.ndarray, "N S S 3"], captions: Sequence[str], path: Path
) -> None:
    """Writes images as a grid with a caption under each."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = [slice(start, start + columns) for start in range(0, len(images), columns)]
    _save_rows([images[row] for row in rows], [captions[row] for row in rows], path)


def save_neighbors(
    queries: UInt8[np.ndarray, "Q S S 3"],
    neighbors: UInt8[np.ndarray, "Q K S S 3"],
    captions: Sequence[Sequence[str]],
    path: Path,
) -> None:
    """Writes each query and its neighbours as a row.

    Args:
      captions: 1 + K for each row.
    """
    rows = np.concatenate([queries[:, None], neighbors], axis=1)
    _save_rows(rows, captions, path, gap_after_first=12)


def _save_rows(
    rows: Sequence[np.ndarray] | np.ndarray,
    captions: Sequence[Sequence[str]],
    path: Path,
    gap_after_first: int = 0,
) -> None:
    size = rows[0].shape[1]
    side = size * math.ceil(LEAST_TILE / size)
    cell = (side + 4, side + CAPTION_HEIGHT + 4)
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * cell[0] + gap_after_first, len(rows) * cell[1]), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for down, (row, told) in enumerate(zip(rows, captions, strict=True)):
        for along, (image, caption) in enumerate(zip(row, told, strict=True)):
            x = along * cell[0] + 2 + (gap_after_first if along else 0)
            y = down * cell[1] + 2
            tile = Image.fromarray(image).resize((side, side), Image.Resampling.NEAREST)
            sheet.paste(tile, (x, y))
            draw.text((x + 2, y + side), _shorten(caption, side, font), "black", font)
    sheet.save(path)


def save_filters(kernel: Float32[np.ndarray, "H W 3 N"], towers: int, path: Path) -> None:
    """Writes a first layer's kernel as the paper's Figure 3 has it.

    That is 96 filters in rows of 16, the first tower's above the second's. All filters share one
    scale, with grey for zero, so that strong and weak ones can be told apart.
    """
    height, width, _, count = kernel.shape
    scaled = 127.5 + 127.5 * kernel / (np.abs(kernel).max() + 1e-12)
    pixels = np.clip(scaled, 0, 255).astype(np.uint8)
    columns = filter_columns(count, towers)
    rows = count // columns
    gap = (towers - 1) * TOWER_GAP
    sheet = np.full((rows * (height + 1) + 1 + gap, columns * (width + 1) + 1, 3), 255, np.uint8)
    for place in range(count):
        row = place // columns
        y = row * (height + 1) + 1 + row * towers // rows * TOWER_GAP
        x = place % columns * (width + 1) + 1
        sheet[y : y + height, x : x + width] = pixels[..., place]
    zoom = max(FILTER_ZOOM, FILTERS_WIDTH // sheet.shape[1])
    size = (sheet.shape[1] * zoom, sheet.shape[0] * zoom)
    Image.fromarray(sheet).resize(size, Image.Resampling.NEAREST).save(path)


def filter_columns(count: int, towers: int) -> int:
    """Returns how many filters a row has, so that no row is ragged or shared by towers.

    Of those, the nearest to Figure 3's proportions, 16 to 6.
    """
    of_tower = count // towers
    whole = [columns for columns in range(1, of_tower + 1) if of_tower % columns == 0]
    return min(whole, key=lambda columns: abs(columns - math.sqrt(count * 16 / 6)))


def save_curves(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Writes loss, error and learning rate over epochs from the rows of a metrics.jsonl."""
    figure, panels = _curve_panels()
    rows = list(rows)
    _draw_curve(panels, rows, "train", color="black", label="train")
    _draw_curve(panels, rows, "eval", color="tab:red", label="eval", marker="o")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def curves_of_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Draws loss, error and learning rate over epochs, a colour for each run.

    Thin lines are of training, thick ones with dots of evaluation.
    """
    from matplotlib import colormaps

    figure, panels = _curve_panels()
    palette = colormaps["tab10" if len(runs) <= 10 else "tab20"]
    for number, (name, rows) in enumerate(runs.items()):
        color = palette(number % palette.N)
        _draw_curve(panels, rows, "train", color=color, linewidth=0.8, alpha=0.6)
        _draw_curve(panels, rows, "eval", color=color, linewidth=1.8, marker="o")
        panels[0].plot([], [], color=color, linewidth=3, label=name)
    panels[0].plot([], [], color="grey", linewidth=0.8, label="train")
    panels[0].plot([], [], color="grey", linewidth=1.8, marker="o", markersize=3, label="eval")
    columns = min(len(runs) + 2, 6)
    figure.legend(loc="outside upper left", ncols=columns, frameon=False)
    return figure


def _curve_panels() -> tuple["Figure", Sequence["Axes"]]:
    from matplotlib.figure import Figure  # takes a while, and most of a run does without
    from matplotlib.layout_engine import ConstrainedLayoutEngine

    figure = Figure(figsize=(13, 3.6), dpi=100, layout=ConstrainedLayoutEngine(w_pad=0.12))
    panels = figure.subplots(1, 3)
    panels[0].set(xlabel="epoch", ylabel="loss (nats)", yscale="log")
    panels[1].set(xlabel="epoch", ylabel="top-1 error (%)")
    panels[2].set(xlabel="epoch", ylabel="learning rate", yscale="log")
    for axes in panels:
        axes.grid(alpha=0.3)
    return figure, panels


def _draw_curve(
    panels: Sequence["Axes"], rows: Sequence[Mapping[str, Any]], split: str, **style: Any
) -> None:
    loss, error, rate = panels
    of_split = [row for row in rows if row["split"] == split]
    epochs = [row["epoch"] for row in of_split]
    loss.plot(epochs, [row["loss"] for row in of_split], markersize=3, **style)
    error.plot(epochs, [100 * (1 - row["top1"]) for row in of_split], markersize=3, **style)
    if split == "train":
        rate.plot(epochs, [row["learning_rate"] for row in of_split], **style)


def save_predictions(
    images: Sequence[UInt8[np.ndarray, "S S 3"]],
    truths: Sequence[str | None],
    classes: Sequence[Sequence[str]],
    probabilities: Sequence[np.ndarray],
    path: Path,
) -> None:
    """Draws images with their most probable classes as bars under them (paper, Fig. 4 left).

    Args:
      truths: each image's right class, written under it and its bar red; None if not known.
      classes: of each image, the most probable first.
      probabilities: of these classes, 0 to 1.
    """
    from matplotlib.figure import Figure

    columns = min(PANEL_COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.2 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, height_ratios=[2, 1.3] * rows, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for place, image in enumerate(images):
        row, column = divmod(place, columns)
        picture, bars = axes[2 * row, column], axes[2 * row + 1, column]
        picture.imshow(image)
        picture.text(
            *(0.5, -0.04, truths[place] or ""),
            **{"ha": "center", "va": "top", "transform": picture.transAxes, "fontsize": 9},
        )
        colors = ["tab:red" if name == truths[place] else "tab:blue" for name in classes[place]]
        bars.barh(range(len(colors)), probabilities[place], color=colors, alpha=0.55)
        bars.set(xlim=(0, 1), ylim=(len(colors) - 0.4, -0.6))
        for number, name in enumerate(classes[place]):
            bars.text(0.02, number, name, va="center", fontsize=8, clip_on=True)
    figure.savefig(path, dpi=100)


def save_confusion(
    confusion: Int[np.ndarray, "C C"], class_names: Sequence[str], path: Path
) -> None:
    """Draws counts of examples by label (rows) and answer (columns), as shares of each label's.

    With few classes each cell has its count and each axis its names. Shares are coloured on a
    scale that shows the rare mistakes beside the many right answers.
    """
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    count = len(confusion)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    told = count <= MOST_NAMED
    side = max(5.0, 0.42 * count + 1.5) if told else 9.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    scale = SymLogNorm(linthresh=1.0, vmin=0.0, vmax=100.0)
    picture = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
    bar = figure.colorbar(picture, shrink=0.7, label="share of the label's examples (%)")
    bar.set_ticks([0, 1, 10, 100], labels=["0", "1", "10", "100"])
    if told:
        axes.set_xticks(range(count), class_names, rotation=90)
        axes.set_yticks(range(count), class_names)
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 10 else "black"
            number = f"{confusion[row, column]}"
            axes.text(column, row, number, ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="answer", ylabel="label")
    figure.savefig(path, dpi=100)


def save_scaling(
    curves: Mapping[str, Sequence[tuple[int, float]]], topology: str, path: Path
) -> None:
    """Draws predicted images a second against the number of chips, (chips, rate) by layout.

    Beside it, a chip's rate as a share of the best that there is.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.5), layout="constrained")
    rates, shares = figure.subplots(1, 2)
    alone = max((rate / chips for curve in curves.values() for chips, rate in curve), default=1.0)
    most = max(chips for curve in curves.values() for chips, _ in curve)
    rates.plot(
        [1, most],
        [alone, alone * most],
        ":",
        color="grey",
        label="the best chip's rate times chips",
    )
    for name, curve in curves.items():
        chips, found = map(np.array, zip(*curve, strict=True))
        rates.plot(chips, found, "o-", label=name)
        shares.plot(chips, found / chips / alone, "o-", label=name)
    for axes in (rates, shares):
        axes.set_xscale("log", base=2)
        axes.set_xlabel(f"chips, up to {topology}")
        axes.grid(alpha=0.3)
    rates.set_yscale("log")
    rates.set_ylabel("images a second, predicted")
    rates.legend(fontsize=8)
    shares.set_ylabel("a chip's rate over the best chip's")
    shares.set_ylim(0, 1.05)
    figure.savefig(path, dpi=100)


def _shorten(text: str, width: int, font: ImageFont.FreeTypeFont | ImageFont.ImageFont) -> str:
    while text and font.getlength(text) > width - 4:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text
