"""Runs the benchmarks: `python -m benchmarks.run`, with `--help` for the options."""

import argparse
import dataclasses
import datetime
import sys
from collections.abc import Sequence
from pathlib import Path

import jax

from benchmarks import records, scaling
from benchmarks.cases import GROUPS, Case, table
from benchmarks.goals import judge, skip
from benchmarks.machine import (
    default_name,
    device_kind,
    free_memory,
    machine,
    versions,
)
from benchmarks.plots import plot_ratios, plot_scaling
from benchmarks.records import AxisRecord, CaseRecord, GroupRecord, Results
from benchmarks.timing import OBSTACLES, in_a_line, time_interleaved

QUICK_ROUNDS = 2
# The logits, their gradient and one more: the most that an implementation needs.
LOGITS_ARRAYS = 3


@dataclasses.dataclass(frozen=True)
class Settings:
    """The command line."""

    groups: tuple[str, ...]
    rounds: int
    quick: bool
    scaling: bool
    name: str
    out: Path


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the selected benchmarks; a missed goal is a result, not an error."""
    settings = parse(arguments)
    path = settings.out / f"{settings.name}.json"
    results = _results(settings)
    cases = table(device_kind(), settings.quick)
    for group in settings.groups:
        members = [_run(case, settings) for case in cases if case.group == group]
        results["groups"][group] = _group(members, settings)
        # After each group, so that an interrupted run keeps its results.
        records.save(path, records.merge(records.load(path), results))
    for axis in scaling.AXES if settings.scaling else ():
        results["scaling"][axis] = _grow(axis, settings)
        records.save(path, records.merge(records.load(path), results))
    merged = records.merge(records.load(path), results)
    plot_ratios(merged, settings.out / f"{settings.name}-ratios.png")
    plot_scaling(merged, settings.out / f"{settings.name}-scaling.png")
    print(f"wrote {path}")
    return 0


def parse(arguments: Sequence[str] | None) -> Settings:
    """Reads the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run")
    parser.add_argument(
        "--group",
        action="extend",
        nargs="+",
        choices=GROUPS,
        help="only these groups; the file keeps its others",
    )
    parser.add_argument("--rounds", type=_count, default=9, help="default: 9")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, 2 rounds")
    parser.add_argument("--scaling", action="store_true", help="growth with N, D, V, K")
    parser.add_argument("--name", help="of the results; default: the machine's")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    found = parser.parse_args(arguments)
    return Settings(
        groups=tuple(dict.fromkeys(found.group or GROUPS)),
        rounds=QUICK_ROUNDS if found.quick else found.rounds,
        quick=found.quick,
        scaling=found.scaling,
        # Tiny shapes must not replace real figures.
        name=found.name or ("quick" if found.quick else default_name()),
        out=found.out,
    )


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _run(case: Case, settings: Settings) -> CaseRecord:
    print(f"{case.group}: {case.title}", flush=True)
    reason, built = _obstacle(case), {}
    if not reason:
        try:
            # The inputs alone may not fit.
            built = case.build()
        except OBSTACLES as error:
            reason = in_a_line(error)
    results = time_interleaved(built, settings.rounds)
    outcomes = skip(case, reason) if reason else judge(case, results)
    for outcome in outcomes:
        print(f"  {outcome.line()}", flush=True)
    return {
        "title": case.title,
        "implementations": {name: result.summary() for name, result in results.items()},
        "goals": [outcome.summary() for outcome in outcomes],
    }


def _obstacle(case: Case) -> str:
    """Returns why a case cannot run here; empty if it can."""
    backend = jax.default_backend()
    if case.needs_accelerator and backend == "cpu":
        return "needs a GPU or TPU"
    free = free_memory()
    needed = LOGITS_ARRAYS * case.logits_bytes
    # A GPU raises if an array is too large; on a CPU the system kills the process.
    if backend == "cpu" and free is not None and needed > free:
        return f"needs {needed / 2**30:.1f} GiB of memory, {free / 2**30:.1f} are free"
    return ""


def _group(cases: list[CaseRecord], settings: Settings) -> GroupRecord:
    return {
        "date": _now(),
        "rounds": settings.rounds,
        "quick": settings.quick,
        "cases": cases,
    }


def _grow(axis: str, settings: Settings) -> AxisRecord:
    growth = scaling.measure(axis, device_kind(), settings.rounds, settings.quick)
    time, temp = growth.time_slope, growth.temp_slope
    slopes = ("unknown" if s is None else f"{s:.2f}" for s in (time, temp))
    print("scaling with {}: slope of time {}, of memory {}".format(axis, *slopes))
    return {
        "date": _now(),
        "rounds": settings.rounds,
        "quick": settings.quick,
        "shapes": {f"{size}": str(shape) for size, shape in growth.shapes.items()},
        "points": {f"{k}": result.summary() for k, result in growth.results.items()},
        "time_slope": time,
        "temp_slope": temp,
    }


def _results(settings: Settings) -> Results:
    return {
        "machine": machine(),
        "versions": versions(),
        "date": _now(),
        "rounds": settings.rounds,
        "groups": {},
        "scaling": {},
    }


def _now() -> str:
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


if __name__ == "__main__":
    sys.exit(main())
