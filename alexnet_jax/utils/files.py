"""Files: writing them atomically, messages if the system refuses, and finding them in folders."""

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from alexnet_jax.utils.errors import UserError

# errno values.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def checkpoint_steps(workdir: Path) -> set[int]:
    """Returns the steps of the complete checkpoints in a workdir.

    Orbax gives the folder of a checkpoint its number only when it is complete.
    """
    return {int(p.name) for p in (workdir / "checkpoints").glob("*") if p.name.isdigit()}


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yields a temporary path to write to, with the suffix of `path`, that then replaces `path`.

    If the write fails, `path` keeps its content and the temporary file is removed.
    """
    new = path.with_name(f".{path.stem}.new{path.suffix}")
    try:
        yield new
        new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def explain_write_errors(
    folder: str | Path, other: str, codes: Collection[int] = (*DISK_FULL, *NO_ACCESS)
) -> Iterator[None]:
    """Raises UserError instead of the errors of a full disk or missing permissions.

    Args:
      folder: where the block writes.
      other: what to choose instead, e.g. "another --workdir".
      codes: errno values to explain. Other exceptions pass unchanged.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        code = _find_errno(error, codes)
        if code is None:
            raise
        fix = f"choose {other}"
        if code in DISK_FULL:
            fix = f"make room or {fix}, and run the same command again"
        where = getattr(error, "filename", None) or folder
        raise UserError(f"cannot write {where}: {os.strerror(code).lower()}; {fix}") from error


def _find_errno(error: BaseException | None, codes: Collection[int]) -> int | None:
    """Returns the first of these errno values in an error and its causes."""
    while error is not None:
        if isinstance(error, OSError) and error.errno in codes:
            return error.errno
        # TensorStore, and Orbax when it writes arrays by TensorStore, raise ValueError;
        # TensorFlow raises exceptions of its own. None of them has an errno. All of them quote the
        # system's text.
        for code in codes:
            if os.strerror(code) in str(error):
                return code
        # tfds compares a dataset's size with the free space before it writes. Its OSError has no
        # errno.
        if errno.ENOSPC in codes and "Not enough disk space" in str(error):
            return errno.ENOSPC
        error = error.__cause__ or error.__context__
    return None


def files_below(folder: str | Path) -> Iterator[Path]:
    """Yields all files below a folder, sorted by name, except hidden ones. Links are followed.

    Raises UserError for a link to a folder that contains it.
    """
    _check_no_loop(Path(folder))
    for parent, folders, files in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in folders:
            _check_no_loop(Path(parent, name))
        yield from (Path(parent, name) for name in sorted(files) if not name.startswith("."))


def _check_no_loop(folder: Path) -> None:
    if folder.is_symlink() and folder.parent.resolve().is_relative_to(folder.resolve()):
        raise UserError(f"{folder} is a link to a folder that contains the link; remove it")


def printable(name: str | Path) -> str:
    r"""Returns a file name as text that any program can write and draw.

    Linux allows any bytes in names. Python represents those that are not UTF-8 by characters which
    cannot be encoded; here they become \udcXX, as Python's JSON writes them.
    """
    return str(name).encode("utf-8", "backslashreplace").decode()
