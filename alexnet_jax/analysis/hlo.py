"""Reads the text of a program that XLA has compiled: what its devices send and compute.

JAX gives the optimized program as text only (`compiled.as_text()`). Three things in it decide how
often an instruction counts:

- A `while` loop runs its body several times. XLA notes the number of trips for CPU and GPU; for
  TPU it follows from the loop's counter.
- libtpu spreads a collective that runs beside other work over several fusions: one starts it, some
  continue it beside their own work, and the last one waits for its end. All of them repeat the
  instruction. Those after the first take flags as operands, and `flag_start` says from which one.
- libtpu writes some reduce-scatters as a fusion `all-reduce-scatter` of an all-reduce and a slice.
"""

import math
import re
from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
LARGE = 100_000  # elements; smaller operations without an estimate do not matter
# What is not a kernel on a GPU. Its collectives, and what starts and ends beside kernels, are not
# counted as kernels either.
NO_KERNEL = {
    *("parameter", "constant", "tuple", "get-tuple-element", "bitcast", "after-all"),
    *("while", "conditional", "call", "partition-id", "replica-id"),
}
# Operations that need no estimate: they do nothing, or their computations have estimates.
FREE = NO_KERNEL | {"broadcast", "custom-call"}

_COMPUTATION = re.compile(r"^(ENTRY )?%(\S+) \([^\n]*\{\n(.*?)^\}", re.M | re.S)
_INSTRUCTION = re.compile(r"^ +(ROOT )?%(\S+) = (.*?) ([\w-]+)\((.*?)\)(.*)$", re.M)
_NAME = re.compile(r"%([\w.-]+)")
_ARRAY = re.compile(r"\b([a-z]\w*)\[([\d,]*)\]")  # dtype and lengths of f32[8,128]{1,0}


class Instruction(NamedTuple):
    """One line of a program, such as `%sum = f32[8]{0} add(%x, %y), metadata={op_name="add"}`.

    Attributes:
      operands: the text between the parentheses.
      attributes: the text after them.
    """

    name: str
    shape: str
    opcode: str
    operands: str
    attributes: str

    @property
    def operand_names(self) -> list[str]:
        """The names of the instructions whose results it takes."""
        return _NAME.findall(self.operands)

    @property
    def origin(self) -> str:
        """The model's name for it, "" if there is none."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def is_collective(self) -> bool:
        """True for a collective, unless it only continues or awaits one."""
        known = self.opcode.removesuffix("-start") in COLLECTIVES
        return known and not re.search(r'"flag_start":"\d', self.attributes)

    def called(self, attribute: str) -> list[str]:
        """Returns the names of the computations in an attribute, e.g. in `body=%loop`."""
        found = re.findall(rf"\b(?:{attribute})=(%[\w.-]+|\{{%.*?\}})", self.attributes)
        return [name for names in found for name in _NAME.findall(names)]


class Computation(NamedTuple):
    """A function of a program: its instructions by name, and the one that it returns."""

    name: str
    instructions: dict[str, Instruction]
    root: Instruction


Program = dict[str, Computation]  # by name; the one that runs first is "ENTRY"


class Operation(NamedTuple):
    """Estimated cycles of an operation in all its runs, its name, and the model's name for it."""

    cycles: int
    name: str
    origin: str


class Kernel(NamedTuple):
    """A kernel of a GPU program.

    Attributes:
      bytes_moved: what it reads and writes in all runs: its operands and results, each once.
      flops: of matrix products and convolutions in all runs, 2 for a multiplication and addition.
      dtype: of their operands, "" if it has none.
      runs: how many times it runs in one run of the program.
    """

    name: str
    origin: str
    bytes_moved: int
    flops: int
    dtype: str
    runs: int


