"""Figures: images with captions, filters, training curves, predictions, confusion.

pyplot is not used, because it would change the backend of the caller, such as a notebook.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from jaxtyping import Float32, Int, Shaped, UInt8
from PIL import Image, ImageDraw

from alexnet_jax.analysis import fonts
from alexnet_jax.data.augment import Augment
from alexnet_jax.data.pipeline import Order
from alexnet_jax.training.train_step import augment_batch, train_key
from alexnet_jax.utils.process import run_once

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

MIN_TILE = 112  # pixels: enough for a class name below an image
CAPTION_HEIGHT = 16
BASELINE = 12  # below an image
MAX_SAMPLES = 36  # images of a batch
FILTER_ZOOM = 4  # at least; few filters are enlarged more, to about FILTERS_WIDTH pixels in all
FILTERS_WIDTH = 700
TOWER_GAP = 2  # pixels before enlarging, between the filters of two towers
PANEL_COLUMNS = 8
MAX_CLASSES_NAMED = 40  # more names and counts do not fit into a confusion matrix


def tile(
    images: Shaped[np.ndarray, "N H W ..."], columns: int, gap: int = 1, fill: float = 255
) -> Shaped[np.ndarray, "height width ..."]:
    """Returns images arranged in rows in one array, with `gap` pixels of `fill` between them."""
    count, height, width, *channels = images.shape
    rows = math.ceil(count / columns)
    cells = np.full(
        (rows * columns, height + gap, width + gap, *channels), fill, dtype=images.dtype
    )
    cells[:count, :height, :width] = images
    grid = cells.reshape(rows, columns, height + gap, width + gap, *channels)
    sheet = np.moveaxis(grid, 1, 2).reshape(
        rows * (height + gap), columns * (width + gap), *channels
    )
    return sheet[: len(sheet) - gap, : sheet.shape[1] - gap]


def enlarge(image: Shaped[np.ndarray, "H W ..."], zoom: int) -> Shaped[np.ndarray, "h w ..."]:
    """Returns an image in which each pixel is repeated zoom×zoom times."""
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)


def save_sample_grid(
    images: UInt8[np.ndarray, "N S S 3"], captions: Sequence[str], path: Path
) -> None:
    """Saves images in a square grid with a caption below each."""
    columns = math.ceil(math.sqrt(len(images)))
    rows = [slice(start, start + columns) for start in range(0, len(images), columns)]
    _save_rows([images[row] for row in rows], [captions[row] for row in rows], path)


def save_samples(order: Order, augment: Augment, draws: tuple[int, int], path: Path) -> None:
    """Saves the first images of the batch of a training step, augmented as in that step.

    Only the mean is not subtracted, so that the picture shows natural colors.

    Args:
      draws: seed of the augmentation, and the step.
    """
    seed, step = draws
    positions = step * order.batch_size + np.arange(min(MAX_SAMPLES, order.batch_size))
    batch = order.store.read(order.examples(positions))
    with_mean = augment.stats._replace(mean=np.zeros_like(augment.stats.mean))
    augment = dataclasses.replace(augment, stats=with_mean)
    key = jax.random.fold_in(train_key(seed), step)
    seen = run_once(lambda x: augment_batch(augment, key, x, step)["image"], batch)
    pixels = np.clip(np.rint(np.asarray(seen) / augment.scale), 0, 255).astype(np.uint8)
    save_sample_grid(pixels, [order.store.class_names[label] for label in batch["label"]], path)


def save_neighbors(
    queries: UInt8[np.ndarray, "Q S S 3"],
    neighbors: UInt8[np.ndarray, "Q K S S 3"],
    captions: Sequence[Sequence[str]],
    path: Path,
) -> None:
    """Saves each query image and its neighbors as a row.

    Args:
      captions: 1 + K for each row, the query's first.
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
    side = size * math.ceil(MIN_TILE / size)
    cell = (side + 4, side + CAPTION_HEIGHT + 4)
    columns = max(map(len, rows))
    sheet = Image.new("RGB", (columns * cell[0] + gap_after_first, len(rows) * cell[1]), "white")
    draw = ImageDraw.Draw(sheet)
    runs_of = fonts.for_captions([caption for texts in captions for caption in texts], 12)
    for row, (images, texts) in enumerate(zip(rows, captions, strict=True)):
        for column, (image, caption) in enumerate(zip(images, texts, strict=True)):
            x = column * cell[0] + 2 + (gap_after_first if column else 0)
            y = row * cell[1] + 2
            sheet.paste(Image.fromarray(enlarge(image, side // size)), (x, y))
            left = x + 2.0
            for font, run in runs_of(_shorten(caption, side - 4, runs_of)):
                draw.text((left, y + side + BASELINE), run, "black", font, anchor="ls")
                left += font.getlength(run)
    sheet.save(path)


def save_filters(kernel: Float32[np.ndarray, "H W 3 N"], towers: int, path: Path) -> None:
    """Saves the filters of a first layer, arranged as in the paper's Figure 3.

    96 filters form rows of 16, those of the first tower above those of the second. All share one
    scale, on which gray is zero, so that strong and weak filters can be told apart.
    """
    scaled = 127.5 + 127.5 * kernel / (np.abs(kernel).max() + 1e-12)
    filters = np.moveaxis(np.clip(scaled, 0, 255).astype(np.uint8), -1, 0)
    columns = filter_columns(len(filters), towers)
    parts = [tile(part, columns) for part in np.split(filters, towers)]
    gap = np.full((TOWER_GAP + 1, *parts[0].shape[1:]), 255, np.uint8)
    sheet = np.concatenate([row for part in parts for row in (gap, part)][1:])
    sheet = np.pad(sheet, ((1, 1), (1, 1), (0, 0)), constant_values=255)
    zoom = max(FILTER_ZOOM, FILTERS_WIDTH // sheet.shape[1])
    Image.fromarray(enlarge(sheet, zoom)).save(path)


def filter_columns(count: int, towers: int) -> int:
    """Returns the number of filters in a row.

    All rows are full and none is shared by two towers. Among such numbers it is the one nearest to
    the proportions of Figure 3, 16 columns to 6 rows.
    """
    per_tower = count // towers
    divisors = [columns for columns in range(1, per_tower + 1) if per_tower % columns == 0]
    return min(divisors, key=lambda columns: abs(columns - math.sqrt(count * 16 / 6)))


def save_curves(rows: Iterable[Mapping[str, Any]], path: Path) -> None:
    """Plots loss, error and learning rate over epochs from the rows of a metrics.jsonl."""
    figure, panels = _curve_panels()
    rows = list(rows)
    _draw_curve(panels, rows, "train", color="black", label="train")
    _draw_curve(panels, rows, "eval", color="tab:red", label="eval", marker="o")
    panels[0].legend(frameon=False)
    figure.savefig(path)


def curves_of_runs(runs: Mapping[str, Sequence[Mapping[str, Any]]]) -> "Figure":
    """Returns a figure of loss, error and learning rate over epochs, with a color for each run.

    Thin lines are training, thick lines with dots are evaluation.

    Args:
      runs: rows of metrics.jsonl by the name of the run.
    """
    from matplotlib import colormaps

    figure, panels = _curve_panels()
    palette = colormaps["tab10" if len(runs) <= 10 else "tab20"]
    for index, (name, rows) in enumerate(runs.items()):
        color = palette(index % palette.N)
        _draw_curve(panels, rows, "train", color=color, linewidth=0.8, alpha=0.6)
        _draw_curve(panels, rows, "eval", color=color, linewidth=1.8, marker="o")
        panels[0].plot([], [], color=color, linewidth=3, label=name)
    panels[0].plot([], [], color="gray", linewidth=0.8, label="train")
    panels[0].plot([], [], color="gray", linewidth=1.8, marker="o", markersize=3, label="eval")
    columns = min(len(runs) + 2, 6)
    figure.legend(loc="outside upper left", ncols=columns, frameon=False)
    return fonts.prepare(figure)


def _curve_panels() -> tuple["Figure", Sequence["Axes"]]:
    # Importing matplotlib takes a while, and a run that does not draw does not need it.
    from matplotlib.figure import Figure
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
    rows = [row for row in rows if row["split"] == split]
    if split == "train" and rows:
        # A row ends before an evaluation, and can be of a single batch. Its loss would be a spike.
        steps = np.diff([row["step"] for row in rows], prepend=0)
        usual = np.median(steps)
        rows = [row for row, count in zip(rows, steps, strict=True) if 2 * count >= usual]
    epochs = [row["epoch"] for row in rows]
    loss.plot(epochs, [row["loss"] for row in rows], markersize=3, **style)
    error.plot(epochs, [100 * (1 - row["top1"]) for row in rows], markersize=3, **style)
    if split == "train":
        rate.plot(epochs, [row["learning_rate"] for row in rows], **style)


def save_predictions(
    images: Sequence[UInt8[np.ndarray, "S S 3"]],
    labels: Sequence[str | None],
    classes: Sequence[Sequence[str]],
    probabilities: Sequence[np.ndarray],
    path: Path,
) -> None:
    """Saves images with bars for their most probable classes below (paper, Figure 4 left).

    Args:
      labels: the correct class of each image, written below it and drawn as a red bar, or None if
        it is not known.
      classes: the most probable classes of each image, most probable first.
      probabilities: their probabilities, 0 to 1.
    """
    from matplotlib.figure import Figure

    columns = min(PANEL_COLUMNS, len(images))
    rows = math.ceil(len(images) / columns)
    figure = Figure(figsize=(2.2 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(2 * rows, columns, height_ratios=[2, 1.3] * rows, squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for index, (image, label) in enumerate(zip(images, labels, strict=True)):
        row, column = divmod(index, columns)
        picture, bars = axes[2 * row, column], axes[2 * row + 1, column]
        picture.imshow(image)
        style = {"ha": "center", "va": "top", "transform": picture.transAxes, "fontsize": 9}
        picture.text(0.5, -0.04, label or "", **style)
        colors = ["tab:red" if name == label else "tab:blue" for name in classes[index]]
        bars.barh(range(len(colors)), probabilities[index], color=colors, alpha=0.55)
        bars.set(xlim=(0, 1), ylim=(len(colors) - 0.4, -0.6))
        for rank, name in enumerate(classes[index]):
            bars.text(0.02, rank, name, va="center", fontsize=8, clip_on=True)
    fonts.prepare(figure).savefig(path, dpi=100)


def save_confusion(
    confusion: Int[np.ndarray, "C C"], class_names: Sequence[str], path: Path
) -> None:
    """Saves a confusion matrix: labels are rows, predictions are columns.

    The color of a cell is its share of the label's examples, on a scale that is linear up to 1 %
    and logarithmic above, so that rare mistakes remain visible. With few classes, cells show
    counts and axes show names.
    """
    from matplotlib.colors import SymLogNorm
    from matplotlib.figure import Figure

    count = len(confusion)
    shares = 100 * confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    with_names = count <= MAX_CLASSES_NAMED
    side = max(5.0, 0.42 * count + 1.5) if with_names else 9.0
    figure = Figure(figsize=(side + 1, side), layout="constrained")
    axes = figure.subplots()
    scale = SymLogNorm(linthresh=1.0, vmin=0.0, vmax=100.0)
    picture = axes.imshow(shares, cmap="Blues", norm=scale, interpolation="nearest")
    bar = figure.colorbar(picture, shrink=0.7, label="share of the label's examples (%)")
    bar.set_ticks([0, 1, 10, 100], labels=["0", "1", "10", "100"])
    if with_names:
        axes.set_xticks(range(count), class_names, rotation=90)
        axes.set_yticks(range(count), class_names)
        for row, column in zip(*np.nonzero(confusion), strict=True):
            color = "white" if shares[row, column] > 10 else "black"
            text = f"{confusion[row, column]}"
            axes.text(column, row, text, ha="center", va="center", color=color, fontsize=8)
    axes.set(xlabel="prediction", ylabel="label")
    fonts.prepare(figure).savefig(path, dpi=100)


def save_similarity(
    matrices: Mapping[str, Float32[np.ndarray, "K K"]], names: Sequence[str], path: Path
) -> None:
    """Saves matrices of similarities between networks beside each other, with their titles."""
    from matplotlib.figure import Figure

    side = max(4.0, 0.5 * len(names) + 2)
    figure = Figure(figsize=(side * len(matrices), side), layout="constrained")
    (panels,) = figure.subplots(1, len(matrices), squeeze=False)
    for axes, (title, matrix) in zip(panels, matrices.items(), strict=True):
        picture = axes.imshow(matrix, cmap="viridis", vmin=min(0.0, matrix.min()), vmax=1)
        axes.set_xticks(range(len(names)), names, rotation=90)
        axes.set_yticks(range(len(names)), names)
        axes.set_title(title)
        if len(names) <= MAX_CLASSES_NAMED:
            for (row, column), value in np.ndenumerate(matrix):
                style = {"ha": "center", "va": "center", "fontsize": 7}
                color = "black" if value > 0.7 else "white"
                axes.text(column, row, f"{value:.2f}", color=color, **style)
        figure.colorbar(picture, shrink=0.7)
    fonts.prepare(figure).savefig(path, dpi=100)


def _shorten(text: str, width: int, runs_of: Callable[[str], list[fonts.Run]]) -> str:
    while text and sum(font.getlength(run) for font, run in runs_of(text)) > width:
        text = text[:-2] + "…" if len(text) > 2 else ""
    return text
