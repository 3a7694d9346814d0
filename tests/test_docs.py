"""The pages on the code tell of all of it: its order of imports, and every module's reference."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alexnet_jax"
MODULES = sorted(path.stem for path in PACKAGE.glob("[!_]*.py"))
BUILDERS = sorted(f"datasets.{path.stem}" for path in (PACKAGE / "datasets").glob("[!_]*.py"))
(TABLE,) = re.findall(r"```text\n(commands .*?)```", (ROOT / "docs/design.md").read_text(), re.S)
ORDER = [name for line in TABLE.splitlines() for name in re.split(r"\s{2,}", line)[1].split()]
# Inside functions, where there is something to prepare (docs/design.md).
UPWARD = {("store", "prepare"), ("store", "sources")}


def imported(path):
    """The modules of the package that one imports anywhere, in functions too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "alexnet_jax":
            yield from (alias.name for alias in node.names)
        else:
            names = [alias.name for alias in getattr(node, "names", ()) if hasattr(alias, "name")]
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else names
            yield from (n.split(".")[1] for n in names if n.startswith("alexnet_jax."))


def test_the_design_names_every_module_once():
    assert sorted(ORDER) == sorted([*MODULES, "datasets"])


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_what_the_design_has_further_down(module):
    below = ORDER[ORDER.index(module) + 1 :]
    found = {(module, name) for name in imported(PACKAGE / f"{module}.py")}
    assert {name for _, name in found - UPWARD} <= set(below)


def test_every_module_has_its_place_in_the_reference():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    told = re.findall(r"^::: alexnet_jax\.(\S+)$", pages, re.M)
    assert sorted(told) == sorted(MODULES + BUILDERS)
