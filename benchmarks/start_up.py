"""Seconds of the imports, and from there to the first finished step, with and without the cache.

    python benchmarks/start_up.py

Trains one epoch of the quickstart in processes of their own, turn by turn with an empty and with
a filled compilation cache. The data is prepared before.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rows import options, row, write

ROOT = Path(__file__).parent.parent


def first_step_after(data_dir: Path, cache: Path) -> float:
    """Returns the seconds that the program itself tells."""
    with tempfile.TemporaryDirectory() as workdir:
        done = subprocess.run(
            [
                *(sys.executable, "train.py", "--config", "configs/quickstart.py"),
                *(f"--config.data_dir={data_dir}", f"--workdir={workdir}"),
                "--config.num_epochs=1",
            ],
            cwd=ROOT,
            env=os.environ | {"JAX_COMPILATION_CACHE_DIR": str(cache)},
            check=True,
            capture_output=True,
            text=True,
        )
    return float(re.search(r"first step after ([\d.]+) s", done.stdout)[1])


def import_seconds() -> float:
    """Returns how long a new process takes to import what training imports, and to end."""
    started = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import alexnet_jax.train"], cwd=ROOT, check=True)
    return time.perf_counter() - started


def main() -> None:
    """Prints a table of medians, and writes it as rows if asked."""
    args = options(__doc__, quick="one round").parse_args()
    seconds = {"empty cache": [], "filled cache": []}
    imports = []
    with tempfile.TemporaryDirectory() as folder:
        data_dir = Path(folder, "data")
        first_step_after(data_dir, Path(folder, "unused"))  # prepares the data
        for number in range(1 if args.quick else 3):
            imports.append(import_seconds())
            for times in seconds.values():
                times.append(first_step_after(data_dir, Path(folder, f"cache{number}")))
    rows = [
        row(f"first step, {what}", times, "s", batch=64, dtype="float32")
        for what, times in seconds.items()
    ] + [row("imports", imports, "s", batch=64, dtype="float32")]
    for of in rows:
        print(f"{of['what']:26} {of['median']:5.1f} s  ({of['min']:.1f} to {of['max']:.1f})")
    print(f"{'ratio':26} {rows[0]['median'] / rows[1]['median']:5.1f}")
    write(rows, args.json)


if __name__ == "__main__":
    main()
