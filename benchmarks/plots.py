"""Plots of a results file: the ratios with their goals, and the growth.

`python -m benchmarks.plots RECORD PICTURE` draws the picture of the README from a file
that `benchmarks.compiled` wrote.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter

from benchmarks.records import (
    AxisRecord,
    CompiledRecord,
    CompiledRow,
    FiguresRecord,
    OutcomeRecord,
    Results,
)

# Okabe and Ito's colours, which colour-blind readers can distinguish.
COLORS = {
    "time": "#0072B2",
    "cpu_time": "#56B4E9",
    "temp": "#E69F00",
    "bandwidth": "#009E73",
}
NAMES = {
    "time": "time, ratio to the baseline's",
    "cpu_time": "processors' time, ratio to the baseline's",
    "temp": "temporary memory, ratio to the baseline's",
    "bandwidth": "bandwidth, fraction of a copy's (more is better)",
}
WIDEST = 2.0
AXIS_LABELS = {
    "N": "N, tokens",
    "D": "D, width",
    "V": "V, vocabulary",
    "K": "K + 1, hidden states per token on one head",
}
MEBIBYTE = 2**20
COLOR_OF_KIND = {"baseline": COLORS["temp"], "candidate": COLORS["time"]}


class Place(NamedTuple):
    """The label of a program's point: its text, and where it is, in points."""

    text: str
    x: int = 8
    y: int = -4
    align: str = "left"


# What computes the loss and both gradients from hidden states, by its name in a record.
PLACES = {
    "naive": Place("naive: all logits, then optax"),
    "naive, float32 logits": Place("naive with float32 logits"),
    "checkpointed scan": Place("jax.checkpoint over chunks"),
    "tokamax xla": Place("tokamax xla", 0, 8, "center"),
    "tokamax chunked_xla": Place("tokamax chunked_xla", 6, -13),
    "levanter grad_in_forward 2048": Place(
        "Levanter grad_in_forward 2048", 0, 8, "center"
    ),
    "levanter grad_in_forward 4096": Place("Levanter grad_in_forward 4096"),
    "levanter xla": Place("Levanter xla"),
    "levanter xla, v5p blocks": Place("Levanter xla, v5p blocks", 0, -16, "center"),
    "levanter xla_fast_bwd": Place("Levanter xla_fast_bwd", 0, -16, "center"),
    "levanter xla_fast_bwd, v5p blocks": Place(
        "Levanter xla_fast_bwd, v5p blocks", 0, 8, "center"
    ),
    "plain": Place("ava_jax, plain", 4, -17, "right"),
    "everything": Place("ava_jax, every term on", -4, -17),
}
PRODUCTS = "three bare matmuls"
PACKAGES = {"jax": "jax", "tokamax": "tokamax", "Levanter": "marin_levanter"}


class Bar(NamedTuple):
    """One measured ratio and its label."""

    label: str
    outcome: OutcomeRecord


def plot_ratios(results: Results, path: Path) -> bool:
    """Draws a bar per ratio, its quartiles and its goal; `False` if there is none."""
    bars = [
        Bar(f"{case['title']}\n{goal['candidate']} / {goal['baseline']}", goal)
        for group in results["groups"].values()
        for case in group["cases"]
        for goal in case["goals"]
        if goal["ratio"] is not None and goal["metric"] in COLORS
    ]
    if not bars:
        return False
    with mpl.rc_context({"font.size": 8}):
        figure = Figure(figsize=(11, 1.6 + 0.36 * len(bars)), layout="constrained")
        axis = figure.subplots()
        for row, bar in enumerate(bars):
            _draw_bar(axis, row, bar.outcome)
        axis.set_yticks(range(len(bars)), [bar.label for bar in bars])
        axis.set_ylim(len(bars) - 0.4, -0.6)
        axis.set_xlim(0, WIDEST * 1.18)
        axis.axvline(1, color="0.5", linewidth=0.8, linestyle=":")
        axis.set_xlabel("ratio (no unit; below 1 is faster, or smaller)")
        axis.set_title(f"{_where(results)}: ratios to the baselines, and the goals")
        figure.legend(handles=_legend(bars), loc="outside upper left", ncols=2)
        figure.savefig(path, dpi=120)
    return True


