"""Real image files for tests: parts of scikit-learn's two photographs, in many formats."""

import io
import tarfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image
from sklearn.datasets import load_sample_image


@cache
def _photographs() -> tuple[np.ndarray, np.ndarray]:
    return load_sample_image("china.jpg"), load_sample_image("flower.jpg")


def photograph(number: int, height: int = 96, width: int = 128) -> np.ndarray:
    """Returns uint8[height, width, 3]: one of many different parts of the two photographs."""
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


def write_folder(root: Path, classes: Mapping[str, int], first: int = 0) -> list[Path]:
    """Writes so many JPEG files into a folder for each class; returns them in sorted order."""
    files = []
    for name, count in classes.items():
        (root / name).mkdir(parents=True, exist_ok=True)
        for _ in range(count):
            number = first + len(files)
            files.append(root / name / f"{number:05d}.jpg")
            files[-1].write_bytes(encode(photograph(number)))
    return sorted(files)


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
