"""What a run's page says: facts, settings, curves, experts, heads, metrics, samples."""

import dataclasses
import datetime
import itertools
import math
import re
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import plotly.graph_objects as go

from trainer.report.metrics import Record
from trainer.report.page.charts import NONE, Curve, heat_map, line_chart, short
from trainer.report.page.loads import average, columns_for, levels
from trainer.report.plot import (
    HELDOUT,
    HIDDEN,
    LOGARITHMIC,
    MOST_LINES,
    PICTURED,
    group_names,
    smoothing_window,
)
from trainer.report.run_files import RunFiles
from trainer.report.samples import Sample

SCHEDULES = ("Temperature", "Learning rate", "Gradient norm")
NO_STEPS = "metrics.jsonl has no steps; it grows while the run trains."
NO_EVALUATION = "heldout.jsonl has no evaluation; the first comes before training."
NO_SAMPLE = (
    "samples.jsonl has no sample; one is made at the end of training, unless "
    "--sample-tokens is 0."
)
LOAD = re.compile(r"expert_load_L(\d+)_E(\d+)")
HEAD = re.compile(r"head_accuracy_(\d+)")


class Table(NamedTuple):
    """A table whose first column names its rows; a number is a bar of 100."""

    caption: str
    columns: Sequence[str]
    rows: Sequence[Sequence[str | float]]


class Chart(NamedTuple):
    """A figure; `label` says in words what it shows, `numbers` is folded below."""

    title: str
    label: str
    figure: go.Figure
    notes: Sequence[str] = ()
    numbers: Table | None = None


class Text(NamedTuple):
    """A sample: the prompt, and what the model wrote after it."""

    step: int
    prompt: str
    rest: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class Content:
    """That of a section; `missing` says why there is nothing else in it yet."""

    missing: str = ""
    text: str = ""
    scale: Sequence[tuple[str, str]] = ()
    tables: Sequence[Table] = ()
    charts: Sequence[Chart] = ()
    folded: Table | None = None
    samples: Sequence[Text] = ()


class Section(NamedTuple):
    """A part of the page, which its table of contents links to by `name`."""

    name: str
    title: str
    content: Content


def sections(run: RunFiles) -> list[Section]:
    """All sections of the page, in order; a dense model has none on experts."""
    schedules = "Temperature, learning rate, gradient"
    found = [
        Section("terms", "Loss terms", _terms(run)),
        Section("schedules", schedules, _schedules(run)),
    ]
    if run.experts:
        found.append(Section("experts", "Load of the experts", _experts(run)))
    return [
        *found,
        Section("heads", "Accuracy by head", _heads(run)),
        Section("heldout", "Held-out metrics", _heldout(run)),
        Section("samples", "Samples", _samples(run)),
    ]


def facts(run: RunFiles) -> dict[str, str]:
    """What the run is made of, in a few words each."""
    data, settings = run.config["data"], run.config["settings"]
    known = {"Preset": str(settings.get("preset"))}
    if run.records:
        last = run.records[-1]
        known["Tokens"] = f"{last.get('tokens', math.nan):,.0f}"
        known["Training time"] = duration(last.get("seconds", math.nan))
        if skipped := last.get("skipped_steps"):
            known["Skipped steps"] = f"{skipped:.0f}"
    if run.heldout:
        first, last = run.heldout[0], run.heldout[-1]
        known["Held-out nll"] = " → ".join(_both("nll", first, last))
    size = data.get("size")
    bytes_ = f"{size:,} bytes" if isinstance(size, int) else "size unknown"
    known["Data"] = f"{data.get('name')} ({bytes_})"
    versions = run.config["versions"].items()
    return known | {"Versions": ", ".join(f"{k} {v}" for k, v in versions)}


def duration(seconds: float) -> str:
    """Writes seconds as a clock would: 1:02:03."""
    if not math.isfinite(seconds):
        return NONE
    return str(datetime.timedelta(seconds=round(seconds)))


def written(value: object) -> str:
    """Quotes a text whose ends nobody would see."""
    text = str(value)
    return text if text and text == text.strip() else repr(text)


def _both(name: str, first: Record, last: Record) -> list[str]:
    return [short(record.get(name, math.nan)) for record in (first, last)]


def _first_and_last(
    caption: str, column: str, names: Sequence[str], records: Sequence[Record]
) -> Table:
    first, last = records[0], records[-1]
    columns = [column, *(f"step {record['step']:.0f}" for record in (first, last))]
    return Table(caption, columns, [[n, *_both(n, first, last)] for n in names])


def _terms(run: RunFiles) -> Content:
    """Every panel but the schedules', also those of names that no group has."""
    if not run.records:
        return Content(missing=NO_STEPS)
    names = _drawn(run)
    groups = group_names(names).items()
    panels = [_panel(run, *group) for group in groups if group[0] not in SCHEDULES]
    folded = _first_and_last("Every term, first and last", "term", names, run.records)
    return Content(charts=panels, folded=folded)


def _schedules(run: RunFiles) -> Content:
    if not run.records:
        return Content(missing=NO_STEPS)
    groups = group_names(_drawn(run)).items()
    panels = [_panel(run, *group) for group in groups if group[0] in SCHEDULES]
    return Content(charts=panels)


