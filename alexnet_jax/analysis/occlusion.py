"""Where the network looks: how a grey square over each place changes what it answers.

After Zeiler and Fergus 2013 (arXiv 1311.2901, section 4.2).
"""

import math
import textwrap
from collections.abc import Iterator
from typing import TYPE_CHECKING, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, UInt8
from tqdm import tqdm

from alexnet_jax import inference as trained
from alexnet_jax.data import augment
from alexnet_jax.inference import Trained
from alexnet_jax.utils.errors import UserError

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle

BATCH = 64  # images; of one length, so that the network is compiled once


class Occlusion(NamedTuple):
    """What was found.

    Attributes:
      view: the centre crop that the network sees.
      label: the class whose probability was taken.
      probability: of the view as it is, 0 to 1.
      map: with the square centred on each cell of `stride` x `stride` pixels.
      patch: the square's side in pixels.
      stride: by how many pixels it moves.
    """

    view: UInt8[np.ndarray, "C C 3"]
    label: int
    probability: float
    map: Float32[np.ndarray, "n n"]
    patch: int
    stride: int

    def largest_change(self) -> tuple[float, int, int]:
        """Returns the probability that is farthest from the whole image's.

        And the row and column of the square's centre, in the view.
        """
        place = np.abs(self.map - self.probability).argmax()
        row, column = (
            _center(int(cell), self.stride) for cell in np.unravel_index(place, self.map.shape)
        )
        return float(self.map.flat[place]), row, column


def occlude(
    network: Trained,
    image: UInt8[np.ndarray, "S S 3"],
    label: int | None = None,
    patch: int | None = None,
    stride: int | None = None,
) -> Occlusion:
    """Slides a square over an image's centre crop, clipped at its edges.

    The square shows the pixels' mean, which is zero to the network.

    Args:
      image: S is the config's image_size.
      label: by default the class that the network answers.
      patch: the square's side in pixels, by default a quarter of the crop's.
      stride: pixels from place to place, by default a 28th of the crop's side.

    Raises UserError if not 1 <= stride <= patch <= the crop's side.
    """
    size = network.config.augment.crop_size
    patch = max(1, size // 4) if patch is None else patch
    stride = min(patch, max(1, size // 28)) if stride is None else stride
    if not 1 <= stride <= patch <= size:
        raise UserError(
            f"a patch of {patch} and a stride of {stride} pixels do not fit: "
            f"choose 1 <= stride <= patch <= {size}"
        )
    extract = trained.feature_extractor(network, ["fc8"])
    side = math.ceil(size / stride)
    count = 1 + side**2
    found = []
    batches = occluded(network, image, patch, stride)
    for batch in tqdm(batches, total=math.ceil(count / BATCH), unit="batch", disable=None):
        probabilities = np.asarray(jax.nn.softmax(extract(batch)["fc8"]))
        label = int(probabilities[0].argmax()) if label is None else label
        found.append(probabilities[:, label])
    assert label is not None  # since there is a first batch
    whole, *hidden = np.concatenate(found)[:count]
    return Occlusion(
        view=augment.center_window(image, size),
        label=label,
        probability=float(whole),
        map=np.reshape(hidden, (side, side)),
        patch=patch,
        stride=stride,
    )


def occluded(
    network: Trained, image: UInt8[np.ndarray, "S S 3"], patch: int, stride: int
) -> Iterator[UInt8[np.ndarray, "BATCH S S 3"]]:
    """Yields the image, then the same with the square at each place by rows.

    The last batch is filled up with the image.
    """
    config = network.config
    size = config.augment.crop_size
    start = (config.image_size - size) // 2
    mean = np.broadcast_to(np.rint(network.stats.mean), image.shape)
    centers = [_center(cell, stride) for cell in range(math.ceil(size / stride))]
    spans = [_span(center, patch, start, size) for center in centers]
    squares = [(slice(0), slice(0)), *((rows, columns) for rows in spans for columns in spans)]
    for first in range(0, len(squares), BATCH):
        batch = np.repeat(image[None], BATCH, axis=0)
        for picture, square in zip(batch, squares[first : first + BATCH], strict=False):
            picture[square] = mean[square]
        yield batch


def occlusion_figure(found: Occlusion, class_name: str) -> "Figure":
    """Draws the image, the map, and the map over the image."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12.8, 4.6), dpi=100, layout="constrained")
    image, heat, both = figure.subplots(1, 3)
    side = len(found.map) * found.stride
    most = max(found.probability, found.map.max())
    style = {"cmap": "viridis", "vmin": 0, "vmax": most, "extent": (0, side, side, 0)}
    whole = {"extent": (0, len(found.view), len(found.view), 0)}
    image.imshow(found.view, **whole)
    image.add_patch(_square_of_largest_change(found))
    drawn = heat.imshow(found.map, interpolation="nearest", **style)
    both.imshow(found.view.mean(axis=2), cmap="gray", **whole)
    both.imshow(found.map, interpolation="bilinear", alpha=0.5, **style)
    image.set_title("image; red: the square that changes it most")
    heat.set_title("probability, by the square's centre")
    both.set_title("one over the other")
    for axes in (image, heat, both):
        axes.set(xlim=(0, len(found.view)), ylim=(len(found.view), 0), xticks=[], yticks=[])
    figure.colorbar(drawn, ax=both, shrink=0.85)
    name = textwrap.shorten(class_name, 40, placeholder="…")
    figure.suptitle(
        f"{name}: probability {found.probability:.3f} with all in view; behind a grey square of "
        f"{found.patch}×{found.patch} pixels, in steps of {found.stride}, as the map shows"
    )
    return figure


def _square_of_largest_change(found: Occlusion) -> "Rectangle":
    from matplotlib.patches import Rectangle

    _, row, column = found.largest_change()
    rows, columns = (_span(center, found.patch, 0, len(found.view)) for center in (row, column))
    size = columns.stop - columns.start, rows.stop - rows.start
    return Rectangle((columns.start, rows.start), *size, fill=False, edgecolor="red", linewidth=2)


def _center(cell: int, stride: int) -> int:
    return int((cell + 0.5) * stride)


def _span(center: int, patch: int, start: int, size: int) -> slice:
    low = center - patch // 2
    return slice(start + max(0, low), start + min(size, low + patch))
