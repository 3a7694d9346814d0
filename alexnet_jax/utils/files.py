"""Writing files: whole or not at all, and what the user is told where it fails."""

import errno
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from alexnet_jax.utils.errors import UserError

DISK_FULL = (
    *(os.strerror(code) for code in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)),
    "Not enough disk space",  # tfds, when it foresees it
)
NO_ACCESS = tuple(
    os.strerror(code)
    for code in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)
)


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Gives a path of the same suffix to write to, which then takes the place of `path`.

    If the writing fails, `path` stays what it was, and nothing else is left.
    """
    new = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def explain_write_errors(
    folder: str | Path, other: str, texts: tuple[str, ...] = (*DISK_FULL, *NO_ACCESS)
) -> Iterator[None]:
    """Turns a full disk, missing rights and the like, on writing a folder, into a UserError.

    TensorStore, Orbax, TensorFlow, tfds and Python raise different exceptions, all with the
    system's own texts in them or in their causes.

    Args:
      other: what to choose instead, e.g. "another --workdir".
      texts: those to explain. All else keeps its traceback.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        told = _chain(error)
        for text in texts:
            if text in told:
                full = f"make room or choose {other}, and run the same command again: it goes on"
                mend = full if text in DISK_FULL else f"choose {other}"
                where = getattr(error, "filename", None) or folder
                raise UserError(f"cannot write {where}: {text.lower()}; {mend}") from error
        raise


def _chain(error: BaseException | None) -> str:
    """The texts of an error and of what caused it."""
    return f"{error}\n{_chain(error.__cause__ or error.__context__)}" if error else ""
