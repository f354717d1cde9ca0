"""The table of `benchmarks.compiled` for real chips at a small size."""

import json
from pathlib import Path

import pytest

from benchmarks import compiled
from benchmarks.topologies import missing


@pytest.mark.parametrize(
    ("chip", "amount"), [("v5p", "estimated_ms"), ("h100", "moved_bytes")]
)
def test_table(chip: str, amount: str, tmp_path: Path) -> None:
    if reason := missing(chip):
        pytest.skip(reason)
    given = ["--chip", chip, "--shape", "2x1024x256x4096", "--out", str(tmp_path)]
    compiled.main([*given, "--only", "naive", "bare", "plain", "--top", "3"])
    record = json.loads(next(tmp_path.glob("*.json")).read_text())
    rows = {row["name"]: row for row in record["rows"]}
    assert not [row for row in rows.values() if "failed" in row]
    assert {"plain, sequential MTP, K=3", "plain, parallel heads, K=3"} <= rows.keys()
    assert rows["three bare matmuls"][amount] < rows["naive"][amount]
    assert all(row["costliest"] for row in rows.values())
