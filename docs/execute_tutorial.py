"""Runs docs/tutorial.ipynb and stores what it shows there and in docs/tutorial_zh.ipynb.

Change code and English text in the first, the Chinese text in the second, and run

    python docs/execute_tutorial.py

The second takes its code from the first, so the two must have the same cells in the same order.
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
TIMEOUT = 600  # seconds, for the kernel's start and for each cell


def read(path: Path) -> NotebookNode:
    """Returns a notebook, valid by its format's schema."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    return notebook


def executed(
    notebook: NotebookNode, folder: Path = FOLDER, environment: Mapping[str, str] = os.environ
) -> NotebookNode:
    """Returns the notebook with the outputs of a new kernel that was started in the folder.

    Left out is what differs from run to run or tells of the machine: progress bars, warnings and
    logs, all of which go to stderr, and the times and versions in the metadata.

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


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    """Returns its cells of code, in order."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def with_code_of(translation: NotebookNode, notebook: NotebookNode) -> NotebookNode:
    """Returns the text of the first with the code and the outputs of the second.

    Raises ValueError if their cells are not the same ones in the same order.
    """
    for number, (own, other) in enumerate(zip_longest(translation.cells, notebook.cells)):
        ids = [cell and f"{cell.cell_type} cell {cell.id}" for cell in (own, other)]
        if ids[0] != ids[1]:
            raise ValueError(
                f"cell number {number} is the {ids[0]} in the translation but the {ids[1]} in the "
                "notebook; give both the same cells in the same order"
            )
    translation = deepcopy(translation)
    translation.metadata = notebook.metadata
    translation.cells = [
        own if own.cell_type == "markdown" else other
        for own, other in zip(translation.cells, notebook.cells, strict=True)
    ]
    return translation


def main() -> None:
    """Stores both notebooks, or neither if a cell fails."""
    english, chinese = read(ENGLISH), read(CHINESE)
    with_code_of(chinese, english)  # fails now, not after a minute
    english = executed(english)
    stored = {ENGLISH: english, CHINESE: with_code_of(chinese, english)}
    for path, notebook in stored.items():
        nbformat.write(notebook, path.with_suffix(".new"))
    for path in stored:
        path.with_suffix(".new").replace(path)


if __name__ == "__main__":
    main()
