"""Fixtures, eight CPU devices, and a compilation cache shared by all processes of the tests.

Small networks take longer to compile than to run. Without LLVM's optimizations the same HLO, which
test_compiled_step reads, compiles in less than half the time.
"""

import fcntl
import os
import signal
import tempfile

# Where there is a GPU, JAX would use it and find one device. JAX_PLATFORMS=cuda selects it.
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=0"
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="alexnet_jax-test-cache-")
)

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

# A shell that runs pytest in the background has it ignore Ctrl-C, and so the commands under test.
signal.signal(signal.SIGINT, signal.default_int_handler)

import pytest  # noqa: E402  (JAX must find the variables above)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory):
    """Returns `make(name, fill)`: a folder that the first xdist worker to ask for it fills."""
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent

    def make(name, fill):
        folder, made = root / name, root / f"{name}.made"
        with (root / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not made.exists():
                fill(folder)
                made.touch()
        return folder

    return make


@pytest.fixture(scope="session")
def digits(made_once):
    """Returns a data_dir with the quickstart's prepared stores, and those of `commands.FEW`."""
    import commands

    from alexnet_jax import config
    from alexnet_jax.data import prepare

    def fill(data_dir):
        for fields in ((), commands.FEW):
            more = [tuple(field.removeprefix("--config.").split("=", 1)) for field in fields]
            fields = [("data_dir", str(data_dir)), *more]
            prepare.open_or_prepare(config.load("configs/quickstart.py", fields))

    return made_once("digits", fill)


@pytest.fixture(scope="session")
def digit_stores(digits):
    """Returns the quickstart's stores: {"train": 4,000 digits, "eval": 1,000}."""
    from alexnet_jax import config
    from alexnet_jax.data import prepare

    fields = config.load("configs/quickstart.py", [("data_dir", str(digits))])
    return prepare.open_or_prepare(fields)


@pytest.fixture(scope="session")
def trained_run(digits, made_once):
    """Returns a workdir in which a small network learned the digits. Copy it to change it."""
    import commands

    def fill(workdir):
        result = commands.train(digits, workdir)
        assert result.returncode == 0, result.stderr

    return made_once("trained_run", fill)


@pytest.fixture(scope="session")
def network(trained_run):
    """Returns the network of `trained_run`. Do not change its config."""
    from alexnet_jax import inference

    return inference.load(trained_run)


@pytest.fixture(scope="session")
def undisturbed(digits, made_once):
    """Returns the workdir of an uninterrupted run with `commands.OFTEN`, and what it printed."""
    import commands

    def fill(folder):
        result = commands.train(digits, folder / "run", *commands.OFTEN)
        assert result.returncode == 0, result.stderr
        (folder / "printed.txt").write_text(result.stdout)

    folder = made_once("undisturbed", fill)
    return folder / "run", (folder / "printed.txt").read_text()
