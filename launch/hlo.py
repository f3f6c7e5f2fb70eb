"""Reads the text of a compiled program: bytes of its collectives and of its memory, loops counted.

XLA's own cost analysis counts the body of a loop once. Here every computation is multiplied by the
trips of the loops around it. Numbers are those of one device.
"""

import dataclasses
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import numpy as np

Shape = tuple[str, tuple[int, ...], bool]
"""Type, dimensions, and whether it lies in the device's main memory."""

_TYPE_BYTES = {"pred": 1, "token": 0, "opaque": 0}
_SHAPE = re.compile(r"\b([a-z]\w*)\[([\d,]*)\](?:\{([^}]*)\})?")
_ALIASES = re.compile(
    r"output_to_operand_aliasing=\{((?:(?:, )?\{[\d, ]*\}: \(\d+, \{[\d, ]*\}[^)]*\))+)\}"
)
_COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
)
_NO_TRAFFIC = (
    "parameter",
    "constant",
    "tuple",
    "get-tuple-element",
    "bitcast",
    "after-all",
    "partition-id",
    "replica-id",
    "while",
    "conditional",
    "call",
    "iota",
    "opt-barrier",
)
"""Instructions that move no bytes themselves."""
_SLICES = ("dynamic-slice", "slice", "gather")
_UPDATES = ("dynamic-update-slice", "scatter")
"""Instructions that write a part of their first operand in place."""
_NAMES_OPERANDS = ("copy-start", "all-gather-start", "collective-permute-start", "send")
"""Instructions whose result is a tuple of what they write and of what they read."""


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    name: str
    shapes: tuple[Shape, ...]  # of the result; several of a tuple
    opcode: str
    operands: tuple[str, ...]
    rest: str  # what follows the operands: attributes
    literal: str  # what stands between the parentheses
    root: bool

    @property
    def size(self) -> int:
        """Bytes of the result, wherever it lies."""
        return sum(map(_bytes, self.shapes))

    @property
    def traffic(self) -> int:
        """Bytes of the result in main memory."""
        return sum(_bytes(shape) for shape in self.shapes if shape[2])

    def called(self, attribute: str) -> str:
        """Name of the computation that an attribute names; empty where it has none."""
        match = re.search(rf"\b{attribute}=%?([\w.\-]+)", self.rest)
        return match[1] if match else ""


