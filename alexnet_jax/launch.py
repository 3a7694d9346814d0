"""Several processes of this machine as the hosts of one run, to try what a cluster does.

    python -m alexnet_jax.launch --processes 2 -- \\
        -m alexnet_jax.train --config configs/quickstart.py

Process i takes GPU i where there are GPUs. Lines of all but the first process begin with [i].
Ctrl-C and SIGTERM reach the processes, which save and stop together. On a cluster its own launcher
takes this one's place: see docs/pods.md.
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
from typing import IO

from alexnet_jax.utils import distributed as hosts
from alexnet_jax.utils.errors import UserError, exits_cleanly


def start(
    command: Sequence[str],
    count: int,
    environment: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts a Python command so many times, as the processes of one run.

    Args:
      environment: beside what tells each its place.
      folder: where they start, by default here.
    """
    address = f"127.0.0.1:{_free_port()}"
    return [
        subprocess.Popen(
            [sys.executable, *command],
            env={
                **environment,
                hosts.ADDRESS: address,
                hosts.COUNT: str(count),
                hosts.INDEX: str(index),
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


def _pass_on(lines: IO[str], prefix: str) -> None:
    for line in lines:
        sys.stdout.write(prefix + line)
        sys.stdout.flush()


@exits_cleanly
def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the first exit code that is not 0, in the processes' order."""
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
    signal.signal(signal.SIGINT, lambda *_: None)  # of a terminal they all get it themselves
    signal.signal(signal.SIGTERM, lambda *_: processes[0].terminate())
    threads = [
        threading.Thread(target=_pass_on, args=(process.stdout, f"[{index}] " if index else ""))
        for index, process in enumerate(processes)
    ]
    for thread in threads:
        thread.start()
    codes = [process.wait() for process in processes]
    for thread in threads:
        thread.join()
    return next((128 - code if code < 0 else code for code in codes if code), 0)


if __name__ == "__main__":
    main()
