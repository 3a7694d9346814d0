"""Files that get their names when they are whole."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def written_whole(path: Path) -> Iterator[Path]:
    """Gives a path of the same suffix to write to, which then takes the place of `path`.

    If the writing fails, `path` stays what it was, and nothing else is left.
    """
    new = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)
