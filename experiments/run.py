"""Runs an experiment: every variant with every seed, into `experiments/results/`.

    python -m experiments.run repetition
    python -m experiments.run all --jobs 2

A run that is there already is not made again, so a stopped command resumes where it
was; `--again` forgets the old ones. On a CPU each job has one core, so that variants
compare.
"""

import argparse
import concurrent.futures
import dataclasses
import datetime
import importlib
import json
import multiprocessing
import os
import sys
import time
from collections.abc import Mapping, Sequence
from typing import Protocol, cast

import jax

from benchmarks.machine import machine, versions
from experiments.lab import CACHE
from experiments.records import Results, RunRecord, load, path_of, save
from experiments.sizes import Sizes
from experiments.variants import Variant

EXPERIMENTS = ("repetition", "experts", "heads", "ablation")
# Eigen's threads would take turns on the cores that the jobs share.
ONE_THREAD = "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1"


class Experiment(Protocol):
    """What the module of an experiment has."""

    SIZES: dict[str, Sizes]
    VARIANTS: dict[str, Variant]

    def measure(self, sizes: Sizes, variant: Variant, seed: int) -> RunRecord:
        """Trains the variant and measures it; the caller fills in `variant`."""
        ...

    def plot(self, results: Results) -> None:
        """Draws the results beside their file."""
        ...


def use_one_thread() -> None:
    """Gives XLA one thread here, unless it has started already, and in later jobs."""
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {ONE_THREAD}"


def load_experiment(name: str) -> Experiment:
    """Returns the module of an experiment."""
    return cast(Experiment, importlib.import_module(f"experiments.{name}"))


def work(name: str, preset: str, variant: str, seed: int) -> RunRecord:
    """Makes one run; the whole task of a job."""
    # Seeds of a variant compile the same programs.
    jax.config.update("jax_compilation_cache_dir", str(CACHE / "xla"))
    experiment = load_experiment(name)
    begun = time.perf_counter()
    run = experiment.measure(
        experiment.SIZES[preset], experiment.VARIANTS[variant], seed
    )
    run["variant"] = variant
    run["numbers"]["seconds"] = time.perf_counter() - begun
    return run


def sizes_record(sizes: Sizes) -> dict[str, object]:
    """Returns the sizes as JSON holds them."""
    return json.loads(json.dumps(dataclasses.asdict(sizes)))


def begin(name: str, preset: str, *, again: bool) -> Results:
    """Returns the results so far.

    Raises:
      ValueError: the old results are of other sizes.
    """
    sizes = sizes_record(load_experiment(name).SIZES[preset])
    old = None if again else load(path_of(name, preset))
    if old is not None and old["sizes"] != sizes:
        raise ValueError(
            f"{path_of(name, preset)} has runs of other sizes: pass --again to make "
            "them anew"
        )
    return {
        "experiment": name,
        "preset": preset,
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "machine": machine(),
        "versions": versions(),
        "sizes": sizes,
        "runs": [] if old is None else old["runs"],
    }


def missing(
    variants: Mapping[str, Variant], results: Results, seeds: int
) -> list[tuple[str, int]]:
    """Returns the variants and seeds to run, the first seed of all variants first."""
    known = {(record["variant"], record["seed"]) for record in results["runs"]}
    return [
        (name, seed)
        for seed in range(seeds)
        for name, variant in variants.items()
        if (name, seed) not in known and seed < variant.seeds
    ]


def run(name: str, options: argparse.Namespace) -> None:
    """Makes the runs of one experiment that are missing, and draws them all."""
    experiment = load_experiment(name)
    results = begin(name, options.preset, again=options.again)
    path = path_of(name, options.preset)
    wanted = options.variants or experiment.VARIANTS
    variants = {variant: experiment.VARIANTS[variant] for variant in wanted}
    tasks = missing(variants, results, options.seeds)
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(options.jobs, context) as pool:
        started = [pool.submit(work, name, options.preset, *task) for task in tasks]
        for done in concurrent.futures.as_completed(started):
            record = done.result()
            results["runs"].append(record)
            order = list(experiment.VARIANTS)
            results["runs"].sort(key=lambda record: order.index(record["variant"]))
            save(path, results)
            print(_line(name, record), flush=True)
    experiment.plot(results)
    print(f"{path}: {len(results['runs'])} runs")


def _line(name: str, record: RunRecord) -> str:
    numbers = "  ".join(f"{k} {v:.4g}" for k, v in record["numbers"].items())
    return f"{name}/{record['variant']}/{record['seed']}  {numbers}"


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(prog="python -m experiments.run")
    parser.add_argument("experiment", choices=(*EXPERIMENTS, "all"))
    parser.add_argument("--preset", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--jobs", type=int, default=1, help="runs at a time")
    parser.add_argument("--variants", nargs="+", help="only these")
    parser.add_argument("--again", action="store_true", help="forget the old runs")
    options = parser.parse_args(arguments)
    if options.jobs < 1 or options.seeds < 1:
        parser.error("--jobs and --seeds must be at least 1")
    names = EXPERIMENTS if options.experiment == "all" else (options.experiment,)
    if options.variants:
        unknown = set(options.variants) - set(load_experiment(names[0]).VARIANTS)
        if unknown or len(names) > 1:
            parser.error(
                f"--variants: {', '.join(sorted(unknown)) or 'one experiment'}"
            )
    if options.jobs > 1 or options.preset == "cpu":
        use_one_thread()
    for name in names:
        run(name, options)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
