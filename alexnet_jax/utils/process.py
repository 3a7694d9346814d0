"""Process setup: compiler options, the compilation cache and signals."""

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

# For a program that runs once, such as the one that makes the initial state, LLVM's full
# optimization takes longer than it saves. The results are bit-identical.
RUN_ONCE_CPU_OPTIONS = {"xla_backend_optimization_level": 1}

# The vector memory that one fusion may use on a TPU, 16 MiB by default. With more of it the
# compiler overlaps more of the work with transfers (docs/performance.md).
TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "32768"}


# Some GPU operations, such as the atomic additions of a scatter, add in an order that varies.
DETERMINISTIC_GPU_OPTIONS = {"xla_gpu_deterministic_ops": "true"}


def set_up(deterministic_gpu: bool = False) -> None:
    """Sets compiler options and the compilation cache. Call it before JAX computes anything.

    The options change speed and memory, not results. The user's own settings take precedence.

    Args:
      deterministic_gpu: whether GPUs use only operations that always return the same bits.
    """
    _enable_compilation_cache()
    _prepend_options(
        "XLA_FLAGS", CPU_OPTIONS | (DETERMINISTIC_GPU_OPTIONS if deterministic_gpu else {})
    )
    _prepend_options("LIBTPU_INIT_ARGS", TPU_OPTIONS)


def run_once(function: Callable[..., Any], *inputs: Any, **options: Any) -> Any:
    """Compiles a function for a short compilation time, and calls it.

    Args:
      inputs: arguments of the function.
      options: arguments of `jax.jit`.
    """
    quick = RUN_ONCE_CPU_OPTIONS if jax.default_backend() == "cpu" else {}
    return jax.jit(function, compiler_options=quick, **options)(*inputs)


def _enable_compilation_cache() -> None:
    for name, value in {
        "jax_compilation_cache_dir": str(Path("~/.cache/alexnet_jax").expanduser()),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _prepend_options(variable: str, options: dict[str, str]) -> None:
    # Of two values for the same option the last one counts, so the user's come last.
    ours = " ".join(f"--{name}={value}" for name, value in options.items())
    os.environ[variable] = f"{ours} {os.environ.get(variable, '')}"


class StopRequest:
    """Context manager that turns SIGINT and SIGTERM into a request to save and stop.

    A second signal ends the process immediately.

    Python calls its signal handlers between two bytecodes, which can take minutes while XLA
    compiles. So a thread receives the signals through the wakeup socket, to which the
    interpreter's C handler writes.

    In a run of several processes, JAX's preemption service handles SIGTERM: it tells all processes
    and they agree on a step to stop at. SIGINT is forwarded as SIGTERM, and a second SIGTERM has no
    further effect.
    """

    def __init__(self) -> None:
        self._is_multi_process = jax.distributed.is_initialized()
        self._signals = [signal.SIGINT]
        if not self._is_multi_process:
            self._signals.append(signal.SIGTERM)
        self._received = threading.Event()
        self._calls = 0
        self._agreed = False

    def requested(self) -> bool:
        """Returns whether the run should save and stop.

        All processes must call it equally often. The same call returns the same answer on each.
        """
        if not self._is_multi_process:
            return self._received.is_set()
        if not self._agreed:
            self._calls += 1  # JAX expects consecutive numbers
            self._agreed = multihost_utils.reached_preemption_sync_point(self._calls)
        return self._agreed

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._previous_wakeup_fd = signal.set_wakeup_fd(self._writer.fileno())
        self._previous_handlers = [signal.signal(s, lambda *_: None) for s in self._signals]
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in zip(self._signals, self._previous_handlers, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup_fd)
        self._writer.close()  # ends the thread

    def _listen(self) -> None:
        while received := self._reader.recv(1):
            if received[0] not in self._signals:
                continue
            if self._received.is_set():
                os._exit(EXIT_KILLED_BY_CTRL_C)
            self._received.set()
            if self._is_multi_process:
                os.kill(os.getpid(), signal.SIGTERM)
            print(
                "\nstopping: training finishes this step and saves a checkpoint first; repeat the "
                "signal to exit immediately",
                file=sys.stderr,
            )
        self._reader.close()
