"""TrivialAugment, random erasing and CutMix do what torchvision does."""

import functools
import importlib

import jax
import numpy as np
import pytest
from images import photograph
from torchvision_stub import torch, torchvision

from alexnet_jax.data.augment import cutmix_box, erase
from alexnet_jax.data.trivial_augment import GEOMETRIC, OPERATIONS, apply

pytestmark = pytest.mark.torch

SPACE = torchvision.transforms.TrivialAugmentWide()._augmentation_space(31)
THEIRS = {name: name.title().replace("_", "") for name in OPERATIONS} | {
    "autocontrast": "AutoContrast"
}
IMAGE = photograph(0, 96, 96)


@functools.cache
def compiled():
    return jax.jit(lambda image, *args: apply(image, *args))


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("number", [0, 1, 10, 14, 22, 30])
@pytest.mark.parametrize("name", OPERATIONS)
def test_operation_equals_torchvisions(name, number, sign):
    magnitudes, signed = SPACE[THEIRS[name]]
    if sign < 0 and not signed:
        pytest.skip("has no direction")
    magnitude = float(magnitudes[number]) * sign if magnitudes.ndim else 0.0
    expected = torchvision.transforms.autoaugment._apply_op(
        torch.from_numpy(IMAGE).permute(2, 0, 1),
        THEIRS[name],
        magnitude,
        torchvision.transforms.InterpolationMode.NEAREST,
        fill=None,
    )
    found = compiled()(IMAGE, list(OPERATIONS).index(name), number / 30, float(sign))
    difference = np.abs(np.asarray(found) - expected.permute(1, 2, 0).numpy())
    if name in GEOMETRIC:  # a pixel halfway between two may come from either
        assert (difference > 0).any(axis=-1).mean() < 0.02
    else:
        assert difference.max() <= 1
        assert (difference > 0).mean() < 0.05  # sums that differ by one rounding


@pytest.mark.parametrize("box", [(0, 0, 10, 20), (30, 5, 40, 3), (12, 64, 84, 32)])
def test_erase_equals_torchvisions(box):
    expected = torchvision.transforms.functional.erase(
        torch.from_numpy(IMAGE).permute(2, 0, 1), *box, torch.tensor(0)
    )
    found = erase(np.float32(IMAGE), np.array(box))
    np.testing.assert_array_equal(found, expected.permute(1, 2, 0))


@pytest.mark.parametrize("share", [0.05, 0.3, 0.77, 1.0])
@pytest.mark.parametrize("center", [(0, 0), (48, 48), (95, 10)])
def test_cutmix_box_is_torchvisions(share, center, monkeypatch):
    """torchvision draws the center by torch.randint, first x, then y."""
    draws = iter(center)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: torch.tensor([next(draws)]))
    v2 = importlib.import_module("torchvision.transforms.v2")
    mixer = v2.CutMix(num_classes=2)
    monkeypatch.setattr(mixer, "_dist", torch.distributions.Beta(1.0, 1.0))
    monkeypatch.setattr(type(mixer._dist), "sample", lambda self, *_: torch.tensor([share]))
    params = mixer.make_params([torch.zeros(2, 3, 96, 96)])
    x1, y1, x2, y2 = map(int, params["box"])
    top, left, bottom, right = map(int, cutmix_box(share, np.array(center[::-1]), 96))
    assert (top, left, bottom, right) == (y1, x1, y2, x2)
    assert float(params["lam_adjusted"]) == pytest.approx(
        1 - (bottom - top) * (right - left) / 96**2
    )
