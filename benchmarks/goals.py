"""Reads from a race whether its goals are met."""

from typing import Literal, NamedTuple

from benchmarks.cases import EXACT, LOGITS_ARRAY, Case, Goal, Metric
from benchmarks.records import OutcomeRecord, RatioRecord
from benchmarks.timing import Figures, Ratio, Result, Skipped, time_ratio

Status = Literal["met", "missed", "measured", "skipped"]


class Outcome(NamedTuple):
    """A goal and what became of it.

    Attributes:
      subject: as in the goal.
      rival: as in the goal.
      metric: as in the goal.
      ratio: what was measured; with quartiles where it varies from round to round.
      goal: the limit; `None` where there is none.
      status: `"measured"` is what has no limit.
      reason: why it was skipped; else empty.
    """

    subject: str
    rival: str
    metric: Metric
    ratio: Ratio | None
    goal: float | None
    status: Status
    reason: str = ""

    def summary(self) -> OutcomeRecord:
        """Returns the fields as a results file holds them."""
        ratio: RatioRecord | None = None
        if self.ratio is not None:
            median, low, high = self.ratio
            ratio = {"median": median, "low": low, "high": high}
        return {
            "subject": self.subject,
            "rival": self.rival,
            "metric": self.metric,
            "ratio": ratio,
            "goal": self.goal,
            "status": self.status,
            "reason": self.reason,
        }

    def line(self) -> str:
        """Returns the outcome as text for a person."""
        pair = f"{self.subject} / {self.rival} {self.metric}"
        if self.ratio is None:
            return f"{pair}: skipped: {self.reason}"
        text = f"{pair}: {self.ratio.median:.3g}"
        if self.ratio.low != self.ratio.high:
            text += f" [{self.ratio.low:.3g}, {self.ratio.high:.3g}]"
        goal = "" if self.goal is None else f", goal {self.goal:g}"
        return f"{text}{goal}: {self.status}"


def judge(case: Case, results: dict[str, Result]) -> list[Outcome]:
    """Returns the outcome of each goal of a case that was raced."""
    return [_judge(case, goal, results) for goal in case.goals]


def skip(case: Case, reason: str) -> list[Outcome]:
    """Returns the outcomes of a case that cannot run here."""
    return [_outcome(goal, None, reason) for goal in case.goals]


def _judge(case: Case, goal: Goal, results: dict[str, Result]) -> Outcome:
    for name in (goal.subject, goal.rival):
        result = results.get(name)
        if isinstance(result, Skipped):
            return _outcome(goal, None, f"{name}: {result.reason}")
    figures = {k: v for k, v in results.items() if isinstance(v, Figures)}
    subject, rival = figures[goal.subject], figures.get(goal.rival)
    if goal.rival == EXACT:
        return _outcome(goal, _error(subject, case.exact_loss()))
    if goal.rival == LOGITS_ARRAY:
        return _memory(goal, subject.temp_bytes, case.logits_bytes)
    if rival is None:
        raise ValueError(f"{goal.rival!r} is no contender of {case.title!r}")
    if goal.metric == "temp":
        return _memory(goal, subject.temp_bytes, rival.temp_bytes)
    if goal.metric == "bandwidth":
        return _outcome(goal, _bandwidth(case, subject, rival))
    return _outcome(goal, time_ratio(subject, rival))


def _outcome(goal: Goal, ratio: Ratio | None, reason: str = "") -> Outcome:
    status: Status = "skipped"
    if ratio is not None:
        status = "measured"
        if goal.limit is not None:
            status = "met" if ratio.median <= goal.limit else "missed"
    names = goal.subject, goal.rival, goal.metric
    return Outcome(*names, ratio, goal.limit, status, reason)


def _error(subject: Figures, exact: float) -> Ratio:
    distance = float("nan") if subject.value is None else abs(subject.value - exact)
    return Ratio(distance, distance, distance)


def _memory(goal: Goal, own: int | None, other: int | None) -> Outcome:
    if own is None or other is None:
        return _outcome(goal, None, "this device does not report temporary memory")
    if other == 0:
        return _outcome(goal, None, f"{goal.rival} needs no temporary memory")
    return _outcome(goal, Ratio(own / other, own / other, own / other))


def _bandwidth(case: Case, subject: Figures, copy: Figures) -> Ratio:
    # The copy passes over the logits twice, to read and to write. The loss reads them
    # once; its gradient reads them again and writes an array of their size.
    scale = (3 if case.gradient else 1) / 2
    median, low, high = (scale * part for part in time_ratio(copy, subject))
    return Ratio(median, low, high)