@dataclasses.dataclass(frozen=True)
class Collective:
    """A kind of collective along some mesh axes, summed over a program.

    Attributes:
      kind: XLA's name, such as "all-gather".
      axes: mesh axes that its groups span, such as "fsdp" or "data x fsdp".
      group: devices of a group; of a permutation, of its axes.
      bytes: that a device receives from others, with a ring.
      count: how often one runs.
    """

    kind: str
    axes: str
    group: int
    bytes: float
    count: float


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What a program moves on one device.

    Attributes:
      collectives: by kind and axes, largest first.
      memory: bytes that instructions read and write in main memory.
      open_loops: loops whose trips the text does not say.
    """

    collectives: tuple[Collective, ...]
    memory: float
    open_loops: int


Computations = Mapping[str, Sequence[Instruction]]


def read_traffic(
    text: str, mesh: Mapping[str, int], trips: float = 1.0, slices: int = 1
) -> Traffic:
    """Reads a compiled program.

    Args:
      text: of `jax.stages.Compiled.as_text`.
      mesh: devices along every axis, in the order of the mesh.
      trips: of loops whose trips depend on data.
      slices: of TPUs; `data` spans them.
    """
    computations, entry = parse(text)
    moved: dict[tuple[str, str, int], float] = defaultdict(float)
    runs: dict[tuple[str, str, int], float] = defaultdict(float)
    memory, open_loops = 0.0, frozenset[str]()
    for run in _walk(computations, entry, trips):
        instruction, times = run.instruction, run.times
        open_loops |= run.open_loops
        kind = instruction.opcode.removesuffix("-start")
        found = None
        if kind in _COLLECTIVES:
            found = _collective(instruction, kind, computations, mesh)
        elif kind == "recv":
            found = _across_slices(instruction, slices)
        if found:
            moved[found[:3]] += found[3] * times
            runs[found[:3]] += times
        if run.scope:  # What is inside of a fusion is the fusion's.
            memory += times * _memory(instruction, run.scope, computations)
    collectives = [Collective(*key, moved[key], runs[key]) for key in moved]
    return Traffic(tuple(sorted(collectives, key=lambda c: -c.bytes)), memory, len(open_loops))


def parse(text: str) -> tuple[dict[str, list[Instruction]], str]:
    """The computations of a program by name, and the name of the first that runs."""
    computations: dict[str, list[Instruction]] = {}
    entry, current = "", None
    for line in text.splitlines():
        # A brace need not end a computation: the configs of kernels are printed in several lines.
        if match := re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            current = computations.setdefault(match[2], [])
            entry = match[2] if match[1] else entry
        elif current is not None and (instruction := _instruction(line)):
            current.append(instruction)
    return computations, entry


def _instruction(line: str) -> Instruction | None:
    match = re.match(r"\s+(ROOT )?%?([\w.\-]+) = ", line)
    if not match:
        return None
    at = match.end()
    end = _closing(line, at) + 1 if line[at] == "(" else line.index(" ", at)
    name = re.compile(r"\s*([\w\-]+)\(").match(line, end)
    if not name:
        return None
    last = _closing(line, name.end() - 1)
    literal = line[name.end() : last]
    return Instruction(
        match[2],
        tuple(_shapes(line[at:end])),
        name[1],
        tuple(re.findall(r"%([\w.\-]+)", literal)),
        line[last + 1 :],
        literal,
        bool(match[1]),
    )


def _closing(line: str, at: int) -> int:
    """Index of the parenthesis that closes the one at `at`."""
    depth = 0
    for i in range(at, len(line)):
        depth += (line[i] == "(") - (line[i] == ")")
        if not depth:
            return i
    return len(line) - 1


def _shapes(text: str) -> Iterator[Shape]:
    for kind, dims, layout in _SHAPE.findall(text):
        # S(n) is a memory space; 0, the default, is the device's main memory.
        outside = re.search(r"S\(([1-9]\d*)\)", layout)
        yield kind, tuple(int(d) for d in dims.split(",") if d), not outside


def _bytes(shape: Shape) -> int:
    kind, dims, _ = shape
    bits = re.search(r"\d+", kind)
    width = _TYPE_BYTES.get(kind, int(bits[0]) / 8 if bits else 0)
    return math.ceil(math.prod(dims) * width)


class _Run(NamedTuple):
    """An instruction that runs, and how often.

    `scope` has the instructions of its computation by name, and `open_loops` the loops around it
    whose trips are not known.
    """

    instruction: Instruction
    times: float
    scope: Mapping[str, Instruction]
    open_loops: frozenset[str] = frozenset()


def _walk(
    computations: Computations, name: str, trips: float, times: float = 1.0
) -> Iterator[_Run]:
    """Every instruction that runs; of those inside of fusions only collectives."""
    scope = {instruction.name: instruction for instruction in computations[name]}
    for instruction in computations[name]:
        yield _Run(instruction, times, scope)
        if instruction.opcode == "while":
            body, known = instruction.called("body"), _trip_count(instruction, computations)
            turns = trips if known is None else known
            outside = frozenset({body} if known is None else ())
            for run in _walk(computations, body, trips, times * turns):
                yield run._replace(open_loops=run.open_loops | outside)
        elif instruction.opcode == "fusion":
            for inner in computations.get(instruction.called("calls"), ()):
                if inner.opcode.removesuffix("-start") in _COLLECTIVES:
                    yield _Run(inner, times, {})
        elif instruction.opcode in ("call", "async-start"):
            called = instruction.called("to_apply") or instruction.called("calls")
            yield from _walk(computations, called, trips, times)
        elif instruction.opcode == "conditional":
            for branch in re.findall(r"(?:computations?=\{?|, )%([\w.\-]+)", instruction.rest):
                if branch in computations:
                    yield from _walk(computations, branch, trips, times)


def _trip_count(loop: Instruction, computations: Computations) -> float | None:
    """Trips of a loop: XLA's own number, or the constant that its counter is compared with."""
    stated = re.search(r'known_trip_count":\{"n":"(\d+)"', loop.rest)
    if stated:
        return float(stated[1])
    condition = computations[loop.called("condition")]
    by_name = {instruction.name: instruction for instruction in condition}
    root = next(instruction for instruction in condition if instruction.root)
    operands = root.operands
    if root.opcode == "fusion":
        fused = computations[root.called("calls")]
        root = next(instruction for instruction in fused if instruction.root)
    if root.opcode != "compare" or "direction=LT" not in root.rest:
        return None
    limits = [by_name[name] for name in operands if name in by_name]
    constants = [limit for limit in limits if limit.opcode == "constant"]
    return float(constants[0].literal) if len(constants) == 1 else None


