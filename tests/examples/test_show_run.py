"""A run's folder as one page: whole, safe, and honest about what is missing."""

import base64
import dataclasses
import hashlib
import html.parser
import itertools
import json
import math
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import pytest
from plotly.offline import get_plotlyjs
from run_helpers import train

from show_run import main
from trainer.report.metrics import Record
from trainer.run.settings import PRESETS, make_loss_config

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
EVIL = "<script>alert('&amp;')</script>"
VOID = ("meta",)


class Page(html.parser.HTMLParser):
    """Reads a page and refuses one that is not well formed.

    Attributes:
      tags: every element's name and attributes, in order.
      text: what can be read.
      scripts: the text of each.
    """

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._open: list[str] = []
        assert page.startswith("<!DOCTYPE html>\n<html ")
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        names = [name for name, _ in attrs]
        assert len(set(names)) == len(names)
        self.tags.append((tag, {name: value or "" for name, value in attrs}))
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self._open[-1:] == ["script"]:
            self.scripts.append(data)
        elif self._open[-1:] != ["style"]:
            self.text += data

    def all(self, name: str) -> list[dict[str, str]]:
        """The attributes of all elements of a name."""
        return [attributes for tag, attributes in self.tags if tag == name]

    def classed(self, name: str) -> list[dict[str, str]]:
        """The attributes of all elements of a class."""
        found = (attributes for _, attributes in self.tags)
        return [a for a in found if name in a.get("class", "").split()]

    def traces(self) -> list[dict[str, object]]:
        """All curves and heat maps that the charts draw."""
        figures = [json.loads(a["data-figure"]) for a in self.classed("chart")]
        return [trace for figure in figures for trace in figure["data"]]

    def curves(self) -> list[str]:
        """The names of all curves, as plotly reads them: with tags."""
        return [str(trace["name"]) for trace in self.traces() if "name" in trace]


def make_records(steps: int) -> list[Record]:
    return [
        {
            "step": step,
            "tokens": 64 * step,
            "seconds": 0.5 * step,
            "total_loss": 7.0 / step,
            "nll": 6.0 / step,
            "mtp_head_losses_1": 1.0 / step,
            "temperature": 1.0,
            "learning_rate": 1e-3,
            "grad_norm": 2.0,
            "perplexity": math.exp(6 / step),
            "brand_new": 0.25,
            "skipped_steps": 0.0,
        }
        | {
            f"expert_load_L{layer}_E{expert}": 2.0 * (expert == step % 4 + 1)
            for layer in (1, 2)
            for expert in (1, 2, 3, 4)
        }
        for step in range(1, steps + 1)
    ]


HELDOUT: list[Record] = [
    {"step": 0, "nll": 7.5, "accuracy": 0.01, "head_accuracy_1": math.nan},
    {"step": 6, "nll": 3.25, "accuracy": 0.375, "head_accuracy_1": 0.125},
]


def write_lines(path: Path, records: Sequence[Record]) -> None:
    lines = (
        {k: None if math.isnan(v) else v for k, v in record.items()}
        for record in records
    )
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def make_run(folder: Path, *, experts: int = 4, data: str = "some text") -> Path:
    """A run of six steps, with all files."""
    settings, fields = PRESETS["moe"]
    model = dataclasses.replace(settings.model, experts=experts, experts_per_token=1)
    settings = dataclasses.replace(settings, steps=6, model=model)
    fields = fields if experts else PRESETS["demo"][1]
    config = {
        "settings": dataclasses.asdict(settings),
        "loss": dataclasses.asdict(make_loss_config(settings, fields, 300, 299)),
        "data": {"name": data, "sha256": "0" * 64, "size": 123456},
        "versions": {"python": "3.11.0", "jax": "0.10.2"},
    }
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config, default=str))
    write_lines(folder / "metrics.jsonl", make_records(6))
    write_lines(folder / "heldout.jsonl", HELDOUT)
    sample = {"step": 6, "prompt": "def ", "text": "def f(x):\n    return x"}
    (folder / "samples.jsonl").write_text(json.dumps(sample) + "\n")
    return folder


def show(folder: Path) -> Page:
    assert main([str(folder)]) == 0
    return Page((folder / "report.html").read_text())


def test_a_page_has_everything_and_loads_nothing(tmp_path: Path) -> None:
    page = show(make_run(tmp_path / "my run"))
    ids = [a["id"] for _, a in page.tags if "id" in a]
    assert len(set(ids)) == len(ids)
    parts = ["terms", "schedules", "experts", "heads", "heldout", "samples"]
    assert [a["id"] for a in page.all("section")] == parts
    assert [a["href"] for a in page.all("a")] == [f"#{part}" for part in parts]
    labels = [a["aria-labelledby"] for a in page.all("section")]
    assert all(label in ids for label in labels)
    text = (tmp_path / "my run" / "report.html").read_text()
    assert text.count(get_plotlyjs()) == 1
    own = text.replace(get_plotlyjs(), "").replace("// ", "")
    for outside in ("http:", "https:", "//", "url(", "@import", "src="):
        assert outside not in own, outside
    assert not page.all("link")
    assert not any(name.startswith("on") for _, a in page.tags for name in a)
    assert "Not yet" not in page.text
    for words in ("my run", "finished: step 6 of 6", "384", "0:00:03", "123,456 bytes"):
        assert words in page.text
    for words in ("python 3.11.0, jax 0.10.2", "7.5 → 3.25", "37.50%", "brand_new"):
        assert words in page.text
    assert page.text.count("\ndef f(x):\n    return x\n") == 1


