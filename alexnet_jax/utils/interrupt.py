"""Ctrl-C and SIGTERM while training: the first asks the run to save and stop, a second ends it."""

import os
import signal
import socket
import sys
import threading

import jax
from jax.experimental import multihost_utils

from alexnet_jax.utils.errors import EXIT_KILLED_BY_CTRL_C


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
