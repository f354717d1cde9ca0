"""What a results file holds, and how a new run is merged into it."""

import json
from pathlib import Path
from typing import NotRequired, TypedDict


class SkippedRecord(TypedDict):
    """A contender that did not run."""

    skipped: str


class FiguresRecord(TypedDict):
    """A contender's figures, in seconds and bytes."""

    median: float
    min: float
    max: float
    interquartile_range: float
    times: list[float]
    compile_seconds: float
    temp_bytes: int | None
    output_bytes: int | None
    value: float | None


ContenderRecord = FiguresRecord | SkippedRecord


class RatioRecord(TypedDict):
    """A median and its quartiles."""

    median: float
    low: float
    high: float


class OutcomeRecord(TypedDict):
    """A goal and what became of it."""

    subject: str
    rival: str
    metric: str
    ratio: RatioRecord | None
    goal: float | None
    status: str
    reason: str


class CaseRecord(TypedDict):
    """A race and its goals."""

    title: str
    contenders: dict[str, ContenderRecord]
    goals: list[OutcomeRecord]


class GroupRecord(TypedDict):
    """The cases of a group, which were run together."""

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
    points: dict[str, ContenderRecord]
    time_slope: float | None
    temp_slope: float | None


class MachineRecord(TypedDict):
    """What the figures were measured on; memory in bytes."""

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
    """Operations that are alike; the amount is in cycles on a TPU, else in bytes."""

    kind: str
    result: str
    source: str
    amount: int


class CompiledRow(TypedDict):
    """What is known of one compiled program.

    Attributes:
      name: what was compiled.
      kind: `"baseline"` or `"candidate"`.
      reference: the baseline that it is held against.
      estimated_ms: by the TPU's compiler.
      moved_bytes: by the GPU's kernels.
      temp_bytes: temporaries of a device.
      compile_seconds: tracing and compiling.
      costliest: the operations that cost most.
      failed: why there is no program; then nothing else is known.
    """

    name: str
    kind: str
    reference: str
    estimated_ms: NotRequired[float]
    moved_bytes: NotRequired[int]
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
    """Returns the new results with the old groups and axes that were not run again."""
    if old is None:
        return new
    return {
        **new,
        "groups": old["groups"] | new["groups"],
        "scaling": old["scaling"] | new["scaling"],
    }


def save(path: Path, results: Results) -> None:
    """Writes a results file; one that exists is replaced only by a whole one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    part.write_text(json.dumps(results, indent=1) + "\n")
    part.replace(path)