def test_nothing_may_be_loaded_and_no_other_script_run(tmp_path: Path) -> None:
    page = show(make_run(tmp_path / "run"))
    policy = page.all("meta")[1]["content"].split("; ")
    digests = [hashlib.sha256(s.encode()).digest() for s in page.scripts]
    sources = [f"'sha256-{base64.b64encode(digest).decode()}'" for digest in digests]
    assert policy == [
        "default-src 'none'",
        "base-uri 'none'",
        "form-action 'none'",
        "style-src 'unsafe-inline'",
        "img-src data:",
        f"script-src {' '.join(sources)}",
    ]
    assert page.scripts[0] == get_plotlyjs()
    assert len(page.scripts) == len(page.all("script")) == 2
    assert page.all("script") == [{}, {}]


def test_every_chart_says_what_it_shows(tmp_path: Path) -> None:
    page = show(make_run(tmp_path / "run"))
    charts = page.classed("chart")
    assert len(charts) == len(page.all("figure"))
    assert all(chart["role"] == "img" for chart in charts)
    labels = [chart["aria-label"] for chart in charts]
    assert "nll: 6 at step 1, 1 at step 6" in labels[0]
    assert "held-out nll: 7.5 at step 0, 3.25 at step 6" in labels[0]
    assert any("busiest is E3 with 2.00" in label for label in labels)
    assert all("scope" in cell for cell in page.all("th"))
    assert len(page.all("caption")) == len(page.all("table"))
    levels = [int(tag[1]) for tag, _ in page.tags if tag in ("h1", "h2", "h3")]
    assert levels[0] == 1
    assert all(after - before <= 1 for before, after in itertools.pairwise(levels))
    drawn = set(page.curves())
    assert {"total_loss", "temperature", "grad_norm", "brand_new"} <= drawn
    assert {"held-out nll", "main head", "head 1"} <= drawn
    assert not any(name.startswith("expert_load") for name in drawn)
    maps = [trace for trace in page.traces() if trace["type"] == "heatmap"]
    assert [trace["y"] for trace in maps] == [["E1", "E2", "E3", "E4"]] * 2


def test_what_a_run_chose_comes_before_the_defaults(tmp_path: Path) -> None:
    text = show(make_run(tmp_path / "run")).text
    chosen, _, others = text.partition("All other settings")
    for name in (
        "steps6 default 800",
        "loss.moe_balancing_typebias default gradient",
        "loss.label_smoothing0.0 default 0.1",
    ):
        assert name in chosen
        assert name not in others
    for name in ("batch_size8", "loss.focal_gamma2.0", "loss.vocab_size300"):
        assert name in others
        assert name not in chosen
    assert "batch_size8 default" not in others
    # A space at the end is part of the prompt.
    assert "prompt'def '" in others


def test_a_dense_run_has_no_section_on_experts(tmp_path: Path) -> None:
    page = show(make_run(tmp_path / "run", experts=0))
    assert "experts" not in [a["id"] for a in page.all("section")]
    assert not page.classed("scale")
    assert {trace["type"] for trace in page.traces()} == {"scatter"}


@pytest.mark.parametrize(
    ("files", "sections"),
    [
        (["heldout.jsonl"], 2),
        (["samples.jsonl"], 1),
        (["metrics.jsonl"], 3),
        (["metrics.jsonl", "heldout.jsonl", "samples.jsonl"], 6),
    ],
)
@pytest.mark.parametrize("left", ["", '{"step": 1, "nl'])
def test_what_is_missing_or_cut_off_is_said(
    tmp_path: Path, files: list[str], sections: int, left: str
) -> None:
    run = make_run(tmp_path / "run")
    for name in files:
        (run / name).unlink()
        if left:
            (run / name).write_text(left)
    page = show(run)
    assert page.text.count("Not yet:") == len(page.classed("missing")) == sections
    if "metrics.jsonl" in files:
        assert "going on, or stopped: step 0 of 6" in page.text


