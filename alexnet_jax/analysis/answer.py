"""What is shown of a photograph: the likeliest classes, conv1's responses, the nearest images."""

import io
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Float32, Int64, UInt8
from PIL import Image
from tqdm import tqdm

from alexnet_jax import inference as trained
from alexnet_jax.analysis import neighbors
from alexnet_jax.data import augment, decode
from alexnet_jax.data.store import Store
from alexnet_jax.inference import Trained
from alexnet_jax.utils.errors import UserError

TOP = 5
NEIGHBORS_SHOWN = 8
SHEET_WIDTH = 900  # pixels, at most where a map needs no more

MAX_BYTES = 10 * 2**20  # of an upload
MAX_PIXELS = 25_000_000  # of an image; decoding takes up to 24 bytes of memory for each
FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")  # Pillow runs Ghostscript for some others


class Index(NamedTuple):
    """Some images of a store by their features."""

    store: Store
    rows: Int64[np.ndarray, " N"]
    features: Float32[np.ndarray, "N D"]


class Answer(NamedTuple):
    """What the page shows of one image.

    Attributes:
      seen: the centre crop that the network sees.
      classes: the likeliest, falling, each with its probability.
      responses: of conv1 to `seen`; 255 is the strongest of all.
      nearest: images, each with its class and distance; none without an index.
    """

    seen: UInt8[np.ndarray, "C C 3"]
    classes: dict[str, float]
    responses: UInt8[np.ndarray, "H W N"]
    nearest: list[tuple[UInt8[np.ndarray, "S S 3"], str]]


def read_upload(data: bytes, size: int) -> UInt8[np.ndarray, "{size} {size} 3"]:
    """Decodes an upload as training does, upright.

    What is no image, or one too large, is found out before any of it is decoded.

    Raises UserError for what a visitor uploaded that is no whole image within the limits.
    """
    if len(data) > MAX_BYTES:
        raise UserError(f"the file is larger than {MAX_BYTES >> 20} MB; upload a smaller one")
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as picture:
            width, height = picture.size
    except Exception as error:  # Pillow's plugins raise what they like
        raise UserError(
            f"the file is no image that can be read; upload one of {', '.join(FORMATS)}"
        ) from error
    if width * height > MAX_PIXELS:
        raise UserError(
            f"the image has {width}x{height} pixels, more than {MAX_PIXELS // 10**6} million; "
            "upload a smaller one"
        )
    try:
        return decode.decode_upright(data, size)
    except Exception as error:
        raise UserError("the image is damaged or cut short; upload another copy of it") from error


def build_index(network: Trained, store: Store, count: int) -> Index:
    """Computes fc7 of `count` images spread evenly over a store, or of all if it holds fewer.

    On a terminal a bar shows how far it is. Raises UserError if an image cannot be read.
    """
    count = min(count, store.num_examples)
    rows = np.arange(count) * store.num_examples // count  # stores may lie class by class
    extract = trained.feature_extractor(network, ["fc7"])
    found = []
    with tqdm(total=count, desc="index", unit="image", disable=None) as bar:
        for start in range(0, count, neighbors.BATCH):
            part = rows[start : start + neighbors.BATCH]
            found.append(neighbors.fc7_of(extract, store.read(part)["image"]))
            bar.update(len(part))
    return Index(store, rows, np.concatenate(found))


def answerer(
    network: Trained, index: Index | None
) -> Callable[[UInt8[np.ndarray, "S S 3"]], Answer]:
    """Returns the function from an image to its Answer, compiled already."""
    classify = trained.classifier(network)
    extract = trained.feature_extractor(network, ["conv1", "fc7"])
    size = network.config.image_size

    def answer(image: np.ndarray) -> Answer:
        features = {name: np.asarray(x) for name, x in extract(image[None]).items()}
        responses = features["conv1"][0]
        return Answer(
            augment.center_window(image, network.config.augment.crop_size),
            likeliest(network.class_names, np.asarray(classify(image[None]))[0]),
            (255 * np.clip(responses / (responses.max() + 1e-12), 0, 1)).astype(np.uint8),
            [] if index is None else _nearest(index, features["fc7"]),
        )

    answer(np.zeros((size, size, 3), np.uint8))
    return answer


def likeliest(names: Sequence[str], log_probs: Float32[np.ndarray, " K"]) -> dict[str, float]:
    """Returns the TOP likeliest, falling; what is named twice has its number too."""
    return {
        names[k] if names.count(names[k]) == 1 else f"{names[k]} ({k})": math.exp(log_probs[k])
        for k in np.argsort(-log_probs, kind="stable")[:TOP]
    }


def _nearest(index: Index, query: np.ndarray) -> list[tuple[np.ndarray, str]]:
    parts = np.split(index.features, range(neighbors.BATCH, len(index.features), neighbors.BATCH))
    (places,), (distances,) = neighbors.nearest(query, parts, NEIGHBORS_SHOWN)
    found = index.store.read(index.rows[places])
    captions = [
        f"{index.store.class_names[label]} (distance {distance:#.3g})"
        for label, distance in zip(found["label"], distances, strict=True)
    ]
    return list(zip(found["image"], captions, strict=True))


def response_sheet(responses: UInt8[np.ndarray, "H W N"]) -> UInt8[np.ndarray, "height width 3"]:
    """Returns the maps of an Answer in rows, white lines between."""
    height, width, count = responses.shape
    columns = math.ceil(math.sqrt(count * 16 / 6))  # as the paper's Figure 3 has conv1's filters
    rows = math.ceil(count / columns)
    tiles = np.full((height + 1, width + 1, rows * columns), 255, np.uint8)
    tiles[:-1, :-1, :count] = responses
    by_rows = tiles.reshape(height + 1, width + 1, rows, columns).transpose(2, 0, 3, 1)
    sheet = by_rows.reshape(rows * (height + 1), columns * (width + 1))[:-1, :-1]
    return enlarged(np.stack([sheet] * 3, axis=2), max(1, SHEET_WIDTH // sheet.shape[1]))


def enlarged(image: np.ndarray, zoom: int) -> np.ndarray:
    """Makes each pixel of an image zoom x zoom."""
    return image.repeat(zoom, axis=0).repeat(zoom, axis=1)
