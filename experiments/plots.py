"""Pictures of results: a dot per seed, paths over training, maps of experts' load."""

from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from experiments.records import Results, RunRecord, Spread, by_variant, changes

# Okabe and Ito's colours, which colour-blind readers can tell apart.
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_dots(
    results: Results,
    panels: dict[str, str],
    path: Path,
    marks: dict[str, dict[str, float]] | None = None,
) -> None:
    """Draws a panel per number: variants from top to bottom, a dot per seed, the mean.

    Args:
      results: of an experiment.
      panels: title of each number.
      path: of the picture.
      marks: vertical lines by number, each with its label.
    """
    variants = list(by_variant(results, next(iter(panels))))
    with mpl.rc_context({"font.size": 9}):
        size = (2.2 + 3.2 * len(panels), 1.3 + 0.34 * len(variants))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
        for axis, (number, title) in zip(axes, panels.items(), strict=True):
            _draw_dots(axis, results, number, variants)
            for place, (label, value) in enumerate(
                (marks or {}).get(number, {}).items()
            ):
                axis.axvline(value, color="0.4", linestyle="--" if place else ":", lw=1)
                axis.annotate(
                    label,
                    (value, 1),
                    xycoords=("data", "axes fraction"),
                    xytext=(2, -2),
                    textcoords="offset points",
                    va="top",
                    fontsize=7,
                    color="0.3",
                )
            axis.set_xlabel(title)
        axes[0].set_yticks(range(len(variants)), variants)
        axes[0].set_ylim(len(variants) - 0.5, -0.5)
        figure.savefig(path, dpi=120)


def _draw_dots(axis: Axes, results: Results, number: str, variants: list[str]) -> None:
    for run in results["runs"]:
        if number in run["numbers"]:
            place = variants.index(run["variant"])
            axis.plot(
                run["numbers"][number], place, "o", color=COLORS[0], alpha=0.5, ms=4
            )
    for variant, found in by_variant(results, number).items():
        axis.plot(
            found["mean"], variants.index(variant), "|", color=COLORS[1], ms=14, mew=2
        )
    axis.grid(axis="x", alpha=0.3)
    axis.margins(x=0.08)


def plot_changes(
    results: Results,
    numbers: dict[str, str],
    against: str,
    path: Path,
    goal: dict[str, float],
) -> None:
    """Draws two changes against each other: a mark per variant, its range over seeds.

    Args:
      results: of an experiment.
      numbers: title of the number along x, and of that along y.
      against: the variant that the changes are relative to.
      path: of the picture.
      goal: largest change of each number that is wanted.
    """
    (across, up), titles = numbers, list(numbers.values())
    found = {name: changes(results, name, against) for name in numbers}
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(7.6, 4.8), layout="constrained")
        axis = figure.subplots()
        for place, (variant, x) in enumerate(found[across].items()):
            y, color = found[up][variant], COLORS[place % len(COLORS)]
            axis.errorbar(
                x["mean"],
                y["mean"],
                xerr=_to_ends(x),
                yerr=_to_ends(y),
                fmt="os^D"[place // len(COLORS)],
                color=color,
                elinewidth=0.8,
                label=f"{variant} ({x['seeds']})",
            )
        axis.axvline(goal[across], color="0.4", linestyle=":", lw=1)
        axis.axhline(goal[up], color="0.4", linestyle=":", lw=1, label="goal")
        axis.set(xlabel=titles[0], ylabel=titles[1])
        axis.xaxis.set_major_formatter(PercentFormatter(1.0))
        axis.yaxis.set_major_formatter(PercentFormatter(1.0))
        axis.grid(alpha=0.3)
        figure.legend(loc="outside right upper", fontsize=7, title="variant (seeds)")
        figure.savefig(path, dpi=120)


def _to_ends(value: Spread) -> list[list[float]]:
    mean = value["mean"]
    return [[mean - value["low"]], [value["high"] - mean]]


def plot_paths(results: Results, names: dict[str, str], path: Path) -> None:
    """Draws a panel per reported number over training: a line per variant and seed."""
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(4.6 * len(names), 3.4), layout="constrained")
        axes = figure.subplots(1, len(names), squeeze=False)[0]
        for axis, (name, title) in zip(axes, names.items(), strict=True):
            having = [run for run in results["runs"] if name in run["paths"]]
            variants = list(dict.fromkeys(run["variant"] for run in having))
            for run in having:
                _draw_path(axis, run, name, variants)
            axis.set_title(title)
            axis.set_xlabel("step")
            axis.grid(alpha=0.3)
            if having:
                axis.legend(fontsize=7)
        figure.savefig(path, dpi=120)


