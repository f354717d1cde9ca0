"""Whole runs, tiny: presets, exact resumption, micro-batches, meshes, dtypes."""

import json
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec
from rich.console import Console
from run_helpers import (
    TWO_LAYERS,
    assert_close,
    checkpoint,
    names_of_metrics,
    train,
    with_flags,
    without_seconds,
)

from train_tpu import Run, main
from trainer.model.layers import Batch
from trainer.report.metrics import read_records
from trainer.run.devices import make_mesh, split_rows
from trainer.run.settings import PRESETS, parse_settings

SLOW = pytest.mark.slow


@pytest.mark.usefixtures("drawn")
@pytest.mark.parametrize(
    "preset",
    [p if p in ("demo", "moe") else pytest.param(p, marks=SLOW) for p in PRESETS],
)
def test_every_preset_runs(tiny: list[str], tmp_path: Path, preset: str) -> None:
    records = train(tiny, tmp_path / "run", "--steps", "2", preset=preset)
    assert [record["step"] for record in records] == [1, 2]
    assert all(np.isfinite(list(record.values())).all() for record in records)


@pytest.mark.usefixtures("own_steps")
def test_six_steps_equal_three_and_three(tiny: list[str], tmp_path: Path) -> None:
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    expected = train(tiny, whole)
    train(tiny, halves, "--steps", "3")
    assert checkpoint(halves, 3)[1] != checkpoint(whole, 6)[1]
    records = train(tiny, halves)
    assert without_seconds(records) == without_seconds(expected)
    chex.assert_trees_all_equal(checkpoint(halves, 6), checkpoint(whole, 6))
    state = checkpoint(whole, 6)[0]
    assert set(state) == {"step", "params", "optimizer", "loss", "skipped"}


