"""The table of errors at a tiny size."""

import pytest

from benchmarks import precision


def test_errors() -> None:
    found = precision.errors(precision.draw(tokens=64, width=32, vocab=500))
    usual, widened, ours, wide_head = found
    assert ours.largest_rounded <= 3e-6
    assert wide_head.largest_rounded <= 3e-6
    # Logits in bfloat16 lose far more, and casting them does not bring it back.
    assert usual.mean_rounded > widened.mean_rounded > 1000 * ours.mean_rounded
    assert wide_head.mean < ours.mean < widened.mean
    assert all(e.mean <= e.largest for e in found)


def test_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    precision.main(["--sizes", "8", "16", "50"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 6
    assert len({line.count("|") for line in lines[1:]}) == 1