class Collective(NamedTuple):
    """A communication between devices.

    Attributes:
      kind: one of COLLECTIVES.
      dtypes: of the arrays, e.g. "bf16" or "bf16+f32".
      payload_bytes: size of the whole arrays: of the output of an all-gather, else of the input.
      group: the devices of the first group, as positions in the device order of the mesh.
      runs: how many times it runs in one run of the program.
    """

    kind: str
    dtypes: str
    payload_bytes: int
    group: tuple[int, ...]
    runs: int = 1

    @property
    def bytes_sent(self) -> float:
        """Bytes that each device must send in all runs, over all its links together."""
        share = 1 - 1 / len(self.group)
        factor = {"all-reduce": 2 * share, "collective-permute": 1.0}.get(self.kind, share)
        return self.runs * factor * self.payload_bytes


def parse(text: str) -> Program:
    """Returns the computations of a program."""
    program = {}
    for is_entry, name, body in _COMPUTATION.findall(text):
        lines = _INSTRUCTION.findall(body)
        instructions = {line[1]: Instruction(*line[1:]) for line in lines}
        root = next(instructions[line[1]] for line in lines if line[0])
        program["ENTRY" if is_entry else name] = Computation(name, instructions, root)
    return program


def collectives(text: str, num_devices: int) -> list[Collective]:
    """Returns the collectives of a program, each once, those in loops and fusions included."""
    return [
        _collective(instruction, computation, runs, num_devices)
        for instruction, computation, runs in _executed(parse(text), "ENTRY", inside_fusions=True)
        if instruction.is_collective
    ]


def operation_cycles(text: str) -> tuple[list[Operation], Counter[str]]:
    """Returns the operations of a TPU program with libtpu's estimates, the most expensive first.

    The estimate of a fusion includes all that is inside. Collectives have none.

    Also returns how many large operations of each opcode have no estimate.
    """
    program = parse(text)
    operations = []
    unknown: Counter[str] = Counter()
    for instruction, _, runs in _executed(program, "ENTRY", inside_fusions=False):
        if instruction.is_collective:
            continue
        estimate = re.search(r'"estimated_cycles":"(\d+)"', instruction.attributes)
        if estimate and (cycles := runs * int(estimate[1])):
            operations.append(Operation(cycles, instruction.name, instruction.origin))
        elif _needs_cycles(program, instruction):
            unknown[instruction.opcode] += 1
    return sorted(operations, reverse=True), unknown


def kernels(text: str) -> list[Kernel]:
    """Returns the kernels of a GPU program, those in loops included."""
    program = parse(text)
    found = []
    for instruction, computation, runs in _executed(program, "ENTRY", inside_fusions=False):
        opcode = instruction.opcode
        if opcode in NO_KERNEL or opcode.endswith(("-start", "-done")) or opcode in COLLECTIVES:
            continue
        flops, dtype = _flops(program, instruction, computation)
        found.append(
            Kernel(
                instruction.name,
                instruction.origin,
                runs * _bytes_moved(program, instruction, computation),
                runs * flops,
                dtype,
                runs,
            )
        )
    return found


def _bytes_moved(program: Program, instruction: Instruction, computation: Computation) -> int:
    operands = list(dict.fromkeys(instruction.operand_names))
    sizes = {name: _bytes(computation.instructions[name].shape) for name in operands}
    written = _bytes(instruction.shape)
    for called in instruction.called("calls"):
        inner = program[called]
        for parameter in inner.instructions.values():
            if parameter.opcode != "parameter":
                continue
            name = instruction.operand_names[int(parameter.operands)]
            users = [i for i in inner.instructions.values() if parameter.name in i.operand_names]
            # A loop reads a part of a whole array in each run, and writes a part of its result.
            if users and all(user.opcode == "dynamic-slice" for user in users):
                sizes[name] = min(sizes[name], sum(_bytes(user.shape) for user in users))
            if inner.root.opcode == "dynamic-update-slice" and users == [inner.root]:
                sizes[name] = 0
                written = _bytes(inner.instructions[inner.root.operand_names[1]].shape)
    return sum(sizes.values()) + written


