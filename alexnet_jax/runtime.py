"""What the process is told before JAX starts its backends: each for speed alone."""

import ctypes
import os
from pathlib import Path

# More of a TPU's vector memory for one fusion than the 16 MiB that it gets by default: the
# compiler then overlaps more of it with transfers (docs/performance.md).
TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "32768"}

# By default XLA's CPU backend starts as many operations at once as it can, which takes up to
# twice the memory (docs/performance.md).
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# From malloc.h of the GNU C library.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def set_up() -> None:
    """Sets all of it up. Call it before anything is computed."""
    keep_freed_memory()
    _set_up_jax()
    _add_options("XLA_FLAGS", CPU_OPTIONS)
    _add_options("LIBTPU_INIT_ARGS", TPU_OPTIONS)


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed for the next step; without effect off the GNU C library.

    By default large buffers go back to the kernel after each step on CPU, and come back as pages
    of zeros in the next, which takes up to a quarter of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)


def _set_up_jax() -> None:
    import jax  # here, so that a process without JAX can keep its memory too

    # Else a step may allocate before the one before it has freed, and both stay with malloc.
    jax.config.update("jax_cpu_enable_async_dispatch", False)
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path("~/.cache/alexnet_jax").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _add_options(variable: str, options: dict[str, str]) -> None:
    """Puts them first, so that what the user has there counts."""
    own = " ".join(f"--{name}={value}" for name, value in options.items())
    os.environ[variable] = f"{own} {os.environ.get(variable, '')}"
