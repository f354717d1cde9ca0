"""The progress of a run: a live bar on a terminal, lines elsewhere."""

import types

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)

from trainer.report.metrics import Record

SHOWN = {
    "total_loss": "loss",
    "nll": "nll",
    "mtp_loss": "mtp",
    "ngram_penalty": "ngram",
    "immediate_repetition_penalty": "repeat",
    "accuracy": "acc",
    "temperature": "T",
}


class ProgressReport:
    """A live bar on a terminal; elsewhere one plain line for every 5 % of the run."""

    def __init__(
        self, console: Console, start: int, steps: int, tokens_per_step: int
    ) -> None:
        self._console = console
        self._steps = steps
        self._tokens_per_step = tokens_per_step
        self._mark: tuple[int, float] | None = None
        self._rate = ""
        self._stride = max(1, steps // 20)
        self._bar = None
        if console.is_terminal:
            self._bar = Progress(
                BarColumn(bar_width=24),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.description}"),
                console=console,
            )
            self._task = self._bar.add_task("compiling", total=steps, completed=start)

    def __enter__(self) -> "ProgressReport":
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: types.TracebackType | None,
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def show(self, step: int, seconds: float, record: Record) -> None:
        """Shows the main terms of a step and how fast the steps are."""
        self._measure(step, seconds)
        terms = "  ".join(
            f"{label} {record[name]:.3f}"
            for name, label in SHOWN.items()
            if name in record
        )
        terms += self._rate
        if self._bar is not None:
            self._bar.update(self._task, completed=step, description=terms)
        elif step % self._stride == 0 or step == self._steps:
            self._console.print(
                f"step {step}/{self._steps}  {seconds:.0f} s  {terms}",
                highlight=False,
                soft_wrap=True,
            )

    def _measure(self, step: int, seconds: float) -> None:
        """Measures the speed since the last mark; the first mark is after compiling."""
        if self._mark is None:
            self._mark = (step, seconds)
        elif step % self._stride == 0 or step == self._steps:
            steps, elapsed = step - self._mark[0], seconds - self._mark[1]
            self._mark = (step, seconds)
            if elapsed > 0:
                rate = steps * self._tokens_per_step / elapsed
                self._rate = f"  {rate:,.0f} tokens/s"
