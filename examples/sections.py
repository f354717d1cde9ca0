"""The sections of a run's page: facts, curves, experts, heads, held-out, samples."""

import datetime
import itertools
import math
import re
from collections.abc import Sequence

import numpy as np

from heat_map import average, columns_for, heat_map, level_names
from markup import Html, element, figure, join, not_yet, table
from svg import NONE, PALETTE, Line, line_chart, short
from trainer.report.metrics import Record
from trainer.report.plot import (
    GROUPS,
    HIDDEN,
    LOGARITHMIC,
    MOST_LINES,
    PICTURED,
    group_names,
    smooth,
    smoothing_window,
)
from trainer.report.run_files import Parameter, RunFiles, is_telling
from trainer.report.samples import Sample

SCHEDULES = ("Temperature", "Learning rate", "Gradient norm")
TERMS = tuple(title for title in GROUPS if title not in SCHEDULES)
NO_STEPS = "metrics.jsonl has no steps; it grows while the run trains."
NO_EVALUATION = "heldout.jsonl has no evaluation; the first comes before training."
LOAD = re.compile(r"expert_load_L(\d+)_E(\d+)")
HEAD = re.compile(r"head_accuracy_(\d+)")


def head_of_page(run: RunFiles) -> Html:
    """The run's name, how far it is, and what it was made of."""
    done = run.records[-1]["step"] if run.records else 0
    state = "finished" if done >= run.planned else "going on, or stopped"
    bar = element(
        "progress",
        f"{done:.0f} of {run.planned}",
        value=str(done),
        max=str(run.planned),
        aria_label="steps done",
    )
    facts = (
        element("div", element("dt", name), element("dd", text))
        for name, text in _facts(run).items()
    )
    parameters = run.parameters()
    telling = [p for p in parameters if is_telling(p)]
    others = [p for p in parameters if not is_telling(p)]
    return element(
        "header",
        element("h1", run.name),
        element("p", f"{state}: step {done:,.0f} of {run.planned:,}", class_="lead"),
        bar,
        element("dl", *facts, class_="facts"),
        element("h2", "Settings other than the defaults"),
        _parameters(telling) if telling else element("p", "None."),
        element(
            "details",
            element("summary", f"All other settings ({len(others)})"),
            _parameters(others),
        ),
    )


def _facts(run: RunFiles) -> dict[str, str]:
    data, settings = run.config["data"], run.config["settings"]
    facts = {"Preset": str(settings.get("preset"))}
    if run.records:
        last = run.records[-1]
        facts["Tokens"] = f"{last.get('tokens', math.nan):,.0f}"
        facts["Training time"] = duration(last.get("seconds", math.nan))
        if skipped := last.get("skipped_steps"):
            facts["Skipped steps"] = f"{skipped:.0f}"
    if run.heldout:
        first, last = run.heldout[0], run.heldout[-1]
        facts["Held-out nll"] = " → ".join(
            short(record.get("nll", math.nan)) for record in (first, last)
        )
    size = data.get("size")
    bytes_ = f"{size:,} bytes" if isinstance(size, int) else "size unknown"
    facts["Data"] = f"{data.get('name')} ({bytes_})"
    versions = run.config["versions"].items()
    return facts | {"Versions": ", ".join(f"{k} {v}" for k, v in versions)}


def duration(seconds: float) -> str:
    """Writes seconds as a clock would: 1:02:03."""
    if not math.isfinite(seconds):
        return NONE
    return str(datetime.timedelta(seconds=round(seconds)))


def _parameters(parameters: Sequence[Parameter]) -> Html:
    entries = (
        element(
            "div",
            element("dt", p.name.removeprefix("settings.")),
            element("dd", _written(p.value), _default(p)),
        )
        for p in parameters
    )
    return element("dl", *entries, class_="parameters")


def _default(parameter: Parameter) -> Html:
    if not parameter.is_chosen:
        return Html("")
    return element("small", f" default {_written(parameter.default)}")


def _written(value: object) -> str:
    """Quotes a text whose ends nobody would see."""
    text = str(value)
    return text if text and text == text.strip() else repr(text)