def _drawn(run: RunFiles) -> list[str]:
    """What is drawn as a curve."""
    shown = (name for name in run.names if name not in HIDDEN)
    return [name for name in shown if not name.startswith(PICTURED)]


def _panel(run: RunFiles, title: str, names: list[str]) -> Chart:
    steps = run.steps
    window = smoothing_window(title, len(steps))
    curves = [
        Curve(name, steps, run.column(name), color, window)
        for color, name in enumerate(names[:MOST_LINES])
    ]
    if title == "Loss" and run.heldout:
        for color, name in zip((9, 8), HELDOUT, strict=True):
            if name in run.heldout[-1]:
                label = f"held-out {name}"
                curves.append(_heldout_curve(label, name, run, color, "markers"))
    notes = ["logarithmic"] * (title in LOGARITHMIC)
    notes += [f"mean of the last {window} records; faint: every one"] * (window > 1)
    if len(names) > MOST_LINES:
        notes.append(f"first {MOST_LINES} of {len(names)}")
    return _chart(title, f"{title} over the steps", curves, notes)


def _chart(
    title: str, label: str, curves: Sequence[Curve], notes: Sequence[str] = ()
) -> Chart:
    summary = "; ".join(curve.summary() for curve in curves)
    return Chart(title, f"{label}. {summary}", line_chart(title, curves), notes)


def _heldout_curve(
    label: str, name: str, run: RunFiles, color: int, mode: str, factor: float = 1.0
) -> Curve:
    """A metric of the evaluations."""
    steps = np.array([record["step"] for record in run.heldout], float)
    values = np.array([record.get(name, np.nan) for record in run.heldout], float)
    return Curve(label, steps, factor * values, color, mode=mode)


def _experts(run: RunFiles) -> Content:
    if not run.records:
        return Content(missing=NO_STEPS)
    layers: dict[int, list[str]] = {}
    for match in filter(None, map(LOAD.fullmatch, run.names)):
        layers.setdefault(int(match[1]), []).append(match[0])
    if not layers:
        return Content(
            missing="metrics.jsonl has no expert_load; this run logged none."
        )
    most = columns_for(len(layers), run.experts)
    return Content(
        text=(
            "The share of a layer's choices that each expert got, relative to an even "
            "share: 1 is even, 2 is twice its share, 0 is idle."
        ),
        scale=levels(),
        charts=[_load_chart(run, *layer, most) for layer in layers.items()],
    )


def _load_chart(run: RunFiles, layer: int, names: list[str], most: int) -> Chart:
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
    numbers = Table(f"{title}: mean load", ["expert", *stretches], rows)
    return Chart(title, label, heat_map(columns), numbers=numbers)


def _heads(run: RunFiles) -> Content:
    """How often the main head and each further one is right, on held-out text."""
    if not run.heldout:
        return Content(missing=NO_EVALUATION)
    first, last = run.heldout[0], run.heldout[-1]
    further = {name: int(m[1]) for name in last if (m := HEAD.fullmatch(name))}
    if run.has_further_heads and not further:
        return Content(
            missing="heldout.jsonl has no head_accuracy; this run logged none."
        )
    labels = {"accuracy": "main head"}
    labels |= {name: f"head {j}" for name, j in further.items()}
    rows: list[list[str | float]] = []
    for name, label in labels.items():
        before, after = (record.get(name, math.nan) for record in (first, last))
        bar = 0.0 if math.isnan(after) else 100 * after
        rows.append([label, _percent(before), _percent(after), bar])
    steps = [f"step {record['step']:.0f}" for record in (first, last)]
    curves = [
        _heldout_curve(label, name, run, color, "lines+markers", 100.0)
        for color, (name, label) in enumerate(labels.items())
    ]
    title = "Over the evaluations, in %"
    return Content(
        text=(
            "How often the likeliest token is the right one. The main head predicts "
            "the next token, head j the token j positions after it."
        ),
        tables=[Table("Accuracy on held-out text", ["head", *steps, "of 100 %"], rows)],
        charts=[_chart(title, "Held-out accuracy in percent", curves)],
    )


def _percent(value: float) -> str:
    return NONE if math.isnan(value) else f"{value:.2%}"


def _heldout(run: RunFiles) -> Content:
    if not run.heldout:
        return Content(missing=NO_EVALUATION)
    names = [name for name in run.heldout[-1] if name != "step"]
    table = _first_and_last("First and last", "metric", names, run.heldout)
    text = "At temperature 1, without label smoothing, and without any penalty."
    if "tempered_nll" in names:
        text += " Tempered: at the temperature of the loss, which is the model's own."
    return Content(text=text, tables=[table])


def _samples(run: RunFiles) -> Content:
    """What the model wrote, the newest first."""
    if not run.samples:
        return Content(missing=NO_SAMPLE)
    return Content(samples=[_text(sample) for sample in reversed(run.samples)])


def _text(sample: Sample) -> Text:
    step, prompt, text = sample
    if text.startswith(prompt):
        return Text(step, prompt, text[len(prompt) :])
    # Decoding may change a prompt, by its spaces say; then it stands apart.
    return Text(step, f"{prompt}\n", text)
