"""What a person sees: the progress, the closing table, the paths."""

import types
from pathlib import Path

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from trainer.report.metrics import Record
from trainer.report.plot import HIDDEN, PICTURED

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
        """Takes the speed since the last mark; the first comes after compiling."""
        if self._mark is None:
            self._mark = (step, seconds)
        elif step % self._stride == 0 or step == self._steps:
            steps, elapsed = step - self._mark[0], seconds - self._mark[1]
            self._mark = (step, seconds)
            if elapsed > 0:
                rate = steps * self._tokens_per_step / elapsed
                self._rate = f"  {rate:,.0f} tokens/s"


def show_table(console: Console, records: list[Record], heldout: list[Record]) -> None:
    """Prints first → last of every term, then of the held-out metrics."""
    first, last = records[0], records[-1]
    table = Table(title=f"step {first['step']:.0f} → step {last['step']:.0f}")
    table.add_column("term")
    table.add_column("first", justify="right")
    table.add_column("last", justify="right")
    for name in last:
        if name not in HIDDEN and not name.startswith(PICTURED):
            table.add_row(name, _format(first.get(name)), _format(last[name]))
    if heldout:
        table.add_section()
        before, after = heldout[0], heldout[-1]
        for name in after:
            if name != "step":
                label = f"held-out {name}"
                table.add_row(label, _format(before.get(name)), _format(after[name]))
    console.print(table)


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def show_paths(console: Console, out: Path) -> None:
    """Prints where everything is."""
    console.print("Written:")
    names = (
        "config.json",
        "metrics.jsonl",
        "heldout.jsonl",
        "samples.jsonl",
        "losses.png",
        "tokenizer.json",
        "checkpoints",
        "tensorboard",
    )
    for path in (out / name for name in names):
        if path.exists():
            console.print(f"  {path}", highlight=False, soft_wrap=True)
    console.print(
        f"All of it as one page: python examples/show_run.py {out}",
        highlight=False,
        soft_wrap=True,
    )