def _draw_bar(axis: Axes, row: int, outcome: OutcomeRecord) -> None:
    ratio, goal = outcome["ratio"], outcome["goal"]
    if ratio is None:
        return
    end = min(ratio["median"], WIDEST)
    axis.barh(row, end, color=COLORS[outcome["metric"]], height=0.62)
    low, high = (min(ratio[key], WIDEST) for key in ("low", "high"))
    axis.plot([low, high], [row, row], color="black", linewidth=1.2)
    if goal is not None:
        axis.plot([goal, goal], [row - 0.45, row + 0.45], "k-", linewidth=2)
    more = ">" if ratio["median"] > WIDEST else ""
    text = f"{more and '→ '}{ratio['median']:.3g}  {outcome['status']}"
    right = max(end, high, goal or 0)
    weight = "bold" if outcome["status"] == "missed" else "normal"
    axis.text(right + 0.02, row, text, va="center", fontweight=weight)


def _legend(bars: list[Bar]) -> list[Patch]:
    used = {bar.outcome["metric"] for bar in bars}
    patches = [
        Patch(color=color, label=NAMES[metric])
        for metric, color in COLORS.items()
        if metric in used
    ]
    goal = Patch(color="black", label="thick mark: goal; thin line: quartiles")
    return [*patches, goal]


def plot_scaling(results: Results, path: Path) -> bool:
    """Draws time and memory against N, D, V and K; `False` if none was measured."""
    if not results["scaling"]:
        return False
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 8), layout="constrained")
        axes = figure.subplots(2, 2).reshape(-1)
        for axis, (name, label) in zip(axes, AXIS_LABELS.items(), strict=True):
            record = results["scaling"].get(name)
            if record is None:
                axis.set_axis_off()
                continue
            _draw_axis(axis, record)
            axis.set_xlabel(label)
        figure.suptitle(f"{_where(results)}: fused everything call with gradient")
        figure.savefig(path, dpi=120)
    return True


def plot_compiled(record: CompiledRecord, path: Path) -> bool:
    """Draws time, or bytes, against memory for each program; `False` without any."""
    moved = any("moved_bytes" in row for row in record["rows"])
    rows = [row for row in record["rows"] if row.get("temp_bytes") is not None]
    if not rows:
        return False
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 6), layout="constrained")
        axis = figure.subplots()
        names = []
        for number, row in enumerate(rows, start=1):
            amount = row.get("moved_bytes", 0) / 2**30 or row.get("estimated_ms", 0)
            point = amount, row.get("temp_bytes", 0) / MEBIBYTE
            axis.plot(*point, "o", color=COLOR_OF_KIND[row["kind"]])
            # Alternately above and below, so that neighbours' numbers do not overlap.
            offset = (0, 5 if number % 2 else -12)
            axis.annotate(f"{number}", point, offset, textcoords="offset points")
            label = f"{number}  {row['name']}"
            names.append(Patch(color=COLOR_OF_KIND[row["kind"]], label=label))
        axis.set_xlim(0, None)
        axis.set_ylim(0, None)
        axis.set_xlabel("GiB moved" if moved else "ms, estimated by the compiler")
        axis.set_ylabel("temporary memory, MiB")
        axis.grid(alpha=0.3)
        sizes = "x".join(map(str, record["shape"]))
        mesh = "".join(f", {name}={n}" for name, n in record["mesh"].items())
        axis.set_title(f"{record['chip']}{mesh}: BxSxDxV = {sizes}; compiled, not run")
        title = "orange: baselines; blue: candidates"
        figure.legend(handles=names, loc="outside right upper", title=title)
        figure.savefig(path, dpi=120)
    return True


def plot_tradeoff(record: CompiledRecord, path: Path) -> bool:
    """Draws time against memory as ratios to naive; `False` without naive's figures.

    The background is opaque and white, so that the labels are legible on a dark page.
    """
    rows = {row["name"]: row for row in record["rows"]}
    naive = _amounts(rows.get("naive"))
    if naive is None:
        return False
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(9.5, 4.6), layout="constrained", facecolor="white")
        axis = figure.subplots()
        for name, place in PLACES.items():
            if (found := _amounts(rows.get(name))) is not None:
                point = found[0] / naive[0], found[1] / naive[1]
                _draw_point(axis, point, place, rows[name]["kind"])
        if (products := _amounts(rows.get(PRODUCTS))) is not None:
            axis.axvline(products[0] / naive[0], color="0.4", linestyle=":")
            text = axis.annotate(
                "the three products alone", (products[0] / naive[0], 0.75), rotation=90
            )
            text.set(ha="right", va="center", color="0.4")
        axis.set(ylim=(0, 1.1), axisbelow=True)
        axis.margins(x=0.14)
        axis.grid(alpha=0.3)
        axis.set_xlabel("time ÷ naive (left is faster)")
        axis.set_ylabel("temporary memory ÷ naive (down is less)")
        axis.set_title(_title(record))
        figure.savefig(path, dpi=150)
    return True


