"""Imports between the folders of the package go one way."""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "alexnet_jax"
# A module imports from its own level and from lower ones, also inside functions.
LEVELS = (
    {"__version__", "config", "utils"},
    {"data", "models", "weights"},
    {"analysis", "inference", "training"},
)
COMMANDS = len(LEVELS)  # what is not listed is a command, or the package's public interface


def level(part):
    """Returns the level of a folder or module directly below the package."""
    return next((number for number, parts in enumerate(LEVELS) if part in parts), COMMANDS)


def imported_parts(path):
    """Yields the folder or module of the package that each import of a file names."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "alexnet_jax":
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("alexnet_jax."):
            yield node.module.split(".")[1]


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.name))
def test_imports_go_down(path):
    own = level(path.relative_to(PACKAGE).parts[0].removesuffix(".py"))
    assert [part for part in imported_parts(path) if level(part) > own] == []