def curves(run: RunFiles, titles: Sequence[str]) -> Html:
    """The panels of these titles; those of unknown names go with the terms."""
    if not run.records:
        return not_yet(NO_STEPS)
    panels = [
        _panel(run, title, members)
        for title, members in group_names(_drawn(run)).items()
        if title in titles or (titles == TERMS and title not in GROUPS)
    ]
    return element("div", *panels, class_="panels")


def _drawn(run: RunFiles) -> list[str]:
    """What is drawn as a curve."""
    shown = (name for name in run.names if name not in HIDDEN)
    return [name for name in shown if not name.startswith(PICTURED)]


def _panel(run: RunFiles, title: str, names: list[str]) -> Html:
    lines: list[Line] = []
    steps = run.steps
    window = smoothing_window(title, len(steps))
    for color, name in enumerate(names[:MOST_LINES]):
        values = run.column(name)
        if window > 1:
            lines.append(Line(name, steps, values, color, "raw"))
        lines.append(Line(name, steps, smooth(values, window), color))
    if title == "Loss" and run.heldout:
        lines.append(heldout_line("held-out nll", "nll", run.heldout, 9, "dots"))
    is_log = title in LOGARITHMIC
    notes = ["logarithmic"] * is_log
    notes += [f"mean of the last {window} records; faint: every one"] * (window > 1)
    if len(names) > MOST_LINES:
        notes.append(f"first {MOST_LINES} of {len(names)}")
    summary = "; ".join(_summary(line) for line in lines if line.kind != "raw")
    chart = line_chart(f"{title} over the steps. {summary}", lines, is_log=is_log)
    return figure(title, chart, legend(lines), notes)


def heldout_line(
    label: str, name: str, heldout: list[Record], color: int, kind: str = "line"
) -> Line:
    """A metric of the evaluations."""
    x = np.array([record["step"] for record in heldout], float)
    y = np.array([record.get(name, np.nan) for record in heldout], float)
    return Line(label, x, y, color, kind)


def _summary(line: Line) -> str:
    known = np.flatnonzero(np.isfinite(line.y)).tolist()
    if not known:
        return f"{line.label}: no numbers"
    first, last = known[0], known[-1]
    ends = (f"{short(line.y[i])} at step {line.x[i]:.0f}" for i in (first, last))
    return f"{line.label}: {', '.join(dict.fromkeys(ends))}"


def legend(lines: Sequence[Line]) -> Html:
    """Which colour is which curve."""
    entries = (
        element(
            "li",
            element("span", class_=f"swatch {line.style}", aria_hidden="true"),
            line.label,
        )
        for line in lines
        if line.kind != "raw"
    )
    return element("ul", *entries, class_="legend")


def terms_table(run: RunFiles) -> Html:
    """Every term at the first and the last record, folded."""
    if not run.records:
        return Html("")
    first, last = run.records[0], run.records[-1]
    columns = ["term", f"step {first['step']:.0f}", f"step {last['step']:.0f}"]
    rows = [
        [name, *(short(record.get(name, math.nan)) for record in (first, last))]
        for name in _drawn(run)
    ]
    caption = "Every term, first and last"
    return element(
        "details", element("summary", caption), table(caption, columns, rows)
    )


def experts(run: RunFiles) -> Html:
    """A heat map per layer with experts."""
    if not run.records:
        return not_yet(NO_STEPS)
    places = [match for match in map(LOAD.fullmatch, run.names) if match]
    if not places:
        return not_yet("metrics.jsonl has no expert_load; this run logged none.")
    layers: dict[int, list[str]] = {}
    for match in places:
        layers.setdefault(int(match[1]), []).append(match[0])
    most = columns_for(len(layers), run.experts)
    maps = [_heat_figure(run, layer, names, most) for layer, names in layers.items()]
    scale = element(
        "ul",
        *(
            element("li", element("span", class_=f"swatch {level}"), text)
            for level, text in level_names()
        ),
        class_="legend scale",
        aria_label="colours of the load",
    )
    text = (
        "The share of a layer's choices that each expert got, relative to an even "
        "share: 1 is even, 2 is twice its share, 0 is idle."
    )
    return join([element("p", text), scale, element("div", *maps, class_="panels")])


