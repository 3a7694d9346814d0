"""Runs several processes on this machine as one run, with an equal share of its cores for each.

    python -m alexnet_jax.launch --per-gpu -- -m alexnet_jax.train --config configs/imagenet.py

Process i uses GPU i if there are GPUs. --per-gpu starts one process for each GPU, or for each in
CUDA_VISIBLE_DEVICES; --processes 2 tries without GPUs what a cluster does. Output lines of process
i > 0 start with [i]. Ctrl-C and SIGTERM stop all processes after the same step. The exit code is
that of the process that failed first, or 76 if it was killed and the others ended because they lost
it. A cluster has its own launcher: see docs/pods.md.
"""

import argparse
import itertools
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import EXIT_PEER_LOST, UserError, exits_cleanly


def start(
    command: Sequence[str],
    count: int,
    environment: Mapping[str, str] = os.environ,
    folder: Path | None = None,
) -> list[subprocess.Popen[str]]:
    """Starts a Python command `count` times, as the processes of one run, each on its own cores.

    Args:
      command: arguments of the Python interpreter.
      environment: variables, besides those that place each process in the run.
      folder: working directory.
    """
    address = f"127.0.0.1:{_free_port()}"

    def start_one(index: int) -> subprocess.Popen[str]:
        place = {
            distributed.ADDRESS: address,
            distributed.COUNT: str(count),
            distributed.INDEX: str(index),
            "JAX_LOCAL_DEVICE_IDS": str(index),
        }
        return subprocess.Popen(
            [sys.executable, *command],
            env={**environment, **place},
            cwd=folder,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
        )

    allowed = os.sched_getaffinity(0)
    try:
        processes = []
        for index, cores in enumerate(shares(allowed, count)):
            os.sched_setaffinity(0, cores)  # a process inherits the cores of the one that starts it
            processes.append(start_one(index))
        return processes
    finally:
        os.sched_setaffinity(0, allowed)


def shares(cores: Collection[int], count: int) -> list[list[int]]:
    """Divides cores among processes. If there are fewer cores than processes, some share one.

    Neighboring shares are on the same socket, and the hyperthreads of a core in the same share. The
    numbers of GPUs follow their PCI addresses, which most servers assign socket by socket too.
    """

    def place(core: int) -> tuple[int, ...]:
        topology = Path(f"/sys/devices/system/cpu/cpu{core}/topology")
        names = ("physical_package_id", "core_id")
        # A virtual machine need not tell.
        known = [int((topology / n).read_text()) if (topology / n).exists() else 0 for n in names]
        return (*known, core)

    ordered = sorted(cores, key=place)
    starts = [i * len(ordered) // count for i in range(count + 1)]
    return [ordered[a : max(a + 1, b)] for a, b in itertools.pairwise(starts)]


def count_gpus() -> int:
    """Returns the number of GPUs that CUDA would use. Does not start CUDA in this process.

    Raises UserError if there are none.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:  # as CUDA reads it: up to the first number that is none, such as -1
        gpus = list(itertools.takewhile(lambda gpu: gpu and gpu != "-1", visible.split(",")))
        where = f"in CUDA_VISIBLE_DEVICES={visible}"
    else:
        try:
            listed = subprocess.run(["nvidia-smi", "-L"], stdout=subprocess.PIPE, text=True).stdout
        except OSError:
            listed = ""
        gpus = [line for line in listed.splitlines() if line.startswith("GPU ")]
        where = "by nvidia-smi -L"
    if not gpus:
        raise UserError(
            f"--per-gpu finds no GPU {where}; name them in CUDA_VISIBLE_DEVICES=0,1,…, or say how "
            "many processes to start by --processes"
        )
    return len(gpus)


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
    how_many = parser.add_mutually_exclusive_group(required=True)
    how_many.add_argument("--processes", type=int, metavar="N")
    how_many.add_argument("--per-gpu", action="store_true", help="one process for each GPU")
    parser.add_argument("command", nargs="+", help="-- COMMAND …, e.g. -- -m alexnet_jax.train …")
    args = parser.parse_args(argv)
    count = count_gpus() if args.per_gpu else args.processes
    if count < 1:
        raise UserError(f"--processes={count} must be at least 1")
    processes = start(args.command, count)
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
