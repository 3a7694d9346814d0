"""What libtpu's compiler says of a program for TPUs that are not there."""

import contextlib
import importlib.metadata
import importlib.util
import math
import os
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import jax
import numpy as np
from jax.experimental import topologies

from alexnet_jax.utils.errors import UserError, one_line

LARGE = 100_000  # elements: an operation on fewer may go without cycles
FREE = {  # the rest that has none: it does nothing, or copies while others compute
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "custom-call", "broadcast"),
    *("copy-start", "copy-done", "slice-start", "slice-done", "async-start", "async-done"),
}
OPERATION = re.compile(r"\s*(?:ROOT )?%(?P<name>\S+) = (?P<type>.*?) (?P<opcode>[\w-]+)\(")
CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
ORIGIN = re.compile(r'op_name="([^"]*)"')
LIMIT = re.compile(r"s32\[\]\S* constant\((\d+)\)")
COMPUTATION = re.compile(r"^(?:ENTRY )?%(\S+) \(.*\{$", re.M)
# How a program names the chips of a group: as a list, as shape and order of all places, or as axes
# of a mesh of them.
LISTED = re.compile(r"replica_groups=\{\{([\d,]+)\}")
RESHAPED = re.compile(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?")
OF_MESH = re.compile(
    r"replica_groups=mesh\[(.*?)\]"
    r"(?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{(.*?)\}"
)
COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s32": 4, "u32": 4, "f32": 4, "u64": 8}


class Chip(NamedTuple):
    """Published figures of one chip (docs.cloud.google.com/tpu/docs/v5e, …/v5p-training, …/v6e).

    Attributes:
      hbm_bytes: capacity.
      link_bytes_per_s: of one of its links to a neighbour, in one direction.
      hertz: the clock. It is not published; this is what makes the products that the chip's
        matrix units start in a cycle the published peak.
      wraps_from: length of an axis of the topology from which on its ends are linked too.
    """

    hbm_bytes: float
    link_bytes_per_s: float
    hertz: float
    wraps_from: int


CHIPS = {
    # 400 GB/s in both directions over 4 ports; 197 TFLOP/s of 4 units of 128 × 128.
    "v5e": Chip(16e9, 50e9, 1.5e9, 16),
    # 4,800 Gbit/s, counted as v5e's 1,600, over 6 ports; 459 TFLOP/s of 8 units of 128 × 128.
    "v5p": Chip(95e9, 100e9, 1.75e9, 4),
    # 3,200 Gbit/s over 4 ports; 918 TFLOP/s, at v5p's clock.
    "v6e": Chip(32e9, 100e9, 1.75e9, 16),
}


class Operation(NamedTuple):
    """One that the chip runs, with what it comes from in the program."""

    cycles: int
    name: str
    origin: str


class Collective(NamedTuple):
    """One that chips run together.

    Attributes:
      kind: one of COLLECTIVES.
      dtypes: of what is sent, e.g. "bf16".
      payload_bytes: the whole array's on a chip: of an all-gather the output, else the input.
      group: the places, in the order of the mesh's devices, of the chips of the first group.
    """

    kind: str
    dtypes: str
    payload_bytes: int
    group: tuple[int, ...]

    @property
    def bytes_sent(self) -> float:
        """What a chip sends at least, over all of its links."""
        share = 1 - 1 / len(self.group)
        times = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return times * self.payload_bytes


def topology_devices(topology: str) -> tuple[Chip, list[jax.Device]]:
    """Returns the chip of a topology such as "v5e:16x16", and the topology's devices.

    Raises UserError if libtpu is missing or there is no such topology.
    """
    _check_libtpu()
    name, _, shape = topology.partition(":")
    if name not in CHIPS or not re.fullmatch(r"\d+(x\d+)+", shape):
        raise UserError(
            f"--topology={topology} must be like v5e:16x16, of one of {', '.join(CHIPS)}"
        )
    with _no_tpu_of_our_own():
        try:
            found = topologies.get_topology_desc(topology, platform="tpu")
        except Exception as error:  # libtpu's, of several types
            raise UserError(f"libtpu knows no topology {topology}: {one_line(error)}") from error
    return CHIPS[name], list(found.devices)


@contextlib.contextmanager
def _no_tpu_of_our_own() -> Iterator[None]:
    """libtpu would look for one, and ask Google's cloud for it."""
    before = dict(os.environ)
    os.environ |= {
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-8",
        "TPU_WORKER_HOSTNAMES": "localhost",
        "TPU_WORKER_ID": "0",
    }
    yield
    os.environ.clear()
    os.environ |= before


def _check_libtpu() -> None:
    if importlib.util.find_spec("libtpu"):
        return
    wanted = [need for need in importlib.metadata.requires("jax") or [] if "libtpu" in need]
    spec = wanted[0].partition(";")[0].strip() if wanted else "libtpu"
    raise UserError(f"libtpu, which compiles for TPUs, is not installed: pip install '{spec}'")


def entry_operations(text: str) -> tuple[list[Operation], Counter[str]]:
    """Returns the operations that have cycles, the costliest first, and how many have none.

    Those of the entry computation count, since a fusion's cycles include what is inside of it; of
    a loop the body's, as often as it runs. Collectives do not: see `collectives`.
    """
    bodies = _computations(text)
    operations = []
    unknown: Counter[str] = Counter()
    for line in bodies["ENTRY"]:
        head = OPERATION.match(line)
        if not head or head["opcode"].removesuffix("-start") in COLLECTIVES:
            continue
        origin = ORIGIN.search(line)
        cycles = _cycles(line, head["opcode"], bodies)
        if cycles:
            operations.append(Operation(cycles, head["name"], origin[1] if origin else ""))
        elif head["opcode"] not in FREE and _elements(head["type"]) >= LARGE:
            unknown[head["opcode"]] += 1
    return sorted(operations, reverse=True), unknown


def collectives(text: str, chips: int) -> list[Collective]:
    """Returns what the chips send each other in one run of a program, in its order.

    Those that run beside other operations are inside of computations of their own, which begin
    with an async-collective-start; their continuations repeat them.
    """
    bodies = _computations(text)
    lines = []
    for line in bodies["ENTRY"]:
        head = OPERATION.match(line)
        if head and head["name"].startswith("async-collective-start"):
            lines += bodies[_called(line, "calls")]
        else:
            lines.append(line)
    return [found for line in lines if (found := _collective(line, chips))]


def _computations(text: str) -> dict[str, list[str]]:
    """Returns the lines of each computation by its name, of the entry by "ENTRY"."""
    found = {}
    for match in COMPUTATION.finditer(text):
        name = "ENTRY" if match[0].startswith("ENTRY") else match[1]
        found[name] = text[match.end() : text.index("\n}", match.end())].splitlines()
    return found


def _called(line: str, as_what: str) -> str:
    name: str = re.findall(rf"\b{as_what}=%([\w.-]+)", line)[0]
    return name


def _cycles(line: str, opcode: str, bodies: dict[str, list[str]]) -> int:
    if opcode != "while":
        cycles = CYCLES.search(line)
        return int(cycles[1]) if cycles else 0
    limits = LIMIT.findall("\n".join(bodies[_called(line, "condition")]))
    heads = ((OPERATION.match(inner), inner) for inner in bodies[_called(line, "body")])
    per_trip = sum(_cycles(inner, head["opcode"], bodies) for head, inner in heads if head)
    return per_trip * max(map(int, limits), default=1)


def _collective(line: str, chips: int) -> Collective | None:
    head = OPERATION.match(line)
    if not head or (kind := head["opcode"].removesuffix("-start")) not in COLLECTIVES:
        return None
    group = _group(line, chips)
    shapes = re.findall(r"\b(\w+)\[([\d,]*)\]", head["type"])
    sizes = [BYTES[dtype] * _length(lengths) for dtype, lengths in shapes if dtype in BYTES]
    if head["opcode"].endswith("-start") and kind != "all-reduce":  # of a pair (input, output)
        sizes = sizes[1:2]
    payload = sum(sizes) * (len(group) if kind == "reduce-scatter" else 1)
    return Collective(kind, "+".join(sorted({dtype for dtype, _ in shapes})), payload, group)


def _group(line: str, chips: int) -> tuple[int, ...]:
    if listed := LISTED.search(line):
        return tuple(map(int, listed[1].split(",")))
    if reshaped := RESHAPED.search(line):
        return tuple(_iota(reshaped[3], reshaped[4])[: int(reshaped[2])])
    if of_mesh := OF_MESH.search(line):
        lengths = {name: int(length) for name, length in re.findall(r"'(\w+)'=(\d+)", of_mesh[1])}
        shape = of_mesh[2] or ",".join(map(str, lengths.values()))
        places = np.array(_iota(shape, of_mesh[3])).reshape(list(lengths.values()))
        named = re.findall(r"'(\w+)'", of_mesh[4])
        first = tuple(slice(None) if name in named else 0 for name in lengths)
        return tuple(places[first].ravel().tolist())
    return tuple(range(chips))


def _iota(shape: str, order: str | None) -> list[int]:
    lengths = [int(length) for length in shape.split(",")]
    places = np.arange(math.prod(lengths)).reshape(lengths)
    if order:
        places = places.transpose([int(axis) for axis in order.split(",")])
    return places.ravel().tolist()


def _length(lengths: str) -> int:
    return math.prod(map(int, filter(None, lengths.split(","))))


def _elements(shapes: str) -> int:
    """Returns how many elements the largest array has, of one or more such as bf16[8,128]{1,0}."""
    return max((_length(of) for of in re.findall(r"\w\[([\d,]*)\]", shapes)), default=0)


def links(coordinates: list[tuple[int, ...]], shape: tuple[int, ...], chip: Chip) -> int:
    """Returns over how many of its links each chip of a group reaches others of it directly.

    Along an axis on which the group's chips are neighbours that is two where they close a ring,
    and one where the ends of a line have but one. Along other axes messages pass through chips
    of other groups, which need the same links at the same time.
    """
    count = 0
    for axis, length in enumerate(shape):
        places = sorted({place[axis] for place in coordinates})
        if len(places) > 1 and places == list(range(places[0], places[0] + len(places))):
            rings = len(places) == length and length >= chip.wraps_from
            count += 2 if rings else 1
    return max(count, 1)


def seconds(collective: Collective, links: int, chip: Chip) -> float:
    """Returns how long a collective takes at the links' full rate, without latency."""
    sent = collective.bytes_sent
    if collective.kind == "all-to-all":  # half of everything crosses the middle of a line or ring
        sent = max(sent, collective.payload_bytes * len(collective.group) / 4)
    return sent / (links * chip.link_bytes_per_s)
