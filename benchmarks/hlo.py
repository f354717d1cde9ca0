"""Parsing compiled programs: their operations, and how often each runs.

Reads the text of `jax.stages.Compiled.as_text` on any platform. The costs of the
operations are in `benchmarks.costs`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
# Operations that keep the values of their first operand, to follow constants through.
_SAME = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape")
_CALLED = re.compile(
    r"\b(?:calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)"
    r"|branch_computations=\{([^}]*)\}"
)
_RUN = ("async-start", "call", "conditional", "fusion")


class Array(NamedTuple):
    """The type of an array.

    Attributes:
      dtype: the dtype as in the program.
      shape: the sizes.
    """

    dtype: str
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """The number of elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        """The bytes of the elements, without the layout's padding."""
        if self.dtype == "pred":
            return self.size
        bits = re.match(r"[a-z]+(\d+)", self.dtype)  # None for a token
        return self.size * int(bits[1]) // 8 if bits else 0

    def __str__(self) -> str:
        return f"{self.dtype}[{','.join(map(str, self.shape))}]"


class Operation(NamedTuple):
    """One line of a program.

    Attributes:
      name: unique in its computation.
      kind: such as `fusion` or `all-reduce`.
      results: the types of its results; of a tuple, of all elements.
      operands: their names; of a constant or a parameter, the text in their place.
      attributes: the rest of the line.
    """

    name: str
    kind: str
    results: tuple[Array, ...]
    operands: tuple[str, ...]
    attributes: str

    @property
    def bytes(self) -> int:
        """The bytes of the results."""
        return sum(array.bytes for array in self.results)

    @property
    def source(self) -> str:
        """The operation of the user's program it comes from; empty if unknown."""
        found = re.search(r'op_name="([^"]*)"', self.attributes)
        return found[1] if found else ""

    @property
    def called(self) -> tuple[str, ...]:
        """The computations that it calls, except those of a loop."""
        found = _CALLED.findall(self.attributes)
        names = [name for one, many in found for name in (one, *many.split(","))]
        return tuple(name.strip(" %") for name in names if name)

    def attribute(self, name: str) -> str:
        """Returns the word or number after `name=`; empty if there is none."""
        found = re.search(rf"\b{name}=%?([\w.\-]+)", self.attributes)
        return found[1] if found else ""


@dataclasses.dataclass(frozen=True)
class Computation:
    """A named list of operations.

    Attributes:
      operations: by name, in order.
      root: the name of the operation whose results are returned.
    """

    operations: dict[str, Operation]
    root: str

    @functools.cached_property
    def parameters(self) -> tuple[str, ...]:
        """The names of its parameters, in order."""
        found = [each for each in self.operations.values() if each.kind == "parameter"]
        return tuple(e.name for e in sorted(found, key=lambda e: int(e.operands[0])))

    def operands(self, operation: Operation) -> list[Operation]:
        """Returns the operations that an operation has as operands."""
        return [self.operations[n] for n in operation.operands if n in self.operations]


@dataclasses.dataclass(frozen=True)
class Program:
    """A compiled program.

    Attributes:
      computations: by name.
      entry: the name of the entry computation.
    """

    computations: dict[str, Computation]
    entry: str

    def arrays(self) -> set[Array]:
        """Returns the types of all arrays, including those inside fusions."""
        return {
            array
            for body in self.computations.values()
            for operation in body.operations.values()
            for array in operation.results
        }


class Frame(NamedTuple):
    """A call of a computation.

    Attributes:
      body: the computation.
      caller: the frame of the call; `None` for the entry.
      arguments: for each parameter, its name in the caller.
    """

    body: Computation
    caller: "Frame | None" = None
    arguments: tuple[str, ...] = ()


class Step(NamedTuple):
    """An operation, and how often it runs.

    Attributes:
      operation: the operation.
      times: how often it runs.
      frame: the frame that it belongs to.
    """

    operation: Operation
    times: int
    frame: Frame


class Collective(NamedTuple):
    """One operand of a collective.

    Attributes:
      kind: the collective.
      shape: the operand's shape.
      size: the operand's bytes.
      times: how often it runs.
    """

    kind: str
    shape: tuple[int, ...]
    size: int
    times: int


