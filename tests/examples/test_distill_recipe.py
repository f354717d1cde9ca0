"""The recipe of distillation: a student of half the width, with and without it."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

import distill
from trainer.recipe import run_recipe
from trainer.report.metrics import Record, read_records
from trainer.run.trained import load, load_text

STEPS = 8


OPTIONS = {
    "name": "distill",
    "doc": distill.__doc__,
    "steps": STEPS,
    "reads_text": True,
}


def distilled(run: Path, out: Path) -> list[Record]:
    settings = load(run).settings
    paths = {"out": out, "data": settings.data, "cache": settings.cache}
    flags = [part for name, path in paths.items() for part in (f"--{name}", str(path))]
    arguments = ["--checkpoint", str(run), *flags]
    assert run_recipe(distill.train, arguments, **OPTIONS) == 0
    return read_records(out / "distill.jsonl")


def test_the_student_has_half_the_width(demo_run: Path) -> None:
    settings = load(demo_run).settings
    half = distill.half_of(settings, STEPS)
    assert (settings.model.width, half.model.width) == (32, 16)
    assert half.model.inner < settings.model.inner
    assert half.model.layers == settings.model.layers
    assert half.schedule_steps == STEPS


def test_perplexities_of_both_students_and_the_teacher(
    demo_run: Path, tmp_path: Path
) -> None:
    records = distilled(demo_run, tmp_path / "out")
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    plain, taught = (
        np.array([record[name] for record in records])
        for name in ("plain", "distilled")
    )
    # The same start and the same batches; from there on the teacher is what differs.
    np.testing.assert_allclose(plain[0], taught[0], rtol=0.05)
    assert abs(plain[-1] - taught[-1]) > 1e-3 * plain[-1]
    assert plain[-1] < 0.9 * plain[0]
    assert taught[-1] < 0.9 * taught[0]
    # The trainer itself has evaluated the teacher, at its own temperature.
    expected = read_records(demo_run / "heldout.jsonl")[-1]["tempered_perplexity"]
    np.testing.assert_allclose(records[0]["teacher"], expected, rtol=1e-4)
    assert (tmp_path / "out" / "distill.png").stat().st_size > 10_000


def test_without_weight_there_is_no_teacher(
    demo_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(distill, "WEIGHT", 0.0)
    records = distilled(demo_run, tmp_path / "out")
    assert all(record["plain"] == record["distilled"] for record in records)


def test_a_text_that_has_changed_is_refused(
    demo_run: Path,
    tmp_path: Path,
    text_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    more = text_folder / "more.txt"
    more.write_text("a new document")
    try:
        arguments = ["--checkpoint", str(demo_run), "--out", str(tmp_path / "out")]
        arguments += ["--data", str(text_folder), "--cache", str(tmp_path / "cache")]
        assert run_recipe(distill.train, arguments, **OPTIONS) == 1
    finally:
        more.unlink()
    assert "is not that of the run" in capsys.readouterr().err


def test_the_record_of_a_run_decides_nothing_that_is_read_or_written(
    demo_run: Path,
    tmp_path: Path,
    text_folder: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    run, elsewhere, cache = (tmp_path / name for name in ("run", "else", "cache"))
    shutil.copytree(demo_run, run)
    config = json.loads((run / "config.json").read_text())
    config["settings"]["cache"] = str(elsewhere)
    (run / "config.json").write_text(json.dumps(config))
    arguments = ["--checkpoint", str(run), "--out", str(tmp_path / "out")]
    assert run_recipe(distill.train, arguments, **OPTIONS) == 1
    assert f"pass --data {text_folder}" in capsys.readouterr().err
    load_text(run, load(run).settings, data=text_folder, cache=cache)
    assert cache.exists()
    assert not elsewhere.exists()
