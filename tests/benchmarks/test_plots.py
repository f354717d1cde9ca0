"""The picture of time against memory, and its command."""

import json
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread
from matplotlib.text import Annotation

from benchmarks import plots
from benchmarks.records import CompiledRecord, CompiledRow

ROOT = Path(__file__).parents[2]
RECORD = ROOT / "benchmarks/results/compiled-v5p-llama3-8b-jax0.11.2.json"
PICTURE = ROOT / "docs/images/tpu-v5p.png"
NOWHERE = Path("unused.png")


@pytest.fixture
def record() -> CompiledRecord:
    return json.loads(RECORD.read_text())


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[Figure]:
    """The figures that are saved, none of which is written."""
    figures: list[Figure] = []
    monkeypatch.setattr(Figure, "savefig", lambda self, *_, **__: figures.append(self))
    return figures


def labels_of(figure: Figure) -> dict[str, Annotation]:
    texts = [text for text in figure.axes[0].texts if isinstance(text, Annotation)]
    return {text.get_text(): text for text in texts}


def marks_of(figure: Figure) -> np.ndarray:
    """The points, without the line of the products; `[points, 2]`."""
    lines = [np.asarray(line.get_xydata()) for line in figure.axes[0].lines]
    return np.concatenate([xy for xy in lines if len(xy) == 1])


def ratios(row: CompiledRow, naive: CompiledRow) -> tuple[float, float]:
    assert {"estimated_ms", "temp_bytes"} <= row.keys() & naive.keys()
    return (
        row.get("estimated_ms", 0) / naive.get("estimated_ms", 1),
        row.get("temp_bytes", 0) / naive.get("temp_bytes", 1),
    )


def test_points_are_ratios_of_the_record(record: CompiledRecord, drawn: list[Figure]):
    assert plots.plot_tradeoff(record, NOWHERE)
    rows = {row["name"]: row for row in record["rows"]}
    expected = {
        place.text: ratios(rows[name], rows["naive"])
        for name, place in plots.PLACES.items()
    }
    np.testing.assert_allclose(marks_of(drawn[0]), list(expected.values()))
    labels = labels_of(drawn[0])
    products = labels.pop("the three products alone")
    assert {text: label.xy for text, label in labels.items()} == expected
    assert products.xy[0] == ratios(rows[plots.PRODUCTS], rows["naive"])[0]
    np.testing.assert_allclose(labels["ava_jax, plain"].xy, (0.97, 0.245), atol=0.005)
    axis = drawn[0].axes[0]
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    assert all(left < x < right and low < y < high for x, y in expected.values())
    assert drawn[0].get_facecolor() == (1, 1, 1, 1)


def test_ours_are_bold_and_of_another_colour(
    record: CompiledRecord, drawn: list[Figure]
):
    assert plots.plot_tradeoff(record, NOWHERE)
    bold = {t for t, x in labels_of(drawn[0]).items() if x.get_fontweight() == "bold"}
    assert bold == {"ava_jax, plain", "ava_jax, every term on"}
    points = [line for line in drawn[0].axes[0].lines if line.get_marker() == "o"]
    colors = [str(line.get_color()) for line in points]
    assert set(colors[:-2]) == {plots.COLORS["temp"]}
    assert colors[-2:] == [plots.COLORS["time"]] * 2


def test_title_says_what_is_estimated(record: CompiledRecord, drawn: list[Figure]):
    assert plots.plot_tradeoff(record, NOWHERE)
    assert drawn[0].axes[0].get_title() == (
        "Loss and gradients of hidden states and lm_head on a TPU v5p: "
        "the compiler's estimates\n"
        "16384 tokens, D = 4096, V = 128256, bfloat16; "
        "jax 0.11.2, tokamax 0.0.17, Levanter 0.2.227"
    )


def test_programs_without_figures_are_left_out(
    record: CompiledRecord, drawn: list[Figure]
):
    failed = CompiledRow(
        name="plain", kind="candidate", reference="naive", failed="does not fit"
    )
    naive = next(row for row in record["rows"] if row["name"] == "naive")
    other = CompiledRow(
        name="everything", kind="candidate", reference="naive", estimated_ms=1.0
    )
    assert plots.plot_tradeoff({**record, "rows": [naive, failed, other]}, NOWHERE)
    assert list(labels_of(drawn[0])) == [plots.PLACES["naive"].text]
    assert not plots.plot_tradeoff({**record, "rows": [failed]}, NOWHERE)
    assert len(drawn) == 1


def test_command_draws_an_opaque_picture(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], record: CompiledRecord
):
    picture = tmp_path / "images" / "drawn.png"
    plots.main([str(RECORD), str(picture)])
    pixels = imread(picture)
    assert pixels.shape == imread(PICTURE).shape  # as the one in the documentation
    assert (pixels[0, 0] == 1).all()
    assert (pixels[..., 3] == 1).all()
    empty = tmp_path / "empty.json"
    empty.write_text(json.dumps({**record, "rows": []}))
    with pytest.raises(SystemExit):
        plots.main([str(empty), str(picture)])
    assert "no estimated time" in capsys.readouterr().err
