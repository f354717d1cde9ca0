"""Computes from a benchmark's figures whether its goals are met."""

from typing import Literal, NamedTuple

from benchmarks.cases import EXACT, LOGITS_ARRAY, Case, Goal, Metric
from benchmarks.records import OutcomeRecord, RatioRecord
from benchmarks.timing import Figures, Ratio, Result, Skipped, time_ratio

Status = Literal["met", "missed", "measured", "skipped"]


class Outcome(NamedTuple):
    """A goal and its result.

    Attributes:
      candidate: as in the goal.
      baseline: as in the goal.
      metric: as in the goal.
      ratio: the measured ratio, with quartiles if it varies between rounds.
      goal: the limit, or `None`.
      status: `"measured"` if there is no limit.
      reason: why it was skipped; empty otherwise.
    """

    candidate: str
    baseline: str
    metric: Metric
    ratio: Ratio | None
    goal: float | None
    status: Status
    reason: str = ""

    def summary(self) -> OutcomeRecord:
        """Returns the record for a results file."""
        ratio: RatioRecord | None = None
        if self.ratio is not None:
            median, low, high = self.ratio
            ratio = {"median": median, "low": low, "high": high}
        return {
            "candidate": self.candidate,
            "baseline": self.baseline,
            "metric": self.metric,
            "ratio": ratio,
            "goal": self.goal,
            "status": self.status,
            "reason": self.reason,
        }

    def line(self) -> str:
        """Returns the outcome as a line of text."""
        pair = f"{self.candidate} / {self.baseline} {self.metric}"
        if self.ratio is None:
            return f"{pair}: skipped: {self.reason}"
        text = f"{pair}: {self.ratio.median:.3g}"
        if self.ratio.low != self.ratio.high:
            text += f" [{self.ratio.low:.3g}, {self.ratio.high:.3g}]"
        goal = "" if self.goal is None else f", goal {self.goal:g}"
        return f"{text}{goal}: {self.status}"


def judge(case: Case, results: dict[str, Result]) -> list[Outcome]:
    """Returns the outcome of each goal of a case."""
    return [_judge(case, goal, results) for goal in case.goals]


def skip(case: Case, reason: str) -> list[Outcome]:
    """Returns the outcomes of a case that cannot run here."""
    return [_outcome(goal, None, reason) for goal in case.goals]


def _judge(case: Case, goal: Goal, results: dict[str, Result]) -> Outcome:
    for name in (goal.candidate, goal.baseline):
        result = results.get(name)
        if isinstance(result, Skipped):
            return _outcome(goal, None, f"{name}: {result.reason}")
    figures = {k: v for k, v in results.items() if isinstance(v, Figures)}
    candidate, baseline = figures[goal.candidate], figures.get(goal.baseline)
    if goal.baseline == EXACT:
        return _outcome(goal, _error(candidate, case.exact_loss()))
    if goal.baseline == LOGITS_ARRAY:
        return _memory(goal, candidate.temp_bytes, case.logits_bytes)
    if baseline is None:
        raise ValueError(f"{goal.baseline!r} is not implemented in {case.title!r}")
    if goal.metric == "temp":
        return _memory(goal, candidate.temp_bytes, baseline.temp_bytes)
    if goal.metric == "bandwidth":
        return _outcome(goal, _bandwidth(case, candidate, baseline))
    cpu = goal.metric == "cpu_time"
    return _outcome(goal, time_ratio(candidate, baseline, cpu=cpu))


def _outcome(goal: Goal, ratio: Ratio | None, reason: str = "") -> Outcome:
    status: Status = "skipped"
    if ratio is not None:
        status = "measured"
        if goal.limit is not None:
            status = "met" if ratio.median <= goal.limit else "missed"
    names = goal.candidate, goal.baseline, goal.metric
    return Outcome(*names, ratio, goal.limit, status, reason)


def _error(candidate: Figures, exact: float) -> Ratio:
    distance = float("nan") if candidate.value is None else abs(candidate.value - exact)
    return Ratio(distance, distance, distance)


def _memory(goal: Goal, own: int | None, other: int | None) -> Outcome:
    if own is None or other is None:
        return _outcome(goal, None, "this device does not report temporary memory")
    if other == 0:
        return _outcome(goal, None, f"{goal.baseline} needs no temporary memory")
    return _outcome(goal, Ratio(own / other, own / other, own / other))


def _bandwidth(case: Case, candidate: Figures, copy: Figures) -> Ratio:
    # The copy reads and writes the logits. The loss reads them once; its gradient reads
    # them again and writes an array of their size.
    scale = (3 if case.gradient else 1) / 2
    median, low, high = (scale * part for part in time_ratio(copy, candidate))
    return Ratio(median, low, high)
