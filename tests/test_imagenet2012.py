"""The imagenet2012 builder of tfds, applied to small archives of real image files."""

import io
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import tensorflow_datasets as tfds
from images import encode, photograph, write_imagenet_tars
from ml_collections import ConfigDict
from PIL import Image

from alexnet_jax.config import default_config
from alexnet_jax.data.prepare import open_or_prepare
from alexnet_jax.data.store import Store
from alexnet_jax.data.wordnet import imagenet_names
from alexnet_jax.utils.errors import UserError

ROOT = Path(__file__).parents[1]
SIZE = 64
HEIGHT, WIDTH = 96, 144  # scaled by 64/96 and cropped, all borders are whole pixels
# file name -> (number of the photograph, Pillow's format, Pillow's mode)
RGB, GRAY, CMYK = ("JPEG", "RGB"), ("JPEG", "L"), ("JPEG", "CMYK")
TRAIN_FILES = {
    "n01440764": {
        "n01440764_1.JPEG": (0, *RGB),
        "n01440764_2.JPEG": (1, *GRAY),
        "n01440764_3.JPEG": (2, *CMYK),
    },
    "n01739381": {"n01739381_1309.JPEG": (3, *CMYK), "n01739381_7.JPEG": (4, *RGB)},
    "n02105855": {
        "n02105855_2933.JPEG": (5, "PNG", "RGB"),
        "n02105855_8.JPEG": (6, "PNG", "RGB"),
        "n02105855_9.JPEG": (7, "PNG", "P"),
    },
}
LISTED_BY_TFDS = ("n01739381_1309.JPEG", "n02105855_2933.JPEG")  # its builder encodes these again
VALIDATION_FILES = {
    "ILSVRC2012_val_00000003.JPEG": (10, *RGB),
    "ILSVRC2012_val_00000001.JPEG": (11, *GRAY),
    "ILSVRC2012_val_00000004.JPEG": (12, *CMYK),
    "ILSVRC2012_val_00000002.JPEG": (13, "PNG", "RGB"),
}
FILTER_TOLERANCE = 5  # mean difference between Pillow's bicubic and bilinear filters


def content(number: int, kind: str, mode: str) -> bytes:
    return encode(photograph(number, HEIGHT, WIDTH), kind, mode)


def config_for(data_dir: Path) -> ConfigDict:
    config = default_config()
    config.data_dir = str(data_dir)
    config.image_size = SIZE
    return config


