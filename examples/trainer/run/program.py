"""Reads a compiled program's text: what its devices send each other, and its cycles.

A loop's body stands once in the text and counts as often as it runs. Only the compiler
of TPUs writes estimated cycles, and it writes none for communication, nor for kernels
that are not its own.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterator

BYTES = {"pred": 1, "bf16": 2, "f16": 2}
# `%name = type operation(operands), attributes`; types in brackets are of several par
OPERATION = re.compile(
    r"(?:ROOT )?%?([\w.\-]+) = (\((?:[^()]|\([^()]*\))*\)|\S+) ([\w\-]+)\((.*)"
)
HEADING = re.compile(r"(ENTRY )?%?([\w.\-]+) \(.*\) -> .* \{")
CALLED = re.compile(r"(?:to_apply|calls|\w+_computation)=%?([\w.\-]+)")
# What a device sends, times the whole of the array that the collective is about, in a
# group of n devices that pass on parts of it in a ring.
SENT = {
    "all-gather": lambda n: (n - 1) / n,
    "all-reduce": lambda n: 2 * (n - 1) / n,
    "reduce-scatter": lambda n: (n - 1) / n,
    "all-to-all": lambda n: (n - 1) / n,
    "ragged-all-to-all": lambda n: (n - 1) / n,
    "collective-permute": lambda n: 1.0,
    "collective-broadcast": lambda n: 1.0,
}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Collectives of one kind: how many run, and the bytes that a device sends."""

    count: int
    sent: float


@dataclasses.dataclass(frozen=True)
class Program:
    """What one call of a compiled program does on each device.

    Attributes:
      cycles: the compiler's estimate, without communication; 0 where there is none.
      scoped_cycles: those of operations inside the scope that was asked for.
      traffic: by kind of collective.
      kernels: calls of kernels that the compiler does not estimate.
      unknown_loops: loops of which it is unknown how often they run: counted once.
    """

    cycles: int
    scoped_cycles: int
    traffic: dict[str, Traffic]
    kernels: int
    unknown_loops: int

    @property
    def sent(self) -> float:
        """Bytes that each device sends."""
        return sum(traffic.sent for traffic in self.traffic.values())


def read_program(text: str, devices: int, scope: str = "loss") -> Program:
    """Reads the optimised HLO of a program.

    Args:
      text: of `compiled.as_text()`.
      devices: that the program runs on.
      scope: a `jax.named_scope` whose cycles are also counted alone. Forward and
        backward belong to it; a fusion does if its result does.
    """
    reader = _Reader(text, devices, scope)
    reader.visit(reader.entry, 1)
    traffic = {
        kind: Traffic(reader.counts[kind], reader.sent[kind])
        for kind in SENT
        if reader.counts[kind]
    }
    cycles = reader.cycles, reader.scoped_cycles
    return Program(*cycles, traffic, reader.kernels, reader.unknown_loops)


