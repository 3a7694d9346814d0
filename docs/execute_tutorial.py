"""Runs docs/tutorial.ipynb and stores its outputs in both languages.

    python docs/execute_tutorial.py

The Chinese notebook takes its code cells from the English one, so both must have the same cells in
the same order.
"""

import os
from collections.abc import Mapping
from copy import deepcopy
from itertools import zip_longest
from pathlib import Path

import nbformat
from nbclient import NotebookClient
from nbformat import NotebookNode

FOLDER = Path(__file__).parent
ENGLISH, CHINESE = FOLDER / "tutorial.ipynb", FOLDER / "tutorial_zh.ipynb"
TIMEOUT = 600  # seconds, per cell


def read(path: Path) -> NotebookNode:
    """Returns a notebook after checking it against the format's schema."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Returns the code cells in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def execute(
    notebook: NotebookNode, folder: Path = FOLDER, environment: Mapping[str, str] = os.environ
) -> NotebookNode:
    """Returns the notebook with outputs from a new kernel that starts in `folder`.

    Outputs that differ between runs or machines are removed: stderr (progress bars, warnings,
    logs), execution times and the kernel's version.

    Raises nbclient.exceptions.CellExecutionError for the first cell that fails.
    """
    notebook = deepcopy(notebook)
    client = NotebookClient(
        notebook,
        timeout=TIMEOUT,
        startup_timeout=TIMEOUT,
        kernel_name="python3",
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    )
    client.execute(env=dict(environment))
    notebook.metadata.language_info = {"name": "python"}
    for cell in code_cells(notebook):
        cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    return notebook


def translate(notebook: NotebookNode, translation: NotebookNode) -> NotebookNode:
    """Returns the notebook with the text cells of its translation.

    Raises ValueError if the two do not have the same cells in the same order.
    """
    for number, cells in enumerate(zip_longest(notebook.cells, translation.cells)):
        ours, theirs = (cell and f"{cell.cell_type} cell {cell.id}" for cell in cells)
        if ours != theirs:
            raise ValueError(
                f"cell number {number} is the {ours} in the notebook but the {theirs} in the "
                "translation; give both the same cells in the same order"
            )
    result = deepcopy(notebook)
    for cell, text in zip(result.cells, translation.cells, strict=True):
        if cell.cell_type == "markdown":
            cell.source = text.source
    return result


def main() -> None:
    """Executes and stores both notebooks, or neither if a cell fails."""
    english, chinese = read(ENGLISH), read(CHINESE)
    translate(english, chinese)  # fails before the minutes of execution, not after them
    english = execute(english)
    for path, notebook in ((ENGLISH, english), (CHINESE, translate(english, chinese))):
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
