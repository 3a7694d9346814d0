"""What the process is told before JAX starts its backends: none of it changes what is computed."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

# By default XLA's CPU backend starts as many operations at once as it can, which takes up to
# twice the memory and is no faster (docs/performance.md).
CPU_OPTIONS = {"xla_cpu_scheduler_type": "CPU_SCHEDULER_TYPE_MEMORY_OPTIMIZED"}

# Of a program that runs once, the initial state's, LLVM's full optimization takes longer than it
# gives back; the values are the same to the last bit.
RUN_ONCE_CPU_OPTIONS = {"xla_backend_optimization_level": 1}

# More of a TPU's vector memory for one fusion than the 16 MiB that it gets by default: the
# compiler then overlaps more of it with transfers (docs/performance.md).
TPU_OPTIONS = {"xla_tpu_scoped_vmem_limit_kib": "32768"}


def set_up() -> None:
    """Sets all of it up. Call it before anything is computed."""
    _keep_compiled_programs()
    _add_options("XLA_FLAGS", CPU_OPTIONS)
    _add_options("LIBTPU_INIT_ARGS", TPU_OPTIONS)


def run_once(function: Callable[[], Any], **options: Any) -> Any:
    """Returns what a function without arguments returns when it is compiled, soon rather than well.

    Args:
      options: of `jax.jit`.
    """
    quick = RUN_ONCE_CPU_OPTIONS if jax.default_backend() == "cpu" else {}
    return jax.jit(function, compiler_options=quick, **options)()


def _keep_compiled_programs() -> None:
    """In ~/.cache/alexnet_jax those that took 0.2 s, if JAX's own variables say nothing else."""
    folder = Path("~/.cache/alexnet_jax").expanduser()
    for name, value in {
        "jax_compilation_cache_dir": str(folder),
        "jax_persistent_cache_min_compile_time_secs": 0.2,
    }.items():
        if name.upper() not in os.environ:
            jax.config.update(name, value)


def _add_options(variable: str, options: dict[str, str]) -> None:
    """Puts them first, so that what the user has there counts."""
    own = " ".join(f"--{name}={value}" for name, value in options.items())
    os.environ[variable] = f"{own} {os.environ.get(variable, '')}"
