"""The tutorial runs, and both languages store the same code and outputs."""

import os
import re

import nbformat
import pytest
from nbclient.exceptions import CellExecutionError

from docs import execute_tutorial as tutorial

NOTEBOOKS = {"English": tutorial.ENGLISH, "Chinese": tutorial.CHINESE}
TRAINED_FROM = "optimizer"  # from this cell on, numbers depend on training and the machine
# One device, as most readers have; the tests have eight.
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


@pytest.mark.slow
def test_every_cell_runs_and_prints_the_stored_output(english, digits):
    environment = {**ENVIRONMENT, "TUTORIAL_DATA_DIR": str(digits)}
    executed = tutorial.execute(english, environment=environment)
    trains = False
    cells = zip(tutorial.code_cells(english), tutorial.code_cells(executed), strict=True)
    for stored, new in cells:
        trains = trains or stored.id == TRAINED_FROM
        compared = without_numbers if trains else str
        assert compared(printed(new)) == compared(printed(stored)), stored.id
        assert pictures(new) == pictures(stored), stored.id
    assert trains


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_stored_outputs_contain_nothing_of_the_machine(path):
    notebook = tutorial.read(path)
    assert set(notebook.metadata) == {"kernelspec", "language_info"}
    for cell in tutorial.code_cells(notebook):
        assert cell.execution_count and not cell.metadata
        assert all(output.get("name") != "stderr" for output in cell.outputs)
        assert not re.search(r"/(root|home|tmp|Users|usr|opt|var)/", printed(cell)), cell.id


def test_languages_have_the_same_cells_code_and_outputs(english, chinese):
    assert tutorial.translate(english, chinese) == chinese


@pytest.mark.parametrize("path", NOTEBOOKS.values(), ids=NOTEBOOKS)
def test_linked_files_exist(path):
    for cell in tutorial.read(path).cells:
        if cell.cell_type == "markdown":
            for target in re.findall(r"\]\(([^)#]+)\)", cell.source):
                assert "://" in target or (path.parent / target).exists(), target


@pytest.mark.parametrize("folder", [tutorial.FOLDER, tutorial.FOLDER.parent], ids=["docs", "root"])
def test_notebook_starts_in_the_docs_and_the_root_folder(english, folder):
    start = nbformat.from_dict({**english, "cells": tutorial.code_cells(english)[:1]})
    start.cells[0].source += '\nimport alexnet_jax\nassert (ROOT / "configs").is_dir()'
    tutorial.execute(start, folder, ENVIRONMENT)


def test_failing_cell_raises(english):
    failing = nbformat.from_dict({**english, "cells": tutorial.code_cells(english)[:1]})
    failing.cells[0].source = "assert 1 + 1 == 3, 'the sum'"
    with pytest.raises(CellExecutionError, match="the sum"):
        tutorial.execute(failing, environment=ENVIRONMENT)


def test_translation_without_a_cell_is_rejected(english, chinese):
    incomplete = nbformat.from_dict({**chinese, "cells": chinese.cells[1:]})
    with pytest.raises(ValueError, match="code cell imports in the translation"):
        tutorial.translate(english, incomplete)
