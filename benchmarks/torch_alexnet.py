"""AlexNet and its training step in PyTorch, `owt` as torchvision has it; needs PyTorch."""

from collections.abc import Iterator

import torch
from shapes import FILTERS, GROUPS, NORMED, POOLED, SIZES
from torch import nn


def network(variant: str) -> nn.Sequential:
    """Returns variant `owt` or `paper` for float[B, 3, 224, 224]."""
    layers, channels = [], 3
    settings = zip(FILTERS[variant], SIZES, GROUPS[variant], strict=True)
    for number, (filters, size, groups) in enumerate(settings, start=1):
        stride, padding = (4, 2) if number == 1 else (1, size // 2)
        layers += [nn.Conv2d(channels, filters, size, stride, padding, groups=groups)]
        layers += [nn.ReLU(inplace=True)]
        if variant == "paper" and number in NORMED:
            layers += [nn.LocalResponseNorm(5, alpha=5e-4, k=2.0)]  # it divides alpha by 5
        if number in POOLED:
            layers += [nn.MaxPool2d(3, 2)]
        channels = filters
    hidden = [
        *(nn.Dropout(), nn.Linear(9216, 4096), nn.ReLU(inplace=True)),
        *(nn.Dropout(), nn.Linear(4096, 4096), nn.ReLU(inplace=True)),
    ]
    if variant == "paper":  # dropout behind the hidden layers, not before
        hidden = hidden[1:3] + hidden[:1] + hidden[4:] + hidden[3:4]
    return nn.Sequential(*layers, nn.Flatten(), *hidden, nn.Linear(4096, 1000))


def steps(
    variant: str, batch: int, dtype: str, train: bool, channels_last: bool, compiled: bool
) -> Iterator[int]:
    """Yields the batch size after each step, or each forward pass."""
    torch.manual_seed(0)
    layout = torch.channels_last if channels_last else torch.contiguous_format
    model = network(variant).to(memory_format=layout)
    images = torch.randn(batch, 3, 224, 224).to(memory_format=layout)
    labels = torch.arange(batch) % 1000
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    model.train(train)
    run = torch.compile(model) if compiled else model
    while True:
        with (
            torch.set_grad_enabled(train),
            torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"),
        ):
            logits = run(images)
            loss = nn.functional.cross_entropy(logits, labels)
        if train:
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        yield batch
