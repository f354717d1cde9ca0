"""What a run prints before its first step and after its last one."""

from pathlib import Path

import jax
from jax.sharding import Mesh
from rich.console import Console
from rich.table import Table

from trainer.data.text import TextData
from trainer.report.metrics import Record
from trainer.report.plot import HIDDEN, PICTURED
from trainer.run.settings import Settings
from trainer.run.state import TrainState


def say(console: Console, line: str) -> None:
    """Prints one line as it is."""
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def show_run(
    console: Console, settings: Settings, text: TextData, state: TrainState, mesh: Mesh
) -> None:
    """Prints the sizes of the data, the model and the mesh."""
    count = sum(leaf.size for leaf in jax.tree.leaves(state.params))
    tokens = settings.batch_size * settings.sequence_length
    say(
        console,
        f"{text.tokens:,} tokens of a vocabulary of {text.vocab_size:,}; "
        f"{len(text.train):,} rows to train on, {len(text.heldout):,} held out",
    )
    say(
        console,
        f"{count:,} parameters in {settings.dtype}; {tokens:,} tokens per step; "
        f"mesh {dict(mesh.shape)} of {jax.default_backend()} devices",
    )
    say(
        console,
        f"the learning rate falls until step {settings.schedule_steps:,}; training "
        f"ends at step {settings.steps:,}",
    )
    if start := int(state.step):
        say(console, f"resuming from step {start}")


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
    say(console, f"{last['seconds']:.0f} s of training")
    if skipped := last.get("skipped_steps"):
        say(console, f"{skipped:.0f} steps were skipped: they were not finite")


def _format(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"


def show_paths(console: Console, out: Path) -> None:
    """Prints the paths of the run's files."""
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


def show_sample(console: Console, text: str) -> None:
    """Prints a text between two rules."""
    console.rule("sample")
    say(console, text)
    console.rule()
