"""Eight CPU devices, and one compilation cache for all the processes that the tests start.

XLA compiles for a small network longer than it runs it: at LLVM's lower level the same HLO is
compiled in half the time and takes no longer, to the same bits (test_compiled_step reads the HLO).
"""

import os
import tempfile

os.environ.setdefault(
    "XLA_FLAGS", "--xla_force_host_platform_device_count=8 --xla_backend_optimization_level=1"
)
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR", tempfile.mkdtemp(prefix="alexnet_jax-test-cache-")
)

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import pytest  # noqa: E402  (JAX must find the variables above)


@pytest.fixture(scope="session")
def digits(tmp_path_factory):
    """A data_dir with the quickstart's prepared digits."""
    from alexnet_jax import config, store

    data_dir = tmp_path_factory.mktemp("data")
    store.open_or_prepare(config.load("configs/quickstart.py", [("data_dir", str(data_dir))]))
    return data_dir


@pytest.fixture(scope="session")
def trained_run(digits, tmp_path_factory):
    """A workdir in which a small network learned the digits; read it or copy it."""
    import commands

    workdir = tmp_path_factory.mktemp("trained") / "run"
    result = commands.train(digits, workdir)
    assert result.returncode == 0, result.stderr
    return workdir
