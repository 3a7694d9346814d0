"""The tutorial runs, shows what is stored in it, and says in Chinese what it says in English."""

import os
import re

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from docs import execute_tutorial as tutorial

NOTEBOOKS = {"English": tutorial.ENGLISH, "Chinese": tutorial.CHINESE}
CHAPTERS = ("Network structure", "output", "Loading data", "Viewing data", "Training", "Results")
TRAINED_FROM = "optimizer"  # from this cell on, numbers are of training and differ by machine
# One device, as most readers have, where the tests have eight.
ENVIRONMENT = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}


@pytest.fixture(scope="module")
def english():
    return tutorial.read(tutorial.ENGLISH)


@pytest.fixture(scope="module")
def chinese():
    return tutorial.read(tutorial.CHINESE)


def printed(cell):
    return "".join(output.text for output in cell.outputs if output.output_type == "stream")


def pictures(cell):
    return sum("image/png" in output.get("data", {}) for output in cell.outputs)


def without_numbers(text):
    return re.sub(r"\s+", " ", re.sub(r"\d[\d.,]*(e[-+]\d+)?", "#", text))


def text_cells(notebook):
    return [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]


@pytest.mark.slow
def test_every_cell_runs_and_shows_what_is_stored(english, digits):
    environment = {**ENVIRONMENT, "TUTORIAL_DATA_DIR": str(digits)}
    now = tutorial.executed(english, environment=environment)
    trains = False
    for before, after in zip(tutorial.code_cells(english), tutorial.code_cells(now), strict=True):
        trains = trains or before.id == TRAINED_FROM
        shown = without_numbers if trains else str
        assert shown(printed(after)) == shown(printed(before)), before.id
        assert pictures(after) == pictures(before), before.id
    assert trains


def test_it_follows_the_chapters_and_each_but_the_text_shows_something(english):
    chapters, shown = [], {}
    for cell in english.cells:
        if cell.source.startswith("## ") and cell.source[3].isdigit():
            chapters.append(cell.source.splitlines()[0])
        elif cell.cell_type == "code" and chapters:
            text, count = shown.get(chapters[-1], ("", 0))
            shown[chapters[-1]] = text + printed(cell), count + pictures(cell)
    assert len(chapters) == len(CHAPTERS)
    for chapter, about in zip(chapters, CHAPTERS, strict=True):
        text, count = shown[chapter]
        assert about in chapter and text
        assert count or about == "Loading data"


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_what_is_stored_is_small_and_tells_nothing_of_the_machine(path):
    assert path.stat().st_size < 1_500_000
    notebook = tutorial.read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in tutorial.code_cells(notebook):
        assert cell.execution_count and not cell.metadata
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        assert not re.search(r"/(root|home|tmp|Users|usr|opt|var)/", printed(cell)), cell.id


def test_the_languages_have_the_same_cells_code_and_outputs(english, chinese):
    assert tutorial.with_code_of(chinese, english) == chinese


def test_the_languages_have_the_same_headings_links_numbers_code_and_formulas(english, chinese):
    for ours, theirs in zip(text_cells(english), text_cells(chinese), strict=True):
        for kind in (
            r"^(#+) ",
            r"\]\(([^)]+)\)",
            r"`[^`]+`",
            r"\$+[^$]+\$+",
            r"\d+",
            r"^- ",
        ):
            found = [sorted(re.findall(kind, text, re.M)) for text in (ours, theirs)]
            links = [[link.replace("_zh", "") for link in part] for part in found]
            assert links[0] == links[1], (kind, ours[:60])


def test_the_chinese_text_is_chinese(chinese):
    for text in text_cells(chinese):
        words = re.sub(r"`[^`]*`|\$+[^$]*\$+|\([^)]*\)", "", text)
        han, latin = (len(re.findall(letters, words)) for letters in ("[\u4e00-\u9fff]", "[a-z]"))
        assert han > latin, text[:60]


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_links_to_files_lead_somewhere(path):
    for text in text_cells(tutorial.read(path)):
        for target in re.findall(r"\]\(([^)#]+)\)", text):
            assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize("folder", [tutorial.FOLDER, tutorial.FOLDER.parent], ids=["docs", "root"])
def test_it_starts_in_the_docs_as_in_the_root_folder(english, folder):
    start = nbformat.from_dict({**english, "cells": tutorial.code_cells(english)[:1]})
    start.cells[0].source += '\nfrom alexnet_jax import errors\nassert (ROOT / "configs").is_dir()'
    tutorial.executed(start, folder, ENVIRONMENT)


def test_a_cell_that_fails_is_an_error(english):
    failing = nbformat.from_dict({**english, "cells": tutorial.code_cells(english)[:1]})
    failing.cells[0].source = "assert 1 + 1 == 3, 'the sum'"
    with pytest.raises(CellExecutionError, match="the sum"):
        tutorial.executed(failing, environment=ENVIRONMENT)


def test_a_translation_that_lacks_a_cell_is_refused_where_it_does(english, chinese):
    lacking = nbformat.from_dict({**chinese, "cells": chinese.cells[1:]})
    with pytest.raises(ValueError, match="code cell imports in the translation"):
        tutorial.with_code_of(lacking, english)
