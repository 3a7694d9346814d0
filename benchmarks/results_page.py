"""Renders docs/results.md from the rows that benchmarks wrote, and tells where they were made."""

import importlib.metadata
import json
import os
import platform
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from figures import ENTRIES, README, Entry
from other_figures import OTHERS

from alexnet_jax.utils.errors import UserError

PACKAGES = ("jax", "jaxlib", "flax", "optax", "grain", "tensorflow", "torch", "onnxruntime")
Result = dict[str, Any]  # a file of benchmarks/results
HEAD = """# Results

Every figure that the project claims, with the command that makes it. This page is written by

```console
python benchmarks/all.py
```

from the rows in `benchmarks/results`, which it makes first; `--only NAME` runs some of them, and
`--render` writes the page alone. Values are medians, with least and most where there are several.
Pages that explain a figure may give it of an earlier run, on the machine that they name.
"""


def circumstances() -> Result:
    """Returns the date, the machine, and the versions of what is measured and compared with."""
    versions = {"Python": platform.python_version()}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    machine = {
        "processor": _of_proc("cpuinfo", "model name") or platform.machine(),
        "cores": os.cpu_count(),
        "memory_gb": round(int(_of_proc("meminfo", "MemTotal").split()[0]) / 1e6),
    }
    return {"date": time.strftime("%Y-%m-%d"), "machine": machine, "versions": versions}


def _of_proc(file: str, key: str) -> str:
    """Returns the first value of a key in a file of /proc; "" if there is none."""
    for line in Path("/proc", file).read_text().splitlines():
        name, _, value = line.partition(":")
        if name.strip() == key:
            return value.strip()
    return ""


def page(results: Path) -> str:
    """Returns the page of the rows in a folder."""
    found = {entry.name: _loaded(results / f"{entry.name}.json") for entry in ENTRIES}
    parts = [HEAD, _contents(found)]
    parts += [_section(entry, found[entry.name]) for entry in ENTRIES if found[entry.name]]
    not_run = [entry for entry in ENTRIES if not found[entry.name]]
    if not_run:
        lines = [f"- {entry.name}: {_made_by(entry.command, entry.needs)}" for entry in not_run]
        parts.append("\n".join(["## Not run", "", *lines, ""]))
    return "\n".join([*parts, _others()])


def _loaded(path: Path) -> Result | None:
    """Returns what is in a file of rows; None if there is none."""
    try:
        return json.loads(path.read_text()) if path.exists() else None
    except ValueError as error:
        mend = f"make them again by benchmarks/all.py --only {path.stem}"
        raise UserError(f"{path} holds no whole rows ({error}); {mend}") from error


def _contents(found: dict[str, Result | None]) -> str:
    lines = [
        f"| {f'[{entry.name}](#{entry.name})' if found[entry.name] else entry.name} "
        f"| {entry.shows} | {_links(entry.pages)} | {entry.minutes} "
        f"| {found[entry.name]['date'] if found[entry.name] else 'not run'} |"
        for entry in ENTRIES
    ]
    return _table("name | what it shows | claimed in | minutes | made", lines)


def _section(entry: Entry, result: Result) -> str:
    machine, versions = result["machine"], result["versions"]
    told = ", ".join(f"{name} {version}" for name, version in versions.items())
    rows = [
        f"| {row['what']} | {row['batch']} | {row['dtype']} | {number(row['median'])} "
        f"| {_spread(row)} | {row['unit']} |"
        for row in result["rows"]
    ]
    return "\n".join(
        [
            f"## {entry.name}\n",
            f"{entry.shows[0].upper()}{entry.shows[1:]}: {_made_by(result['command'])}\n",
            f"{result['date']}, in {max(1, round(result['seconds'] / 60))} min, on "
            f"{machine['cores']} cores ({machine['processor']}) with {machine['memory_gb']} GB of "
            f"memory. {told}.\n",
            _table("what | batch | dtype | median | least to most | unit", rows),
        ]
    )


def _others() -> str:
    lines = [f"| {of.figures} | {_links(of.pages)} | {of.source} |" for of in OTHERS]
    return "## Figures that no benchmark makes\n\n" + _table("figures | page | source", lines)


def number(value: float) -> str:
    """Returns a figure with four digits at least before or after its point."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def _spread(row: Result) -> str:
    if row["min"] == row["max"]:
        return ""
    return f"{number(row['min'])} to {number(row['max'])}"


def _table(head: str, lines: Sequence[str]) -> str:
    rule = "|".join(" --- " for _ in head.split("|"))
    return "\n".join([f"| {head} |", f"|{rule}|", *lines, ""])


def _made_by(command: str, needs: Sequence[str] = ()) -> str:
    return f"`python {command}`" + (f" (needs {', '.join(needs)})" if needs else "")


def _links(pages: Sequence[str]) -> str:
    return ", ".join(
        "README" if page == README else f"[{Path(page).stem}]({Path(page).name})" for page in pages
    )
