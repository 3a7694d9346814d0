"""The GPUs and TPUs that this machine can compile for without having them.

libtpu compiles for any TPU topology on a CPU, and XLA's CUDA plugin for any GPU, given its
properties. Each file `targets/NAME.toml` has the published numbers of one device.
"""

import contextlib
import importlib.metadata
import importlib.resources
import importlib.util
import os
import re
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import jax
from jax.experimental import topologies

from alexnet_jax.utils.errors import UserError, one_line
from alexnet_jax.utils.process import TPU_OPTIONS

FOLDER = importlib.resources.files("alexnet_jax.analysis") / "targets"
# Autotuning, which tries kernels out, needs the GPU.
GPU_OPTIONS = {"xla_gpu_autotune_level": 0}


@dataclass(frozen=True)
class Target:
    """One device, as `targets/NAME.toml` describes it.

    Attributes:
      kind: "gpu" or "tpu".
      memory_bytes: of the device.
      memory_bytes_per_s: how fast it reads and writes its memory.
      link_bytes_per_s: bandwidth in one direction, of all links of a GPU to the others, or of one
        link of a TPU to a neighbor.
      peak_flops: FLOP/s of matrix products by the dtype of the arrays.
      max_devices: GPUs of a machine.
      xla: XLA's GpuTargetConfigProto.
      hertz: clock rate of a TPU.
      min_ring: length from which on the ends of a TPU topology's axis are linked too.
    """

    kind: str
    memory_bytes: float
    memory_bytes_per_s: float
    link_bytes_per_s: float
    peak_flops: Mapping[str, float]
    max_devices: int = 0
    xla: Mapping[str, Any] = field(default_factory=dict)
    hertz: float = 0.0
    min_ring: int = 0

    @property
    def compiler_options(self) -> dict[str, Any]:
        """The options with which to compile a training step for it."""
        return TPU_OPTIONS if self.kind == "tpu" else GPU_OPTIONS


def names() -> list[str]:
    """Returns the names of all targets."""
    files = (file.name for file in FOLDER.iterdir())
    return sorted(name.removesuffix(".toml") for name in files if name.endswith(".toml"))


def load(name: str) -> Target:
    """Returns a target by its name."""
    return Target(**tomllib.loads((FOLDER / f"{name}.toml").read_text()))


def topology_devices(topology: str) -> tuple[Target, list[jax.Device]]:
    """Returns the target and the devices of a topology such as "v5e:16x16" or "h100:8".

    Raises:
      UserError: there is no such topology, or its compiler is not installed.
    """
    name, _, shape = topology.partition(":")
    if name not in names() or not re.fullmatch(r"\d+(x\d+)*", shape):
        raise UserError(
            f"--topology={topology} is not a topology; write it like v5e:16x16 or h100:8, with one "
            f"of {', '.join(names())}"
        )
    target = load(name)
    if target.kind == "gpu":
        return target, _gpus(topology, shape, target)
    if "x" not in shape:
        raise UserError(f"--topology={topology} is not a topology; write it like {name}:2x4")
    return target, _tpus(topology)


def _tpus(topology: str) -> list[jax.Device]:
    _check_installed("libtpu", "libtpu", "TPUs")
    with _environment(
        # libtpu must not look for a TPU, ask Google Cloud for it, or lock it.
        ALLOW_MULTIPLE_LIBTPU_LOAD="1",
        TPU_SKIP_MDS_QUERY="1",
        TPU_ACCELERATOR_TYPE="v5litepod-8",
        TPU_WORKER_HOSTNAMES="localhost",
        TPU_WORKER_ID="0",
    ):
        try:
            return list(topologies.get_topology_desc(topology, platform="tpu").devices)
        except Exception as error:  # libtpu raises several types
            raise UserError(f"libtpu knows no topology {topology}: {one_line(error)}") from error


def _gpus(topology: str, shape: str, target: Target) -> list[jax.Device]:
    if not (shape.isdigit() and 1 <= int(shape) <= target.max_devices):
        raise UserError(
            f"--topology={topology} is not a topology; the GPUs of one machine are 1 to "
            f"{target.max_devices}, as in {topology.partition(':')[0]}:{target.max_devices}"
        )
    _check_installed("jax_plugins.xla_cuda12", "jax-cuda12-plugin", "GPUs")
    with _environment(CUDA_VISIBLE_DEVICES="-1"):  # a GPU of this machine is of no use here
        found = topologies.get_topology_desc(
            platform="cuda", topology=f"1x{shape}x1", target_config=_text_proto(target.xla)
        )
    return list(found.devices)


def _check_installed(module: str, package: str, what: str) -> None:
    with contextlib.suppress(ModuleNotFoundError):  # of the parent of a module
        if importlib.util.find_spec(module):
            return
    # JAX's own requirement has the version that fits. One with brackets adds the CUDA toolkit.
    needs = importlib.metadata.requires("jax") or []
    specs = [need.partition(";")[0].strip() for need in needs if need.startswith(package)]
    spec = next((spec for spec in specs if "[" not in spec), package)
    raise UserError(f"{package}, which compiles for {what}, is not installed: pip install '{spec}'")


@contextlib.contextmanager
def _environment(**variables: str) -> Iterator[None]:
    before = dict(os.environ)
    os.environ |= variables
    try:
        yield
    finally:
        os.environ.clear()
        os.environ |= before


def _text_proto(fields: Mapping[str, Any]) -> str:
    """Returns a message in the text format of protocol buffers."""

    def line(name: str, value: Any) -> str:
        if isinstance(value, Mapping):
            return f"{name} {{ {_text_proto(value)} }}"
        return f'{name}: "{value}"' if isinstance(value, str) else f"{name}: {value}"

    return "\n".join(line(name, value) for name, value in fields.items())