def _collective(
    instruction: Instruction, kind: str, computations: Computations, mesh: Mapping[str, int]
) -> tuple[str, str, int, float] | None:
    """Kind, axes, group size and bytes received; None where no device talks to another."""
    members = _members(instruction, kind, math.prod(mesh.values()))
    coordinates = np.stack(np.unravel_index(members, tuple(mesh.values())), axis=-1)
    # A group spans an axis if its members differ along it.
    spans = (coordinates != coordinates[:, :1]).any(axis=(0, 1))
    axes = [axis for axis, spanned in zip(mesh, spans, strict=True) if spanned]
    if not axes:
        return None
    # The result of a start is a tuple of operands, results and marks of synchronisation.
    shapes = [shape for shape in instruction.shapes if shape[0] != "u32" or shape[1]]
    size = sum(map(_bytes, shapes))
    if instruction.opcode.endswith("-start") and kind != "all-reduce":
        size = max(map(_bytes, shapes))
    group = members.shape[1]
    if kind == "all-reduce" and _scattered(instruction, computations):
        kind = "reduce-scatter"
        factor = (group - 1) / group
    elif kind == "collective-permute":
        group, factor = math.prod(mesh[axis] for axis in axes), 1.0
    else:
        factor = _received(kind, group)
    return kind, " x ".join(axes), group, size * factor


def _received(kind: str, group: int) -> float:
    """Bytes that a device receives, over those of the result.

    In a ring every device receives all parts but its own, and an all-reduce does it twice. The
    result of a reduce-scatter is one part.
    """
    shares = {"all-reduce": 2.0 * (group - 1) / group, "reduce-scatter": group - 1.0}
    return shares.get(kind, (group - 1) / group)


def _across_slices(recv: Instruction, slices: int) -> tuple[str, str, int, float] | None:
    """The same of a collective between slices, which the hosts carry for their devices.

    A device exchanges its own part of an array with the devices of its place in other slices.
    """
    match = re.search(r'_xla_megascale_transfer_type="(\w+)"', recv.rest)
    if not match:
        return None
    kind = match[1].lower().replace("_", "-")
    return kind, "data", slices, _bytes(recv.shapes[0]) * _received(kind, slices)


def _scattered(instruction: Instruction, computations: Computations) -> bool:
    """Whether an all-reduce keeps a part alone, which a TPU runs as a reduce-scatter."""
    return any(
        name.startswith("all-reduce-scatter") and instruction in body
        for name, body in computations.items()
    )


def _members(instruction: Instruction, kind: str, devices: int) -> np.ndarray:
    """Numbers of devices [groups, size]; of a permutation pairs of source and target."""
    rest = instruction.rest
    if kind == "collective-permute":
        pairs = re.search(r"source_target_pairs=\{(.*?)\}\}", rest)
        numbers = [int(n) for n in re.findall(r"\d+", pairs[1])] if pairs else [0, 0]
        return np.asarray(numbers).reshape(-1, 2)
    if match := re.search(r"replica_groups=\{(\{[\d,{} ]*\})\}", rest):
        groups = re.findall(r"\{([\d, ]*)\}", match[1])
        return np.asarray([[int(n) for n in group.split(",")] for group in groups])
    if match := re.search(r"replica_groups=\[([\d,]+)\]<=(\[[\d,]+\](?:T\([\d,]+\))?)", rest):
        return _iota(match[2]).reshape(_numbers(match[1]))
    if match := re.search(
        r"replica_groups=mesh\[(.*?)\](?:, device_ids=\((.*?)\)\s)?\s*\{(.*?)\}", rest
    ):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", match[1])}
        order = _iota(match[2]) if match[2] else np.arange(devices)
        return _along(order.reshape(tuple(sizes.values())), list(sizes), match[3])
    return np.arange(devices)[None]


def _iota(text: str) -> np.ndarray:
    """Numbers of devices as "[2,4]T(1,0)" writes them: counted, shaped, transposed, flat."""
    dims = _numbers(text[1 : text.index("]")])
    order = re.search(r"T\(([\d,]+)\)", text)
    numbers = np.arange(math.prod(dims)).reshape(dims)
    return (numbers.transpose(_numbers(order[1])) if order else numbers).reshape(-1)


