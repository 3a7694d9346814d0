"""What benchmarks write: a list of rows, one for each thing measured in one unit."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

Row = dict[str, Any]


def options(doc: str, quick: str) -> argparse.ArgumentParser:
    """Returns a parser with the options of all benchmarks; `quick` tells what --quick leaves."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows there")
    parser.add_argument("--quick", action="store_true", help=quick)
    return parser


def row(what: str, values: Sequence[float], unit: str, batch: int, dtype: str = "uint8") -> Row:
    """Returns the row of repeated measurements; its `value` is their median."""
    middle = median(values)
    spread = {"min": min(values), "median": middle, "max": max(values)}
    return {"what": what, "batch": batch, "dtype": dtype, "unit": unit, "value": middle, **spread}


def write(rows: Sequence[Row], path: Path | None) -> None:
    """Writes the rows, if --json named a file."""
    if path:
        path.write_text(json.dumps(rows, indent=2) + "\n")
