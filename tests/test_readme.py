"""Commands, config fields, variants, files and links in the README and docs exist."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from alexnet_jax import VARIANTS, AlexNet, layer_table
from alexnet_jax import config as configs

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
README = PAGES[0].read_text()
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
COMMANDS = [
    line.replace("\\\n", " ")
    for page in PAGES
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", page.read_text(), re.S)
    for line in re.split(r"(?<!\\)\n|&&", block)
    if re.search(r"alexnet[_-]|train\.py", line)
]
SOURCE_FILE = re.compile(r"`((?:alexnet_jax|benchmarks|configs|tests)/[\w/.-]+\.\w+)`")


@pytest.mark.parametrize("command", COMMANDS)
def test_command_names_existing_modules_configs_and_fields(command):
    words = shlex.split(command, comments=True)
    start = next(
        (i for i, word in enumerate(words) if word.endswith("python") or word in SCRIPTS), None
    )
    if start is None:
        return  # pip, gcloud
    if words[start] not in SCRIPTS:
        module = words[start + 2] if words[start + 1] == "-m" else words[start + 1]
        path = ROOT / module.removesuffix(".py").replace(".", "/")
        assert path.with_suffix(".py").is_file() or module in ("pytest", "-c")
    if "--config" in words:
        path = words[words.index("--config") + 1]
        fields = [word.removeprefix("--config.") for word in words if word.startswith("--config.")]
        configs.load(str(ROOT / path), [tuple(field.split("=", 1)) for field in fields])


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