@pytest.mark.usefixtures("drawn")
def test_what_a_run_writes(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    records = train(tiny, out, "--sample-tokens", "4")
    assert [record["step"] for record in records] == [1, 2, 3, 4, 5, 6]
    assert [record["tokens"] for record in records] == [128 * i for i in range(1, 7)]
    terms = ("total_loss", "main_loss", "mtp_head_losses_2", "ngram_penalty")
    more = ("eos_penalty", "temperature", "nll", "learning_rate", "grad_norm")
    assert all(name in records[0] for name in terms + more)
    assert records[-1]["nll"] < records[0]["nll"]
    config = json.loads((out / "config.json").read_text())
    assert config["settings"]["batch_size"] == 4
    assert config["loss"]["label_smoothing"] == 0.1
    heldout = read_records(out / "heldout.jsonl")
    assert [record["step"] for record in heldout] == [0, 6]
    assert (out / "losses.png").stat().st_size > 10_000
    assert list((out / "tensorboard").glob("events*"))
    assert (out / "tokenizer.json").exists()
    screen = capsys.readouterr().out
    for words in ("sha256", "held-out perplexity", "sample", "def ", "losses.png"):
        assert words in screen


def test_a_finished_run_only_reports(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    before = train(tiny, out)
    assert train(tiny, out) == before


def test_other_settings_are_not_resumed(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    train(tiny, out, "--steps", "1")
    arguments = ["--out", str(out), *tiny, "--seed", "5", "--loss.mtp-weight", "0.2"]
    assert main(arguments) == 1
    message = capsys.readouterr().err
    assert "seed was 0 and is now 5" in message
    assert "mtp_weight was 0.1 and is now 0.2" in message


def test_lines_past_the_checkpoint_are_dropped(tiny: list[str], tmp_path: Path) -> None:
    out = tmp_path / "run"
    expected = train(tiny, tmp_path / "whole")
    train(tiny, out, "--steps", "3")
    with (out / "metrics.jsonl").open("a") as file:
        file.write('{"step": 4, "seconds": 9.0}\n{"step": 5, "sec')
    assert without_seconds(train(tiny, out)) == without_seconds(expected)


@pytest.mark.parametrize("preset", ["demo", pytest.param("moe", marks=SLOW)])
def test_microbatches_change_nothing(
    tiny: list[str], tmp_path: Path, preset: str
) -> None:
    # The auxiliary balance losses of `moe` couple a whole batch, so they stay out.
    flags = ["--loss.no-use-auxiliary-loss"] if preset == "moe" else []
    whole = train(tiny, tmp_path / "a", *flags, preset=preset)
    parts = train(tiny, tmp_path / "b", "--microbatches", "4", *flags, preset=preset)
    assert_close(parts, whole, rtol=2e-4)


def test_no_row_leaves_its_device_for_a_micro_batch() -> None:
    mesh = make_mesh("data=4", 8)
    over_data = NamedSharding(mesh, PartitionSpec("data"))
    rows = jax.device_put(np.arange(64, dtype=np.int32).reshape(16, 4), over_data)
    batch = Batch(rows, rows, rows, rows)
    compiled = (
        jax.jit(split_rows, static_argnums=(1, 2)).lower(batch, 2, mesh).compile()
    )
    program = str(compiled.as_text())
    assert "ENTRY" in program
    assert "all-" not in program
    assert "permute" not in program
    window = compiled(batch).inputs
    assert window.shape == (2, 8, 4)
    np.testing.assert_array_equal(np.sort(window.ravel()), np.arange(64))


@pytest.mark.parametrize(
    ("preset", "mesh"),
    [
        ("demo", "data=4,tensor=2"),
        ("demo", "data=2,fsdp=2,tensor=2"),
        pytest.param("demo", "tensor=2", marks=SLOW),
        pytest.param("moe", "data=2,tensor=2", marks=SLOW),
    ],
)
def test_a_mesh_changes_nothing(
    tiny: list[str], tmp_path: Path, preset: str, mesh: str
) -> None:
    alone = train(tiny, tmp_path / "a", "--steps", "3", preset=preset)
    shared = train(tiny, tmp_path / "b", "--steps", "3", "--mesh", mesh, preset=preset)
    assert_close(shared, alone, rtol=5e-4)


def test_a_record_without_the_newer_sizes_can_be_resumed(
    tiny: list[str], tmp_path: Path
) -> None:
    train(tiny, tmp_path, "--steps", "1")
    path = tmp_path / "config.json"
    config = json.loads(path.read_text())
    model = config["settings"]["model"]
    for name in ("kv_heads", "inner_width", "attention_block", "scan"):
        del model[name]
    del config["settings"]["compile_for"]
    path.write_text(json.dumps(config))
    assert len(train(tiny, tmp_path, "--steps", "2")) == 2


@SLOW
def test_a_run_goes_on_under_another_mesh(tiny: list[str], tmp_path: Path) -> None:
    expected = train(tiny, tmp_path / "a")
    train(tiny, tmp_path / "b", "--steps", "3")
    moved = train(tiny, tmp_path / "b", "--mesh", "data=2,tensor=2")
    assert_close(moved, expected, rtol=5e-4)


@pytest.mark.parametrize("mesh", ["data=2,tensor=2", "data=2,fsdp=2"])
def test_big_matrices_are_split(tiny: list[str], tmp_path: Path, mesh: str) -> None:
    moe = "--preset", "moe", *TWO_LAYERS
    arguments = with_flags(tiny, *moe, "--mesh", mesh, "--out", str(tmp_path))
    run = Run(*parse_settings(arguments), Console(quiet=True))
    placed = {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf.sharding
        for path, leaf in jax.tree.leaves_with_path(run.state)
        if leaf.size >= 1024
    }
    assert any("optimizer" in name for name in placed)
    assert any("experts/down" in name for name in placed)
    assert any("lm_head" in name for name in placed)
    whole = [name for name, where in placed.items() if where.is_fully_replicated]
    assert whole == []


@pytest.mark.parametrize(("rows", "devices"), [(8, 8), (6, 6), (7, 7), (9, 3), (1, 1)])
def test_the_default_mesh_of_a_cpu_shares_the_rows(rows: int, devices: int) -> None:
    sizes = {"data": devices, "fsdp": 1, "tensor": 1}
    assert dict(make_mesh("", rows).shape) == sizes


@pytest.mark.parametrize(
    ("mesh", "message"),
    [
        ("data=3", "4 rows, which data=3"),
        ("data=99", "needs 99 devices"),
        ("rows=2", "data=N,tensor=M"),
    ],
)
def test_a_mesh_that_does_not_fit_says_so(
    tiny: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    mesh: str,
    message: str,
) -> None:
    flags = [*tiny[: tiny.index("--mesh")], "--mesh", mesh]
    assert main(["--out", str(tmp_path), *flags]) == 1
    assert message in capsys.readouterr().err


def test_logits_and_the_fused_path_train_alike(tiny: list[str], tmp_path: Path) -> None:
    fused = train(tiny, tmp_path / "a", "--fused")
    plain = train(tiny, tmp_path / "b", "--no-fused")
    assert_close(plain, fused, rtol=2e-4)


@SLOW
def test_bfloat16_is_near_float32(tiny: list[str], tmp_path: Path) -> None:
    exact = train(tiny, tmp_path / "a")
    short = train(tiny, tmp_path / "b", "--dtype", "bfloat16")
    assert short[-1]["nll"] != exact[-1]["nll"]
    assert short[-1]["nll"] == pytest.approx(exact[-1]["nll"], rel=0.02)
    state, _ = checkpoint(tmp_path / "b", 6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state["params"])} == {
        np.dtype(np.float32)
    }


@pytest.mark.parametrize(
    ("flags", "name"),
    [
        (["--loss.mtp-type", "sequential"], "mtp_head_losses_2"),
        (["--loss.mtp-type", "adaptive"], "adaptive_mtp_avg_confidence"),
        (["--loss.use-focal-loss"], "focal_loss"),
        (["--loss.penalty-source", "targets"], "ngram_repetition"),
        (
            ["--loss.use-contrastive-loss", "--loss.contrastive-type", "simctg"],
            "contrastive_loss",
        ),
        (["--loss.unlikelihood-weight", "0.1"], "unlikelihood"),
        (["--loss.z-loss-weight", "1e-4"], "z_loss"),
        (["--model.experts", "4", "--loss.use-diversity-loss"], "diversity_loss"),
        (["--model.experts", "4", "--loss.use-moe-balancing"], "moe_cv"),
    ],
)
def test_single_fields_of_the_loss_add_their_terms(
    tiny: list[str], flags: list[str], name: str
) -> None:
    sizes = ("--model.layers", "1", "--model.dense-layers", "0")
    assert name in names_of_metrics([*with_flags(tiny, *sizes), *flags])
