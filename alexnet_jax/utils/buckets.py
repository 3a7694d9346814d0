"""Workdirs in buckets: local copies that are kept the same as gs://bucket/folder.

Orbax, TensorBoard and Matplotlib write files, and have no common way to write to a bucket. So a
run works in a local folder, and this module copies to the bucket what changes there, in the
background and through TensorStore. Objects have the names of files. Two more kinds exist:

    .lock                                of the run that writes here now
    checkpoints/<step>/.begun            a process has begun to copy this checkpoint
    checkpoints/<step>/.part_<i>_of_<n>  process i has copied all that it saved of it

A checkpoint that was begun counts when all its parts are there. Without a barrier between
processes, a run that is killed at any moment leaves the latest complete checkpoint in the bucket. A
checkpoint without these objects was copied by another program, and counts too.
"""

import atexit
import contextlib
import hashlib
import re
import shutil
import socket
import tempfile
import threading
import time
import uuid
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
import tensorstore as ts
from jax.experimental import multihost_utils

from alexnet_jax.utils import distributed
from alexnet_jax.utils.errors import EXIT_USER_ERROR, UserError, exit_now, one_line
from alexnet_jax.utils.files import checkpoint_steps

COPY_EVERY_S = 10.0
LOCK_EXPIRES_S = 40.0  # its holder renews it four times as often
REQUESTS_IN_FLIGHT = 16

PART = re.compile(r"checkpoints/(\d+)/\.part_\d+_of_(\d+)")
BEGUN = re.compile(r"checkpoints/(\d+)/\.begun")

_downloads: list[Path] = []


def is_url(path: str | Path) -> bool:
    """Returns whether `path` is a URL such as gs://bucket/folder."""
    return "://" in str(path)


def open_bucket(url: str) -> ts.KvStore:
    """Opens the objects below a URL."""
    with _explain_errors(url):
        return ts.KvStore.open(f"{url.rstrip('/')}/").result()


