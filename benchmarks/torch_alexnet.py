"""AlexNet and its training step in PyTorch, as a user writes them. A baseline for train_step.py."""

import os
from collections.abc import Iterator

import torch
from torch import nn


def network(variant: str) -> nn.Sequential:
    """Returns variant `owt`, as torchvision has it, or `paper` for float32[B, 3, 224, 224]."""
    if variant == "owt":
        return nn.Sequential(
            *(nn.Conv2d(3, 64, 11, 4, 2), nn.ReLU(True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(64, 192, 5, 1, 2), nn.ReLU(True), nn.MaxPool2d(3, 2)),
            *(nn.Conv2d(192, 384, 3, 1, 1), nn.ReLU(True)),
            *(nn.Conv2d(384, 256, 3, 1, 1), nn.ReLU(True)),
            *(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU(True), nn.MaxPool2d(3, 2), nn.Flatten()),
            *(nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(True)),
            *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(True), nn.Linear(4096, 1000)),
        )
    lrn = nn.LocalResponseNorm(5, alpha=5e-4, k=2.0)  # PyTorch divides alpha by 5
    return nn.Sequential(
        *(nn.Conv2d(3, 96, 11, 4, 2), nn.ReLU(True), lrn, nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(96, 256, 5, 1, 2, groups=2), nn.ReLU(True), lrn, nn.MaxPool2d(3, 2)),
        *(nn.Conv2d(256, 384, 3, 1, 1), nn.ReLU(True)),
        *(nn.Conv2d(384, 384, 3, 1, 1, groups=2), nn.ReLU(True)),
        *(nn.Conv2d(384, 256, 3, 1, 1, groups=2), nn.ReLU(True), nn.MaxPool2d(3, 2), nn.Flatten()),
        *(nn.Linear(9216, 4096), nn.ReLU(True), nn.Dropout()),
        *(nn.Linear(4096, 4096), nn.ReLU(True), nn.Dropout(), nn.Linear(4096, 1000)),
    )


def steps(
    variant: str, batch: int, dtype: str, train: bool, channels_last: bool, compiled: bool
) -> Iterator[int]:
    """Yields the batch size after each finished training step or forward pass."""
    torch.manual_seed(0)
    on_gpu = os.environ["JAX_PLATFORMS"] != "cpu"  # where the others run
    device = "cuda" if on_gpu else "cpu"
    # As JAX does: the fastest convolutions for these shapes, and TensorFloat-32 for float32.
    torch.backends.cudnn.benchmark = True
    torch.set_float32_matmul_precision("high")
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = network(variant).to(device, memory_format=layout).train(train)
    images = torch.randn(batch, 3, 224, 224, device=device).to(memory_format=layout)
    labels = torch.arange(batch, device=device) % 1000
    optimizer = torch.optim.SGD(
        model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4, fused=on_gpu or None
    )
    forward = torch.compile(model) if compiled else model
    while True:
        with (
            torch.set_grad_enabled(train),
            torch.autocast(device, torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            loss = nn.functional.cross_entropy(forward(images), labels)
        if train:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if on_gpu:
            torch.cuda.synchronize()
        yield batch