def _along(devices: np.ndarray, names: list[str], chosen: str) -> np.ndarray:
    """Groups along named axes of an array of devices; 'a':(2)4 is a part of the axis a."""
    shape: list[int] = []
    grouped: list[int] = []
    parts = {
        name: (int(before), int(size)) if size else None
        for name, before, size in re.findall(r"'([^']+)'(?::\((\d+)\)(\d+))?", chosen)
    }
    for name, size in zip(names, devices.shape, strict=True):
        if name not in parts:
            shape.append(size)
        elif (part := parts[name]) is None:
            grouped.append(len(shape))
            shape.append(size)
        else:
            before, inner = part
            grouped.append(len(shape) + 1)
            shape += [before, inner, size // (before * inner)]
    split = devices.reshape(shape)
    size = math.prod(shape[axis] for axis in grouped)
    return np.moveaxis(split, grouped, range(-len(grouped), 0)).reshape(-1, size)


def _numbers(text: str) -> list[int]:
    return [int(n) for n in text.split(",")]


def _memory(
    instruction: Instruction, scope: Mapping[str, Instruction], computations: Computations
) -> float:
    """Bytes that one run of an instruction reads and writes in main memory.

    Slices read what they give, and updates in place write what they change.
    """
    opcode = instruction.opcode
    if opcode in _NO_TRAFFIC or opcode.endswith(("-done", "-update", "async-start")):
        return 0.0
    if "AllocateBuffer" in instruction.rest:
        return 0.0
    operands = [scope[name] for name in instruction.operands if name in scope]
    if opcode in _SLICES:
        return 2.0 * instruction.traffic
    if opcode == "slice-start":
        # Its result is a tuple of the operand, the slice and a mark of synchronisation.
        part = instruction.shapes[-2]
        return float(_bytes(part) * (operands[0].traffic > 0) + _bytes(part) * part[2])
    if opcode in _NAMES_OPERANDS:
        return float(instruction.traffic)
    if opcode in _UPDATES:
        changed = operands[-1] if opcode == "scatter" else operands[1]
        return 2.0 * changed.traffic
    body = computations.get(instruction.called("calls")) if opcode == "fusion" else None
    # A kernel that changes operands in place reads at most all of them; what it writes is unknown.
    pairs = _ALIASES.search(instruction.rest) if opcode == "custom-call" else None
    if pairs:
        names = (instruction.operands[int(n)] for n in re.findall(r"\((\d+)", pairs[1]))
        given = sum(scope[name].traffic for name in names)
        return float(instruction.traffic + sum(o.traffic for o in operands) - given)
    if body is None:
        return float(instruction.traffic + sum(operand.traffic for operand in operands))
    return _fusion_memory(instruction, operands, body, computations)


def _fusion_memory(
    fusion: Instruction,
    operands: Sequence[Instruction],
    body: Sequence[Instruction],
    computations: Computations,
) -> float:
    read = 0.0
    for instruction in body:
        if instruction.opcode != "parameter" or int(instruction.literal) >= len(operands):
            continue
        operand = operands[int(instruction.literal)]
        uses = _uses(instruction, body, computations)
        if uses and all(use.opcode in _SLICES for use in uses):
            read += min(sum(use.size for use in uses), operand.traffic)
        elif not (fusion.traffic and uses and all(use.opcode in _UPDATES for use in uses)):
            read += operand.traffic
    by_name = {instruction.name: instruction for instruction in body}
    root = next(instruction for instruction in body if instruction.root)
    while root.opcode == "bitcast":
        root = by_name[root.operands[0]]
    if root.opcode in _UPDATES and fusion.traffic:
        return read + by_name[root.operands[1 if root.opcode == _UPDATES[0] else -1]].size
    return read + fusion.traffic


def _uses(
    value: Instruction, body: Sequence[Instruction], computations: Computations
) -> list[Instruction]:
    """Instructions that use a value, through bitcasts and into fusions."""
    found: list[Instruction] = []
    for user in body:
        if value.name not in user.operands:
            continue
        if user.opcode == "bitcast":
            found += _uses(user, body, computations)
        elif user.opcode == "fusion":
            inner = computations[user.called("calls")]
            place = str(user.operands.index(value.name))
            parameter = next(i for i in inner if i.opcode == "parameter" and i.literal == place)
            found += _uses(parameter, inner, computations)
        else:
            found.append(user)
    return found
