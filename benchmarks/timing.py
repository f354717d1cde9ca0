"""Timing compiled functions against each other, with interleaved rounds."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from benchmarks.records import FiguresRecord, SkippedRecord


class Implementation(NamedTuple):
    """A jitted function and its arguments."""

    function: jax.stages.Wrapped
    args: tuple[object, ...]


class Figures(NamedTuple):
    """The figures of an implementation.

    Attributes:
      compile_seconds: time to trace and compile.
      temp_bytes: temporary memory of the compiled program; `None` if unknown.
      output_bytes: memory of its outputs; `None` if unknown.
      value: its first output if that is a scalar, usually the loss.
      times: seconds of each round.
      cpu_times: seconds of all processors that the process used in each round; on a
        shared machine they vary less than `times`.
    """

    compile_seconds: float
    temp_bytes: int | None
    output_bytes: int | None
    value: float | None
    times: tuple[float, ...]
    cpu_times: tuple[float, ...] = ()

    def summary(self) -> FiguresRecord:
        """Returns the figures with the median and the spread of the times."""
        low, median, high = np.quantile(self.times, (0.25, 0.5, 0.75)).tolist()
        return {
            "median": median,
            "min": min(self.times),
            "max": max(self.times),
            "interquartile_range": high - low,
            "times": list(self.times),
            "cpu_times": list(self.cpu_times),
            "compile_seconds": self.compile_seconds,
            "temp_bytes": self.temp_bytes,
            "output_bytes": self.output_bytes,
            "value": self.value,
        }


class Skipped(NamedTuple):
    """An implementation that could not be built or run, and why."""

    reason: str

    def summary(self) -> SkippedRecord:
        """Returns the record with the reason."""
        return {"skipped": self.reason}


class Ratio(NamedTuple):
    """A median and its quartiles."""

    median: float
    low: float
    high: float


class Unavailable(Exception):
    """Raised if an implementation cannot run here; the message says what it needs."""


# What keeps an implementation from running here; anything else is a bug.
OBSTACLES = (ImportError, MemoryError, Unavailable, jax.errors.JaxRuntimeError)

Result = Figures | Skipped


def in_a_line(error: Exception) -> str:
    """Returns an error's message; of XLA's on memory, which takes pages, one line."""
    return f"{error}".strip().partition("\n")[0] or type(error).__name__


def time_interleaved(
    implementations: Mapping[str, Implementation],
    rounds: int,
    warmup: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> dict[str, Result]:
    """Times implementations against each other in interleaved rounds.

    All are compiled first. Every round then times each of them once, starting with a
    different one, so that other load of the machine affects all of them equally.

    Args:
      implementations: by name.
      rounds: the number of times each is timed.
      warmup: calls of each before the first round, at least 1.
      clock: returns seconds.

    Returns:
      By name, the figures or the reason why an implementation was skipped.
    """
    results: dict[str, Result] = {}
    runs: dict[str, Callable[[], object]] = {}
    for name, implementation in implementations.items():
        try:
            runs[name], results[name] = _build(implementation, warmup, clock)
        except OBSTACLES as error:
            results[name] = Skipped(in_a_line(error))
    times, cpu_times = _rounds(runs, rounds, (clock, time.process_time))
    return {
        name: result._replace(times=times[name], cpu_times=cpu_times[name])
        if isinstance(result, Figures)
        else result
        for name, result in results.items()
    }


def _build(
    implementation: Implementation, warmup: int, clock: Callable[[], float]
) -> tuple[Callable[[], object], Figures]:
    start = clock()
    compiled = implementation.function.lower(*implementation.args).compile()
    seconds = clock() - start
    memory = compiled.memory_analysis()

    def run() -> object:
        return jax.block_until_ready(compiled(*implementation.args))

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
    runs: Mapping[str, Callable[[], object]],
    rounds: int,
    clocks: Sequence[Callable[[], float]],
) -> list[dict[str, tuple[float, ...]]]:
    """Returns for each clock the seconds of every run in every round."""
    names = list(runs)
    times = {name: np.zeros((rounds, len(clocks))) for name in names}
    for number in range(rounds):
        turn = number % max(len(names), 1)
        for name in names[turn:] + names[:turn]:
            start = [clock() for clock in clocks]
            runs[name]()
            times[name][number] = [
                clock() - begun for clock, begun in zip(clocks, start, strict=True)
            ]
    return [
        {name: tuple(found[:, index].tolist()) for name, found in times.items()}
        for index in range(len(clocks))
    ]


def time_ratio(candidate: Figures, baseline: Figures, *, cpu: bool = False) -> Ratio:
    """Returns the median and quartiles of `candidate / baseline` over the rounds.

    Args:
      candidate: its figures.
      baseline: those of the same rounds.
      cpu: whether processors' seconds are compared, not those of the clock.
    """
    own, other = (f.cpu_times if cpu else f.times for f in (candidate, baseline))
    each = np.array(own) / np.array(other)
    low, median, high = np.quantile(each, (0.25, 0.5, 0.75)).tolist()
    return Ratio(median, low, high)
