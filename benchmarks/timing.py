"""Races between compiled functions whose rounds are interleaved."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.records import FiguresRecord, SkippedRecord


class Contender(NamedTuple):
    """A jitted function and its arguments."""

    function: jax.stages.Wrapped
    args: tuple[object, ...]


class Figures(NamedTuple):
    """What was measured of a contender.

    Attributes:
      compile_seconds: tracing and compiling.
      temp_bytes: temporary memory of the compiled program; `None` if it is unknown.
      output_bytes: memory of its outputs, likewise.
      value: its first output where that is one number: the loss, of those that have it.
      times: seconds of each round.
    """

    compile_seconds: float
    temp_bytes: int | None
    output_bytes: int | None
    value: float | None
    times: tuple[float, ...]

    def summary(self) -> FiguresRecord:
        """Returns the figures with the median and the spread of the times."""
        low, median, high = np.quantile(self.times, (0.25, 0.5, 0.75)).tolist()
        return {
            "median": median,
            "min": min(self.times),
            "max": max(self.times),
            "interquartile_range": high - low,
            "times": list(self.times),
            "compile_seconds": self.compile_seconds,
            "temp_bytes": self.temp_bytes,
            "output_bytes": self.output_bytes,
            "value": self.value,
        }


class Skipped(NamedTuple):
    """A contender that could not be built or run, and why."""

    reason: str

    def summary(self) -> SkippedRecord:
        """Returns the reason under the key `skipped`."""
        return {"skipped": self.reason}


class Ratio(NamedTuple):
    """A median and its quartiles."""

    median: float
    low: float
    high: float


class Unavailable(Exception):
    """A contender cannot run here; the message says what it needs."""


Result = Figures | Skipped


def race(
    contenders: Mapping[str, Contender],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Result]:
    """Times contenders against each other.

    All are compiled first. Each round then times every one once, beginning with another
    in each, so that whatever else the machine does falls on all of them alike.

    Args:
      contenders: by name.
      rounds: how often each is timed.
      warmup: calls of each before the first round, at least 1.
      clock: returns seconds.

    Returns:
      By name, the figures; or the reason why a contender was skipped.
    """
    results: dict[str, Result] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, contender in contenders.items():
        try:
            runs[name], results[name] = _build(contender, warmup, clock)
        except (ImportError, MemoryError, Unavailable, jax.errors.JaxRuntimeError) as e:
            # XLA's report of exhausted memory goes on for pages.
            first = f"{e}".strip().partition("\n")[0]
            results[name] = Skipped(first or type(e).__name__)
    times = _rounds(runs, rounds, clock)
    return {
        name: result._replace(times=tuple(times[name]))
        if isinstance(result, Figures)
        else result
        for name, result in results.items()
    }


def _build(
    contender: Contender, warmup: int, clock: Callable[[], float]
) -> tuple[Callable[[], object], Figures]:
    start = clock()
    compiled = contender.function.lower(*contender.args).compile()
    seconds = clock() - start
    memory = compiled.memory_analysis()

    def run() -> object:
        return jax.block_until_ready(compiled(*contender.args))

    value = _first_number(run())
    for _ in range(warmup - 1):
        run()
    return run, Figures(
        compile_seconds=seconds,
        temp_bytes=memory.temp_size_in_bytes if memory else None,
        output_bytes=memory.output_size_in_bytes if memory else None,
        value=value,
        times=(),
    )


def _first_number(outputs: object) -> float | None:
    first = jax.tree.leaves(outputs)[0]
    return float(first) if first.ndim == 0 else None


def _rounds(
    runs: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float]
) -> dict[str, list[float]]:
    names = list(runs)
    times: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            start = clock()
            runs[name]()
            times[name].append(clock() - start)
    return times


def time_ratio(subject: Figures, rival: Figures) -> Ratio:
    """Returns the median and quartiles of `subject / rival`, taken round by round."""
    each = np.array(subject.times) / np.array(rival.times)
    low, median, high = np.quantile(each, (0.25, 0.5, 0.75)).tolist()
    return Ratio(median, low, high)
