"""Charts as inline SVG: curves over the steps.

Colours come from the page's style sheet, by class. What a pointer reads off stands in
`data-` attributes, so that the charts are whole without a script.
"""

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from markup import Html, element

WIDTH, HEIGHT = 400, 240
LEFT, RIGHT, TOP, BOTTOM = 48, 384, 10, 206
MOST_POINTS = 1000
PALETTE = 10
NONE = "\N{EN DASH}"


class Line(NamedTuple):
    """One curve: `kind` is "line", "raw" (what a line smooths) or "dots"."""

    label: str
    x: np.ndarray
    y: np.ndarray
    color: int
    kind: str = "line"

    @property
    def style(self) -> str:
        """Classes: the colours repeat, dashed, after the last one."""
        dashed = " dashed" if self.color >= PALETTE else ""
        return f"{self.kind} c{self.color % PALETTE}{dashed}"


@dataclasses.dataclass(frozen=True)
class Scale:
    """From numbers to places: `low` is at `start`, `high` at `end`."""

    low: float
    high: float
    start: float
    end: float
    is_log: bool = False

    @classmethod
    def around(
        cls, values: np.ndarray, start: float, end: float, *, is_log: bool = False
    ) -> "Scale":
        """Holds all finite values, with a little room; positive ones if logarithmic.

        Without a positive value there is no logarithm, and the scale is linear.
        """
        known = values[np.isfinite(values)]
        positive = known[known > 0]
        if is_log and positive.size:
            low, high = math.log10(positive.min()), math.log10(positive.max())
            room = 0.04 * (high - low) or 0.2
            return cls(10 ** (low - room), 10 ** (high + room), start, end, True)
        low, high = (known.min(), known.max()) if known.size else (0.0, 1.0)
        size = max(abs(low), abs(high))
        # What differs by rounding alone is one number.
        differs = high - low > 1e-6 * size
        room = 0.04 * (high - low) if differs else 0.5 * size or 0.5
        return cls(float(low - room), float(high + room), start, end)

    def place(self, values: np.ndarray) -> np.ndarray:
        """Where the values are; NaN where they are nowhere."""
        low, high = self.low, self.high
        if self.is_log:
            low, high = math.log10(low), math.log10(high)
            values = np.log10(np.where(values > 0, values, np.nan))
        return self.start + (values - low) / (high - low) * (self.end - self.start)

    def ticks(self, *, whole: bool = False) -> dict[float, str]:
        """Round numbers inside the scale, and how they are written."""
        if self.is_log:
            factors = (1,) if self.high / self.low > 1000 else (1, 2, 5)
            first, last = (math.floor(math.log10(x)) for x in (self.low, self.high))
            marks = [f * 10.0**n for n in range(first, last + 1) for f in factors]
            inside = [mark for mark in marks if self.low <= mark <= self.high]
            if len(inside) >= 3:
                return {mark: short(mark) for mark in inside}
        step = _round_step((self.high - self.low) / 6)
        step = max(1.0, step) if whole else step
        first, last = math.ceil(self.low / step), math.floor(self.high / step)
        largest = max(abs(first), abs(last)) * step
        unit, letter = _unit(largest)
        digits = max(0, -math.floor(math.log10(step / unit) + 1e-9))
        form = ".3g" if largest < 1e-3 else f".{digits}f"
        return {
            n * step: f"{n * step / unit:{form}}{letter}" if n else "0"
            for n in range(first, last + 1)
        }


def _round_step(least: float) -> float:
    """The least of …, 1, 2, 5, 10, … that is not below."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(f * power for f in (1, 2, 5, 10) if f * power >= least * 0.999)


def _unit(largest: float) -> tuple[float, str]:
    units = ((1e9, 1e9, "G"), (1e6, 1e6, "M"), (1e4, 1e3, "k"))
    return next((u[1:] for u in units if largest >= u[0]), (1.0, ""))


def short(value: float) -> str:
    """Writes a number briefly; `NONE` where there is none."""
    if not math.isfinite(value):
        return NONE
    unit, letter = _unit(abs(value))
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


def line_chart(label: str, lines: Sequence[Line], *, is_log: bool = False) -> Html:
    """Draws curves over the steps.

    Args:
      label: what a screen reader says.
      lines: the curves; long ones are thinned.
      is_log: whether the numbers lie on a logarithmic scale.
    """
    thinned: list[Line] = []
    for line in lines:
        kept = thin(line.y)
        thinned.append(line._replace(x=line.x[kept], y=line.y[kept]))
    across = Scale.around(_all([line.x for line in thinned]), LEFT, RIGHT)
    up = Scale.around(_all([line.y for line in thinned]), BOTTOM, TOP, is_log=is_log)
    return element(
        "svg",
        _grid(across, up),
        *(_curve(line, across, up) for line in thinned),
        class_="chart",
        viewBox=f"0 0 {WIDTH} {HEIGHT}",
        role="img",
        aria_label=label,
        tabindex="0",
        data_range=numbers([across.low, across.high, LEFT, RIGHT, TOP, BOTTOM], 9),
    )


def _all(arrays: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate([np.zeros(0), *arrays])


def _grid(across: Scale, up: Scale) -> Html:
    """Axes with their ticks, and faint lines at those of the numbers."""
    pieces: list[Html] = []
    for value, text in up.ticks().items():
        y = float(up.place(np.array(value)))
        pieces.append(rule(LEFT, y, RIGHT, y, "grid"))
        pieces.append(label_at(text, LEFT - 5, y + 4, "end"))
    pieces += step_axis(across, BOTTOM)
    pieces.append(rule(LEFT, BOTTOM, RIGHT, BOTTOM, "axis"))
    return element("g", *pieces, aria_hidden="true")


def step_axis(across: Scale, y: float) -> list[Html]:
    """Ticks at round steps, below a height."""
    pieces = [label_at("step", (LEFT + RIGHT) / 2, y + 30, "middle")]
    for value, text in across.ticks(whole=True).items():
        x = float(across.place(np.array(value)))
        pieces.append(rule(x, y, x, y + 4, "axis"))
        pieces.append(label_at(text, x, y + 17, "middle"))
    return pieces


def rule(x1: float, y1: float, x2: float, y2: float, class_: str) -> Html:
    return element("line", x1=x1, y1=y1, x2=x2, y2=y2, class_=class_)


def label_at(text: str, x: float, y: float, anchor: str) -> Html:
    return element("text", text, x=x, y=y, text_anchor=anchor)


def _curve(line: Line, across: Scale, up: Scale) -> Html:
    x, y = across.place(line.x), up.place(line.y)
    known = np.flatnonzero(np.isfinite(y))
    readings = {
        "class_": line.style,
        "data_label": line.label,
        "data_x": numbers(line.x[known], 10),
        "data_y": numbers(line.y[known], 4),
    }
    if line.kind == "dots":
        dots = (element("circle", cx=x[i], cy=y[i], r="4") for i in known)
        return element("g", *dots, **readings)
    return element("path", d=_path(x, y, known), **readings)


def _path(x: np.ndarray, y: np.ndarray, known: np.ndarray) -> str:
    """Strokes through the known points; a gap lifts the pen, one point is a dot."""
    strokes = np.split(known, np.flatnonzero(np.diff(known) > 1) + 1)
    texts = (
        "L".join(f"{x[i]:.1f} {y[i]:.1f}" for i in stroke) + "h0" * (len(stroke) == 1)
        for stroke in strokes
        if len(stroke)
    )
    return "".join(f"M{text}" for text in texts)


def numbers(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """Writes numbers for the script."""
    return ",".join(f"{value:.{digits}g}" for value in values)
