"""`losses.png`: one panel per group of terms."""

import math
from pathlib import Path

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from trainer.report.metrics import Record

GROUPS: dict[str, tuple[str, ...]] = {
    "Loss": ("total_loss", "main_loss", "nll", "tempered_nll"),
    "Multi-token prediction": ("mtp_loss", "mtp_head_losses"),
    "Repetition": (
        "ngram_penalty",
        "ngram_repetition",
        "token_diversity",
        "immediate_repetition_penalty",
        "unlikelihood",
    ),
    "Early end of text": ("eos_penalty",),
    "Other token terms": ("focal_loss", "z_loss", "contrastive_loss"),
    "Adaptive multi-token": ("main_", "adaptive_mtp"),
    "Experts: balance": ("moe_", "diversity_loss"),
    "Experts: auxiliary": ("aux_",),
    "Experts: load": ("expert_load_",),
    "Accuracy": ("accuracy",),
    "Entropy (nats)": ("entropy",),
    "Perplexity": ("perplexity",),
    "Temperature": ("temperature",),
    "Learning rate": ("learning_rate",),
    "Gradient norm": ("grad_norm",),
}
# Counts; nothing to look at unless they are wrong, and then training stops.
HIDDEN = (
    "step",
    "tokens",
    "seconds",
    "num_tokens",
    "num_invalid_targets",
    "skipped_steps",
    "skipped_in_a_row",
)
# One number per layer and expert: a picture, not lines of a table.
PICTURED = ("expert_load_",)
# Drawn as dots into the loss panel.
HELDOUT = {"nll": "ko", "tempered_nll": "kx"}
LOGARITHMIC = ("Perplexity", "Gradient norm")
SMOOTH_ALREADY = ("Temperature", "Learning rate")
MOST_LINES = 12


def plot_losses(records: list[Record], heldout: list[Record], path: Path) -> None:
    """Draws every scalar of the records; `heldout` adds dots to the loss panel."""
    panels = group_names([name for name in records[-1] if name not in HIDDEN])
    columns = 3
    rows = math.ceil(len(panels) / columns)
    with mpl.rc_context({"font.size": 9}):
        figure = Figure(figsize=(15, 3.6 * rows), layout="constrained")
        axes = figure.subplots(rows, columns, squeeze=False).reshape(-1)
        for axis, (title, names) in zip(axes, panels.items(), strict=False):
            _draw(axis, title, names, records)
            if title == "Loss" and heldout:
                steps = [record["step"] for record in heldout]
                for name, mark in HELDOUT.items():
                    if name in heldout[-1]:
                        values = [record[name] for record in heldout]
                        label = f"held-out {name}"
                        axis.plot(steps, values, mark, markersize=5, label=label)
                axis.legend(fontsize=8)
        for axis in axes[len(panels) :]:
            axis.set_axis_off()
        figure.savefig(path, dpi=110)


def group_names(names: list[str]) -> dict[str, list[str]]:
    """Sorts names into panels: an exact name first, then the longest beginning."""
    ranked: dict[str, list[str]] = {title: [] for title in GROUPS}
    for name in names:
        title = _panel(name)
        ranked.setdefault(title, []).append(name)
    return {title: members for title, members in ranked.items() if members}


def _panel(name: str) -> str:
    keys = {key: title for title, group in GROUPS.items() for key in group}
    if name in keys:
        return keys[name]
    beginnings = [key for key in keys if name.startswith(key)]
    return keys[max(beginnings, key=len)] if beginnings else name


def _draw(axis: Axes, title: str, names: list[str], records: list[Record]) -> None:
    steps = np.array([record["step"] for record in records])
    for index, name in enumerate(names[:MOST_LINES]):
        values = np.array([record.get(name, np.nan) for record in records])
        color = f"C{index % 10}"
        style = "-" if index < 10 else "--"
        window = smoothing_window(title, len(values))
        if window > 1:
            axis.plot(steps, values, color=color, alpha=0.2, linewidth=0.8)
        axis.plot(steps, smooth(values, window), style, color=color, label=name)
    more = len(names) - MOST_LINES
    axis.set_title(
        title + (f" (first {MOST_LINES} of {len(names)})" if more > 0 else "")
    )
    axis.set_xlabel("step")
    axis.grid(alpha=0.3)
    if title in LOGARITHMIC:
        axis.set_yscale("log")
    if len(names) > 1:
        axis.legend(fontsize=8)


def smoothing_window(title: str, count: int) -> int:
    """Returns the number of records that a panel's curves are averaged over."""
    return 1 if title in SMOOTH_ALREADY else max(1, count // 50)


def smooth(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the last `window` finite values, of fewer at the start."""
    known = np.isfinite(values)
    sums = np.cumsum(np.concatenate([[0.0], np.where(known, values, 0.0)]))
    counts = np.cumsum(np.concatenate([[0], known]))
    ends = np.arange(1, len(values) + 1)
    starts = np.maximum(0, ends - window)
    total, count = sums[ends] - sums[starts], counts[ends] - counts[starts]
    return np.where(count > 0, total / np.maximum(count, 1), np.nan)
