"""The table of compiled programs: its options, its output and its files."""

import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks import compiled, topologies
from benchmarks.compiled import head, line, measure, read_shape
from benchmarks.programs import Entry
from benchmarks.records import CompiledRow
from benchmarks.shapes import COMPILED, Shape
from benchmarks.topologies import CHIPS, topology_name

HERE = topologies.Chip("cpu", 2**30)


def entry(name: str, function: Any, kind: Any = "baseline") -> Entry:
    sharding = SingleDeviceSharding(jax.devices("cpu")[0])
    array = topologies.given((64, 128), "float32", sharding)
    return Entry(name, kind, function, (array,), (0,))


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine as a chip, and two functions to compile for it."""
    monkeypatch.setitem(CHIPS, "here", HERE)
    made = [
        entry("naive", lambda x: jnp.exp(x).sum()),
        entry("plain", lambda x: jnp.sin(x).sum(), "candidate"),
    ]
    monkeypatch.setattr(compiled, "devices_of", lambda *_: None)
    monkeypatch.setattr(compiled, "entries", lambda *_: iter(made))


def test_named_shapes_are_a_device_s_and_sizes_are_all_devices():
    assert read_shape("llama3-8b", {}) == Shape(16384, 128256, 4096, "bfloat16", 4)
    mesh = {"data": 4, "fsdp": 4, "tensor": 2}
    pod = read_shape("llama3-8b", mesh)
    assert (pod.batch, pod.length, pod.width, pod.vocab) == (64, 4096, 4096, 128256)
    sizes = read_shape("2x8x16x32", mesh)
    assert (sizes.batch, sizes.length, sizes.width, sizes.vocab) == (2, 8, 16, 32)
    assert {"gpt2-medium", "qwen3-4b", "deepseek-v3"} <= COMPILED.keys()
    assert COMPILED["qwen3-4b"] == Shape(8192, 151936, 2560, "bfloat16", 2)


@pytest.mark.parametrize("text", ["2x8x16", "llama", "2x8x16x32x64", "2x8x16xV"])
def test_unknown_shape_is_refused_with_the_names(text: str):
    with pytest.raises(ValueError, match="llama3-8b"):
        read_shape(text, {})


def test_command_line(capsys: pytest.CaptureFixture[str]):
    assert compiled.parse(["--chip", "v5e"]).shape == "gpt2-medium"
    assert compiled.parse(["--chip", "h100"]).shape == "llama3-8b"
    options = compiled.parse(["--mesh", "data=4,tensor=2"])
    assert options.mesh == {"data": 4, "tensor": 2}
    assert options.sizes.batch == 16
    for bad in (["--mesh", "data4"], ["--shape", "7"], ["--chip", "v1"]):
        with pytest.raises(SystemExit):
            compiled.parse(bad)
        assert bad[0] in capsys.readouterr().err


@pytest.mark.parametrize(
    ("chip", "count", "name"),
    [
        ("v5e", 1, "v5e:2x2"),
        ("v5e", 8, "v5e:2x4"),
        ("v6e", 256, "v6e:16x16"),
        ("v5p", 1, "v5p:2x2x1"),
        ("v5p", 32, "v5p:2x4x4"),
        ("v5p", 512, "v5p:8x8x8"),
        ("tpu7x", 8, "tpu7x:2x2x1"),
        ("tpu7x", 16, "tpu7x:2x2x2"),
        ("h100", 1, "1x1x1"),
        ("h100", 16, "1x2x8"),
    ],
)
def test_smallest_topology_that_is_large_enough(chip: str, count: int, name: str):
    assert topology_name(chip, count) == name


def test_missing_compiler_is_reported(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _: None)
    for chip in ("v5p", "h100"):
        assert "test-compiled" in topologies.missing(chip)
        with pytest.raises(ModuleNotFoundError, match=f"no compiler for {chip}"):
            topologies.devices(chip)


def test_rows_have_ratios_to_their_baseline():
    def row(name: str, ms: float, temp: int, reference: str) -> CompiledRow:
        return CompiledRow(
            name=name,
            kind="candidate",
            reference=reference,
            estimated_ms=ms,
            temp_bytes=temp * 2**20,
            compile_seconds=3.0,
        )

    rows = [row("naive", 100.0, 4000, "naive"), row("optax", 2.0, 0, "optax")]
    fused = row("plain", 110.0, 800, "naive")
    assert line(fused, rows) == "| plain | 110.0 | 800 | 1.10 | 0.20 | 3 |"
    whole = row("plain, from logits", 1.5, 0, "optax")
    cells = "| plain, from logits | 1.50 | 0 | 0.75 (÷ optax) | - | 3 |"
    assert line(whole, rows) == cells
    assert line(fused, []) == "| plain | 110.0 | 800 | - | - | 3 |"
    moved = CompiledRow(
        name="plain",
        kind="candidate",
        reference="naive",
        moved_bytes=20 * 2**30,
        outside_bytes=5 * 2**30,
    )
    assert line(moved, []) == "| plain | 20.0 (5.00) | - | - | - | 0 |"


def test_units_are_named():
    shape = Shape(8, 32, 16, "bfloat16", 2)
    assert "estimated ms" in head("v5p", shape, {"data": 2})
    assert ", data=2: 2x4 tokens, D 16, V 32" in head("v5p", shape, {"data": 2})
    assert "GiB moved (outside products) | temp" in head("h100", shape, {})
    assert "estimated" not in head("h100", shape, {})


@pytest.mark.usefixtures("here")
def test_table_is_printed_written_merged_and_drawn(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    given = ["--chip", "here", "--shape", "2x8x16x32", "--out", str(tmp_path)]
    compiled.main([*given, "--top", "2", "--plot"])
    printed = capsys.readouterr().out
    assert "| naive | 0.0" in printed
    assert "| plain | 0.0" in printed
    assert "GiB  " in printed
    name = f"compiled-here-2x8x16x32-jax{jax.__version__}"
    assert (tmp_path / f"{name}.png").stat().st_size > 10_000
    path = tmp_path / f"{name}.json"
    record = json.loads(path.read_text())
    assert record["shape"] == [2, 8, 16, 32]
    assert record["versions"]["jax"] == jax.__version__
    assert [row["name"] for row in record["rows"]] == ["naive", "plain"]
    # The array is read, and a gradient of its size and a number are written.
    assert record["rows"][0]["moved_bytes"] >= 2 * 4 * 64 * 128
    compiled.main([*given, "--only", "plain"])
    assert "| naive" not in capsys.readouterr().out
    again = json.loads(path.read_text())
    assert [row["name"] for row in again["rows"]] == ["naive", "plain"]
    assert again["rows"][0] == record["rows"][0]


@pytest.mark.usefixtures("here")
@pytest.mark.parametrize(
    ("message", "reason"),
    [
        (
            "RESOURCE_EXHAUSTED: Ran out of memory. Used 20.1G of 15.7G hbm. More",
            "does not fit: 20.1G of 15.7G",
        ),
        ("INTERNAL: a reason\nand a trace", "INTERNAL: a reason"),
    ],
)
def test_program_that_does_not_compile_is_kept_with_its_reason(
    monkeypatch: pytest.MonkeyPatch, message: str, reason: str
):
    def refuse(*_: Any, **__: Any) -> None:
        raise jax.errors.JaxRuntimeError(message)

    monkeypatch.setattr(compiled, "compile_for", refuse)
    row = measure("here", entry("naive", jnp.sum))
    assert row.get("failed") == reason
    assert line(row, [row]) == f"| naive | {reason} | | | | |"
