"""The growth of the fused call's time and memory with N, D, V and K."""

import dataclasses
from typing import NamedTuple

import numpy as np

from benchmarks import candidates, shapes
from benchmarks.arrays import make_batch
from benchmarks.shapes import Shape
from benchmarks.timing import Figures, Implementation, Result, time_interleaved

CPU_BASE = Shape(1024, 16384, 256, depths=1)
DEVICE_BASE = Shape(16384, 65536, 2048, dtype="bfloat16", depths=1)
FACTORS = (0.25, 0.5, 1, 2, 4)
DEPTHS = (1, 2, 3, 5, 7)
FIELDS = {"N": "tokens", "D": "width", "V": "vocab"}
AXES = (*FIELDS, "K")


class Growth(NamedTuple):
    """The figures along an axis, by the size that grows.

    Attributes:
      shapes: the shape of each point.
      results: the figures of each point.
      time_slope: the exponent of the median time; `None` if unknown.
      temp_slope: the exponent of the temporary memory.
    """

    shapes: dict[int, Shape]
    results: dict[int, Result]
    time_slope: float | None
    temp_slope: float | None


def points(axis: str, device_kind: str, quick: bool = False) -> dict[int, Shape]:
    """Returns the shapes along an axis, by the size that grows.

    Args:
      axis: one of `AXES`.
      device_kind: `jax.Device.device_kind`, which selects the fixed sizes.
      quick: two tiny points.

    Returns:
      Shapes by size. Along K the size is K + 1, the number of hidden states that share
      the head: the main one costs as much as a depth.
    """
    base = CPU_BASE if device_kind == "cpu" else DEVICE_BASE
    if quick:
        base = shapes.tiny(base)
    if axis == "K":
        sized = {k + 1: dataclasses.replace(base, depths=k) for k in DEPTHS}
    else:
        field = FIELDS[axis]
        sizes = [int(getattr(base, field) * factor) for factor in FACTORS]
        sized = {size: dataclasses.replace(base, **{field: size}) for size in sizes}
    return dict(list(sized.items())[: 2 if quick else None])


def slope(sizes: list[int], values: list[float]) -> float | None:
    """Fits the exponent of growth, the slope of log value on log size.

    `None` for fewer than two points, or if a value is 0.
    """
    if len(sizes) < 2 or min(values) <= 0:
        return None
    return float(np.polyfit(np.log(sizes), np.log(values), 1)[0])


def measure(axis: str, device_kind: str, rounds: int, quick: bool = False) -> Growth:
    """Times the everything call, with its gradient, at all points of an axis."""
    chosen = points(axis, device_kind, quick)
    calls = {f"{size}": _call(shape) for size, shape in chosen.items()}
    timed = time_interleaved(calls, rounds)
    results = {size: timed[f"{size}"] for size in chosen}
    figures = {k: v for k, v in results.items() if isinstance(v, Figures)}
    times = [float(np.median(each.times)) for each in figures.values()]
    temps = [float(each.temp_bytes or 0) for each in figures.values()]
    sizes = list(figures)
    return Growth(chosen, results, slope(sizes, times), slope(sizes, temps))


def _call(shape: Shape) -> Implementation:
    config = candidates.with_depths(candidates.everything(shape.vocab), shape.depths)
    return candidates.candidate(config, make_batch(shape), report=True)
