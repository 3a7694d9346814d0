"""Errors that are the user's to mend, and how a command shows them."""

import errno
import functools
import logging
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # BSD's EX_TEMPFAIL: saved on request, run the same command to go on
EXIT_KILLED_BY_CTRL_C = 130


class UserError(Exception):
    """Bad input. Its text is one sentence that names the thing at fault and the mend."""


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wraps a command's `main`: a `UserError` becomes one line on stderr and exit code 2.

    Ctrl-C outside the training loop exits with 130. Any other exception keeps its traceback,
    since it is a fault of the program.
    """

    @functools.wraps(main)
    def command(*args, **kwargs) -> None:
        _quiet_libraries()
        try:
            sys.exit(main(*args, **kwargs))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(EXIT_USER_ERROR)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(EXIT_KILLED_BY_CTRL_C)

    return command


def _quiet_libraries() -> None:
    """What Orbax and tfds log they also raise, and TensorFlow greets each user with a page."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")


@contextmanager
def disk_full_is_users(folder: Path) -> Iterator[None]:
    """Turns "no space left" of any library, on writing into `folder`, into a UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if not is_disk_full(error):
            raise
        raise UserError(
            f"no space left to write into {folder}; free some and run the same command again: "
            "what was saved before is whole"
        ) from error


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, is a full disk, quota or file size limit."""
    if error is None:
        return False
    if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return True
    told = ("No space left on device", "Disk quota exceeded", "File too large")
    if any(text in str(error) for text in told):
        return True
    return is_disk_full(error.__cause__ or error.__context__)