# Reading -------------------------------------------------------------------------


def parse(text: str) -> Program:
    """Parses the text of a compiled program.

    Raises:
      ValueError: the text has no entry computation.
    """
    computations: dict[str, Computation] = {}
    entry, name, root = "", "", ""
    lines: dict[str, Operation] = {}
    for line in re.sub(r"/\*.*?\*/", "", text).splitlines():
        header = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*-> .*\{$", line)
        if header:
            name, root, lines = header[2], "", {}
            entry = name if header[1] else entry
        elif line.startswith("}") and name:
            computations[name] = Computation(lines, root or next(reversed(lines), ""))
            name = ""
        elif name and (operation := _operation(line)):
            lines[operation.name] = operation
            if line.lstrip().startswith("ROOT"):
                root = operation.name
    if not entry:
        raise ValueError("this is not a compiled program: it has no ENTRY computation")
    return Program(computations, entry)


def _operation(line: str) -> Operation | None:
    head = re.match(r"\s*(?:ROOT )?%?([\w.\-]+) = ", line)
    if not head:
        return None
    start = head.end()
    # A tuple's type is in parentheses; any other contains no spaces.
    end = _closing(line, start) if line[start] == "(" else line.index(" ", start)
    kind = re.match(r" ?([\w\-]+)\(", line[end:])
    if not kind:
        return None
    opening = end + kind.end() - 1
    closing = _closing(line, opening)
    inside = line[opening + 1 : closing - 1]
    names = re.findall(r"%([\w.\-]+)", inside)
    return Operation(
        head[1],
        kind[1],
        tuple(_arrays(line[start:end])),
        tuple(names) if names else tuple(filter(None, [inside.strip()])),
        line[closing:],
    )


def _closing(line: str, opening: int) -> int:
    """Returns the index after the parenthesis that closes the one at `opening`."""
    depth = 0
    for index in range(opening, len(line)):
        depth += {"(": 1, ")": -1}.get(line[index], 0)
        if depth == 0:
            return index + 1
    return len(line)


def _arrays(text: str) -> Iterator[Array]:
    for dtype, sizes in re.findall(r"\b([a-z]\w*)\[([\d,<= ]*)\]", text):
        yield Array(dtype, tuple(int(n) for n in re.findall(r"\d+", sizes)))


# Running -------------------------------------------------------------------------


def steps(program: Program, *, inside_fusions: bool = False) -> Iterator[Step]:
    """Yields the operations in order, with the number of times that they run.

    Loops and calls are entered and not yielded themselves. All branches of a
    conditional are included; the body of a loop is counted once if its trip count is
    not known statically, see `unknown_loops`.

    Args:
      program: from `parse`.
      inside_fusions: whether to yield the operations of a fusion after the fusion.
    """
    yield from _iterate(
        program, Frame(program.computations[program.entry]), 1, inside_fusions
    )


def _iterate(
    program: Program, frame: Frame, times: int, inside_fusions: bool
) -> Iterator[Step]:
    for operation in frame.body.operations.values():
        if operation.kind == "while":
            inner = _enter(program, frame, operation, operation.attribute("body"))
            runs = times * (trip_count(program, frame, operation) or 1)
            yield from _iterate(program, inner, runs, inside_fusions)
            continue
        if operation.kind not in ("call", "conditional"):
            yield Step(operation, times, frame)
        if operation.kind not in _RUN:
            continue
        if operation.kind == "fusion" and not inside_fusions:
            continue
        for name in operation.called:
            inner = _enter(program, frame, operation, name)
            yield from _iterate(program, inner, times, inside_fusions)


def _enter(program: Program, frame: Frame, operation: Operation, name: str) -> Frame:
    arguments = operation.operands
    if operation.kind == "conditional":  # the index, then an operand for each branch
        index = operation.called.index(name) + 1
        arguments = arguments[index : index + 1]
    return Frame(program.computations[name], frame, arguments)


def unknown_loops(program: Program) -> list[str]:
    """Returns the names of the loops without a static trip count."""
    entry = Frame(program.computations[program.entry])
    return [
        loop.name
        for loop, frame in _loops(program, entry)
        if trip_count(program, frame, loop) is None
    ]


def _loops(program: Program, frame: Frame) -> Iterator[tuple[Operation, Frame]]:
    for operation in frame.body.operations.values():
        names = operation.called if operation.kind in _RUN else ()
        if operation.kind == "while":
            yield operation, frame
            names = (operation.attribute("body"),)
        for name in names:
            yield from _loops(program, _enter(program, frame, operation, name))


def trip_count(program: Program, frame: Frame, loop: Operation) -> int | None:
    """Returns how often a loop runs at most; `None` if that is not known statically."""
    known = re.search(r'known_trip_count"?[:=]\{"?n"?:"?(\d+)', loop.attributes)
    if known:
        return int(known[1])
    condition = _enter(program, frame, loop, loop.attribute("condition"))
    bounds = [
        bound
        for compare, where in _comparisons(program, condition, condition.body.root)
        if (bound := _bound(program, compare, where)) is not None
    ]
    return min(bounds, default=None)


def _bound(program: Program, compare: Operation, where: Frame) -> int | None:
    """Returns how often a comparison lets a loop run; None if that is not known."""
    sides = [_constant(program, where, name) for name in compare.operands]
    if len(sides) != 2 or sides[0] is None or sides[1] is None:
        return None
    low, high = sides[0], sides[1]
    direction = compare.attribute("direction")
    if direction in ("GT", "GE"):
        low, high = high, low
    if direction not in ("LT", "GT", "LE", "GE", "NE"):
        return None
    return max(abs(high - low) + (direction in ("LE", "GE")), 0)


def _comparisons(
    program: Program, frame: Frame, name: str
) -> Iterator[tuple[Operation, Frame]]:
    """Finds the comparisons that all have to hold."""
    operation = frame.body.operations.get(name)
    if operation is None:
        return
    if operation.kind == "compare":
        yield operation, frame
    elif operation.kind in ("fusion", "call"):
        inner = _enter(program, frame, operation, operation.called[0])
        yield from _comparisons(program, inner, inner.body.root)
    elif operation.kind == "and" or operation.kind in _SAME:
        for operand in operation.operands:
            yield from _comparisons(program, frame, operand)


def _constant(
    program: Program, frame: Frame, name: str, path: tuple[int, ...] = ()
) -> int | None:
    """Returns the integer value of an operation when its computation is first entered.

    Args:
      program: the program.
      frame: the frame of the operation.
      name: the operation's name.
      path: the index of the element, if the result is a tuple.
    """
    operation = frame.body.operations.get(name)
    if operation is None:
        return None
    first = operation.operands[0] if operation.operands else ""
    match operation.kind:
        case "constant":
            return int(first) if re.fullmatch(r"-?\d+", first) else None
        case "get-tuple-element":
            index = int(operation.attribute("index"))
            return _constant(program, frame, first, (index, *path))
        case "tuple" if path:
            return _constant(program, frame, operation.operands[path[0]], path[1:])
        case "parameter" if frame.caller and int(first) < len(frame.arguments):
            argument = frame.arguments[int(first)]
            return _constant(program, frame.caller, argument, path)
        case "fusion" | "call":
            inner = _enter(program, frame, operation, operation.called[0])
            return _constant(program, inner, inner.body.root, path)
        case kind if kind in _SAME:
            return _constant(program, frame, first, path)
    return None


# Collectives ---------------------------------------------------------------------


def collectives(text: str) -> list[Collective]:
    """Returns the collectives of one device, an entry per operand.

    A collective in two fusions, that of its start and that of its end, is counted once.
    """
    found, seen = [], set()
    for operation, times, frame in steps(parse(text), inside_fusions=True):
        kind = operation.kind.removesuffix("-start")
        if kind not in COLLECTIVES:
            continue
        channel = operation.attribute("channel_id")
        if channel and (kind, channel, operation.operands) in seen:
            continue
        seen.add((kind, channel, operation.operands))
        for operand in frame.body.operands(operation):
            found += [
                Collective(kind, array.shape, array.bytes, times)
                for array in operand.results
            ]
    return found