def _heat_figure(run: RunFiles, layer: int, names: list[str], most: int) -> Html:
    loads = np.stack([run.column(name) for name in names], axis=1)
    columns = average(run.steps, loads, most)
    last = columns.means[-1]
    order = [int(i) for i in np.argsort(last) if np.isfinite(last[i])]
    title = f"Expert layer {layer}"
    label = f"{title}, experts by steps."
    if order:
        label += (
            f" At the end the busiest is E{order[-1] + 1} with {last[order[-1]]:.2f} "
            f"of an even share, the idlest E{order[0] + 1} with {last[order[0]]:.2f}."
        )
    quarters = average(run.steps, loads, 4)
    stretches = [
        f"steps {math.ceil(a)} to {math.floor(b)}"
        for a, b in itertools.pairwise(quarters.edges.tolist())
    ]
    rows = [
        [f"E{expert}", *(f"{value:.2f}" for value in row)]
        for expert, row in enumerate(quarters.means.T, start=1)
    ]
    numbers = table(f"{title}: mean load", ["expert", *stretches], rows)
    folded = element("details", element("summary", "as a table"), numbers)
    return figure(title, heat_map(label, columns), folded)


def heads(run: RunFiles) -> Html:
    """How often the main head and each further one is right, on held-out text."""
    if not run.heldout:
        return not_yet(NO_EVALUATION)
    first, last = run.heldout[0], run.heldout[-1]
    further = {name: int(m[1]) for name in last if (m := HEAD.fullmatch(name))}
    if run.has_further_heads and not further:
        return not_yet("heldout.jsonl has no head_accuracy; this run logged none.")
    labels = {"accuracy": "main head"}
    labels |= {name: f"head {j}" for name, j in further.items()}
    rows: list[list[str]] = []
    lines: list[Line] = []
    for color, (name, label) in enumerate(labels.items()):
        before, after = (record.get(name, math.nan) for record in (first, last))
        rows.append([label, _percent(before), _percent(after), _bar(after, color)])
        line = heldout_line(label, name, run.heldout, color)
        line = line._replace(y=100 * line.y)
        lines += [line, line._replace(kind="dots")]
    columns = [
        "head",
        f"step {first['step']:.0f}",
        f"step {last['step']:.0f}",
        "of 100 %",
    ]
    bars = table("Accuracy on held-out text", columns, rows)
    summary = "; ".join(map(_summary, lines[::2]))
    chart = line_chart(f"Held-out accuracy in percent. {summary}", lines)
    drawn = figure("Over the evaluations, in %", chart, legend(lines[::2]))
    text = (
        "How often the likeliest token is the right one. The main head predicts the "
        "next token, head j the one j places after it."
    )
    return join([element("p", text), element("div", bars, drawn, class_="panels")])


def _percent(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.2%}"


def _bar(value: float, color: int) -> Html:
    """A bar from 0 to 100 %, beside a number that says the same."""
    width = 0.0 if math.isnan(value) else 100 * value
    return element(
        "svg",
        element("rect", width="100", height="10", class_="track"),
        element("rect", width=width, height="10", class_=f"bar c{color % PALETTE}"),
        class_="meter",
        viewBox="0 0 100 10",
        preserveAspectRatio="none",
        aria_hidden="true",
    )


def heldout_table(run: RunFiles) -> Html:
    """The held-out metrics, first and last."""
    if not run.heldout:
        return not_yet(NO_EVALUATION)
    first, last = run.heldout[0], run.heldout[-1]
    columns = ["metric", f"step {first['step']:.0f}", f"step {last['step']:.0f}"]
    rows = [
        [name, *(short(record.get(name, math.nan)) for record in (first, last))]
        for name in last
        if name != "step"
    ]
    text = "At temperature 1, without label smoothing, and without any penalty."
    return join([element("p", text), table("First and last", columns, rows)])


def samples(run: RunFiles) -> Html:
    """What the model wrote, the newest first."""
    if not run.samples:
        return not_yet(
            "samples.jsonl has no sample; one is made at the end of training, unless "
            "--sample-tokens is 0."
        )
    return join(map(_sample, reversed(run.samples)))


def _sample(sample: Sample) -> Html:
    prompt, text = sample.prompt, sample.text
    if not text.startswith(prompt):
        # Decoding may change a prompt, by its spaces say; then it stands apart.
        prompt, text = f"{prompt}\n", f"{prompt}\n{text}"
    rest = text[len(prompt) :]
    return element(
        "article",
        element("h3", f"After step {sample.step:,}"),
        element("pre", element("mark", prompt), rest),
    )