@pytest.fixture(scope="module")
def data_dir(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("tfds")


@pytest.fixture(scope="module")
def stores(data_dir) -> dict[str, Store]:
    write_imagenet_tars(
        data_dir / "downloads" / "manual",
        {wnid: {n: content(*f) for n, f in files.items()} for wnid, files in TRAIN_FILES.items()},
        {name: content(*file) for name, file in VALIDATION_FILES.items()},
    )
    return open_or_prepare(config_for(data_dir))


def scaled_and_cropped(picture: Image.Image) -> np.ndarray:
    """Section 2 of the paper, literally: shorter side to SIZE, then the central square."""
    scale = SIZE / min(picture.size)
    width, height = (round(side * scale) for side in picture.size)
    picture = picture.convert("RGB").resize((width, height), Image.Resampling.BICUBIC)
    left, top = (width - SIZE) // 2, (height - SIZE) // 2
    return np.asarray(picture.crop((left, top, left + SIZE, top + SIZE)))


def nearest(store: Store, image: np.ndarray) -> tuple[int, np.ndarray]:
    """Returns the label of the most similar stored image, and the absolute differences."""
    rows = store.read(np.arange(store.num_examples))
    differences = np.abs(rows["image"].astype(int) - image)
    best = differences.mean(axis=(1, 2, 3)).argmin()
    return rows["label"][best], differences[best]


def label_of(store: Store, wnid: str) -> int:
    return store.class_names.index(imagenet_names()[wnid])


def validation_wnid(name: str) -> str:
    """Returns the wnid of validation image n: line n of the list of tfds."""
    path = tfds.core.tfds_path("datasets/imagenet2012/validation_labels.txt")
    return path.read_text().split()[int(name.split("_")[-1].removesuffix(".JPEG")) - 1]


def test_stores_contain_each_image_and_the_thousand_classes(stores):
    assert stores["train"].num_examples == 8
    assert stores["eval"].num_examples == 4
    for store in stores.values():
        assert len(store.class_names) == 1000
        assert store.class_names[0] == "tench"


@pytest.mark.parametrize(
    ("wnid", "name", "file"), [(w, n, f) for w, fs in TRAIN_FILES.items() for n, f in fs.items()]
)
def test_train_pixels_and_labels(stores, wnid, name, file):
    number, kind, mode = file
    reference = scaled_and_cropped(Image.open(io.BytesIO(content(number, kind, mode))))
    label, difference = nearest(stores["train"], reference)
    assert label == label_of(stores["train"], wnid)
    if name in LISTED_BY_TFDS:
        assert difference.mean() < 4
    elif file[1:] in (RGB, GRAY):
        assert difference.mean() < FILTER_TOLERANCE
    else:
        assert difference.max() <= 1


@pytest.mark.parametrize(("name", "file"), VALIDATION_FILES.items())
def test_validation_pixels_and_labels(stores, name, file):
    label, difference = nearest(
        stores["eval"], scaled_and_cropped(Image.open(io.BytesIO(content(*file))))
    )
    if file[1:] in (RGB, GRAY):
        assert difference.mean() < FILTER_TOLERANCE
    else:
        assert difference.max() <= 1
    assert label == label_of(stores["eval"], validation_wnid(name))


@pytest.mark.parametrize(("number", "mode"), [(2, "CMYK"), (3, "CMYK"), (1, "L"), (7, "RGB")])
def test_stored_image_resembles_the_photograph_for_each_file_kind(stores, number, mode):
    photo = Image.fromarray(photograph(number, HEIGHT, WIDTH))
    if mode == "L":
        photo = photo.convert("L")
    _, difference = nearest(stores["train"], scaled_and_cropped(photo))
    assert difference.mean() < 8


@pytest.mark.parametrize("version", ["5.1.0", "5.0.0"])
def test_directory_built_by_tfds_suffices(stores, data_dir, tmp_path, version):
    """Without the archives, linked from another disk, and also of an older version."""
    built = tmp_path / "elsewhere" / version
    shutil.copytree(data_dir / "imagenet2012" / "5.1.0", built)
    info = built / "dataset_info.json"
    info.write_text(info.read_text().replace('"version": "5.1.0"', f'"version": "{version}"'))
    (tmp_path / "own").mkdir()
    (tmp_path / "own" / "imagenet2012").symlink_to(tmp_path / "elsewhere")
    found = open_or_prepare(config_for(tmp_path / "own"))
    assert found["train"].source == f"imagenet2012/{version} train"
    for use, store in stores.items():
        rows, expected = (s.read(np.arange(s.num_examples)) for s in (found[use], store))
        np.testing.assert_array_equal(rows["image"], expected["image"])
        np.testing.assert_array_equal(rows["label"], expected["label"])


@pytest.mark.parametrize(
    ("present", "named"),
    [
        ([], "ILSVRC2012_img_train.tar and ILSVRC2012_img_val.tar"),
        (["ILSVRC2012_img_train.tar"], "needs ILSVRC2012_img_val.tar"),
        (["ILSVRC2012_img_val.tar"], "needs ILSVRC2012_img_train.tar"),
    ],
)
def test_missing_archives_are_named_with_their_folder(tmp_path, present, named):
    manual_dir = tmp_path / "downloads" / "manual"
    manual_dir.mkdir(parents=True)
    for name in present:
        (manual_dir / name).touch()
    with pytest.raises(UserError) as caught:
        open_or_prepare(config_for(tmp_path))
    assert named in str(caught.value)
    assert f"in {manual_dir};" in str(caught.value)


def test_command_explains_missing_archives_in_one_line(tmp_path):
    (tmp_path / "paper.py").write_text(
        "from alexnet_jax.config import default_config as get_config"
    )
    ran = subprocess.run(
        [sys.executable, "-m", "alexnet_jax.store", f"--config={tmp_path / 'paper.py'}"]
        + [f"--config.data_dir={tmp_path}"],
        cwd=ROOT,
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 2
    assert ran.stderr.splitlines()[-1].startswith("error: imagenet2012 needs ILSVRC2012_img_train")
    assert "Traceback" not in ran.stderr
