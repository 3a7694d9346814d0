"""Names of ImageNet's classes, whose folders and labels are called by WordNet IDs: n01440764."""

import functools
from collections.abc import Iterable
from pathlib import Path


@functools.cache
def imagenet_names() -> dict[str, str]:
    """Returns the names of ILSVRC's 1,000 classes by WordNet ID, in the order of its labels."""
    lines = Path(__file__).with_name("wordnet.txt").read_text("utf-8").splitlines()
    return dict(line.split(" ", 1) for line in lines)


def display_names(class_names: Iterable[str]) -> tuple[str, ...]:
    """Returns class names, WordNet IDs of ImageNet's classes replaced by their names.

    Example:
      >>> display_names(["n01440764", "cat"])
      ('tench', 'cat')
    """
    return tuple(imagenet_names().get(name, name) for name in class_names)