def _flops(program: Program, instruction: Instruction, computation: Computation) -> tuple[int, str]:
    """Returns the FLOPs of the products in a kernel, and the dtype of their operands."""
    products = [
        (inner, program[called])
        for called in instruction.called("calls")
        for inner in program[called].instructions.values()
        if inner.opcode == "dot"
    ]
    target = re.search(r'custom_call_target="__(cudnn\$conv|cublas\$)(\w*)', instruction.attributes)
    if instruction.opcode == "dot" or target:
        products.append((instruction, computation))
    flops, dtype = 0, ""
    for product, around in products:
        x, y = (_ARRAY.findall(around.instructions[n].shape)[0] for n in product.operand_names[:2])
        result = _ARRAY.findall(product.shape)[0]
        dtype = x[0]
        if target and target[1].startswith("cudnn"):
            # The convolution of the forward pass whose outputs or gradients these are.
            kernel, outputs = {
                "BackwardInput": (y, x),
                "BackwardFilter": (result, y),
            }.get(target[2], (y, result))
            labels = re.search(r"dim_labels=\w+_(\w+)->", product.attributes)
            filters = _lengths(kernel)[labels[1].index("o")] if labels else 1
            flops += 2 * _size(outputs) * _size(kernel) // filters
        else:
            dims = re.search(
                r'lhs_contracting_dim(?:s=\{|ensions":\[)([\d,"]*)', product.attributes
            )
            contracted = re.findall(r"\d+", dims[1]) if dims else []
            flops += 2 * _size(result) * math.prod(_lengths(x)[int(d)] for d in contracted)
    return flops, dtype


def _needs_cycles(program: Program, instruction: Instruction) -> bool:
    # What starts and ends is a copy or a collective beside other operations.
    if instruction.opcode in FREE or instruction.opcode.endswith(("-start", "-done")):
        return False
    for called in instruction.called("calls"):
        if any(inner.is_collective for inner, _, _ in _executed(program, called, True)):
            return False
    return any(_size(array) >= LARGE for array in _ARRAY.findall(instruction.shape))


def _executed(
    program: Program, name: str, inside_fusions: bool, runs: int = 1
) -> Iterator[tuple[Instruction, Computation, int]]:
    """Yields each instruction of a computation and of those it calls, and how often it runs."""
    computation = program[name]
    for instruction in computation.instructions.values():
        yield instruction, computation, runs
        trips = 1
        match instruction.opcode:
            case "while":
                called = instruction.called("body")
                trips = _trip_count(program, computation, instruction)
            case "call":
                called = instruction.called("to_apply")
            case "conditional":
                called = instruction.called(r"branch_computations|\w+_computation")
            case _:
                called = instruction.called("calls") if inside_fusions else []
        for inner in called:
            yield from _executed(program, inner, inside_fusions, runs * trips)


def _trip_count(program: Program, caller: Computation, loop: Instruction) -> int:
    """Returns how many times a loop runs: for (i = first; i < limit; i += step).

    Raises:
      ValueError: it is another kind of loop.
    """
    if known := re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.attributes):
        return int(known[1])
    condition, body = (program[loop.called(role)[0]] for role in ("condition", "body"))
    if condition.root.opcode != "compare" or "direction=LT" not in condition.root.attributes:
        raise ValueError(f"cannot read how many times {loop.name} runs")
    counter, limit = condition.root.operand_names
    # The loop carries a tuple, and the counter is an element of it.
    index = _tuple_index(condition.instructions[counter])
    initial = caller.instructions[loop.operand_names[0]].operand_names[index]
    first = _scalar(caller, initial)
    step = _scalar(body, body.root.operand_names[index], {index: first}) - first
    return math.ceil((_scalar(condition, limit) - first) / step)


def _scalar(computation: Computation, name: str, carried: dict[int, int] | None = None) -> int:
    """Evaluates an integer expression of constants and of elements of the loop's tuple."""
    instruction = computation.instructions[name]
    operands = instruction.operand_names
    match instruction.opcode:
        case "constant":
            return int(instruction.operands)
        case "copy" | "bitcast" | "convert":
            return _scalar(computation, operands[0], carried)
        case "add":
            return sum(_scalar(computation, operand, carried) for operand in operands)
        case "get-tuple-element" if carried:
            return carried[_tuple_index(instruction)]
    raise ValueError(f"cannot evaluate {instruction.opcode} in the counter of a loop")