def _amounts(row: CompiledRow | None) -> tuple[float, float] | None:
    """Returns the estimated milliseconds and the bytes, unless one is not known."""
    if row is None or "estimated_ms" not in row or "temp_bytes" not in row:
        return None
    return row["estimated_ms"], row["temp_bytes"]


def _draw_point(
    axis: Axes, point: tuple[float, float], place: Place, kind: str
) -> None:
    ours = kind == "candidate"
    axis.plot(*point, "o", color=COLOR_OF_KIND[kind], markersize=9 if ours else 7)
    text = axis.annotate(
        place.text, point, (place.x, place.y), textcoords="offset points"
    )
    text.set(ha=place.align, fontweight="bold" if ours else "normal")
    text.set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 1})


def _title(record: CompiledRecord) -> str:
    batch, length, width, vocab = record["shape"]
    packages = ", ".join(
        f"{name} {version.partition('.dev')[0]}"
        for name, key in PACKAGES.items()
        if (version := record["versions"].get(key)) is not None
    )
    return (
        f"Loss and gradients of hidden states and lm_head on a TPU {record['chip']}: "
        "the compiler's estimates\n"
        f"{batch * length} tokens, D = {width}, V = {vocab}, bfloat16; {packages}"
    )


def _draw_axis(axis: Axes, record: AxisRecord) -> None:
    sizes, figures = _figures(record)
    times = [1e3 * each["median"] for each in figures]
    temps = [(each["temp_bytes"] or 0) / MEBIBYTE for each in figures]
    axis.loglog(sizes, times, "o", color=COLORS["time"])
    if record["time_slope"] is not None:
        fit = np.polyfit(np.log(sizes), np.log(times), 1)
        fitted = np.exp(np.polyval(fit, np.log(sizes)))
        axis.loglog(sizes, fitted, "--", color=COLORS["time"])
    axis.set_ylabel("time, ms (●, dashed: fit)", color=COLORS["time"])
    memory = axis.twinx()
    memory.loglog(sizes, temps, "s-", color=COLORS["temp"], alpha=0.8)
    memory.set_ylabel("temporary memory, MiB (■)", color=COLORS["temp"])
    _scale(axis, times)
    _scale(memory, temps)
    axis.set_xticks(sizes, [f"{size}" for size in sizes])
    axis.set_xticks([], minor=True)
    axis.grid(alpha=0.3)
    slopes = record["time_slope"], record["temp_slope"]
    time, temp = ("unknown" if s is None else f"{s:.2f}" for s in slopes)
    axis.set_title(f"slope of time {time}, of memory {temp}")


def _scale(axis: Axes, values: list[float]) -> None:
    """Sets plain numbers, and a range in which noise does not look like growth."""
    if min(values) > 0:
        axis.set_ylim(min(values) / 2, max(values) * 2)
    axis.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.yaxis.set_minor_formatter(NullFormatter())


def _figures(record: AxisRecord) -> tuple[list[int], list[FiguresRecord]]:
    found = {
        int(size): point
        for size, point in record["points"].items()
        if "skipped" not in point
    }
    return list(found), list(found.values())


def _where(results: Results) -> str:
    device = results["machine"]["device"]
    if device == "cpu":
        device = (
            f"{results['machine']['processor']}, {results['machine']['cores']} cores"
        )
    return f"{device}, jax {results['versions']['jax']}"


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws a record's time against memory."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plots")
    parser.add_argument("record", type=Path, help="written by benchmarks.compiled")
    parser.add_argument("picture", type=Path, help="the PNG file to write")
    options = parser.parse_args(arguments)
    options.picture.parent.mkdir(parents=True, exist_ok=True)
    record: CompiledRecord = json.loads(options.record.read_text())
    if not plot_tradeoff(record, options.picture):
        parser.error(f"{options.record} has no estimated time and memory of naive")


if __name__ == "__main__":
    main()