def readable(workdir: str | Path) -> Path:
    """Returns a workdir as a local path. One in a bucket is downloaded until the process ends.

    Use it as the type of a command-line argument.

    Raises:
      UserError: the bucket cannot be read, or holds nothing there.
    """
    if not is_url(workdir):
        return Path(workdir).expanduser()
    folder = Path(tempfile.mkdtemp(prefix="alexnet_jax-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _downloads.append(folder)
    with _explain_errors(str(workdir)):
        found = _download(open_bucket(str(workdir)), folder)
    if not found:
        raise UserError(f"{workdir} is empty; name a workdir of train.py")
    return folder


def local(path: str) -> Path:
    """Returns a path to write to. Raises UserError if it is a URL. A type of arguments too."""
    if is_url(path):
        raise UserError(f"this command cannot write to {path}; name a local path")
    return Path(path)


def folder_for_results(workdir: Path) -> Path:
    """Returns where a command writes by default: the workdir, or the current folder if the workdir
    was downloaded from a bucket.
    """
    return Path() if workdir in _downloads else workdir


@contextlib.contextmanager
def local_copy(url: str) -> Iterator[Path]:
    """Yields a local folder with the content of a workdir in a bucket, and copies changes back.

    Locks the workdir in the bucket. All processes of a run must call it together; each has a copy
    of its own.

    Raises:
      UserError: another run holds the lock, the processes see different buckets, or the bucket
        cannot be written. The local copy then remains and is named.
    """
    objects = open_bucket(url)
    index, count = distributed.part()
    digest = hashlib.sha256(url.encode()).hexdigest()[:12]
    folder = Path(tempfile.gettempdir()) / f"alexnet_jax-{digest}-{index}"
    with _explain_errors(url):
        lock = _Lock(objects, url) if index == 1 else None
    try:
        with _explain_errors(url):
            _check_same_lock(objects, url, lock)
            if lock:
                # What a killed run left of a checkpoint must not mix with a new one of this step.
                _delete_other_steps(objects, keep=_complete_steps(_list(objects)))
            distributed.wait_for_all("prepared the bucket")
            shutil.rmtree(folder, ignore_errors=True)  # left by a run that was killed
            folder.mkdir(parents=True)
            _download(objects, folder)
        uploader = _Uploader(objects, folder, f"{index - 1}_of_{count}", deletes=index == 1)
        thread = threading.Thread(target=uploader.run, daemon=True)
        thread.start()
        try:
            yield folder
        finally:
            uploader.stop.set()
            thread.join()
            kept = folder.with_name(f"{folder.name}-{uuid.uuid4().hex[:8]}")
            with _explain_errors(url, f"; the newest files are in {kept}, copy them there"):
                try:
                    uploader.copy()
                except ValueError:
                    folder.rename(kept)  # because the next start of this run empties `folder`
                    raise
            shutil.rmtree(folder)
    finally:
        if lock:
            lock.release()


@contextlib.contextmanager
def _explain_errors(url: str, more: str = "") -> Iterator[None]:
    try:
        yield
    except ValueError as error:  # TensorStore has no other type for what a server refuses
        raise UserError(
            f"cannot use {url}: {one_line(error)[:200]}{more}; check the name and the credentials, "
            "then run the same command again"
        ) from error


class _Lock:
    """The lock of a workdir in a bucket, an object that its holder rewrites again and again.

    A holder that was killed cannot remove it. So whoever finds a lock watches whether it changes,
    which needs no clocks that agree. Every write names the generation that it replaces, so that of
    two processes only one can take a lock.
    """

    def __init__(self, objects: ts.KvStore, url: str):
        self._objects = objects
        self._url = url
        self.token = f"{socket.gethostname()} {uuid.uuid4().hex}"
        found = objects.read(".lock").result()
        if found.state == "value":
            distributed.say(
                f"{url} has the lock of another run; waiting {LOCK_EXPIRES_S:.0f} s to see whether "
                "it still runs"
            )
            time.sleep(LOCK_EXPIRES_S)
            again = objects.read(".lock").result()
            if again.state == "value" and again.stamp.generation != found.stamp.generation:
                host = found.value.decode().partition(" ")[0]
                raise UserError(
                    f"another process is training in {url}, on {host}; wait for it or choose "
                    "another --workdir"
                )
            found = again
        self._generation = found.stamp.generation
        if not self._renew():
            raise UserError(f"another process has just started in {url}; choose another --workdir")
        self._released = threading.Event()
        # A thread of its own: copying a checkpoint may take longer than the lock lasts.
        self._thread = threading.Thread(target=self._keep, daemon=True)
        self._thread.start()

    def _keep(self) -> None:
        while not self._released.wait(LOCK_EXPIRES_S / 4):
            # A server that does not answer now may answer later.
            with contextlib.suppress(ValueError):
                if not self._renew():
                    exit_now(
                        EXIT_USER_ERROR,
                        f"error: another run has taken over {self._url}; this one ended, and its "
                        f"newest files are below {tempfile.gettempdir()}",
                    )

    def _renew(self) -> bool:
        """Rewrites the lock. Returns False if another run has it."""
        stamp = self._objects.write(".lock", self.token, if_equal=self._generation).result()
        if not stamp.generation:  # the condition was false
            # If the answer to an earlier write was lost, the lock is ours all the same.
            found = self._objects.read(".lock").result()
            if found.value != self.token.encode():
                return False
            stamp = found.stamp
        self._generation = stamp.generation
        return True

    def release(self) -> None:
        self._released.set()
        self._thread.join()
        with contextlib.suppress(ValueError):  # a server that does not answer: it will expire
            self._objects.write(".lock", None, if_equal=self._generation).result()


class _Uploader:
    """Copies what changes in a folder to a bucket.

    Args:
      part: of this process, such as "0_of_2".
      deletes: whether this process also deletes checkpoints that the run no longer keeps.
    """

    def __init__(self, objects: ts.KvStore, folder: Path, part: str, deletes: bool):
        self._objects = objects
        self._folder = folder
        self._part = part
        self._deletes = deletes
        self._copied = self._changes()  # has just been downloaded
        self._marked = checkpoint_steps(folder)
        self.stop = threading.Event()

    def run(self) -> None:
        """Copies again and again until `stop` is set."""
        while not self.stop.wait(COPY_EVERY_S):
            try:
                self.copy()
            except ValueError as error:  # a server that does not answer now may answer later
                distributed.say(f"cannot write to the bucket, will retry: {one_line(error)[:200]}")

    def copy(self) -> None:
        """Copies all files that changed since the last call."""
        changes = {n: c for n, c in self._changes().items() if self._copied.get(n) != c}
        for step in {_step(name) for name in changes} - {None, *self._marked}:
            self._objects.write(f"checkpoints/{step}/.begun", b"").result()
        # Files of checkpoints last: the metrics in the bucket must not be older than they are.
        for names in _batches(sorted(changes, key=lambda n: (n.startswith("checkpoints/"), n))):
            writes = {}
            for name in names:
                # The run may delete a checkpoint meanwhile.
                with contextlib.suppress(FileNotFoundError):
                    writes[name] = self._objects.write(name, (self._folder / name).read_bytes())
            for name, write in writes.items():
                write.result()
                self._copied[name] = changes[name]
        steps, now = checkpoint_steps(self._folder), self._changes()
        for step in steps - self._marked:
            prefix = f"checkpoints/{step}/"
            files = {n: c for n, c in now.items() if n.startswith(prefix)}
            if files and files.items() <= self._copied.items():
                self._objects.write(f"{prefix}.part_{self._part}", b"").result()
                self._marked.add(step)
        if (
            self._deletes
            and self._marked - steps
            and max(steps, default=-1) in _complete_steps(_list(self._objects))
        ):
            _delete_other_steps(self._objects, keep=steps)
            self._marked &= steps

    def _changes(self) -> dict[str, tuple[int, int]]:
        """Returns modification time and size of each file that belongs into the bucket."""
        found = {}
        for path in self._folder.rglob("*"):
            name = path.relative_to(self._folder).as_posix()
            # Orbax renames the folder of a checkpoint when it is complete.
            unfinished = name.startswith("checkpoints/") and not name.split("/")[1].isdigit()
            # Hidden files directly in the workdir are local: a lock, and files being written.
            if unfinished or name.startswith("."):
                continue
            with contextlib.suppress(FileNotFoundError):
                if path.is_file():
                    found[name] = (path.stat().st_mtime_ns, path.stat().st_size)
        return found


def _check_same_lock(objects: ts.KvStore, url: str, lock: _Lock | None) -> None:
    """Raises UserError on all processes if one of them does not see the lock of process 0."""
    if not distributed.is_multi_process():
        return
    digest = np.zeros(32, np.uint8)
    if lock:
        digest = np.frombuffer(hashlib.sha256(lock.token.encode()).digest(), np.uint8)
    expected = multihost_utils.broadcast_one_to_all(digest).tobytes()
    seen = hashlib.sha256(objects.read(".lock").result().value).digest()
    if distributed.any_process(seen != expected):
        raise UserError(
            f"the processes of this run do not see the same {url}; give all of them the same "
            "--workdir and access to the bucket"
        )


def _download(objects: ts.KvStore, folder: Path) -> int:
    """Downloads all objects except unfinished checkpoints. Returns their number."""
    names = _list(objects)
    steps = _complete_steps(names)
    ours = {n for n in names if PART.fullmatch(n) or BEGUN.fullmatch(n)} | {".lock"}
    wanted = [n for n in names if _step(n) in (None, *steps) and n not in ours]
    for batch in _batches(wanted):
        reads = [(name, objects.read(name)) for name in batch]
        for name, read in reads:
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(read.result().value)
    return len(wanted)


def _list(objects: ts.KvStore) -> list[str]:
    return [key.decode() for key in objects.list().result()]


def _step(name: str) -> int | None:
    """Returns the step of the checkpoint to which an object belongs."""
    found = re.match(r"checkpoints/(\d+)/", name)
    return int(found[1]) if found else None


def _complete_steps(names: Iterable[str]) -> set[int]:
    names = list(names)
    parts: dict[tuple[int, int], int] = defaultdict(int)
    for name in names:
        if found := PART.fullmatch(name):
            parts[int(found[1]), int(found[2])] += 1
    begun = {int(found[1]) for found in map(BEGUN.fullmatch, names) if found}
    foreign = {step for step in map(_step, names) if step is not None} - begun
    return foreign | {step for (step, count), found in parts.items() if found == count}


def _delete_other_steps(objects: ts.KvStore, keep: set[int]) -> None:
    for step in {_step(name) for name in _list(objects)} - {None, *keep}:
        # In this order, so that a checkpoint that was deleted in part does not count.
        prefix = f"checkpoints/{step}/"
        objects.write(f"{prefix}.begun", b"").result()
        for first, end in ((".part", ".paru"), ("/", "\x7f")):
            objects.delete_range(ts.KvStore.KeyRange(prefix + first, prefix + end)).result()
        objects.write(f"{prefix}.begun", None).result()


def _batches(names: list[str]) -> Iterator[list[str]]:
    for start in range(0, len(names), REQUESTS_IN_FLIGHT):
        yield names[start : start + REQUESTS_IN_FLIGHT]