def _draw_path(axis: Axes, run: RunRecord, name: str, variants: list[str]) -> None:
    values = np.asarray(run["paths"][name], float).reshape(
        len(run["paths"]["step"]), -1
    )
    place = variants.index(run["variant"])
    for column in range(values.shape[1]):
        label = run["variant"] + (f" [{column + 1}]" if values.shape[1] > 1 else "")
        axis.plot(
            np.asarray(run["paths"]["step"], float),
            values[:, column],
            color=COLORS[(place + column) % len(COLORS)],
            alpha=0.8,
            lw=1,
            label=label if run["seed"] == 0 else None,
        )


def plot_loads(results: Results, path: Path) -> None:
    """Draws the experts' load over training: a row per variant, a column per layer."""
    runs = [run for run in results["runs"] if run["seed"] == 0]
    layers = np.asarray(runs[0]["paths"]["expert_load"]).shape[1]
    norm = TwoSlopeNorm(vcenter=1.0, vmin=0.0, vmax=4.0)
    with mpl.rc_context({"font.size": 9}):
        size = (2 + 4 * layers, 0.6 + 1.45 * len(runs))
        figure = Figure(figsize=size, layout="constrained")
        axes = figure.subplots(len(runs), layers, sharex=True, squeeze=False)
        for row, run in zip(axes, runs, strict=True):
            load = np.asarray(run["paths"]["expert_load"], float)
            last = float(np.asarray(run["paths"]["step"], float)[-1])
            for layer, axis in enumerate(row):
                axis.imshow(
                    load[:, layer].T,
                    aspect="auto",
                    interpolation="nearest",
                    norm=norm,
                    cmap="RdBu_r",
                    extent=(0, last, load.shape[2] + 0.5, 0.5),
                )
                axis.set_title(
                    f"{run['variant']}, expert layer {layer + 1}", fontsize=8
                )
            row[0].set_ylabel("expert")
        for axis in axes[-1]:
            axis.set_xlabel("step")
        figure.colorbar(
            ScalarMappable(norm, "RdBu_r"),
            ax=axes,
            label="share of the choices, over an even share",
            shrink=0.6,
        )
        figure.savefig(path, dpi=120)


def plot_calibration(results: Results, name: str, path: Path) -> None:
    """Draws confidence against accuracy, a panel per variant that has such bins.

    The bins are in `extra`, under the name.
    """
    having = [run for run in results["runs"] if name in run.get("extra", {})]
    variants = list(dict.fromkeys(run["variant"] for run in having))
    with mpl.rc_context({"font.size": 9}):
        panels = max(1, len(variants))
        figure = Figure(figsize=(0.6 + 4.2 * panels, 4.2), layout="constrained")
        axes = figure.subplots(1, panels, squeeze=False, sharey=True)[0]
        for axis, variant in zip(axes, variants, strict=False):
            axis.plot([0, 1], [0, 1], color="0.6", lw=1, ls=":", label="calibrated")
            for run in having:
                bins = run.get("extra", {}).get(name)
                if run["variant"] == variant and isinstance(bins, dict):
                    _draw_bins(axis, bins, run["seed"])
            axis.set(title=variant, xlabel="confidence", xlim=(0, 1), ylim=(0, 1))
            axis.grid(alpha=0.3)
            axis.legend(fontsize=7)
        axes[0].set_ylabel("share of the first drafts that are accepted")
        figure.savefig(path, dpi=120)


def _draw_bins(axis: Axes, bins: dict[str, list[float]], seed: int) -> None:
    weight, confidence, correct = (
        np.asarray(bins[key]) for key in ("weight", "confidence", "correct")
    )
    full = weight > 0
    axis.scatter(
        confidence[full] / weight[full],
        correct[full] / weight[full],
        s=8 + 200 * weight[full] / weight.sum(),
        color=COLORS[seed % len(COLORS)],
        alpha=0.6,
        label=f"seed {seed}",
    )
