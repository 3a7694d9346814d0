"""Writing files: atomically, and with one-line messages if the file system refuses."""

import errno
import os
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from alexnet_jax.utils.errors import UserError

# errno values.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
NO_ACCESS = (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


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
