"""Image files for tests: crops of scikit-learn's two photographs, and numbered colors."""

import io
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict
from PIL import Image
from sklearn.datasets import load_sample_image

from alexnet_jax.config import default_config


@cache
def _photographs() -> tuple[np.ndarray, np.ndarray]:
    return load_sample_image("china.jpg"), load_sample_image("flower.jpg")


def photograph(number: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Returns uint8[height, width, 3]: one of many crops of the two photographs."""
    whole = _photographs()[number % 2]
    top = (150 + 37 * number) % (whole.shape[0] - height + 1)
    left = (200 + 91 * number) % (whole.shape[1] - width + 1)
    return whole[top : top + height, left : left + width].copy()


def encode(pixels: np.ndarray, kind: str = "JPEG", mode: str = "RGB", **options) -> bytes:
    """Returns the bytes of an image file; `mode` is a Pillow mode: RGB, L, P, CMYK, RGBA, …"""
    picture = Image.fromarray(pixels)
    if mode != picture.mode:
        picture = picture.convert(mode)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def mark(number: int, side: int = 8) -> np.ndarray:
    """Returns uint8[side, side, 3] of one color that encodes `number` (see `mark_number`)."""
    return np.full((side, side, 3), (number >> 8, number & 255, 77), np.uint8)


def mark_number(images: np.ndarray) -> np.ndarray:
    """Returns the numbers int[B] of marks uint8[B, S, S, 3]."""
    return images[:, 0, 0, 0].astype(int) * 256 + images[:, 0, 0, 1]


def write_marks(root: Path, count: int, classes: int = 4) -> list[Path]:
    """Writes marks 0 to count - 1 as PNG files; mark n belongs to class n * classes // count."""
    files = []
    for number in range(count):
        folder = root / f"class{number * classes // count}"
        folder.mkdir(parents=True, exist_ok=True)
        files.append(folder / f"{number:05d}.png")
        files[-1].write_bytes(encode(mark(number), "PNG"))
    return files


def folder_config(folder: Path, data_dir: Path | str, size: int = 8) -> ConfigDict:
    """Returns a config for a folder of images with the splits `train` and `val`."""
    config = default_config()
    config.dataset = f"folder:{folder}"
    config.data_dir = str(data_dir)
    config.eval_split = "val"
    config.image_size = size
    return config


def prepare_command(folder: Path, data_dir: Path | str, size: int = 8) -> tuple[str, ...]:
    """Returns the arguments of Python that prepare the stores of `folder_config`."""
    return (
        *("-m", "alexnet_jax.store", "--config", "configs/folder.py"),
        *(f"--config.dataset=folder:{folder}", f"--config.data_dir={data_dir}"),
        f"--config.image_size={size}",
    )


def contents(folder: str | Path) -> dict[str, bytes]:
    """Returns the content of each file below a folder, by relative path."""
    root = Path(folder)
    return {str(p.relative_to(root)): p.read_bytes() for p in root.rglob("*") if p.is_file()}


def write_imagenet_tars(
    manual_dir: Path, train: Mapping[str, Mapping[str, bytes]], validation: Mapping[str, bytes]
) -> None:
    """Writes ILSVRC2012_img_train.tar (a tar of n*.tar) and ILSVRC2012_img_val.tar."""
    manual_dir.mkdir(parents=True, exist_ok=True)
    inner = {f"{wnid}.tar": _tar(files) for wnid, files in train.items()}
    (manual_dir / "ILSVRC2012_img_train.tar").write_bytes(_tar(inner))
    (manual_dir / "ILSVRC2012_img_val.tar").write_bytes(_tar(validation))


def _tar(files: Mapping[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return buffer.getvalue()
