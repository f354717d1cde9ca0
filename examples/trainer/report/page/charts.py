"""Plotly figures of a run: curves over the steps, and maps of the experts' load."""

import html
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from trainer.report.page.loads import COLORS, LEVELS, Columns
from trainer.report.plot import LOGARITHMIC, smooth

# Each has a contrast of 3 at least with a light page and with a dark one.
PALETTE = (
    "#2f81f7",
    "#d9730d",
    "#2c974b",
    "#9d6df2",
    "#e5484d",
    "#0f8f9f",
    "#a67c00",
    "#7d8590",
    "#d6409f",
    "#9a6b4c",
)
MOST_POINTS = 1000
NONE = "\N{EN DASH}"
FAINT = "rgba(125, 133, 144, 0.3)"
# The style sheet colours the text, so that it follows the page.
LAYOUT = {
    "template": {},
    "paper_bgcolor": "rgba(0, 0, 0, 0)",
    "plot_bgcolor": "rgba(0, 0, 0, 0)",
    "margin": {"l": 8, "r": 8, "t": 8, "b": 8},
    "font": {"size": 12, "family": "system-ui, sans-serif"},
    "hoverlabel": {"namelength": -1},
    "xaxis": {
        "title": "step",
        "automargin": True,
        "showgrid": False,
        "zeroline": False,
        "unifiedhovertitle": {"text": "step %{x}"},
    },
    "yaxis": {
        "automargin": True,
        "gridcolor": FAINT,
        "zerolinecolor": FAINT,
        "ticklabelstandoff": 4,
    },
}


class Curve(NamedTuple):
    """One metric over the steps.

    Attributes:
      label: its name.
      steps: [T], rising.
      values: [T]; NaN is a gap.
      color: index into the palette, which repeats with dashes.
      window: how many values each point is the mean of.
      mode: "lines", "markers" or "lines+markers".
    """

    label: str
    steps: np.ndarray
    values: np.ndarray
    color: int
    window: int = 1
    mode: str = "lines"

    def summary(self) -> str:
        """Its first and last value in words."""
        values = smooth(self.values, self.window)
        known = np.flatnonzero(np.isfinite(values)).tolist()
        if not known:
            return f"{self.label}: no numbers"
        ends = dict.fromkeys((known[0], known[-1]))
        texts = (f"{short(values[i])} at step {self.steps[i]:.0f}" for i in ends)
        return f"{self.label}: {', '.join(texts)}"


def short(value: float) -> str:
    """Writes a number briefly; `NONE` where there is none."""
    if not math.isfinite(value):
        return NONE
    units = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    found = (unit[1:] for unit in units if abs(value) >= unit[0])
    unit, letter = next(found, (1.0, ""))
    return f"{value / unit:.4g}{letter}"


