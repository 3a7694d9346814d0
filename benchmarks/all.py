"""Makes every figure that the project claims, and docs/results.md of them.

    python benchmarks/all.py                      all in turn, which takes hours
    python benchmarks/all.py --only crops start_up
    python benchmarks/all.py --quick              a short try of each, into a temporary folder
    python benchmarks/all.py --render             the page alone, from the rows that are there

Each entry's rows go to benchmarks/results/NAME.json. One that fails is told, its earlier rows stay,
and the others go on; then the exit code is 1. Let nothing else run beside it.
"""

import argparse
import importlib.util
import json
import shlex
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

BENCHMARKS = Path(__file__).parent
ROOT = BENCHMARKS.parent
RESULTS = BENCHMARKS / "results"
PAGE = ROOT / "docs" / "results.md"
sys.path[:0] = str(BENCHMARKS), str(ROOT)

import results_page  # noqa: E402  (in this folder)
from figures import ENTRIES, Entry  # noqa: E402

from alexnet_jax.utils.errors import UserError, exits_cleanly  # noqa: E402
from alexnet_jax.utils.files import atomic_write, explain_write_errors  # noqa: E402


def missing(entry: Entry) -> list[str]:
    """Returns the modules that an entry needs and this environment has not."""
    return [name for name in entry.needs if not importlib.util.find_spec(name)]


def run(entry: Entry, folder: Path, quick: bool) -> str | None:
    """Runs an entry's command, and writes all of its rows to `folder` or none.

    Returns what went wrong, if anything did.
    """
    words = [*shlex.split(entry.command), *(["--quick"] if quick else [])]
    print(f"\n== {entry.name}: python {shlex.join(words)}", flush=True)
    with tempfile.TemporaryDirectory() as scratch:
        rows = Path(scratch, "rows.json")
        started = time.time()
        done = subprocess.run([sys.executable, *words, f"--json={rows}"], cwd=ROOT, check=False)
        if done.returncode or not rows.exists():
            return f"failed with exit code {done.returncode}"
        result = {
            "command": shlex.join(words),
            "seconds": round(time.time() - started),
            **results_page.circumstances(),
            "rows": json.loads(rows.read_text()),
        }
    try:
        write(folder / f"{entry.name}.json", json.dumps(result, indent=2) + "\n")
    except UserError as error:
        return f"failed: {error}"
    return None


def write(path: Path, text: str) -> None:
    """Writes a file whole. Raises UserError where it cannot be written."""
    with explain_write_errors(path, "another --out"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_write(path) as new:
            new.write_text(text)


def parsed(argv: Sequence[str] | None) -> argparse.Namespace:
    """Returns the arguments; `results` and `page` tell where rows and the page go."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    names = [entry.name for entry in ENTRIES]
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="NAME")
    parser.add_argument("--quick", action="store_true", help="a short try of each")
    parser.add_argument("--render", action="store_true", help="run nothing, write the page")
    parser.add_argument("--list", action="store_true", help="print names, minutes and commands")
    parser.add_argument("--out", type=Path, metavar="DIR", help="rows and page go there instead")
    args = parser.parse_args(argv)
    if args.quick and not args.out:
        args.out = Path(tempfile.mkdtemp(prefix="results-quick-"))
    args.results, args.page = (args.out, args.out / PAGE.name) if args.out else (RESULTS, PAGE)
    return args


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """Runs what is asked for, writes the page, and returns the exit code."""
    args = parsed(argv)
    chosen = [entry for entry in ENTRIES if entry.name in args.only]
    if args.list:
        for entry in chosen:
            print(f"{entry.name:22} {entry.minutes:4} min  python {entry.command}")
        return 0
    runnable = [] if args.render else [entry for entry in chosen if not missing(entry)]
    for entry in [] if args.render else chosen:
        if missing(entry):
            print(f"{entry.name}: not run, it needs {', '.join(missing(entry))}", file=sys.stderr)
    troubles = {entry.name: run(entry, args.results, args.quick) for entry in runnable}
    failed = {name: trouble for name, trouble in troubles.items() if trouble}
    for name, trouble in failed.items():
        print(f"{name}: {trouble}", file=sys.stderr)
    write(args.page, results_page.page(args.results))
    print(f"wrote {args.page}")
    return int(bool(failed))


if __name__ == "__main__":
    main()
