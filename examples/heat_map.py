"""A heat map of the load of experts over the steps, as inline SVG."""

import itertools
from typing import NamedTuple

import numpy as np

from markup import Html, element
from svg import LEFT, RIGHT, WIDTH, Scale, label_at, numbers, step_axis

# Load relative to an even share, 1: as far below as above, by factors.
LEVELS = (1 / 8, 1 / 4, 1 / 2, 0.7, 0.9, 1.1, 1.4, 2, 4, 8)
LEVEL_NAMES = ("⅛", "¼", "½", "0.7", "0.9", "1.1", "1.4", "2", "4", "8")
MOST_CELLS, MOST_COLUMNS, FEWEST_COLUMNS = 40_000, 120, 24
TOP = 4


class Columns(NamedTuple):
    """Loads averaged over stretches of steps; NaN where there are no records."""

    edges: np.ndarray
    means: np.ndarray


def columns_for(maps: int, experts: int) -> int:
    """How many columns a heat map may have where there are so many."""
    return int(np.clip(MOST_CELLS // (maps * experts), FEWEST_COLUMNS, MOST_COLUMNS))


def average(steps: np.ndarray, loads: np.ndarray, most: int) -> Columns:
    """Averages loads over at most so many stretches of equal length.

    Args:
      steps: [T], rising.
      loads: [T, E]; NaN is not known.
      most: columns.
    """
    count = len(steps)
    half = (steps[-1] - steps[0]) / (count - 1) / 2 if count > 1 else 0.5
    edges = np.linspace(steps[0] - half, steps[-1] + half, min(count, most) + 1)
    inside = np.searchsorted(edges, steps, side="right") - 1
    column = np.clip(inside, 0, len(edges) - 2)
    known = np.isfinite(loads)
    total, counts = np.zeros((2, len(edges) - 1, loads.shape[1]))
    np.add.at(total, column, np.where(known, loads, 0.0))
    np.add.at(counts, column, known)
    means = np.divide(total, counts, out=np.full_like(total, np.nan), where=counts > 0)
    return Columns(edges, means)


def heat_map(label: str, columns: Columns) -> Html:
    """Draws experts × steps, one path per level of load.

    Args:
      label: what a screen reader says.
      columns: of the loads.
    """
    experts = columns.means.shape[1]
    height = int(np.clip(180 // experts, 5, 18))
    bottom = TOP + height * experts
    across = Scale(columns.edges[0], columns.edges[-1], LEFT, RIGHT)
    every = 1 if height >= 11 else 8
    names = [
        label_at(f"E{row + 1}", LEFT - 5, TOP + height * (row + 0.5) + 4, "end")
        for row in range(0, experts, every)
    ]
    axis = [*names, *step_axis(across, bottom)]
    return element(
        "svg",
        element("g", *axis, aria_hidden="true"),
        *_levels(across.place(columns.edges), columns.means, height),
        class_="heat",
        viewBox=f"0 0 {WIDTH} {bottom + 34:.0f}",
        role="img",
        aria_label=label,
        data_edges=numbers(columns.edges, 9),
        data_loads=";".join(numbers(row, 3) for row in columns.means.T),
        data_box=numbers([LEFT, RIGHT, TOP, bottom], 5),
    )


def _levels(x: np.ndarray, means: np.ndarray, height: int) -> list[Html]:
    """Cells of one level as one path; neighbours in a row are one box."""
    paths: dict[int, list[str]] = {}
    for row, loads in enumerate(means.T):
        level = np.where(np.isfinite(loads), np.digitize(loads, LEVELS), -1)
        starts = np.flatnonzero(np.diff(level, prepend=-2))
        ends = np.append(starts[1:], len(level))
        top = TOP + row * height
        for start, end in zip(starts, ends, strict=True):
            box = f"M{x[start]:.1f} {top}H{x[end]:.1f}v{height}H{x[start]:.1f}z"
            paths.setdefault(int(level[start]), []).append(box)
    return [
        element("path", d="".join(boxes), class_=f"h{level}")
        for level, boxes in sorted(paths.items())
        if level >= 0
    ]


def level_names() -> list[tuple[str, str]]:
    """Each level's class, and what it stands for."""
    between = itertools.pairwise(LEVEL_NAMES)
    texts = [f"< {LEVEL_NAMES[0]}", *(f"{a} to {b}" for a, b in between)]
    texts.append(f"≥ {LEVEL_NAMES[-1]}")
    return [(f"h{level}", text) for level, text in enumerate(texts)]
