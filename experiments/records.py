"""Results files, and figures over the seeds."""

import json
import statistics
from collections.abc import Collection
from pathlib import Path
from typing import NotRequired, TypedDict

from benchmarks.records import MachineRecord
from trainer.files import write_whole

RESULTS = Path(__file__).parent / "results"


class RunRecord(TypedDict):
    """One variant with one seed.

    `numbers` are what is compared, `paths` go over training, `extra` is for plots.
    """

    variant: str
    seed: int
    numbers: dict[str, float]
    paths: dict[str, list[object]]
    extra: NotRequired[dict[str, object]]


class Results(TypedDict):
    """A results file; `sizes` are the same for all runs."""

    experiment: str
    preset: str
    date: str
    machine: MachineRecord
    versions: dict[str, str | None]
    sizes: dict[str, object]
    runs: list[RunRecord]


def path_of(experiment: str, preset: str) -> Path:
    """Returns where the results of an experiment lie."""
    return RESULTS / f"{experiment}-{preset}.json"


def picture(results: Results, of: str = "") -> Path:
    """Returns where a picture of the results belongs."""
    name = f"{results['experiment']}-{results['preset']}"
    return RESULTS / f"{name}-{of}.png" if of else RESULTS / f"{name}.png"


def only(results: Results, variants: Collection[str]) -> Results:
    """Returns the results of some variants."""
    return {
        **results,
        "runs": [run for run in results["runs"] if run["variant"] in variants],
    }


def load(path: Path) -> Results | None:
    """Reads a results file, if it exists."""
    return json.loads(path.read_text()) if path.exists() else None


def save(path: Path, results: Results) -> None:
    """Writes a results file whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    results["runs"].sort(key=lambda run: run["seed"])
    lines = ",\n  ".join(json.dumps(run, allow_nan=False) for run in results["runs"])
    head = json.dumps({k: v for k, v in results.items() if k != "runs"}, indent=1)
    write_whole(path, f'{head[:-2]},\n "runs": [\n  {lines}\n ]\n}}\n')


class Spread(TypedDict):
    """A number over the seeds."""

    mean: float
    low: float
    high: float
    seeds: int


def spread(values: list[float]) -> Spread:
    """Returns the mean and the range."""
    return {
        "mean": statistics.fmean(values),
        "low": min(values),
        "high": max(values),
        "seeds": len(values),
    }


def by_variant(results: Results, number: str) -> dict[str, Spread]:
    """Returns a number of every variant that has it, over its seeds, in order."""
    values: dict[str, list[float]] = {}
    for run in results["runs"]:
        if number in run["numbers"]:
            values.setdefault(run["variant"], []).append(run["numbers"][number])
    return {variant: spread(found) for variant, found in values.items()}


def changes(results: Results, number: str, against: str) -> dict[str, Spread]:
    """Returns `number / its value in the variant against − 1`, seed by seed."""
    base = {
        run["seed"]: run["numbers"][number]
        for run in results["runs"]
        if run["variant"] == against
    }
    values: dict[str, list[float]] = {}
    for run in results["runs"]:
        if number in run["numbers"] and run["seed"] in base:
            change = run["numbers"][number] / base[run["seed"]] - 1
            values.setdefault(run["variant"], []).append(change)
    return {variant: spread(found) for variant, found in values.items()}
