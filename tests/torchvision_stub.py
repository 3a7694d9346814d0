"""Imports torchvision beside any build of PyTorch.

torchvision's wheel brings C++ operators for object detection, which fail to load where PyTorch is a
CPU build and the wheel expects CUDA. Its `alexnet` uses none of them, so declaring them is enough.
"""

import pytest

torch = pytest.importorskip(
    "torch", reason="PyTorch is not installed: pip install -r requirements-torch.txt"
)
_operators = torch.library.Library("torchvision", "DEF")
for _name in ("nms", "qnms"):
    try:
        _operators.define(f"{_name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    except RuntimeError:  # the wheel fits and has defined it
        break
torchvision = pytest.importorskip(
    "torchvision", reason="torchvision is not installed: pip install -r requirements-torch.txt"
)
