"""The figures of MaxText with our loss: they reach the goals, and the page has them."""

import json

import pytest
from support.pages import DOCS, ROOT, rows_of

from benchmarks import maxtext, maxtext_training

RESULTS = ROOT / "benchmarks" / "results"
STEPS = json.loads((RESULTS / "maxtext-0.2.5.json").read_text())
TRAINING = json.loads((RESULTS / "maxtext-training-0.2.5.json").read_text())
PAGE = DOCS / "integrations.md"
METRICS = ("loss", "perplexity", "z_loss", "grad_norm")


def test_every_loss_and_every_case_has_figures() -> None:
    assert tuple(STEPS) == maxtext.LOSSES
    assert TRAINING.keys() == maxtext_training.CASES.keys()


@pytest.mark.parametrize("loss", maxtext.OPTIONS)
def test_no_slower_than_maxtext_and_no_larger_than_its_tiling(loss: str) -> None:
    assert STEPS[loss]["estimated_ms"] <= STEPS["own"]["estimated_ms"]
    assert STEPS[loss]["temp_bytes"] <= STEPS["tiling"]["temp_bytes"]
    assert STEPS[loss]["versions"] == STEPS["own"]["versions"]


def test_the_page_has_the_figures_of_the_steps() -> None:
    rows = rows_of(PAGE, "loss", "estimated ms a step", "GiB of temporaries a chip")
    assert len(rows) == len(maxtext.LOSSES)
    for loss, (_, ms, gib) in zip(maxtext.LOSSES, rows, strict=True):
        step, own = STEPS[loss], STEPS["own"]["estimated_ms"]
        assert ms.split()[0] == f"{step['estimated_ms']:,.0f}"
        assert gib == f"{step['temp_bytes'] / maxtext.GIB:.1f}"
        if loss in maxtext.OPTIONS:
            assert ms.split()[1] == f"({step['estimated_ms'] / own:.2f})"


def test_the_page_has_the_differences_in_training() -> None:
    titles = ("loss", "perplexity", "`z_loss`", "norm of the gradient")
    rows = rows_of(PAGE, "head, settings", *titles)
    for name, *cells in rows:
        gaps, tiling = (TRAINING[name][key] for key in ("gaps", "tiling_gaps"))
        found = [cell.strip(")").split(" (") for cell in cells]
        expected = [[short(gaps[m]), short(tiling[m])] for m in METRICS]
        assert found == expected, name
        assert max(gaps.values()) < 1e-5
    assert [row[0] for row in rows] == list(TRAINING)


def short(gap: float) -> str:
    return f"{gap:.0e}".replace("e-0", "e-") if gap else "0"
