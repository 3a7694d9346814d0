"""Child processes that take turns, so that each works alone while it is measured. For Linux."""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping
from itertools import count
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import NamedTuple

CORES = os.cpu_count() or 1
WARM_UP = max(8, 4 * CORES)  # batches: more than any contender holds ready
IDLE_SECONDS = 0.1
END_SECONDS = 2
TICKS = os.sysconf("SC_CLK_TCK")  # a second

Make = Callable[[], Iterator[int]]


class Turn(NamedTuple):
    """What one turn gave.

    Attributes:
      rate: images a second.
      user, kernel: microseconds that processors worked for an image, summed over them.
      peak_bytes: the most resident memory so far, summed over the processes; memory that these
        share counts in each.
    """

    rate: float
    user: float
    kernel: float
    peak_bytes: int


def take_turns(
    makers: Mapping[str, Make],
    rounds: int,
    seconds: float,
    warm_up: int = WARM_UP,
    together: int = CORES,
) -> dict[str, list[Turn]]:
    """Measures each contender in a child process of its own, for so long in each round.

    Args:
      makers: picklable functions that return endless generators, which yield how many images they
        have just delivered.
      warm_up: batches before each turn that are not counted.
      together: batches are counted in groups of so many, which workers finish at once.
    """
    context = multiprocessing.get_context("spawn")
    pipes, found = {}, {name: [] for name in makers}
    with contextlib.ExitStack() as stack:
        for name, make in makers.items():
            pipes[name], other_end = context.Pipe()
            process = context.Process(target=_serve, args=(other_end, make, warm_up, together))
            process.start()
            other_end.close()
            stack.callback(_stop, pipes[name], process)
        try:
            for pipe in pipes.values():
                pipe.recv()  # when it is ready
            for _ in range(rounds):
                for name, pipe in pipes.items():
                    pipe.send(seconds)
                    found[name].append(pipe.recv())
        except (EOFError, OSError):
            raise SystemExit("a contender has ended; its error is above") from None
    return found


def _stop(pipe: Connection, process: BaseProcess) -> None:
    pipe.close()
    process.join(END_SECONDS)  # TensorFlow may take long to end its threads
    process.terminate()


def _serve(pipe: Connection, make: Make, warm_up: int, together: int) -> None:
    """Runs one contender: a turn whenever the pipe gives seconds, until it is closed."""
    batches = make()
    next(batches)
    _wait_until_idle()
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            turn = _measure(batches, pipe.recv(), warm_up, together)
            _wait_until_idle()
            pipe.send(turn)
    batches.close()  # ends its workers


def _measure(batches: Iterator[int], seconds: float, warm_up: int, together: int) -> Turn:
    """Warms up, and takes batches in groups for at least so many seconds."""
    for _ in range(warm_up):
        next(batches)
    images, before, started = 0, _cpu_seconds(), time.perf_counter()
    for number in count(1):
        images += next(batches)
        elapsed = time.perf_counter() - started
        if elapsed >= seconds and number % together == 0:
            worked = (1e6 * (b - a) / images for a, b in zip(before, _cpu_seconds(), strict=True))
            return Turn(images / elapsed, *worked, _peak_bytes())


def _wait_until_idle() -> None:
    """Returns when this process and its workers have filled their buffers and sleep."""
    before, now = -1.0, sum(_cpu_seconds())
    while now - before > 0.2 * IDLE_SECONDS:
        time.sleep(IDLE_SECONDS)
        before, now = now, sum(_cpu_seconds())


def _cpu_seconds() -> tuple[float, ...]:
    """Returns what this process and its workers have used in user and in kernel mode."""
    stats = [text.rpartition(")")[2].split() for text in _read_proc("stat")]
    return tuple(sum(int(stat[field]) for stat in stats) / TICKS for field in (11, 12))


def _peak_bytes() -> int:
    peaks = (text.partition("VmHWM:")[2].split()[0] for text in _read_proc("status"))
    return 1024 * sum(map(int, peaks))


def _read_proc(name: str) -> list[str]:
    """Returns a file of /proc for this process and for each of its workers."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    return [Path(f"/proc/{pid}/{name}").read_text() for pid in pids]