def thin(values: np.ndarray, most: int = MOST_POINTS) -> np.ndarray:
    """Chooses indices so that spikes and gaps stay: the extremes of every bucket.

    Args:
      values: NaN is a gap.
      most: how many to choose, about.

    Returns:
      Rising indices; all of them if they are few enough.
    """
    count = len(values)
    if count <= most:
        return np.arange(count)
    buckets = most // 2
    width = -(-count // buckets)
    grid = np.full(buckets * width, np.nan)
    grid[:count] = values
    grid = grid.reshape(buckets, width)
    known = np.isfinite(grid)
    starts = np.arange(buckets) * width
    chosen = [
        starts + np.argmin(np.where(known, grid, np.inf), axis=1),
        starts + np.argmax(np.where(known, grid, -np.inf), axis=1),
        (starts + np.argmin(known, axis=1))[~known.all(axis=1)],
        [0, count - 1],
    ]
    indices = np.unique(np.concatenate(chosen).astype(int))
    return indices[indices < count]


def line_chart(title: str, curves: Sequence[Curve]) -> go.Figure:
    """Draws curves over the steps; long ones are thinned.

    Args:
      title: of the panel; it decides whether the numbers lie on a logarithmic scale.
      curves: at least one.
    """
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    is_log = title in LOGARITHMIC and bool((values > 0).any())
    steps = np.concatenate([curve.steps for curve in curves])
    figure = go.Figure([t for curve in curves for t in _traces(curve)], LAYOUT)
    figure.update_layout(
        height=240 + 18 * len(curves),
        hovermode="x unified",
        showlegend=True,
        legend={"orientation": "h", "yref": "container", "yanchor": "bottom", "y": 0},
    )
    figure.update_xaxes(dtick=1 if np.ptp(steps) < 6 else None)
    figure.update_yaxes(
        type="log" if is_log else "linear",
        nticks=4 if is_log else 7,
        # Thousands get a letter, and millionths none.
        exponentformat="SI" if (np.abs(values) >= 1).any() else "e",
        # That of a logarithmic scale is one of exponents.
        range=_range(np.log10(values[values > 0]) if is_log else values),
    )
    return figure


def _range(values: np.ndarray) -> list[float] | None:
    """Returns a wider range for values that differ by rounding alone, or None."""
    if not values.size or np.ptp(values) > 1e-6 * (size := np.abs(values).max()):
        return None
    margin = 0.5 * size or 0.5
    return [float(values.min() - margin), float(values.max() + margin)]


def _traces(curve: Curve) -> list[go.Scatter]:
    """The curve, after every single value faintly if it is smoothed."""
    smoothed = smooth(curve.values, curve.window)
    kept = np.union1d(thin(curve.values), thin(smoothed))
    steps = curve.steps[kept]
    exact, mean = curve.values[kept].astype("f4"), smoothed[kept].astype("f4")
    color = PALETTE[curve.color % len(PALETTE)]
    dash = "solid" if curve.color < len(PALETTE) else "dash"
    # Plotly reads tags in a name.
    name = html.escape(curve.label)
    both = {"x": steps, "name": name, "legendgroup": name}
    shown = go.Scatter(
        both | _markers(curve.mode, mean),
        y=mean,
        hovertemplate="%{y:.4~g}",
        line={"color": color, "width": 1.8, "dash": dash},
    )
    if curve.window == 1:
        return [shown]
    shown.update(customdata=exact, hovertemplate="%{y:.4~g} (exact %{customdata:.4~g})")
    raw = go.Scatter(
        both | _markers(curve.mode, exact),
        y=exact,
        showlegend=False,
        hoverinfo="skip",
        opacity=0.3,
        line={"color": color, "width": 0.8},
    )
    return [raw, shown]


def _markers(mode: str, values: np.ndarray) -> dict[str, object]:
    """The mode, and dots where a line would not show: at values between two gaps."""
    if mode != "lines":
        return {"mode": mode, "marker": {"size": 8}}
    known = np.pad(np.isfinite(values), 1)
    alone = known[1:-1] & ~known[:-2] & ~known[2:]
    if not alone.any():
        return {"mode": mode}
    marker = {"size": np.where(alone, 6, 0), "opacity": 1, "line": {"width": 0}}
    return {"mode": "lines+markers", "marker": marker}


def heat_map(columns: Columns) -> go.Figure:
    """Draws experts × steps, coloured by level of load."""
    experts = columns.means.shape[1]
    height = int(np.clip(180 // experts, 5, 18))
    half = (columns.edges[1] - columns.edges[0]) / 2
    stretch = f" ± {half:.4g}" if half > 0.5 else ""
    highest = LEVELS[-1] + 1
    stops = [0, *np.repeat(LEVELS, 2) / highest, 1]
    figure = go.Figure(
        go.Heatmap(
            x=columns.edges,
            y=[f"E{expert}" for expert in range(1, experts + 1)],
            z=columns.means.T.astype("f4"),
            zmin=0,
            zmax=highest,
            colorscale=list(zip(stops, np.repeat(COLORS, 2).tolist(), strict=True)),
            showscale=False,
            hoverongaps=False,
            hovertemplate=(
                f"%{{y}}, step %{{x:.6~g}}{stretch}<br>%{{z:.3~g}} of an even share"
                "<extra></extra>"
            ),
        ),
        LAYOUT,
    )
    figure.update_layout(height=height * experts + 60)
    every = 1 if height >= 14 else 4
    figure.update_yaxes(autorange="reversed", showgrid=False, dtick=every)
    return figure
