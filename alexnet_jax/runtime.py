"""What the process is told before JAX starts its backends: none of it changes what is computed."""

import os
from pathlib import Path

import jax

# By default XLA's CPU backend starts as many operations at once as it can, which takes up to
# twice the memory and is no faster (docs/performance.md).
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# More of a TPU's vector memory for one fusion than the 16 MiB that it gets by default: the
# compiler then overlaps more of it with transfers (docs/performance.md).
TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "32768"}


def set_up() -> None:
    """Sets all of it up. Call it before anything is computed."""
    _keep_compiled_programs()
    _add_options("XLA_FLAGS", CPU_OPTIONS)
    _add_options("LIBTPU_INIT_ARGS", TPU_OPTIONS)


def _keep_compiled_programs() -> None:
    """In ~/.cache/alexnet_jax, or $JAX_COMPILATION_CACHE_DIR if set."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        folder = Path("~/.cache/alexnet_jax").expanduser()
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


def _add_options(variable: str, options: dict[str, str]) -> None:
    """Puts them first, so that what the user has there counts."""
    own = " ".join(f"--{name}={value}" for name, value in options.items())
    os.environ[variable] = f"{own} {os.environ.get(variable, '')}"