def test_a_run_of_before_these_metrics_says_so(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write_lines(
        run / "metrics.jsonl", [{"step": 1, "tokens": 1, "seconds": 1.0, "nll": 1.0}]
    )
    write_lines(run / "heldout.jsonl", [{"step": 0, "nll": 1.0, "accuracy": 0.5}])
    text = show(run).text
    assert "Not yet: metrics.jsonl has no expert_load" in text
    assert "Not yet: heldout.jsonl has no head_accuracy" in text


def test_a_last_line_cut_off_leaves_the_others(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    path = run / "metrics.jsonl"
    path.write_text(path.read_text()[:-30])
    assert "going on, or stopped: step 5 of 6" in show(run).text


def test_what_comes_from_files_is_text(tmp_path: Path) -> None:
    run = make_run(tmp_path / "<b>run", data=f'{EVIL}"')
    config = json.loads((run / "config.json").read_text())
    config["settings"] |= {"prompt": EVIL, "preset": EVIL, EVIL: EVIL}
    config["versions"][EVIL] = EVIL
    (run / "config.json").write_text(json.dumps(config))
    records = [record | {EVIL: 1.0, '" onload="x': 2.0} for record in make_records(6)]
    write_lines(run / "metrics.jsonl", records)
    write_lines(run / "heldout.jsonl", [record | {EVIL: 1.0} for record in HELDOUT])
    samples = [
        {"step": 1, "prompt": EVIL, "text": f"{EVIL} more"},
        {"step": 2, "prompt": EVIL, "text": "\ud800 something else </pre>"},
    ]
    lines = "".join(json.dumps(sample) + "\n" for sample in samples)
    (run / "samples.jsonl").write_text(lines)
    page = show(run)
    assert len(page.all("script")) == 2
    assert not page.all("b")
    assert not any("onload" in attributes for _, attributes in page.tags)
    assert {html.escape(EVIL), html.escape('" onload="x')} <= set(page.curves())
    assert not any("<" in name for name in page.curves())
    assert page.text.count(EVIL) > 10
    assert f"{EVIL} more" in page.text
    # Decoding has changed the second prompt, so it stands before the text.
    assert f"{EVIL}\n? something else </pre>" in page.text
    assert len(page.all("mark")) == 2


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (None, "is no run of the trainer: it has no config.json"),
        ("{", "cannot read "),
        ("[]", "was not written by the trainer"),
        ('{"settings": {}, "loss": {}, "data": {}}', "was not written by the trainer"),
        (
            '{"settings": {}, "loss": {}, "data": {}, "versions": {}}',
            "does not say how many steps",
        ),
    ],
)
def test_a_folder_that_is_no_run_is_refused(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    config: str | None,
    message: str,
) -> None:
    if config is not None:
        (tmp_path / "config.json").write_text(config)
    assert main([str(tmp_path)]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "report.html").exists()


@pytest.mark.parametrize(
    ("lines", "message"),
    [
        ('{"nll": 1.0}\n', "line 1 has no step"),
        ('{"step": 1}\noops\n{"step": 2}\n', "metrics.jsonl, line 2"),
        ('{"step": "1"}\n', "step must be a number, got '1'"),
    ],
)
def test_corrupt_metrics_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], lines: str, message: str
) -> None:
    run = make_run(tmp_path / "run")
    (run / "metrics.jsonl").write_text(lines)
    assert main([str(run)]) == 1
    assert message in capsys.readouterr().err


def test_the_page_goes_where_it_gets_mesh(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = make_run(tmp_path / "run")
    out = tmp_path / "other.html"
    assert main([str(run), "--out", str(out)]) == 0
    assert not (run / "report.html").exists()
    assert out.read_text().startswith("<!DOCTYPE html>")
    assert main([str(run), "--out", str(tmp_path / "nowhere" / "x.html")]) == 1
    assert "cannot write" in capsys.readouterr().err


def test_a_real_run_makes_a_page(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    train(tiny, out, "--steps", "2", "--prompt", "<i>")
    page = show(out)
    assert page.text.count("Not yet:") == page.text.count("has no sample") == 1
    assert not page.all("i")
    assert "finished: step 2 of 2" in page.text
    first = (out / "report.html").read_bytes()
    show(out)
    assert (out / "report.html").read_bytes() == first


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason="needs chromium")
def test_a_browser_runs_the_script_and_complains_of_nothing(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run", data=EVIL)
    records = [record | {EVIL: 1.0} for record in make_records(6)]
    write_lines(run / "metrics.jsonl", records)
    charts = len(show(run).classed("chart"))
    flags = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run"
    flags += " --disable-background-networking --disable-component-update"
    flags += " --disable-sync --enable-logging=stderr --v=0 --dump-dom"
    profile = f"--user-data-dir={tmp_path / 'profile'}"
    page = (run / "report.html").as_uri()
    end = subprocess.run(
        [str(CHROMIUM), *flags.split(), profile, page],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert "CONSOLE" not in end.stderr
    assert end.stdout.count('class="chart js-plotly-plot"') == charts
    # The legend shows the name as it is.
    assert f">{html.escape(EVIL, quote=False)}</text>" in end.stdout
