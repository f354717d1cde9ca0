"""Reading compiled programs: their operations, loops counted as often as they run."""

import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

BYTES = {"pred": 1, "bf16": 2, "f16": 2, "f32": 4, "s32": 4, "u32": 4, "f64": 8}
COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "reduce-scatter",
)


def operations(text: str) -> Iterator[tuple[str, int]]:
    """Yields the lines of a program and how often each one runs."""
    bodies: dict[str, str] = {}
    for part in re.split(r"\n(?=%|ENTRY)", text):
        name = re.match(r"(?:ENTRY )?%?([\w.-]+)", part)
        if name:
            bodies["ENTRY" if part.startswith("ENTRY") else name[1]] = part

    def walk(name: str, times: int) -> Iterator[tuple[str, int]]:
        for line in bodies[name].splitlines():
            yield line, times
            trips = re.search(r'known_trip_count":\{"n":"(\d+)"', line)
            for called in re.findall(r"(?:calls|body|to_apply)=%([\w.-]+)", line):
                yield from walk(called, times * (int(trips[1]) if trips else 1))

    return walk("ENTRY", 1)


def dot_flops(text: str) -> int:
    """Returns the multiply-adds, times two, of all matrix products."""
    total = 0
    shapes = dict(re.findall(r"%([\w.-]+) = \w+\[([\d,]*)\]", text))
    for line, times in operations(text):
        dot = re.search(r"= \w+\[([\d,]*)\]\S* dot\(%([\w.-]+)", line)
        if dot:
            axes = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", line)
            assert axes is not None
            lhs = shapes[dot[2]].split(",")
            inner = np.prod([int(lhs[int(i)]) for i in axes[1].split(",")])
            outer = np.prod([int(n) for n in dot[1].split(",")])
            total += times * 2 * int(inner * outer)
    return total


class Collective(NamedTuple):
    """One operand that a device hands over to others.

    Attributes:
      kind: the operation.
      shape: the operand's.
      size: the operand's bytes.
      times: how often it runs.
    """

    kind: str
    shape: tuple[int, ...]
    size: int
    times: int


def collectives(text: str) -> list[Collective]:
    """Returns what one device hands over."""
    found = []
    kinds = "|".join(COLLECTIVES)
    types = dict(re.findall(r"%([\w.-]+) = (\w+\[[\d,]*\])", text))
    for line, times in operations(text):
        call = re.search(rf" ({kinds})(?:-start)?\(([^)]*)\)", line)
        for name in re.findall(r"%([\w.-]+)", call[2]) if call else ():
            dtype, dims = types[name].rstrip("]").split("[")
            shape = tuple(int(n) for n in dims.split(",") if n)
            size = BYTES[dtype] * int(np.prod(shape))
            found.append(Collective(call[1] if call else "", shape, size, times))
    return found
