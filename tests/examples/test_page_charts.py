"""The figures of a run's page: gaps, scales, long curves, and the experts' load."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import plotly.graph_objects as go
import pytest

from trainer.report.page.charts import Curve, heat_map, line_chart, short, thin
from trainer.report.page.content import duration
from trainer.report.page.loads import LEVELS, average, columns_for, levels

# Plotly makes the attributes of a trace when they are read.
Traces = tuple[Any, ...]


def traces_of(figure: go.Figure) -> Traces:
    return tuple(figure.select_traces())


def chart(values: Sequence[float], title: str = "x", **more: object) -> go.Figure:
    steps = np.arange(1.0, len(values) + 1)
    curve = Curve("a", steps, np.array(values, float), 0)._replace(**more)
    return line_chart(title, [curve])


def draw(values: Sequence[float], **more: object) -> Traces:
    return traces_of(chart(values, "x", **more))


def test_numbers_that_are_missing_are_gaps() -> None:
    (drawn,) = draw([1, 2, math.nan, 4, math.nan, 6, 7])
    assert not drawn.connectgaps
    np.testing.assert_array_equal(drawn.y, [1, 2, np.nan, 4, np.nan, 6, 7])
    # A value between two gaps is a dot, since no line leads there.
    assert drawn.mode == "lines+markers"
    assert (drawn.marker.size > 0).tolist() == [False] * 3 + [True] + [False] * 3
    assert draw([1, 2])[0].mode == "lines"
    assert draw([math.inf, 2, -math.inf])[0].marker.size.tolist() == [0, 6, 0]
    assert np.isnan(draw([math.nan] * 2)[0].y).all()


def test_a_smoothed_curve_tells_the_exact_numbers_too() -> None:
    raw, mean = draw([1, 3, 5], window=2)
    np.testing.assert_array_equal(raw.y, [1, 3, 5])
    np.testing.assert_array_equal(mean.y, [1, 2, 4])
    np.testing.assert_array_equal(mean.customdata, raw.y)
    assert "customdata" in mean.hovertemplate
    assert (raw.hoverinfo, raw.showlegend, raw.line.color) == (
        "skip",
        False,
        mean.line.color,
    )


def test_a_logarithmic_scale_leaves_out_what_has_no_logarithm() -> None:
    assert chart([0, 1, 10, 100], "Perplexity").layout.yaxis.type == "log"
    assert chart([0, 1, 10, 100], "Loss").layout.yaxis.type == "linear"
    # Without a positive value there is no logarithm.
    assert chart([-1, -2], "Perplexity").layout.yaxis.type == "linear"


def test_held_out_values_are_dots() -> None:
    (drawn,) = draw([5, math.nan, 6], mode="markers")
    assert drawn.mode == "markers"
    np.testing.assert_array_equal(drawn.x, [1, 2, 3])


def test_colours_repeat_dashed() -> None:
    first, again = (draw([1, 2], color=color)[0].line for color in (1, 11))
    assert first.color == again.color
    assert (first.dash, again.dash) == ("solid", "dash")


@pytest.mark.parametrize("count", [1, 999, 1000, 1001, 100_000])
def test_long_curves_keep_their_spikes(count: int) -> None:
    values = np.sin(np.arange(count) / 50)
    spike, dip, gap = (count * k // 7 for k in (2, 4, 6))
    values[[spike, dip, gap]] = 9.0, -9.0, np.nan
    kept = thin(values)
    assert len(kept) <= 1003
    assert (np.diff(kept) > 0).all()
    assert {0, count - 1, spike, dip, gap} <= set(kept.tolist())
    if count <= 1000:
        assert len(kept) == count


def test_long_curves_stay_small_and_keep_what_is_exact() -> None:
    values = np.sin(np.arange(100_000) / 50)
    values[[30_000, 60_000]] = 9.0, np.nan
    raw, mean = draw(values.tolist(), window=2000)
    assert len(raw.x) == len(mean.x) <= 2006
    assert raw.y[raw.x.tolist().index(30_001)] == 9
    assert np.isnan(raw.y[raw.x.tolist().index(60_001)])


def test_steps_are_whole() -> None:
    assert chart([1, 2]).layout.xaxis.dtick == 1
    assert chart([1] * 60).layout.xaxis.dtick is None


def test_a_scale_has_room_around_a_single_number() -> None:
    for value in (0.0, 3.0, -1e-9):
        for same in ([value], [value, math.nan], [value, value * (1 + 1e-7)]):
            low, high = chart(same).layout.yaxis.range
            assert low < value < high
            assert (low + high) / 2 == pytest.approx(value)
    assert chart([1, 1.1]).layout.yaxis.range is None
    # In exponents of ten on a logarithmic scale.
    assert chart([100], "Perplexity").layout.yaxis.range == (1, 3)


def test_short_numbers() -> None:
    numbers = (0, 1234.5678, 0.00012345, 25_300, 4.5e6, 2e9, math.nan)
    texts = ["0", "1235", "0.0001234", "25.3k", "4.5M", "2G", "\N{EN DASH}"]
    assert [short(number) for number in numbers] == texts
    assert [duration(x) for x in (59.6, 3723, math.nan)] == [
        "0:01:00",
        "1:02:03",
        "\N{EN DASH}",
    ]


def test_loads_are_averaged_over_stretches_of_steps() -> None:
    steps = np.array([10.0, 20, 30, 40, 70, 80])
    loads = np.stack([[1.0, 3, np.nan, 2, 5, np.nan], np.full(6, np.nan)], axis=1)
    columns = average(steps, loads, 4)
    np.testing.assert_allclose(columns.edges, [3, 24, 45, 66, 87])
    np.testing.assert_allclose(columns.means[:, 0], [2, 2, np.nan, 5])
    assert np.isnan(columns.means[:, 1]).all()
    one = average(np.array([5.0]), np.array([[1.5]]), 10)
    np.testing.assert_allclose(one.edges, [4.5, 5.5])
    assert columns_for(1, 8) == 120
    assert columns_for(24, 64) * 24 * 64 <= 40_000
    assert columns_for(64, 256) == 24


def test_a_heat_map_colours_by_factors_of_an_even_share() -> None:
    loads = np.array([[0.0, 1.0, 2.5], [0.1, 1.0, np.nan], [9.0, 0.6, np.nan]])
    (drawn,) = traces_of(heat_map(average(np.array([1.0, 2, 3]), loads, 120)))
    np.testing.assert_allclose(drawn.z, loads.T, rtol=1e-6)
    np.testing.assert_allclose(drawn.x, [0.5, 1.5, 2.5, 3.5])
    assert list(drawn.y) == ["E1", "E2", "E3"]
    assert not drawn.hoverongaps
    # Each level has one colour from edge to edge.
    stops = np.array([stop * drawn.zmax for stop, _ in drawn.colorscale])
    np.testing.assert_allclose(stops[1:-1], np.repeat(LEVELS, 2))
    colors = [color for _, color in drawn.colorscale]
    assert colors[::2] == colors[1::2] == [color for color, _ in levels()]
    assert len(set(colors)) == 11
    assert levels()[5][1] == "0.9 to 1.1"
    edges = np.searchsorted(LEVELS, [0.0, 0.6, 1.0, 2.5, 9.0])
    texts = ["< ⅛", "½ to 0.7", "0.9 to 1.1", "2 to 4", "≥ 8"]
    assert [levels()[edge][1] for edge in edges] == texts
