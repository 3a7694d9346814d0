"""Runs of several processes: how they join, agree on values and report from process 0.

Set JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID for each process. On TPU pods and
under Slurm, Open MPI and Kubernetes, JAX finds these values itself. Without them a process runs
alone.
"""

import contextlib
import os
import re
import socket
import threading
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils

from alexnet_jax.utils.errors import EXIT_USER_ERROR, UserError, exit_now, one_line

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

JOIN_TIMEOUT_S = 300
HEARTBEAT_TIMEOUT_S = 100  # JAX's default

RESTART_HINT = (
    "start the same command again on all hosts: training resumes from the newest checkpoint"
)


@contextlib.contextmanager
def joined(heartbeat_timeout_s: int = HEARTBEAT_TIMEOUT_S) -> Iterator[None]:
    """Joins the other processes of the run, if there are any. Call it before JAX computes anything.

    JAX itself handles a process that ends or stops responding: its coordination service, which
    runs in process 0, sends heartbeats, and aborts every other process (SIGABRT) with a message
    that starts with "Terminating process because the JAX distributed service detected fatal
    errors". This happens immediately if process 0 is lost, and otherwise after the timeout. On
    CPUs the collectives (Gloo) usually raise JaxRuntimeError before that.

    Args:
      heartbeat_timeout_s: seconds without a heartbeat after which a process counts as lost.

    Raises:
      UserError: the variables are inconsistent, or process 0 cannot open its port.
    """
    _join(heartbeat_timeout_s)
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        # JAX has no exception type for a lost peer, so this is a hint and not a diagnosis.
        if is_multi_process():
            error.add_note(
                "If another process of this run has ended, its own output says why. In that case "
                f"{RESTART_HINT}."
            )
        raise


def is_multi_process() -> bool:
    """Returns whether this run has several processes. Does not start JAX's backends if not."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def part() -> tuple[int, int]:
    """Returns (i, n): this process does part i of n parts of a job, counted from 1."""
    return (jax.process_index() + 1, jax.process_count()) if is_multi_process() else (1, 1)


def is_first() -> bool:
    """Returns True on process 0, which logs and writes shared files."""
    return part()[0] == 1


def say(text: str) -> None:
    """Prints a line on process 0."""
    if is_first():
        print(text, flush=True)


def any_process(flag: bool) -> bool:
    """Returns whether the flag is True on any process. All processes must call it together."""
    if not is_multi_process():
        return flag
    return bool(multihost_utils.process_allgather(np.array(flag)).any())


def wait_for_all(name: str) -> None:
    """Blocks until all processes have called this with the same name."""
    if is_multi_process():
        multihost_utils.sync_global_devices(name)


def check_same(what: str, fields: dict[str, Any]) -> None:
    """Checks that all processes have the same values. All processes must call it together.

    Raises UserError on every process if any of them differs, with the names of the fields.
    """
    if not is_multi_process():
        return
    # Collectives cannot send text, so processes compare a CRC of each value.
    crcs = np.array([zlib.crc32(repr(value).encode()) for value in fields.values()], np.uint32)
    differs_here = (multihost_utils.process_allgather(crcs) != crcs).any(axis=0)
    differs = multihost_utils.process_allgather(differs_here).any(axis=0)
    if differs.any():
        names = [
            f"{name} ({value} here)"
            for (name, value), wrong in zip(fields.items(), differs, strict=True)
            if wrong
        ]
        raise UserError(
            f"the processes of this run do not have the same {what}: {', '.join(names)}; start "
            "the same command with the same files on every host"
        )


def check_shared(folder: Path) -> None:
    """Checks that all processes see the same folder. All processes must call it together.

    Without a shared workdir each process would save its part of the checkpoints where no other
    finds it. Raises UserError on every process if one of them does not see a file of process 0.
    """
    if not is_multi_process():
        return
    random = multihost_utils.broadcast_one_to_all(np.frombuffer(os.urandom(8), np.uint8))
    # A new name each time, since network file systems remember for a while which names are absent.
    file = folder / f".seen-by-all-{random.tobytes().hex()}"
    if is_first():
        file.touch()
    wait_for_all("wrote a file")
    is_missing = not file.exists()
    is_missing_somewhere = any_process(is_missing)
    if is_first():
        file.unlink()
    if is_missing_somewhere:
        here = f"{socket.gethostname()} does not see" if is_missing else "another host does not see"
        raise UserError(
            f"the hosts of this run do not share the workdir: {here} what process 0 writes to "
            f"{folder}; choose a --workdir on a file system that all hosts share, or in a bucket "
            "(gs://BUCKET/FOLDER)"
        )


def _join(heartbeat_timeout_s: int) -> None:
    explicit = _explicit_arguments()
    address = os.environ.get(ADDRESS, "the coordinator")
    if explicit.get("process_id") == 0:
        _check_port(address)
    # If the coordinator does not answer, or a process does not come, JAX aborts with a stack trace
    # instead of raising an exception. This timer exits first.
    timer = threading.Timer(
        JOIN_TIMEOUT_S,
        exit_now,
        (
            EXIT_USER_ERROR,
            f"error: cannot join the run at {address}: not all of its processes came within "
            f"{JOIN_TIMEOUT_S} s; check that each process runs, that it can reach this address, "
            f"and that each has a different {INDEX}",
        ),
    )
    timer.daemon = True
    timer.start()
    try:
        jax.distributed.initialize(
            **explicit,
            initialization_timeout=JOIN_TIMEOUT_S + 60,
            heartbeat_timeout_seconds=heartbeat_timeout_s,
        )
    except ValueError as error:
        # JAX has no function that tells whether there is a cluster, and no type for this error.
        if explicit or "coordinator_address should be defined" not in str(error):
            raise
    except jax.errors.JaxRuntimeError as error:
        raise UserError(
            f"cannot join the run at {address}: {one_line(error)}; check that its port is free on "
            "process 0"
        ) from error
    finally:
        timer.cancel()


def _check_port(address: str) -> None:
    """Raises UserError if process 0 cannot open its port. JAX would end with SIGSEGV instead."""
    dual = socket.has_dualstack_ipv6()
    family = socket.AF_INET6 if dual else socket.AF_INET
    try:
        port = int(address.rpartition(":")[2])
        socket.create_server(("", port), family=family, dualstack_ipv6=dual).close()
    except (OSError, OverflowError) as error:  # OverflowError: a port above 65535
        raise UserError(
            f"cannot join the run at {address}: {one_line(error)}; set {ADDRESS} to a free port on "
            "all processes"
        ) from error


def _explicit_arguments() -> dict[str, Any]:
    """Returns the arguments of jax.distributed.initialize, {} if JAX has to find them itself."""
    given = {name: os.environ.get(name, "") for name in (ADDRESS, COUNT, INDEX)}
    if not (given[COUNT] or given[INDEX]):
        return {}
    try:
        count, index = int(given[COUNT]), int(given[INDEX])
    except ValueError:
        count = index = -1
    if not (re.search(r".:\d+$", given[ADDRESS]) and 0 <= index < count):
        variables = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{variables}: set the first to HOST:PORT of process 0, the second to the number of "
            "processes, and the third to the number of this process, counted from 0; or unset all"
        )
    return {
        "coordinator_address": given[ADDRESS],
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }
