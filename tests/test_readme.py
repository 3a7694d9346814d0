"""Variants, configs, files and links in the README and docs exist, and its example runs."""

import re
from pathlib import Path

import pytest

from alexnet_jax import VARIANTS, AlexNet, layer_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
SOURCE_FILE = re.compile(r"`((?:alexnet_jax|benchmarks|configs|tests)/[\w/.-]+\.\w+)`")


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_table_has_the_number_of_parameters(variant):
    total = sum(row.params for row in layer_table(AlexNet(variant), (224, 224, 3)))
    (row,) = re.findall(rf"^\| `{variant}` \|.*$", README, re.M)
    assert f"{total:,}" in row


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_config_table_has_the_config(path):
    assert f"`configs/{path.name}`" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_linked_and_named_files_exist(page):
    text = page.read_text()
    for target in re.findall(r"\]\(([^)#]+)\)", text):
        assert "://" in target or (page.parent / target).exists(), target
    for name in SOURCE_FILE.findall(text):
        assert (ROOT / name).exists(), name


def test_python_example_in_the_readme_runs():
    (example,) = re.findall(r"```python\n(.*?)```", README, re.S)
    names = {}
    exec(example, names)
    assert names["logits"].shape == (8, 10)
    assert set(names["features"]) == {"conv1", "fc7"}
