"""The costs of a compiled program: estimated cycles, bytes moved, multiply-adds.

These are properties of the program and its compiler's estimates, not measured times. A
slice costs the bytes of the slice, not of its operand; an in-place update those of the
update.
"""

import collections
import math
import re
from typing import NamedTuple

import numpy as np

from benchmarks.hlo import (
    Array,
    Computation,
    Operation,
    Program,
    Step,
    parse,
    steps,
)

# Operations that move no bytes: aliases, and the ends of asynchronous operations.
_FREE = {
    "add-dependency",
    "after-all",
    "async-done",
    "async-start",
    "async-update",
    "bitcast",
    "constant",
    "get-tuple-element",
    "opt-barrier",
    "optimization-barrier",
    "parameter",
    "partition-id",
    "replica-id",
    "tuple",
}
# Inside a fusion these read only the needed elements of their operand.
_ELEMENTWISE = {
    "bitcast",
    "bitcast-convert",
    "convert",
    "copy",
    "exponential",
    "negate",
    "reshape",
    "transpose",
}
# A product of cuBLAS, and of the package's kernel in Mosaic GPU.
_CUBLAS, _OUR_PRODUCT = "__cublas$", "product_and_sums"
_SLICES = ("dynamic-slice", "gather", "slice")
_UPDATES = {"dynamic-update-slice": 1, "scatter": 2}  # the index of the updates


class Cost(NamedTuple):
    """The total cost of equal operations.

    Attributes:
      kind: such as `fusion`.
      result: the type of their first result.
      source: the operation of the user's program.
      amount: cycles or bytes.
    """

    kind: str
    result: str
    source: str
    amount: int


# Cycles --------------------------------------------------------------------------


def estimated_cycles(program: Program) -> int:
    """Returns the cycles that the TPU's compiler estimates; 0 from other compilers.

    Asynchronous operations, such as copies and collectives, have no estimate.
    """
    return sum(_cycles(step) for step in steps(program))


def _cycles(step: Step) -> int:
    found = re.search(r'"estimated_cycles":"(\d+)"', step.operation.attributes)
    return step.times * int(found[1]) if found else 0


def costliest(program: Program, count: int, *, by: str = "cycles") -> list[Cost]:
    """Returns the most expensive operations, with equal ones added up.

    Args:
      program: from `benchmarks.hlo.parse`.
      count: the number of entries to return.
      by: `"cycles"` or `"bytes"`.
    """

    def moved(step: Step) -> int:
        return step.times * bytes_of(program, step.frame.body, step.operation)

    cost = moved if by == "bytes" else _cycles
    total: collections.Counter[tuple[str, str, str]] = collections.Counter()
    for step in steps(program):
        made = step.operation.results
        result = str(made[0]) if made else ""
        key = step.operation.kind, result, step.operation.source
        total[key] += cost(step)
    return [Cost(*key, amount) for key, amount in total.most_common(count) if amount]


# Bytes ---------------------------------------------------------------------------


def moved_bytes(program: Program, *, by_products: bool = True) -> int:
    """Returns the bytes that the kernels read and write, without caches.

    Args:
      program: from `benchmarks.hlo.parse`.
      by_products: whether matrix products count, which compute while they move bytes.
    """
    return sum(
        times * bytes_of(program, frame.body, operation)
        for operation, times, frame in steps(program)
        if by_products or not _has_product(program, operation)
    )


def _has_product(program: Program, operation: Operation) -> bool:
    if operation.kind in ("dot", "convolution"):
        return True
    if operation.kind != "fusion":
        return _CUBLAS in operation.attributes or _OUR_PRODUCT in operation.source
    fused = program.computations[operation.called[0]].operations.values()
    return any(_has_product(program, inner) for inner in fused)


def bytes_of(program: Program, body: Computation, operation: Operation) -> int:
    """Returns the bytes that one run of an operation reads and writes.

    Args:
      program: the program.
      body: the computation of the operation.
      operation: not one inside a fusion, which moves no bytes itself.
    """
    kind, operands = operation.kind, body.operands(operation)
    if (
        kind in _FREE
        or kind.endswith("-done")
        or '"AllocateBuffer"' in operation.attributes
    ):
        return 0
    if kind == "fusion":
        fused = program.computations[operation.called[0]]
        taken = (
            min(_read(program, fused, index), operand.bytes)
            for index, operand in enumerate(operands)
        )
        return sum(taken) + _written(program, fused, fused.root)
    if kind in _SLICES:
        return 2 * operation.bytes + sum(each.bytes for each in operands[1:])
    if kind in _UPDATES:
        indices = operands[1].bytes if kind == "scatter" else 0
        return 2 * operands[_UPDATES[kind]].bytes + indices
    if kind == "slice-start":
        return 2 * operation.results[1].bytes
    if kind.endswith("-start") and len(operation.results) > len(operands):
        return operation.bytes  # its results name the operands again
    # The other result of cuBLAS is its workspace.
    made = (
        operation.results[:1] if _CUBLAS in operation.attributes else operation.results
    )
    return sum(a.bytes for a in made) + sum(each.bytes for each in operands)


