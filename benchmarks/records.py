"""The contents of results files, and merging a new run into one."""

import json
from pathlib import Path
from typing import NotRequired, TypedDict


class SkippedRecord(TypedDict):
    """An implementation that did not run."""

    skipped: str


class FiguresRecord(TypedDict):
    """The figures of an implementation, in seconds and bytes."""

    median: float
    min: float
    max: float
    interquartile_range: float
    times: list[float]
    cpu_times: NotRequired[list[float]]
    compile_seconds: float
    temp_bytes: int | None
    output_bytes: int | None
    value: float | None


ImplementationRecord = FiguresRecord | SkippedRecord


class RatioRecord(TypedDict):
    """A median and its quartiles."""

    median: float
    low: float
    high: float


class OutcomeRecord(TypedDict):
    """A goal and its result."""

    candidate: str
    baseline: str
    metric: str
    ratio: RatioRecord | None
    goal: float | None
    status: str
    reason: str


class CaseRecord(TypedDict):
    """A benchmark and its goals."""

    title: str
    implementations: dict[str, ImplementationRecord]
    goals: list[OutcomeRecord]


class GroupRecord(TypedDict):
    """The cases of a group, from one run."""

    date: str
    rounds: int
    quick: bool
    cases: list[CaseRecord]


class AxisRecord(TypedDict):
    """The growth along one axis; points and shapes are by size."""

    date: str
    rounds: int
    quick: bool
    shapes: dict[str, str]
    points: dict[str, ImplementationRecord]
    time_slope: float | None
    temp_slope: float | None


class MachineRecord(TypedDict):
    """The machine of the figures; memory in bytes."""

    processor: str
    cores: int
    memory: int | None
    device: str


class Results(TypedDict):
    """A results file; date, rounds and versions are those of the last run."""

    machine: MachineRecord
    versions: dict[str, str | None]
    date: str
    rounds: int
    groups: dict[str, GroupRecord]
    scaling: dict[str, AxisRecord]


class CostRecord(TypedDict):
    """The cost of equal operations, in cycles on a TPU, else in bytes."""

    kind: str
    result: str
    source: str
    amount: int


class CompiledRow(TypedDict):
    """The figures of one compiled program.

    Attributes:
      name: the name of what was compiled.
      kind: `"baseline"` or `"candidate"`.
      reference: the baseline that it is compared with.
      estimated_ms: estimate of the TPU's compiler.
      moved_bytes: bytes that the GPU's kernels move.
      outside_bytes: those of them that are not moved by matrix products.
      temp_bytes: temporary memory per device.
      compile_seconds: time to trace and compile.
      costliest: the most expensive operations.
      failed: why there is no program; no figures then.
    """

    name: str
    kind: str
    reference: str
    estimated_ms: NotRequired[float]
    moved_bytes: NotRequired[int]
    outside_bytes: NotRequired[int]
    temp_bytes: NotRequired[int]
    compile_seconds: NotRequired[float]
    costliest: NotRequired[list[CostRecord]]
    failed: NotRequired[str]


class CompiledRecord(TypedDict):
    """A results file of `benchmarks.compiled`."""

    chip: str
    shape: list[int]
    mesh: dict[str, int]
    versions: dict[str, str | None]
    flags: dict[str, str]
    rows: list[CompiledRow]


def load(path: Path) -> Results | None:
    """Reads a results file, if it exists."""
    return json.loads(path.read_text()) if path.exists() else None


def merge(old: Results | None, new: Results) -> Results:
    """Returns the new results, with the old groups and axes that were not rerun."""
    if old is None:
        return new
    return {
        **new,
        "groups": old["groups"] | new["groups"],
        "scaling": old["scaling"] | new["scaling"],
    }


def save(path: Path, results: Results) -> None:
    """Writes a results file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
