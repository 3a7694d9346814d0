"""What the process is told before JAX starts its backends: none of it changes what is computed."""

import os
import signal
import socket
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
from jax.experimental import multihost_utils

from alexnet_jax.utils.errors import EXIT_KILLED_BY_CTRL_C

# By default XLA's CPU backend starts as many operations at once as it can, which takes up to
# twice the memory and is no faster (docs/performance.md).
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# Of a program that runs once, the initial state's, LLVM's full optimization takes longer than it
# gives back; the values are the same to the last bit.
RUN_ONCE_CPU_OPTIONS = {"xla_backend_optimization_level": 1}

# More of a TPU's vector memory for one fusion than the 16 MiB that it gets by default: the
# compiler then overlaps more of it with transfers (docs/performance.md).
TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "32768"}


def set_up() -> None:
    """Sets all of it up. Call it before anything is computed."""
    _keep_compiled_programs()
    _add_options("XLA_FLAGS", CPU_OPTIONS)
    _add_options("LIBTPU_INIT_ARGS", TPU_OPTIONS)


def run_once(function: Callable[[], Any], **options: Any) -> Any:
    """Returns what a function without arguments returns when it is compiled, soon rather than well.

    Args:
      options: of `jax.jit`.
    """
    quick = RUN_ONCE_CPU_OPTIONS if jax.default_backend() == "cpu" else {}
    return jax.jit(function, compiler_options=quick, **options)()


def _keep_compiled_programs() -> None:
    """In ~/.cache/alexnet_jax those that took 0.2 s, if JAX's own variables say nothing else."""
    folder = Path("~/.cache/alexnet_jax").expanduser()
    for name, value in {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _add_options(variable: str, options: dict[str, str]) -> None:
    """Puts them first, so that what the user has there counts."""
    own = " ".join(f"--{name}={value}" for name, value in options.items())
    os.environ[variable] = f"{own} {os.environ.get(variable, '')}"


class StopRequest:
    """A context in which SIGINT and SIGTERM ask for a stop, and a second one leaves at once.

    Python runs its signal handlers between two bytecodes only, which may be minutes away while
    XLA compiles. So a thread hears of signals by the wakeup socket, which the interpreter's own C
    handler writes to.

    Of several processes JAX's own handler takes SIGTERM, and lets all of them know; SIGINT is sent
    on as that. A second SIGTERM is then the same as the first.
    """

    def __init__(self) -> None:
        self._several = jax.distributed.is_initialized()
        self._signals = (signal.SIGINT,) if self._several else (signal.SIGINT, signal.SIGTERM)
        self._received = threading.Event()
        self._asked = 0
        self._agreed = False

    def requested(self) -> bool:
        """Whether the run should save and stop.

        The processes of a run call it equally often, and get the same answer to the same call.
        """
        if not self._several:
            return self._received.is_set()
        if not self._agreed:
            self._asked += 1  # JAX wants consecutive numbers
            self._agreed = multihost_utils.reached_preemption_sync_point(self._asked)
        return self._agreed

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno())
        self._handlers_before = [signal.signal(s, lambda *_: None) for s in self._signals]
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self._signals, self._handlers_before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._writer.close()

    def _listen(self) -> None:
        while received := self._reader.recv(1):
            if received[0] not in self._signals:
                continue
            if self._received.is_set():
                os._exit(EXIT_KILLED_BY_CTRL_C)
            self._received.set()
            if self._several:
                os.kill(os.getpid(), signal.SIGTERM)
            print(
                "\nstopping: the step is finished and saved first; once more leaves at once",
                file=sys.stderr,
            )
        self._reader.close()
