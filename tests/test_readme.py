"""The README and docs hold to what there is: commands, configs, variants, counts and pictures."""

import re
import shlex
import tomllib
from pathlib import Path

import pytest

from alexnet_jax import config as configs
from alexnet_jax.models.alexnet import VARIANTS, AlexNet, layer_table

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
TEXT = "\n".join(page.read_text() for page in PAGES)
README = PAGES[0].read_text()
SCRIPTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
COMMANDS = [
    line.replace("\\\n", " ")
    for block in re.findall(r"```(?:bash|console)\n(.*?)```", TEXT, re.S)
    for line in re.split(r"(?<!\\)\n|&&", block)
    if "--config" in line
]


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_shown_names_a_config_and_fields_that_exist(command):
    words = shlex.split(command, comments=True)
    start = next(i for i, word in enumerate(words) if word.endswith("python") or word in SCRIPTS)
    if words[start] not in SCRIPTS:
        assert words[start + 1] == "train.py" or words[start + 1] == "-m"
        if words[start + 1] == "-m":
            assert (ROOT / (words[start + 2].replace(".", "/") + ".py")).is_file()
    config = words[words.index("--config") + 1]
    fields = [w.removeprefix("--config.").split("=", 1) for w in words if w.startswith("--config.")]
    configs.load(str(ROOT / config), [tuple(field) for field in fields])


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_table_of_variants_gives_the_parameters_counted(variant):
    total = sum(row.params for row in layer_table(AlexNet(variant), (224, 224, 3)))
    (row,) = re.findall(rf"^\| `{variant}` \|.*$", README, re.M)
    assert f"{total:,}" in row


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.py")), ids=lambda p: p.stem)
def test_every_config_is_told_of(path):
    assert f"`configs/{path.name}`" in README


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_to_files_lead_somewhere(page):
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        if "://" not in target:
            assert (page.parent / target).exists(), target
