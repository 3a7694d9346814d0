"""The pages on the code tell of all of it: which module imports which, and each one's reference."""

import re

from test_structure import MODULES, PACKAGE, ROOT, imported

BUILDERS = [f"datasets.{path.stem}" for path in (PACKAGE / "datasets").glob("[!_]*.py")]
(TABLE,) = re.findall(r"```text\n(commands .*?)```", (ROOT / "docs/design.md").read_text(), re.S)
ORDER = [name for line in TABLE.splitlines() for name in re.split(r"\s{2,}", line)[1].split()]


def test_the_design_has_every_module_once_and_what_it_imports_further_down():
    assert sorted(ORDER) == MODULES
    for place, module in enumerate(ORDER):
        assert imported(module) <= set(ORDER[place + 1 :]), module


def test_every_module_has_its_place_in_the_reference():
    pages = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    told = re.findall(r"^::: alexnet_jax\.(\S+)$", pages, re.M)
    assert sorted(told) == sorted(MODULES + BUILDERS)
