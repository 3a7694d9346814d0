"""What all benchmarks share: options, result rows, and contenders that take turns.

Importing this module makes this checkout's `alexnet_jax` importable, and selects JAX's CPU backend
unless JAX_PLATFORMS is set. Contenders run on Linux only, because they read /proc.
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Generator, Mapping, Sequence
from itertools import count
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ.setdefault("JAX_PLATFORMS", "cpu")

CORES = os.cpu_count() or 1
TICKS_PER_SECOND = os.sysconf("SC_CLK_TCK")
EXIT_SECONDS = 2
IDLE_SECONDS = 0.1

Row = dict[str, Any]
Make = Callable[[], Generator[int]]  # picklable


def parser(doc: str, quick: str) -> argparse.ArgumentParser:
    """Returns a parser with the options of all benchmarks.

    Args:
      doc: docstring of the benchmark.
      quick: what --quick does.
    """
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(description=doc, formatter_class=raw)
    made.add_argument("--json", type=Path, metavar="FILE", help="write the rows to FILE")
    made.add_argument("--quick", action="store_true", help=f"check that it runs: {quick}")
    return made


def row(what: str, values: Sequence[float], unit: str, batch: int = 1, dtype: str = "-") -> Row:
    """Returns the result of one or more measurements of the same quantity."""
    spread = {"median": median(values), "min": min(values), "max": max(values)}
    return {"what": what, "batch": batch, "dtype": dtype, "unit": unit, **spread}


def ratio(what: str, values: Sequence[float], others: Sequence[float], **fields: Any) -> Row:
    """Returns the ratio of two measurements, taken round by round so that drift cancels."""
    return row(what, [a / b for a, b in zip(values, others, strict=True)], "times", **fields)


def show(rows: Sequence[Row]) -> None:
    """Prints one line per row."""
    for of in rows:
        batch = f"batch {of['batch']}" if of["batch"] > 1 else ""
        spread = f"({number(of['min'])} to {number(of['max'])})" if of["min"] < of["max"] else ""
        print(f"{of['what']:52} {batch:9} {number(of['median']):>9} {of['unit']:12} {spread}")


def number(value: float) -> str:
    """Returns a number with at least four significant digits."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


def write(rows: Sequence[Row], path: Path | None) -> None:
    """Writes the rows as JSON if a path is given."""
    if path:
        path.write_text(json.dumps(rows, indent=2) + "\n")


class Turn(NamedTuple):
    """One turn of one contender.

    Attributes:
      rate: items per second; usually images.
      cpu: microseconds of processor time per item, user and kernel mode, summed over all cores.
      peak_bytes: peak resident memory so far, summed over the contender's processes. Memory that
        they share is counted in each.
    """

    rate: float
    cpu: float
    peak_bytes: int


def take_turns(
    makers: Mapping[str, Make], rounds: int, seconds: float, warm_up: int = 1, group: int = 1
) -> dict[str, list[Turn]]:
    """Measures contenders alternately; only one of them works at any time.

    Each runs in its own process, which is started once and keeps its state between turns.

    Args:
      makers: functions that return endless generators. A generator yields the number of items
        that it just finished.
      rounds: number of turns of each contender.
      seconds: minimum duration of a turn.
      warm_up: number of iterations at the start of each turn that are not counted.
      group: a turn ends after a multiple of this many iterations. With seconds=0 a turn is
        exactly one group.
    """
    context = multiprocessing.get_context("spawn")
    pipes: dict[str, Connection] = {}
    turns: dict[str, list[Turn]] = {name: [] for name in makers}
    with contextlib.ExitStack() as stack:
        for name, make in makers.items():
            pipes[name], child_end = context.Pipe()
            process = context.Process(target=_serve, args=(child_end, make, warm_up, group))
            process.start()
            child_end.close()
            stack.callback(process.terminate)
            stack.callback(process.join, EXIT_SECONDS)  # TensorFlow can be slow to exit
            stack.callback(pipes[name].close)
        try:
            for pipe in pipes.values():
                pipe.send("start")  # one by one: on a GPU they choose kernels by their speed
                pipe.recv()  # sent when the contender is ready
            for _ in range(rounds):
                for name, pipe in pipes.items():
                    pipe.send(seconds)
                    turns[name].append(pipe.recv())
        except (EOFError, OSError):
            raise SystemExit("a contender failed; its error is printed above") from None
    return turns


def _serve(pipe: Connection, make: Make, warm_up: int, group: int) -> None:
    """Runs one contender: one turn for each message, until the pipe is closed."""
    pipe.recv()
    batches = make()
    next(batches)  # imports, compiles and starts workers
    _wait_until_idle()
    pipe.send("ready")
    with contextlib.suppress(EOFError):
        while True:
            turn = _measure(batches, pipe.recv(), warm_up, group)
            _wait_until_idle()
            pipe.send(turn)
    batches.close()  # stops its workers


def _measure(batches: Generator[int], seconds: float, warm_up: int, group: int) -> Turn:
    for _ in range(warm_up):
        next(batches)
    items, cpu, started = 0, _cpu_seconds(), time.perf_counter()
    for iteration in count(1):
        items += next(batches)
        elapsed = time.perf_counter() - started
        if elapsed >= seconds and iteration % group == 0:
            return Turn(items / elapsed, 1e6 * (_cpu_seconds() - cpu) / items, _peak_bytes())


def _wait_until_idle() -> None:
    """Returns when this process and its workers have filled their buffers and sleep."""
    before, now = -1.0, _cpu_seconds()
    while now - before > 0.2 * IDLE_SECONDS:
        time.sleep(IDLE_SECONDS)
        before, now = now, _cpu_seconds()


def _cpu_seconds() -> float:
    """Returns the processor time, user and kernel, of this process and its workers."""
    stats = [text.rpartition(")")[2].split() for text in _proc("stat")]
    return sum(int(stat[11]) + int(stat[12]) for stat in stats) / TICKS_PER_SECOND


def _peak_bytes() -> int:
    return 1024 * sum(int(text.partition("VmHWM:")[2].split()[0]) for text in _proc("status"))


def _proc(name: str) -> list[str]:
    """Returns the content of /proc/PID/name for this process and each of its workers."""
    pids = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    return [Path(f"/proc/{pid}/{name}").read_text() for pid in pids]