def _read(program: Program, fused: Computation, index: int) -> int:
    """Returns the bytes that a fusion reads of its operand `index`."""
    if index >= len(fused.parameters):
        return 0
    parameter = fused.operations[fused.parameters[index]]
    (array,) = parameter.results[:1] or (Array("token", ()),)
    scale = array.bytes / array.size if array.size else 0
    names, total = {parameter.name}, 0.0
    for operation in fused.operations.values():
        if not names.intersection(operation.operands):
            continue
        where = [i for i, name in enumerate(operation.operands) if name in names]
        if operation.kind in _ELEMENTWISE and operation.name != fused.root:
            names.add(operation.name)
        elif operation.kind in _SLICES and where == [0]:
            total += scale * operation.results[0].size
        elif operation.kind == "fusion":
            inner = program.computations[operation.called[0]]
            total += sum(_read(program, inner, i) for i in where)
        elif operation.kind not in _UPDATES or where != [0]:
            return parameter.bytes
    return min(round(total), parameter.bytes)


def _written(program: Program, fused: Computation, name: str) -> int:
    """Returns the bytes that a fusion writes for one of its results, or for all."""
    operation = fused.operations[name]
    if operation.kind == "tuple":
        return sum(_written(program, fused, each) for each in operation.operands)
    origin = operation
    while origin.kind in _ELEMENTWISE and origin.operands[0] in fused.operations:
        origin = fused.operations[origin.operands[0]]
    if origin.kind in _UPDATES:
        update = fused.operands(origin)[_UPDATES[origin.kind]]
        scale = operation.bytes / max(operation.results[0].size, 1)
        return round(scale * update.results[0].size)
    if origin.kind == "fusion":
        inner = program.computations[origin.called[0]]
        return _written(program, inner, inner.root)
    return operation.bytes


# Multiply-adds -------------------------------------------------------------------


def dot_flops(text: str) -> int:
    """Returns the flops of all matrix products of a program."""
    total = 0
    for operation, times, frame in steps(parse(text), inside_fusions=True):
        operands = [each.results[0] for each in frame.body.operands(operation)[:2]]
        if operation.kind == "convolution":
            total += times * _convolution_flops(operation, *operands)
        elif operation.kind == "dot" or "__cublas$" in operation.attributes:
            total += times * _product_flops(operation, operands[0])
    return total


def _product_flops(operation: Operation, left: Array) -> int:
    axes = re.search(
        r'lhs_contracting_dim(?:s|ensions)"?[=:][{\[]([\d,"]*)', operation.attributes
    )
    inner = [left.shape[int(i)] for i in re.findall(r"\d+", axes[1])] if axes else []
    return 2 * operation.results[0].size * math.prod(inner)


def _convolution_flops(operation: Operation, left: Array, kernel: Array) -> int:
    """Returns the flops of a convolution, which TPUs use for matrix products."""
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", operation.attributes)
    if labels is None:
        return 0
    sizes = [
        dict(zip(names, array.shape, strict=True))
        for names, array in zip(
            labels.groups(), (left, kernel, operation.results[0]), strict=True
        )
    ]
    total = 2 * sizes[2]["b"] * sizes[2]["f"] * sizes[1]["i"]
    for axis, name in enumerate(sorted(set(labels[1]) - {"b", "f"})):
        window = _window(operation, axis)
        total *= _overlaps(window, sizes[0][name], sizes[1][name], sizes[2][name])
    return total


def _window(operation: Operation, axis: int) -> dict[str, list[int]]:
    """Returns the entries of a convolution's window along one axis."""
    window = re.search(r"window=\{([^}]*)\}", operation.attributes)
    entries = re.findall(r"(\w+)=([\w\-]+)", window[1]) if window else []
    return {
        name: [int(n) for n in re.findall(r"-?\d+", value.split("x")[axis])]
        for name, value in entries
        if re.search(r"\d", value)
    }


def _overlaps(window: dict[str, list[int]], size: int, kernel: int, out: int) -> int:
    """Returns how many pairs of an output and a kernel index meet an element."""
    (stride,), (apart,) = window.get("stride", [1]), window.get("lhs_dilate", [1])
    (dilate,) = window.get("rhs_dilate", [1])
    before = window.get("pad", [0])[0]
    index = np.arange(out)[:, None] * stride + np.arange(kernel) * dilate - before
    inside = (index >= 0) & (index <= (size - 1) * apart) & (index % apart == 0)
    return int(inside.sum())
