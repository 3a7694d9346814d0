"""Lines of code that a training runs through: without blank lines, comments and docstrings.

    python benchmarks/lines.py [FILE.py ...]

Without files it counts this project's: the command and `configs/imagenet.py` with all modules of
`alexnet_jax` that they import, what preparing the data imports besides, and the whole package.
"""

import ast
import io
import subprocess
import sys
import tokenize
from pathlib import Path

from rows import options, row, write

ROOT = Path(__file__).parent.parent
LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}
IMPORTED = (
    "import sys, {}; print(*(m.__file__ for n, m in sys.modules.items() if n.startswith('{}.')))"
)
PACKAGE = "alexnet_jax"


def code_lines(source: str) -> int:
    """Returns how many lines of a Python source hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def total(files: set[Path]) -> int:
    return sum(code_lines(file.read_text()) for file in files)


def imported_by(module: str) -> set[Path]:
    """Returns the package's files that a new process has read after an import."""
    command = [sys.executable, "-c", IMPORTED.format(f"{PACKAGE}.{module}", PACKAGE)]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return set(map(Path, done.stdout.split()))


def ours(quick: bool) -> dict[str, set[Path]]:
    """Returns this project's files by what they are for."""
    commands = {ROOT / "train.py", ROOT / "configs" / "imagenet.py"}
    if quick:
        return {"command and config": commands}
    training = commands | imported_by("train")
    return {
        "training": training,
        "preparing data, besides": imported_by("prepare") - training,
        "the whole package": set((ROOT / PACKAGE).rglob("*.py")),
    }


def main() -> None:
    """Prints the lines, and writes them as rows if asked."""
    parser = options(__doc__, quick="the command and its config alone")
    parser.add_argument("files", nargs="*", type=Path, metavar="FILE.py", help="default: ours")
    args = parser.parse_args()
    files = {"these files": set(args.files)} if args.files else ours(args.quick)
    rows = [row(what, [total(of)], "lines", batch=1, dtype="-") for what, of in files.items()]
    for of, paths in zip(rows, files.values(), strict=True):
        print(f"{of['what']:24} {of['value']:6,} lines of code in {len(paths)} files")
    write(rows, args.json)


if __name__ == "__main__":
    main()