def _tuple_index(instruction: Instruction) -> int:
    return int(re.findall(r"\bindex=(\d+)", instruction.attributes)[0])


def _collective(
    instruction: Instruction, computation: Computation, runs: int, num_devices: int
) -> Collective:
    kind = instruction.opcode.removesuffix("-start")
    if computation.name.startswith("all-reduce-scatter"):
        kind = "reduce-scatter"
    group = _first_group(instruction.attributes, num_devices)
    # The result of an asynchronous start repeats the operands, so lengths are the operands'. What
    # is sent may have another dtype, the result's: libtpu fuses conversions of the operands.
    shapes = [computation.instructions[name].shape for name in instruction.operand_names]
    arrays = _ARRAY.findall(" ".join(shapes))
    results = _ARRAY.findall(instruction.shape)
    sent = results if len(results) == len(arrays) else arrays
    dtypes = [dtype for dtype, _ in sent]
    bits = sum(_size(x) * _bits(dtype) for x, dtype in zip(arrays, dtypes, strict=True))
    payload = bits // 8
    payload *= len(group) if kind == "all-gather" else 1
    return Collective(kind, "+".join(sorted(set(dtypes))), payload, group, runs)


def _lengths(array: tuple[str, str]) -> list[int]:
    return [int(length) for length in array[1].split(",") if length]


def _size(array: tuple[str, str]) -> int:
    return math.prod(_lengths(array))


def _bytes(shape: str) -> int:
    return sum(_size(array) * _bits(array[0]) for array in _ARRAY.findall(shape)) // 8


def _bits(dtype: str) -> int:
    found = re.search(r"\d+", dtype)
    return int(found[0]) if found else 8  # pred is a byte


def _first_group(attributes: str, num_devices: int) -> tuple[int, ...]:
    """Returns the first group of devices that communicate, written in one of several ways."""
    if pairs := re.search(r"source_target_pairs=\{(.*?)\}\}", attributes):
        # Each device sends to one other. The first group is the chain or ring from the first one.
        targets = dict(re.findall(r"(\d+),(\d+)", pairs[1]))
        chain = [next(iter(targets))]
        while (following := targets.get(chain[-1])) and following not in chain:
            chain.append(following)
        return tuple(map(int, chain))
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", attributes):
        return tuple(map(int, listed[1].split(",")))
    iota = r"\[([\d,]+)\](?:T\(([\d,]+)\))?"
    if reshaped := re.search(rf"replica_groups=\[\d+,(\d+)\]<={iota}", attributes):
        return tuple(_iota(reshaped[2], reshaped[3])[: int(reshaped[1])].tolist())
    mesh = rf"replica_groups=mesh\[(.*?)\](?:, device_ids=\({iota}\))? \{{(.*?)\}}"
    if of_mesh := re.search(mesh, attributes):
        axes = {name: int(length) for name, length in re.findall(r"'(\w+)'=(\d+)", of_mesh[1])}
        shape = of_mesh[2] or ",".join(map(str, axes.values()))
        devices = _iota(shape, of_mesh[3]).reshape(list(axes.values()))
        named = re.findall(r"'(\w+)'", of_mesh[4])
        first = tuple(slice(None) if name in named else 0 for name in axes)
        return tuple(devices[first].ravel().tolist())
    return tuple(range(num_devices))


def _iota(shape: str, order: str | None) -> np.ndarray:
    """Returns the numbers of all devices as an array of a shape, transposed and flattened."""
    lengths = [int(length) for length in shape.split(",")]
    devices = np.arange(math.prod(lengths)).reshape(lengths)
    if order:
        devices = devices.transpose([int(axis) for axis in order.split(",")])
    return devices.ravel()
