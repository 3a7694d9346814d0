"""How much code and text is there?

    python benchmarks/lines.py
    python benchmarks/lines.py train.py models.py

Lines of code are counted without blank lines, comments and docstrings, all lines for comparison.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections.abc import Iterable
from pathlib import Path

from harness import ROOT, Row, parser, row, show, write

PACKAGE = ROOT / "alexnet_jax"
LAYOUT = {
    *(tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT),
    *(tokenize.ENCODING, tokenize.ENDMARKER),
}
IMPORT = """
import sys, alexnet_jax.train
print(*(m.__file__ for name, m in sys.modules.items() if name.startswith("alexnet_jax")))
"""


def code_lines(source: str) -> int:
    """Returns the number of lines of a Python source that hold code."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type not in LAYOUT:
            lines |= set(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(ast.parse(source)):
        documented = isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        if documented and ast.get_docstring(node) is not None:
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def training_files() -> set[Path]:
    """Returns train.py, one config, and the package's files that they import."""
    command = [sys.executable, "-c", IMPORT]
    done = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)
    return {ROOT / "train.py", ROOT / "configs/imagenet.py", *map(Path, done.stdout.split())}


def count(what: str, files: Iterable[Path]) -> list[Row]:
    """Returns the lines of code and all lines of Python files."""
    sources = [file.read_text() for file in sorted(files)]
    what = f"{what} ({len(sources)} files)"
    return [
        row(what, [sum(map(code_lines, sources))], "lines of code"),
        row(what, [sum(len(source.splitlines()) for source in sources)], "lines"),
    ]


def words(what: str, files: Iterable[Path]) -> Row:
    return row(what, [sum(len(file.read_text().split()) for file in files)], "words")


def project() -> list[Row]:
    """Returns all counts of this checkout."""
    return [
        *count("package", PACKAGE.rglob("*.py")),
        *count("tests", (ROOT / "tests").rglob("*.py")),
        *count("benchmarks", (ROOT / "benchmarks").rglob("*.py")),
        *count("training loop, train.py", [PACKAGE / "train.py"]),
        *count("train.py and what it imports", training_files()),
        words("README", [ROOT / "README.md"]),
        words("docs/*.md", (ROOT / "docs").glob("*.md")),
    ]


def main() -> None:
    options = parser(__doc__, quick="the same")
    options.add_argument("files", nargs="*", type=Path, metavar="FILE.py", help="default: ours")
    args = options.parse_args()
    rows = count("these files", args.files) if args.files else project()
    show(rows)
    write(rows, args.json)


if __name__ == "__main__":
    main()
