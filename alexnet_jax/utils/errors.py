"""Errors that are the user's to mend, and how a command shows them."""

import functools
import logging
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # BSD's EX_TEMPFAIL: saved on request, run the same command to go on
EXIT_PEER_LOST = 76  # another process of the run is gone: run the same command on all to go on
EXIT_KILLED_BY_CTRL_C = 130


class UserError(Exception):
    """Bad input. Its text is one sentence that names the thing at fault and the mend."""


def one_line(error: Exception) -> str:
    """Returns an error's text with its line breaks and runs of spaces made single spaces."""
    return " ".join(str(error).split())


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., None]:
    """Wraps a command's `main`: a `UserError` becomes one line on stderr and exit code 2.

    Ctrl-C outside the training loop exits with 130. Any other exception keeps its traceback,
    since it is a fault of the program.
    """

    @functools.wraps(main)
    def command(*args: Any, **kwargs: Any) -> None:
        _quiet_libraries()
        try:
            sys.exit(main(*args, **kwargs))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            _leave(EXIT_USER_ERROR)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            _leave(EXIT_KILLED_BY_CTRL_C)
        except Exception:
            traceback.print_exc()
            _leave(1)

    return command


def _leave(code: int) -> NoReturn:
    """At a usual exit JAX would wait for the run's other processes, which wait for this one."""
    import jax

    if jax.distributed.is_initialized():
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _quiet_libraries() -> None:
    """What Orbax and tfds log they also raise."""
    logging.getLogger("absl").setLevel(logging.CRITICAL)
    sys.unraisablehook = _without_late_writes


def _without_late_writes(fault: Any) -> None:
    """Once one write of a checkpoint has failed, Orbax closes the loop that the others report to.

    TensorStore then prints a fault of its own threads, beside the error that we raise.
    """
    if "Event loop is closed" not in str(fault.exc_value):
        sys.__unraisablehook__(fault)
