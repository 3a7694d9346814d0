"""Occlusion maps: how the probability of a class changes when a square hides part of the image.

Method: Zeiler and Fergus 2013 (arXiv 1311.2901, section 4.2).
"""

import math
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from alexnet_jax import inference
from alexnet_jax.analysis import fonts
from alexnet_jax.data import augment
from alexnet_jax.inference import Trained
from alexnet_jax.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

BATCH = 64  # images; every batch has this size, so that the network is compiled once


class Occlusion(NamedTuple):
    """The occlusion map of one image.

    Attributes:
      view: the center crop, which is the network's input.
      label: the class whose probabilities these are.
      probability: of the unchanged view, 0 to 1.
      map: probability with the square centered on each cell of `stride` × `stride` pixels.
      patch: side of the square in pixels.
      stride: pixels from one position to the next.
    """

    view: UInt8[np.ndarray, "C C 3"]
    label: int
    probability: float
    map: Float32[np.ndarray, "n n"]
    patch: int
    stride: int

    def largest_change(self) -> tuple[float, int, int]:
        """Returns the probability that differs most from that of the unchanged view.

        Also returns the row and column of the square's center in the view.
        """
        index = np.abs(self.map - self.probability).argmax()
        row, column = (
            _center(int(cell), self.stride) for cell in np.unravel_index(index, self.map.shape)
        )
        return float(self.map.flat[index]), row, column


def occlude(
    network: Trained,
    image: UInt8[np.ndarray, "S S 3"],
    label: int | None = None,
    patch: int | None = None,
    stride: int | None = None,
) -> Occlusion:
    """Slides a square over an image's center crop and returns the occlusion map.

    The square is filled with the training mean, which is zero to the network, and is clipped at
    the edges of the crop.

    Args:
      image: S is the config's `image_size`.
      label: the class; by default the most probable one.
      patch: side of the square in pixels; by default a quarter of the crop's side.
      stride: pixels from one position to the next; by default 1/28 of the crop's side.

    Raises:
      UserError: not 1 <= stride <= patch <= side of the crop.
    """
    size = network.augment.view_size
    patch = max(1, size // 4) if patch is None else patch
    stride = min(patch, max(1, size // 28)) if stride is None else stride
    if not 1 <= stride <= patch <= size:
        raise UserError(
            f"a patch of {patch} and a stride of {stride} pixels do not fit: "
            f"choose 1 <= stride <= patch <= {size}"
        )
    log_probs = inference.classifier(network, "center")
    side = math.ceil(size / stride)
    count = 1 + side**2
    found = []
    batches = occluded_batches(network, image, patch, stride)
    for batch in tqdm(batches, total=math.ceil(count / BATCH), unit="batch", disable=None):
        probabilities = np.exp(np.asarray(log_probs(batch)))
        label = int(probabilities[0].argmax()) if label is None else label
        found.append(probabilities[:, label])
    assert label is not None  # there is at least one batch
    whole, *occluded = np.concatenate(found)[:count]
    return Occlusion(
        view=augment.center_window(image, size),
        label=label,
        probability=float(whole),
        map=np.reshape(occluded, (side, side)),
        patch=patch,
        stride=stride,
    )


def occluded_batches(
    network: Trained, image: UInt8[np.ndarray, "S S 3"], patch: int, stride: int
) -> Iterator[UInt8[np.ndarray, "BATCH S S 3"]]:
    """Yields the image, then the image with the square at each position, row by row.

    The last batch is padded with the image.
    """
    size = network.augment.view_size
    start = (network.config.image_size - size) // 2
    mean = np.broadcast_to(np.rint(network.stats.mean), image.shape)
    centers = [_center(cell, stride) for cell in range(math.ceil(size / stride))]
    spans = [_span(center, patch, start, size) for center in centers]
    squares = [(slice(0), slice(0)), *((rows, columns) for rows in spans for columns in spans)]
    for first in range(0, len(squares), BATCH):
        batch = np.repeat(image[None], BATCH, axis=0)
        for picture, square in zip(batch, squares[first : first + BATCH], strict=False):
            picture[square] = mean[square]
        yield batch


def occlusion_figure(occlusion: Occlusion, class_name: str) -> "Figure":
    """Returns a figure of the image, the map, and the map over the image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 4.6), dpi=100, layout="constrained")
    image, heat, overlay = figure.subplots(1, 3)
    size = len(occlusion.view)
    side = len(occlusion.map) * occlusion.stride
    highest = max(occlusion.probability, occlusion.map.max())
    style = {"cmap": "viridis", "vmin": 0, "vmax": highest, "extent": (0, side, side, 0)}
    whole = {"extent": (0, size, size, 0)}
    image.imshow(occlusion.view, **whole)
    image.add_patch(_square_of_largest_change(occlusion))
    drawn = heat.imshow(occlusion.map, interpolation="nearest", **style)
    overlay.imshow(occlusion.view.mean(axis=2), cmap="gray", **whole)
    overlay.imshow(occlusion.map, interpolation="bilinear", alpha=0.5, **style)
    image.set_title("image; red: the square with the largest change")
    heat.set_title("probability by the center of the square")
    overlay.set_title("both")
    for axes in (image, heat, overlay):
        axes.set(xlim=(0, size), ylim=(size, 0), xticks=[], yticks=[])
    figure.colorbar(drawn, ax=overlay, shrink=0.85)
    name = textwrap.shorten(class_name, 40, placeholder="…")
    figure.suptitle(
        f"{name}: probability {occlusion.probability:.3f} for the whole image; the map is for a "
        f"gray square of {occlusion.patch}×{occlusion.patch} pixels, stride {occlusion.stride}"
    )
    return fonts.prepare(figure)


def _square_of_largest_change(occlusion: Occlusion) -> "Rectangle":
    from matplotlib.patches import Rectangle

    _, row, column = occlusion.largest_change()
    rows, columns = (
        _span(center, occlusion.patch, 0, len(occlusion.view)) for center in (row, column)
    )
    size = columns.stop - columns.start, rows.stop - rows.start
    return Rectangle((columns.start, rows.start), *size, fill=False, edgecolor="red", linewidth=2)


def _center(cell: int, stride: int) -> int:
    return int((cell + 0.5) * stride)


def _span(center: int, patch: int, start: int, size: int) -> slice:
    """Returns the pixels of a square along one axis, clipped to the crop [start, start + size)."""
    low = center - patch // 2
    return slice(start + max(0, low), start + min(size, low + patch))
