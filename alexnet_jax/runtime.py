"""What the process is told before JAX starts its backends: each for speed alone."""

import ctypes
import os
from pathlib import Path

# More of a TPU's vector memory for one fusion than the 16 MiB that it gets by default: the
# compiler then overlaps more of it with transfers (docs/performance.md).
TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "32768"}

# From malloc.h of the GNU C library.
M_TRIM_THRESHOLD, M_MMAP_MAX, M_ARENA_MAX = -1, -4, -8


def set_up() -> None:
    """Sets all of it up. Call it before anything is computed."""
    keep_freed_memory()
    _keep_compiled_programs()
    options = " ".join(f"--{name}={value}" for name, value in TPU_OPTIONS.items())
    os.environ["LIBTPU_INIT_ARGS"] = f"{options} {os.environ.get('LIBTPU_INIT_ARGS', '')}"


def keep_freed_memory() -> None:
    """Lets malloc keep what is freed for the next step; without effect off the GNU C library.

    By default large buffers go back to the kernel after each step on CPU, and come back page by
    page in the next, which takes up to a quarter of its time.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt:
        for parameter, value in ((M_ARENA_MAX, 1), (M_MMAP_MAX, 0), (M_TRIM_THRESHOLD, -1)):
            mallopt(parameter, value)


def _keep_compiled_programs() -> None:
    """In ~/.cache/alexnet_jax, or $JAX_COMPILATION_CACHE_DIR if set."""
    import jax  # here, so that a process without JAX can keep its memory too

    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path("~/.cache/alexnet_jax").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)
