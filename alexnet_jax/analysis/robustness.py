"""Errors under corruptions and on other photographs: ImageNet-C, ImageNetV2, ImageNet-A and -R."""

import difflib
import functools
import json
import multiprocessing
import os
import zlib
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from jaxtyping import Int, UInt8

from alexnet_jax import inference
from alexnet_jax.analysis.prediction import decoded_batches
from alexnet_jax.data.augment import center_window
from alexnet_jax.data.store import Store
from alexnet_jax.data.wordnet import display_names, imagenet_names
from alexnet_jax.inference import Trained
from alexnet_jax.utils.errors import UserError
from alexnet_jax.utils.files import files_below

SEVERITIES = (1, 2, 3, 4, 5)
Labelled = Iterator[tuple[UInt8[np.ndarray, "B S S 3"], Int[np.ndarray, " B"]]]


@functools.cache
def alexnet_errors() -> dict[str, float]:
    """Returns AlexNet's published top-1 error of each corruption, 0 to 1 (imagenet_c.json)."""
    table = json.loads(Path(__file__).with_name("imagenet_c.json").read_text())
    return {name: percent / 100 for name, percent in table["alexnet_errors"].items()}


class Result(NamedTuple):
    """The accuracy of a network on one set of images.

    Attributes:
      corruption: "" for images without one.
      severity: 1 to 5; 0 for images without a corruption.
      num_images: that were evaluated.
      top1_error, top5_error: 0 to 1.
    """

    corruption: str
    severity: int
    num_images: int
    top1_error: float
    top5_error: float


def corruption_errors(results: Sequence[Result]) -> dict[str, float]:
    """Returns the CE of each corruption: its mean error divided by AlexNet's published one.

    Corruptions that the table does not have, or of which a severity is missing, are left out.
    """
    found: dict[str, dict[int, float]] = {}
    for result in results:
        found.setdefault(result.corruption, {})[result.severity] = result.top1_error
    return {
        name: float(np.mean([found[name][s] for s in SEVERITIES])) / error
        for name, error in alexnet_errors().items()
        if set(SEVERITIES) <= found.get(name, {}).keys()
    }


def mean_corruption_error(errors: Mapping[str, float]) -> float | None:
    """Returns mCE, the mean of the 15 corruptions' CE; None if one is missing."""
    missing = alexnet_errors().keys() - errors.keys()
    return None if missing else float(np.mean([errors[name] for name in alexnet_errors()]))


def measure(
    network: Trained, images: Labelled, classes: Sequence[int], kind: tuple[str, int] = ("", 0)
) -> Result:
    """Returns the accuracy of a network on images, among some of its classes.

    Args:
      images: batches with their labels; labels of -1 are not counted.
      classes: labels that the images may have. Others cannot be predicted, as is usual for
        ImageNet-A and ImageNet-R, which have 200 of the 1,000 classes.
      kind: corruption and severity.
    """
    classify = inference.classifier(network, "center")
    allowed = np.full(network.config.model.num_classes, -np.inf, np.float32)
    allowed[list(classes)] = 0
    count, first, five = 0, 0, 0
    for pixels, labels in images:
        real = labels >= 0
        order = np.argsort(-(np.asarray(classify(pixels)) + allowed), axis=1, kind="stable")[real]
        hits = order[:, :5] == labels[real, None]
        count += int(real.sum())
        first += int(hits[:, 0].sum())
        five += int(hits.any(axis=1).sum())
    if not count:
        raise UserError("there are no images to evaluate; name another folder")
    return Result(*kind, count, 1 - first / count, 1 - five / count)


# ------------------------------------------------------------------------------------------
# Folders
# ------------------------------------------------------------------------------------------


