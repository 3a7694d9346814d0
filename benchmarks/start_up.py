"""How long until the first training step, with and without the cache of compiled programs?

    python benchmarks/start_up.py

Trains the quickstart for one epoch, alternately with an empty and a filled cache. The data is
prepared before. "First step" starts after the imports, which are measured separately.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from harness import ROOT, parser, ratio, row, show, write

ROUNDS = 3


def first_step_seconds(folder: Path, cache: str) -> float:
    """Returns the seconds to the first finished step, as train.py prints them."""
    with tempfile.TemporaryDirectory() as workdir:
        command = [
            *(sys.executable, "train.py", "--config=configs/quickstart.py"),
            *(f"--config.data_dir={folder}/data", "--config.num_epochs=1", f"--workdir={workdir}"),
        ]
        env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(folder / cache)}
        done = subprocess.run(
            command, cwd=ROOT, env=env, check=True, stdout=subprocess.PIPE, text=True
        )
    return float(re.search(r"first step after ([\d.]+) s", done.stdout)[1])


def import_seconds() -> float:
    """Returns the seconds that a process takes to import what training imports."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import alexnet_jax.train"], cwd=ROOT, check=True)
    return time.perf_counter() - started


def main() -> None:
    args = parser(__doc__, quick="one round").parse_args()
    imports, empty, filled = [], [], []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        first_step_seconds(folder, "unused cache")  # prepares the data
        for number in range(1 if args.quick else ROUNDS):
            imports.append(import_seconds())
            empty.append(first_step_seconds(folder, f"cache{number}"))
            filled.append(first_step_seconds(folder, f"cache{number}"))
    rows = [
        row("imports", imports, "s"),
        row("first step, empty cache", empty, "s", 64, "float32"),
        row("first step, filled cache", filled, "s", 64, "float32"),
        ratio("empty / filled", empty, filled),
    ]
    show(rows)
    write(rows, args.json)


if __name__ == "__main__":
    main()
