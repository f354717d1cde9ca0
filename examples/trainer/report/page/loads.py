"""The experts' load over the steps: averages, and the levels that are coloured."""

import itertools
from typing import NamedTuple

import numpy as np

# Load relative to an even share, 1: as far below as above, by factors.
LEVELS = (1 / 8, 1 / 4, 1 / 2, 0.7, 0.9, 1.1, 1.4, 2, 4, 8)
LEVEL_NAMES = ("⅛", "¼", "½", "0.7", "0.9", "1.1", "1.4", "2", "4", "8")
STRENGTHS = (1.0, 0.8, 0.62, 0.44, 0.26)
# The page shines through the middle, so that they suit a light one and a dark one.
COLORS = (
    *(f"rgba(47, 129, 247, {strength})" for strength in STRENGTHS),
    "rgba(125, 133, 144, 0.15)",
    *(f"rgba(217, 95, 2, {strength})" for strength in reversed(STRENGTHS)),
)
MOST_CELLS, MOST_COLUMNS, FEWEST_COLUMNS = 40_000, 120, 24


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


def levels() -> list[tuple[str, str]]:
    """Each level's colour, and what it stands for."""
    between = itertools.pairwise(LEVEL_NAMES)
    texts = [f"< {LEVEL_NAMES[0]}", *(f"{a} to {b}" for a, b in between)]
    return list(zip(COLORS, [*texts, f"≥ {LEVEL_NAMES[-1]}"], strict=True))
