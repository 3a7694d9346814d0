"""Ctrl-C and SIGTERM while training: the first asks the run to save and stop, a second ends it."""

import os
import signal
import socket
import sys
import threading

from alexnet_jax.errors import EXIT_KILLED_BY_CTRL_C

SIGNALS = (signal.SIGINT, signal.SIGTERM)


class StopRequest:
    """A context in which SIGINT and SIGTERM set `requested`, and a second one leaves at once.

    Python runs its signal handlers between two bytecodes only, which may be minutes away while
    XLA compiles. So a thread hears of signals by the wakeup socket, which the interpreter's own C
    handler writes to.
    """

    def __init__(self) -> None:
        self._requested = threading.Event()

    @property
    def requested(self) -> bool:
        """Whether the run should save and stop."""
        return self._requested.is_set()

    def __enter__(self) -> "StopRequest":
        self._reader, self._writer = socket.socketpair()
        self._writer.setblocking(False)
        self._wakeup_before = signal.set_wakeup_fd(self._writer.fileno())
        self._handlers_before = [signal.signal(s, lambda *_: None) for s in SIGNALS]
        threading.Thread(target=self._listen, daemon=True).start()
        return self

    def __exit__(self, *_) -> None:
        for number, handler in zip(SIGNALS, self._handlers_before, strict=True):
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup_before)
        self._writer.close()

    def _listen(self) -> None:
        while received := self._reader.recv(1):
            if received[0] not in SIGNALS:
                continue
            if self.requested:
                os._exit(EXIT_KILLED_BY_CTRL_C)
            self._requested.set()
            print(
                "\nstopping: the step is finished and saved first; once more leaves at once",
                file=sys.stderr,
            )
        self._reader.close()
