"""Runs the real command line with a small network on the real digits."""

import os
import signal
import socket
import subprocess
import sys
from pathlib import Path

import jax
import orbax.checkpoint as ocp

ROOT = Path(__file__).parent.parent
SMALL = (
    "--config.model.variant=bn",
    "--config.model.width=0.1",
    "--config.batch_size=200",
    "--config.num_epochs=2",
    "--config.log_every_steps=1",
)  # 20 steps per epoch
FEW = (
    "--config.train_split=train[:480]",
    "--config.eval_split=test[:480]",
    "--config.batch_size=24",
)  # 20 steps an epoch too, which compile in half the time and run in a quarter of it
# A checkpoint every 7 steps, and a schedule whose state has to be restored.
OFTEN = (
    *FEW,
    "--config.checkpoint.every_steps=7",
    "--config.schedule.kind=plateau",
    "--config.schedule.patience=1",
    "--config.parallel=jit",
)


def flags_of_devices(count):
    """Returns XLA_FLAGS for `count` CPU devices instead of eight."""
    return f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"


def arguments(data_dir, workdir, *more):
    return (
        *(sys.executable, "train.py", "--config", "configs/quickstart.py"),
        *(f"--config.data_dir={data_dir}", f"--workdir={workdir}", *SMALL, *more),
    )


def run(*argv, **options):
    """Runs a command in the project's folder and returns its exit code and output."""
    return subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=300, **options)


# Modules of the extra `prepare` in pyproject.toml.
OF_EXTRA_PREPARE = [
    *("tensorflow", "tensorflow_datasets", "importlib_resources", "requests", "mlxtend"),
]
WITHOUT = """
import importlib, shlex, sys
for name in {modules}:
    sys.modules[name] = None  # importing it raises ModuleNotFoundError
for line in sys.argv[1:]:
    command, *words = shlex.split(line)
    try:
        importlib.import_module("alexnet_jax." + command).main(words)
    except SystemExit as end:
        print("exit code", end.code or 0)
"""


def run_without_extra_prepare(*lines):
    """Runs commands such as "predict WORKDIR FILE" in one process that cannot import TensorFlow."""
    return run(sys.executable, "-c", WITHOUT.format(modules=OF_EXTRA_PREPARE), *lines)


def run_with_file_limit(blocks, *argv):
    """Runs a command that cannot write files of more than `blocks` blocks of 1,024 bytes.

    Its coverage is not measured, since that writes files too.
    """
    words = ("env", "-u", "COVERAGE_PROCESS_CONFIG", "bash", "-c")
    return run(*words, f'ulimit -f {blocks} && exec "$@"', "bash", *argv)


def train(data_dir, workdir, *more, **options):
    return run(*arguments(data_dir, workdir, *more), **options)


def started(data_dir, workdir, *more):
    """Starts training and returns the process. Its `lines` are its output.

    They pass through a socket that holds about five lines, so that the run cannot be further ahead
    of the reader.
    """
    ours, theirs = socket.socketpair()
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1)
    command = arguments(data_dir, workdir, *more)
    with ours, theirs:
        process = subprocess.Popen(command, cwd=ROOT, stdout=theirs, stderr=theirs)
        process.lines = ours.makefile()
    return process


def signalled_at(data_dir, workdir, line, number: signal.Signals, *more):
    """Trains until a line of output starts with `line`, sends a signal, and waits for the end."""
    process = started(data_dir, workdir, *more)
    process.output = ""
    with process.lines:
        for text in process.lines:
            process.output += text
            if text.startswith(line):
                process.send_signal(number)
    process.wait(timeout=300)
    return process


def saved_state(workdir, step=None):
    """Returns a checkpoint's step and its arrays on one device, read by Orbax alone.

    Args:
      step: by default the newest checkpoint's.
    """
    path = Path(workdir).absolute() / "checkpoints"
    step = saved_steps(workdir)[-1] if step is None else step
    here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    with ocp.StandardCheckpointer() as checkpointer:
        saved = checkpointer.metadata(path / str(step) / "state").item_metadata.tree
        like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), saved)
        return step, checkpointer.restore(path / str(step) / "state", like)


def saved_steps(workdir):
    return sorted(
        int(p.name) for p in (Path(workdir) / "checkpoints").iterdir() if p.name.isdigit()
    )
