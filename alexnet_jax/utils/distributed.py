"""The processes of one run, on one or more hosts: how they join, agree, and learn of a loss.

A process finds the others by JAX_COORDINATOR_ADDRESS, JAX_NUM_PROCESSES and JAX_PROCESS_ID, or as
JAX does on TPU pods, under Slurm, Open MPI and Kubernetes; without any of these it runs alone.
"""

import contextlib
import ctypes
import functools
import os
import sys
import threading
import zlib
from collections.abc import Iterator
from typing import Any, NoReturn
from unittest import mock

import jax
import numpy as np
from jax.experimental import multihost_utils
from jaxlib import _jax

from alexnet_jax.utils.errors import EXIT_PEER_LOST, UserError, one_line

ADDRESS, COUNT, INDEX = "JAX_COORDINATOR_ADDRESS", "JAX_NUM_PROCESSES", "JAX_PROCESS_ID"

# A process that is killed or hangs is missed after so many seconds, the coordinator at once.
HEARTBEAT_S = 20
JOIN_S = 300
PEER_LOST = (
    "error: another process of this run has ended or does not answer (its own output may say why); "
    "start the same command again on all hosts: it goes on from the newest checkpoint"
)

_speaking = threading.Lock()


@contextlib.contextmanager
def joined() -> Iterator[None]:
    """Joins the run's other processes, if there are any, for as long as the context lasts.

    If one of them is lost, this process prints one sentence and exits with EXIT_PEER_LOST, within
    HEARTBEAT_S and a few seconds.

    Raises UserError if they cannot be joined.
    """
    _join()
    try:
        yield
    except Exception as error:
        # XLA's collectives on CPU notice at once that a peer is gone, but not always.
        if jax.distributed.is_initialized() and "Gloo" in str(error):
            _end_as_peer_lost()
        raise


def is_multi_process() -> bool:
    """Whether this process has joined others; asked without starting JAX's backends."""
    return jax.distributed.is_initialized() and jax.process_count() > 1


def part() -> tuple[int, int]:
    """Returns which of how many parts of a job this process does, counted from 1."""
    return (jax.process_index() + 1, jax.process_count()) if is_multi_process() else (1, 1)


def is_first() -> bool:
    """Whether this is the process that prints, and writes what there is but once."""
    return part()[0] == 1


def say(text: str) -> None:
    """Prints a line, once for all processes."""
    if is_first():
        print(text, flush=True)


def any_process(flag: bool) -> bool:
    """Returns whether the flag is set on any process; all call it together."""
    return (
        bool(multihost_utils.process_allgather(np.array(flag)).any())
        if is_multi_process()
        else flag
    )


def wait_for_all(name: str) -> None:
    """Returns once all processes have called it with that name."""
    if is_multi_process():
        multihost_utils.sync_global_devices(name)


def check_same(what: str, fields: dict[str, Any]) -> None:
    """Raises UserError on every process, with the fields in question, if two have other values."""
    if not is_multi_process():
        return
    digests = np.array([_digest(value) for value in fields.values()], np.uint32)
    differs = (multihost_utils.process_allgather(digests) != digests).any(axis=0)
    others = multihost_utils.process_allgather(differs).any(axis=0)
    wrong = [
        f"{name} ({fields[name]} here)"
        for name, is_wrong in zip(fields, others, strict=True)
        if is_wrong
    ]
    if wrong:
        raise UserError(
            f"the processes of this run do not have the same {what}: {', '.join(wrong)}; start "
            "the same command with the same files on every host"
        )


def _digest(value: Any) -> int:
    return zlib.crc32(repr(value).encode())


def _join() -> None:
    given = {name: os.environ.get(name) for name in (ADDRESS, COUNT, INDEX)}
    explicit = {}
    if given[COUNT] or given[INDEX]:
        explicit = _explicit(given)
    _end_by_our_sentence()
    client = functools.partial(
        _jax.get_distributed_runtime_client, missed_heartbeat_callback=_end_as_peer_lost
    )
    try:
        with mock.patch.object(_jax, "get_distributed_runtime_client", client):
            jax.distributed.initialize(
                **explicit,
                initialization_timeout=JOIN_S,
                heartbeat_timeout_seconds=HEARTBEAT_S,
            )
    except ValueError as error:
        if explicit or "coordinator_address should be defined" not in str(error):
            raise
    except RuntimeError as error:
        # What a callback of ours makes of a failure to connect: see _end_by_our_sentence.
        late = f"not all of its processes came within {JOIN_S} s"
        told = late if "bad_cast" in str(error) else one_line(error)
        raise UserError(
            f"cannot join the run at {given[ADDRESS] or 'the coordinator'}: {told}; see that each "
            f"process runs and has an {INDEX} of its own, and that the port is free"
        ) from error


def _explicit(given: dict[str, str | None]) -> dict[str, Any]:
    try:
        count, index = int(given[COUNT] or ""), int(given[INDEX] or "")
    except ValueError:
        count = index = -1
    if not (given[ADDRESS] and 0 <= index < count):
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        raise UserError(
            f"{told}: set the first to HOST:PORT of process 0, the second to the number of "
            "processes, and the third to this one's, counted from 0; or none of them"
        )
    return {
        "coordinator_address": given[ADDRESS],
        "num_processes": count,
        "process_id": index,
        "cluster_detection_method": "deactivate",
    }


def _end_as_peer_lost(*_: Any) -> NoReturn:
    """Several threads may find out at the same time; one of them speaks, and ends all."""
    _speaking.acquire()
    sys.stdout.flush()
    os.write(sys.stderr.fileno(), f"{PEER_LOST}\n".encode())
    os._exit(EXIT_PEER_LOST)


_on_terminate = ctypes.CFUNCTYPE(None)(_end_as_peer_lost)


def _end_by_our_sentence() -> None:
    """JAX ends a process whose peer is lost by abort(), with a stack of its own functions.

    jaxlib takes a Python callback instead, but cannot convert the callback's argument (0.10.2:
    std::bad_cast), which ends in std::terminate; so that is set to the same function.
    """
    with contextlib.suppress(OSError, AttributeError):  # without libstdc++ it ends all the same
        ctypes.CDLL("libstdc++.so.6")._ZSt13set_terminatePFvvE(_on_terminate)