class _Reader:
    def __init__(self, text: str, devices: int, scope: str) -> None:
        self.entry, self._bodies = _split(text)
        self._devices = devices
        self._scope = re.compile(rf'op_name="[^"]*[/(]{scope}[/)"]')
        self.cycles = self.scoped_cycles = self.kernels = self.unknown_loops = 0
        self.counts: collections.Counter[str] = collections.Counter()
        self.sent: collections.defaultdict[str, float] = collections.defaultdict(float)

    def visit(self, name: str, times: int) -> None:
        """Adds what a computation does, `times` times."""
        body = self._bodies.get(name, [])
        for line in body:
            found = OPERATION.match(line)
            if not found:
                continue
            _, shape, kind, _ = found.groups()
            if cycles := re.search(r'"estimated_cycles":"(\d+)"', line):
                self.cycles += times * int(cycles[1])
                inside = self._scope.search(line) is not None
                self.scoped_cycles += inside * times * int(cycles[1])
            if kind.removesuffix("-start") in SENT:
                self._add(name, line, shape, kind, times)
            elif kind == "while":
                self._visit_loop(line, body, times)
            elif kind == "custom-call" and 'call_target="tpu_custom_call"' in line:
                self.kernels += times
            elif kind in ("call", "fusion", "conditional", "async-start"):
                for called in _called(line):
                    self.visit(called, times)

    def _visit_loop(self, line: str, body: list[str], times: int) -> None:
        trips = self._trips(line, body)
        self.unknown_loops += trips is None
        inside = re.search(r"body=%?([\w.\-]+)", line)
        if inside:
            self.visit(inside[1], times * (1 if trips is None else trips))

    def _trips(self, line: str, body: list[str]) -> int | None:
        """How often a loop runs: as the compiler knows, or by a constant bound."""
        if known := re.search(r'known_trip_count"?[:=]\{"n":"(\d+)"', line):
            return int(known[1])
        condition = re.search(r"condition=%?([\w.\-]+)", line)
        compared = self._bodies.get(condition[1], []) if condition else []
        if bounds := _constants(compared):
            return max(bounds.values())
        # The bound is carried: which part of the tuple, and what it starts as.
        parts = [
            int(part)
            for part in re.findall(
                r"s32\[\]\S* get-tuple-element\(.*?index=(\d+)", "\n".join(compared)
            )
        ]
        start = re.search(r" while\(%?([\w.\-]+)\)", line)
        made = next((x for x in body if start and x.startswith(f"%{start[1]} = ")), "")
        carried = re.findall(r"%([\w.\-]+)", made.rpartition(" tuple(")[2])
        constants = _constants(body)
        bounds = [constants.get(carried[i], 0) for i in parts if i < len(carried)]
        return max(bounds, default=0) or None

    def _add(self, name: str, line: str, shape: str, kind: str, times: int) -> None:
        """Adds a collective."""
        size, group = _size(shape), _group_size(line, self._devices)
        is_start = kind.endswith("-start")
        kind = kind.removesuffix("-start")
        if is_start and kind == "all-gather":
            # Its type is of the operand and of the result.
            size = size * group // (group + 1)
        elif is_start and kind != "all-reduce":
            size //= 2
        if kind == "reduce-scatter":
            size *= group
        elif kind == "all-reduce" and name.startswith("all-reduce-scatter"):
            # On TPUs a fusion of a sum and a slice, which is how it is carried out.
            kind = "reduce-scatter"
        self.counts[kind] += times
        self.sent[kind] += times * size * SENT[kind](group)


def _split(text: str) -> tuple[str, dict[str, list[str]]]:
    """The name of the entry, and the lines of every computation."""
    entry, bodies = "", {}
    lines: list[str] = []
    for line in text.splitlines():
        if found := HEADING.match(line):
            lines = bodies[found[2]] = []
            entry = found[2] if found[1] else entry
        else:
            lines.append(line.strip())
    return entry, bodies


def _called(line: str) -> Iterator[str]:
    yield from CALLED.findall(line)
    if branches := re.search(r"branch_computations=\{([^}]*)\}", line):
        yield from re.findall(r"%?([\w.\-]+)", branches[1])


def _constants(lines: list[str]) -> dict[str, int]:
    """The scalar constants among some lines, by name."""
    found = re.findall(
        r"%?([\w.\-]+) = [su]32\[\]\S* constant\((\d+)\)", "\n".join(lines)
    )
    return {name: int(value) for name, value in found}


def _size(shape: str) -> int:
    """Bytes of a type, or of all the types in brackets."""
    return sum(
        _width(name) * math.prod(int(d) for d in sizes.split(",") if d)
        for name, sizes in re.findall(r"\b([a-z]\w*)\[([\d,]*)\]", shape)
    )


def _width(name: str) -> int:
    bits = re.search(r"\d+", name)
    return BYTES.get(name, max(1, int(bits[0]) // 8) if bits else 0)


def _group_size(line: str, devices: int) -> int:
    """How many devices take part in a collective."""
    if listed := re.search(r"replica_groups=\{\{([\d,]+)\}", line):
        return listed[1].count(",") + 1
    if counted := re.search(r"replica_groups=\[\d+,(\d+)\]", line):
        return int(counted[1])
    if named := re.search(r"replica_groups=mesh\[([^\]]*)\] \{([^}]*)\}", line):
        sizes = dict(re.findall(r"'(\w+)'=(\d+)", named[1]))
        # An axis, or a part of one, as of 'axis_0':(2)4.
        axes = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", named[2])
        return math.prod(int(part or sizes[axis]) for axis, part in axes)
    return devices
