"""Every module of the package is in the reference."""

import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "alexnet_jax"


def test_reference_has_every_module():
    modules = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts) for path in PACKAGE.rglob("[!_]*.py")
    }
    pages = "\n".join(page.read_text() for page in (ROOT / "docs/reference").glob("*.md"))
    listed = re.findall(r"^::: (alexnet_jax\.\S+)$", pages, re.M)
    assert sorted(listed) == sorted(modules)
