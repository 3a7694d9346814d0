"""How commands end: exit codes, and one-line messages for errors that the user can fix."""

import functools
import io
import logging
import os
import re
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

EXIT_USER_ERROR = 2
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: stopped on request; the same command resumes
EXIT_PEER_LOST = 76  # launch: a process was killed, so the others ended; the same command resumes
EXIT_KILLED_BY_CTRL_C = 130  # 128 + SIGINT, as shells report it
EXIT_BROKEN_PIPE = 141  # 128 + SIGPIPE


class UserError(Exception):
    """An error that the user can fix. Its text says what is wrong, then how to fix it."""


def one_line(error: Exception) -> str:
    """Returns an error's text on one line, without a terminal's color codes."""
    return " ".join(re.sub(r"\x1b\[[\d;]*m", "", str(error)).split())


def exits_cleanly(main: Callable[..., int | None]) -> Callable[..., None]:
    """Decorates a command's `main`: prints a `UserError` as one line and exits with code 2.

    So are a device that is missing, occupied or too small. Ctrl-C outside of training exits with
    130. Output that nobody reads any more, as after `| head`, ends a command silently with 141. All
    other exceptions are bugs: they keep their traceback and exit with 1. `main` returns the exit
    code; None means 0.
    """

    @functools.wraps(main)
    def command(*args: Any, **kwargs: Any) -> None:
        # Orbax and tfds log errors that they also raise.
        logging.getLogger("absl").setLevel(logging.CRITICAL)
        sys.unraisablehook = _ignore_errors_that_orbax_repeats
        logging.getLogger("asyncio").addFilter(_is_not_repeated_by_orbax)
        if isinstance(sys.stdout, io.TextIOWrapper):
            # A file name may have characters that the terminal's encoding lacks.
            sys.stdout.reconfigure(errors="backslashreplace")
        try:
            code = main(*args, **kwargs)
            sys.stdout.flush()
            sys.exit(code)
        except UserError as error:
            _exit(EXIT_USER_ERROR, f"error: {error}")
        except KeyboardInterrupt:
            _exit(EXIT_KILLED_BY_CTRL_C, "interrupted")
        except BrokenPipeError:
            # Python flushes stdout once more when it exits, and would print that error.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(EXIT_BROKEN_PIPE)
        except Exception as error:
            if explained := _device_fault(error):
                _exit(EXIT_USER_ERROR, f"error: {explained}")
            _exit(1, traceback.format_exc().rstrip())

    return command


def _device_fault(error: Exception) -> str | None:
    """Returns a sentence about a device that is missing, occupied or too small; else None."""
    if not isinstance(error, (AssertionError, RuntimeError)):  # JAX's have one of these types
        return None
    import jax

    try:
        # If JAX could not start a platform, this fails again. Otherwise it returns at once.
        device = f"the {jax.devices()[0].platform} device"
    except (AssertionError, RuntimeError) as again:
        asked = os.environ.get("JAX_PLATFORMS")
        what = f"the platform of JAX_PLATFORMS={asked}" if asked else "its platform"
        detail = f" ({one_line(again)[:200]})" if str(again) else ""
        return (
            f"JAX cannot start {what}{detail}; install what it needs, such as a driver and "
            "pip install 'jax[cuda13]' for cuda, end other programs that use the device, or set "
            "JAX_PLATFORMS=cpu"
        )
    if isinstance(error, jax.errors.JaxRuntimeError):
        status = str(error).partition(":")[0]  # the name of a gRPC status code
        if status == "RESOURCE_EXHAUSTED":
            return (
                f"{device} has too little free memory ({one_line(error)[:150]}); end other "
                "programs that use it, or choose a smaller batch (in training, "
                "optimizer.accumulate_steps saves memory too)"
            )
        # Libraries such as cuDNN could not start. Between processes it has other causes.
        if status == "FAILED_PRECONDITION" and jax.process_count() == 1:
            return (
                f"{device} cannot be used ({one_line(error)[:150]}); end other programs that use "
                "it, or set JAX_PLATFORMS=cpu"
            )
    return None


def exit_now(code: int, message: str) -> NoReturn:
    """Prints a message on stderr and ends the process, without cleaning up. Works in any thread."""
    print(message, file=sys.stderr)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _exit(code: int, message: str) -> NoReturn:
    import jax

    if jax.distributed.is_initialized():
        # A normal exit waits until all processes of the run exit, but they wait for this one.
        exit_now(code, message)
    print(message, file=sys.stderr)
    sys.exit(code)


def _ignore_errors_that_orbax_repeats(unraisable: Any) -> None:
    # When an array of a checkpoint cannot be written or read, Orbax raises its error and closes its
    # event loop. The other writes then fail in threads that can only print, and the other reads
    # raise when they are deleted: 50 kB of text. The types are RuntimeError and Exception, so the
    # texts are the only way to recognize them.
    text = str(unraisable.exc_value)
    if "Event loop is closed" not in text and "while reading array index" not in text:
        sys.__unraisablehook__(unraisable)


def _is_not_repeated_by_orbax(record: logging.LogRecord) -> bool:
    # The same for the writes that had failed before the loop was closed: asyncio logs each error
    # that nobody read. Which of Orbax's tasks it names depends on when they failed.
    if record.exc_info is None or "exception was never retrieved" not in record.getMessage():
        return True
    frames = traceback.walk_tb(record.exc_info[2])
    modules = [str(frame.f_globals.get("__name__")) for frame, _ in frames]
    return not any(module.startswith("orbax.") for module in modules)