def labels_of_folders(folder: Path, class_names: Sequence[str]) -> dict[str, int]:
    """Returns the label of each class folder, of which there may be fewer than classes.

    Folders are called by the network's class names, by ImageNet's WordNet IDs (ImageNet-C, -A, -R)
    or by numbers of labels (ImageNetV2).

    Raises:
      UserError: there are no class folders, or one that is no class of the network.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {folder}; it must contain class folders")
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise UserError(f"{folder} has no class folders; it must contain CLASS/IMAGE.jpg")
    ids = imagenet_names()
    if tuple(class_names) == tuple(ids.values()):  # two classes have the same name
        known = {name: label for label, name in enumerate(ids)}
    else:
        known = {}
    known |= {name: label for label, name in enumerate(class_names) if name not in known}
    if all(name.isdecimal() for name in names) and not {*names} <= known.keys():
        known = {str(label): label for label in range(len(class_names))}
    labels = {}
    for name, shown in zip(names, display_names(names), strict=True):
        label = known.get(name, known.get(shown))
        if label is None:
            near = difflib.get_close_matches(shown, known, n=3, cutoff=0.3) or list(known)[:3]
            raise UserError(
                f"{folder / name} is no class of the network, whose nearest are {', '.join(near)}; "
                "remove the folder, or evaluate a network that has this class"
            )
        labels[name] = label
    return labels


def folder_images(
    network: Trained, folder: Path, labels: Mapping[str, int], batch_size: int
) -> Labelled:
    """Yields the images of class folders with their labels, by the network's preprocessing.

    Raises:
      UserError: a file is not an image.
    """
    files = [path for name in labels for path in files_below(folder / name)]
    for decoded, images in decoded_batches(files, network.config, batch_size) if files else ():
        found = np.full(len(images), -1)
        for index, (path, fault) in enumerate(decoded):
            if fault is not None:
                raise UserError(f"{path} cannot be read ({fault}); remove it")
            found[index] = labels[path.relative_to(folder).parts[0]]
        yield images, found


def corruption_folders(root: Path) -> dict[tuple[str, int], Path]:
    """Returns the folders of class folders of ImageNet-C's layout, by corruption and severity.

    Raises:
      UserError: there are none.
    """
    found = {
        (place.parent.name, int(place.name)): place
        for place in sorted(root.glob("*/*"))
        if place.name in map(str, SEVERITIES) and place.is_dir()
    }
    if not found:
        raise UserError(
            f"{root} has no folders CORRUPTION/SEVERITY/CLASS, such as gaussian_noise/1/n01440764; "
            "extract ImageNet-C's archives there"
        )
    return found


# ------------------------------------------------------------------------------------------
# Corruptions made on the fly
# ------------------------------------------------------------------------------------------


def check_corruptions(names: Sequence[str]) -> None:
    """Raises UserError if a corruption does not exist, or the package is not installed."""
    for name in names:
        if name not in alexnet_errors():
            near = difflib.get_close_matches(name, alexnet_errors()) or alexnet_errors()
            raise UserError(f"unknown corruption {name!r}; the nearest are {', '.join(near)}")
    try:
        import imagecorruptions  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"corruptions need {error.name}, which is not installed; in a checkout run "
            "pip install --no-deps -r requirements-robustness.txt"
        ) from error


def corrupt(
    image: UInt8[np.ndarray, "H W 3"], corruption: str, severity: int, seed: int
) -> UInt8[np.ndarray, "H W 3"]:
    """Returns a corrupted image; the same for the same arguments.

    Except for impulse_noise and glass_blur, for which the package draws from generators that it
    does not let anyone seed.
    """
    from imagecorruptions import corrupt as apply

    np.random.seed(zlib.crc32(f"{corruption} {severity} {seed}".encode()))  # the package draws so
    corrupted: np.ndarray = apply(image, corruption_name=corruption, severity=severity)
    return corrupted.astype(np.uint8)


class Corrupter:
    """Makes corrupted images of a store in processes of its own, for `with`.

    Like ImageNet-C, it corrupts what a network sees: the center crop.

    Args:
      count: number of images, evenly spaced over the store.
    """

    def __init__(self, store: Store, crop_size: int, count: int, batch_size: int):
        self._store, self._crop_size, self._batch_size = store, crop_size, batch_size
        count = min(count, store.num_examples)
        self._indices = np.linspace(0, store.num_examples - 1, count).round().astype(int)

    def __enter__(self) -> "Corrupter":
        # Forking a process in which JAX has threads can deadlock.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(max(1, os.cpu_count() or 1), mp_context=context)
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def images(self, corruption: str, severity: int) -> Labelled:
        """Yields batches of the images with their labels; "" is no corruption."""
        for start in range(0, len(self._indices), self._batch_size):
            indices = self._indices[start : start + self._batch_size]
            batch = self._store.read(indices, pad_to=self._batch_size)
            pixels = np.stack([center_window(x, self._crop_size) for x in batch["image"]])
            if corruption:
                work = functools.partial(corrupt, corruption=corruption, severity=severity)
                corrupted = self._pool.map(
                    _apply, [work] * len(indices), pixels, indices, chunksize=8
                )
                pixels[: len(indices)] = list(corrupted)
            yield pixels, batch["label"]


def _apply(work: functools.partial[np.ndarray], image: np.ndarray, seed: int) -> np.ndarray:
    return work(image, seed=seed)
