"""Runs every benchmark behind the numbers in the documentation, one after another.

    python benchmarks/all.py FOLDER

Writes each one's rows to FOLDER/NAME.json and what it prints to FOLDER/NAME.txt, then the table of
all to FOLDER/results.md. A benchmark that has its JSON there is not repeated, so the same command
continues after an interruption. Takes several hours; nothing else should run meanwhile.
"""

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path

import accuracy
from harness import ROOT, number

BENCHMARKS = {
    "lines": "lines.py",
    "compiled": "compiled.py",
    "start_up": "start_up.py",
    "train_step_owt": "train_step.py --mode train --variant owt --dtype float32",
    "train_step_paper": "train_step.py --mode train --variant paper --dtype float32 --batch 64",
    "augmentation": "augmentation.py",
    "loop": "loop.py",
    "modern": "modern.py",
    "reading": "reading.py",
    "input_pipeline": "input_pipeline.py --images 8192 --seconds 3",
    "preparation": "preparation.py --scratch /dev/shm",
    "store_scale": "store_scale.py",
    "inference": "inference.py",
    "perceptual_distance": "perceptual_distance.py",
    "torch_twin": "torch_twin.py --config configs/imagenette.py --config.num_epochs=5",
    "figure1": "figure1.py",
    **{f"accuracy_{name}": f"accuracy.py {name}" for name in accuracy.NAMES},
}


def run(name: str, folder: Path) -> str:
    """Runs a benchmark unless its rows exist; returns how that went, in a few words."""
    rows = folder / f"{name}.json"
    if rows.exists():
        return "done before"
    unfinished = folder / f"{name}.unfinished"  # some benchmarks write their rows as they come
    started = time.perf_counter()
    script, *options = BENCHMARKS[name].split()
    command = [sys.executable, str(ROOT / "benchmarks" / script), *options, "--json", unfinished]
    with (folder / f"{name}.txt").open("w") as log:
        code = subprocess.call(command, cwd=ROOT, stdout=log, stderr=subprocess.STDOUT)
    if code:
        return f"FAILED with exit code {code}, see {log.name}"
    unfinished.rename(rows)
    return f"{(time.perf_counter() - started) / 60:.0f} minutes"


def table(folder: Path) -> str:
    """Returns the rows of all benchmarks as a Markdown table."""
    lines = ["| command | what | batch | dtype | median | range | unit |", "|" + " --- |" * 7]
    for name, command in BENCHMARKS.items():
        path = folder / f"{name}.json"
        for row in json.loads(path.read_text()) if path.exists() else ():
            spread = f"{number(row['min'])} to {number(row['max'])}"
            cells = [row["what"], row["batch"], row["dtype"], number(row["median"]), spread]
            lines.append("| " + " | ".join(map(str, [f"`{command}`", *cells, row["unit"]])) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", choices=BENCHMARKS, default=list(BENCHMARKS))
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    failed = False
    for name in args.only:
        result = run(name, args.folder)
        failed |= "FAILED" in result
        print(f"{name:36} {result}", flush=True)
        (args.folder / "results.md").write_text(table(args.folder))
    sys.exit(int(failed))


if __name__ == "__main__":
    main()
