"""Runs several processes on this machine as the hosts of one run, to try what a cluster does.

    python -m alexnet_jax.launch --processes 2 -- \\
        -m alexnet_jax.train --config configs/quickstart.py

Process i uses GPU i if there are GPUs. Output lines of process i > 0 start with [i]. Ctrl-C and
SIGTERM stop all processes after the same step. The exit code is that of the process that failed
first, or 76 if it was killed and the others ended because they lost it. A cluster has its own
launcher: see docs/pods.md.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path

from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import EXIT_PEER_LOST, UserError, exits_cleanly


def start(
    command: Sequence[str],
    count: int,
    environment: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts a Python command `count` times, as the processes of one run.

    Args:
      command: arguments of the Python interpreter.
      environment: variables, besides those that place each process in the run.
      folder: working directory.
    """
    address = f"127.0.0.1:{_free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={
                **environment,
                distributed.ADDRESS: address,
                distributed.COUNT: str(count),
                distributed.INDEX: str(index),
                "JAX_LOCAL_DEVICE_IDS": str(index),
            },
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )
        for index in range(count)
    ]


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _print_output(process: subprocess.Popen[str], prefix: str) -> None:
    for line in process.stdout or ():
        sys.stdout.write(prefix + line)
        sys.stdout.flush()


def _exit_code(failures: list[tuple[int, int]]) -> int:
    """Returns the exit code for the (index, exit code) of failed processes, the first one first.

    A process whose peer is lost is ended by JAX (see `distributed.joined`), so only the first
    failure has a cause of its own. Prints which one that was if others failed after it.
    """
    if not failures:
        return 0
    (index, code), *later = failures
    if code < 0 and later:
        name = signal.Signals(-code).name
        print(
            f"error: process {index} was killed by {name}, and the others ended because they lost "
            f"it; {distributed.RESTART_HINT}",
            file=sys.stderr,
        )
        return EXIT_PEER_LOST
    if any(other != code for _, other in later):
        print(
            f"error: process {index} failed first, with exit code {code}; its output says why",
            file=sys.stderr,
        )
    return 128 - code if code < 0 else code


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m alexnet_jax.launch",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--processes", type=int, required=True, metavar="N")
    parser.add_argument("command", nargs="+", help="-- COMMAND …, e.g. -- -m alexnet_jax.train …")
    args = parser.parse_args(argv)
    if args.processes < 1:
        raise UserError(f"--processes={args.processes} must be at least 1")
    processes = start(args.command, args.processes)
    signal.signal(signal.SIGINT, lambda *_: None)  # a terminal sends it to all processes itself
    signal.signal(signal.SIGTERM, lambda *_: processes[0].terminate())

    failures: list[tuple[int, int]] = []  # in the order in which the processes ended

    def wait(index: int) -> None:
        code = processes[index].wait()
        if code:
            failures.append((index, code))

    threads = []
    for index, process in enumerate(processes):
        prefix = f"[{index}] " if index else ""
        threads.append(threading.Thread(target=_print_output, args=(process, prefix)))
        threads.append(threading.Thread(target=wait, args=(index,)))
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return _exit_code(failures)


if __name__ == "__main__":
    main()
