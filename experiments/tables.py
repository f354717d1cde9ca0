"""Puts the tables of all results into `docs/results.md`, between their markers.

python -m experiments.tables
"""

import collections
import re
import sys
from pathlib import Path
from typing import NamedTuple

from experiments.records import (
    Results,
    Spread,
    by_variant,
    changes,
    load,
    path_of,
)

PAGE = Path(__file__).resolve().parent.parent / "docs" / "results.md"
MARKED = re.compile(r"<!-- table: (\S+) -->\n.*?<!-- end -->\n", re.DOTALL)


class Column(NamedTuple):
    """A column of a table.

    Attributes:
      title: its head.
      number: which number of the runs.
      form: how to print it.
      against: the variant that a change is relative to; None prints the number itself.
    """

    title: str
    number: str
    form: str
    against: str | None = None


TABLES: dict[str, tuple[Column, ...]] = {
    "repetition-cpu": (
        Column("repeated 4-grams", "repeated_4grams", ".3f"),
        Column("change", "repeated_4grams", "+.0%", "plain"),
        Column("1-grams", "repeated_1grams", ".3f"),
        Column("longest loop", "longest_loop", ".0f"),
        Column("perplexity", "perplexity", ".1f"),
        Column("change", "perplexity", "+.1%", "plain"),
        Column("accuracy", "accuracy", ".3f"),
    ),
    "experts-cpu": (
        Column("MaxVio", "max_violation", ".3f"),
        Column("layer 1", "max_violation_1", ".3f"),
        Column("layer 2", "max_violation_2", ".3f"),
        Column("of the batches", "training_violation", ".3f"),
        Column("dead experts", "dead_experts", ".1f"),
        Column("held-out nll", "nll", ".3f"),
        Column("ms per step", "step_milliseconds", ".0f"),
    ),
    "heads-cpu": (
        Column("held-out nll", "nll", ".3f"),
        Column("accuracy", "accuracy", ".3f"),
        Column("head 1", "head_accuracy_1", ".3f"),
        Column("head 2", "head_accuracy_2", ".3f"),
        Column("head 3", "head_accuracy_3", ".3f"),
        Column("accepted 1st", "acceptance_1", ".3f"),
        Column("2nd", "acceptance_2", ".3f"),
        Column("3rd", "acceptance_3", ".3f"),
        Column("calls with drafts", "drafting_calls", ".0%"),
        Column("tokens per call", "tokens_per_call", ".2f"),
        Column("speed-up", "speed_up", ".2f"),
        Column("ms per step", "step_milliseconds", ".0f"),
    ),
    "ablation-cpu": (
        Column("perplexity", "tempered_perplexity", ".1f"),
        Column("change", "tempered_perplexity", "+.1%", "plain"),
        Column("read at T = 1", "perplexity", "+.1%", "plain"),
        Column("calibration error", "tempered_calibration_error", ".3f"),
        Column("repeated 4-grams", "repeated_4grams", ".3f"),
        Column("ms per step", "step_milliseconds", ".0f"),
    ),
}


def table(results: Results, columns: tuple[Column, ...]) -> str:
    """Returns a Markdown table: means over the seeds, and their range in brackets.

    Variants of fewer seeds than others say so.
    """
    found = [
        by_variant(results, column.number)
        if column.against is None
        else changes(results, column.number, column.against)
        for column in columns
    ]
    seeds = collections.Counter(run["variant"] for run in results["runs"])
    lines = ["| variant | " + " | ".join(column.title for column in columns) + " |"]
    lines.append("|---|" + "---:|" * len(columns))
    for variant, count in seeds.items():
        few = f" ({count} seed{'s' * (count > 1)})" * (count < max(seeds.values()))
        cells = [
            _cell(values.get(variant), column.form)
            for values, column in zip(found, columns, strict=True)
        ]
        lines.append(f"| {variant}{few} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _cell(value: Spread | None, form: str) -> str:
    if value is None:
        return ""
    mean, low, high = (format(value[key], form) for key in ("mean", "low", "high"))
    return mean if low == high else f"{mean} ({low}…{high})"


def fill(page: str) -> str:
    """Returns the page with every table made anew from its results.

    Raises:
      ValueError: the page asks for a table that nobody makes.
    """

    def replace(match: re.Match[str]) -> str:
        name = match[1]
        if name not in TABLES:
            raise ValueError(f"no table is called {name!r}; there are {list(TABLES)}")
        experiment, preset = name.rsplit("-", 1)
        results = load(path_of(experiment, preset))
        made = ""
        if results is not None:
            made = table(results, TABLES[name])
        return f"<!-- table: {name} -->\n{made}<!-- end -->\n"

    return MARKED.sub(replace, page)


def main() -> int:
    """Rewrites the page."""
    PAGE.write_text(fill(PAGE.read_text()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
