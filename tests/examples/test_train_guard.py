"""Steps that are not finite change nothing, are counted, and at last end the run."""

import dataclasses
import json
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console
from run_helpers import train, with_flags

from train_tpu import Run, main
from trainer.errors import TrainingError
from trainer.model.layers import Batch
from trainer.report.finish import finish
from trainer.report.metrics import Metrics, Record, read_records
from trainer.report.plot import plot_losses
from trainer.run.checkpoint import Checkpoints
from trainer.run.guard import (
    SkipGuard,
    Skips,
    check_targets,
    choose,
    find_culprit,
    is_finite,
)
from trainer.run.settings import parse_settings
from trainer.run.state import TrainState

NAN, INF = float("nan"), float("inf")
GOOD: Record = {
    "nll": 1.0,
    "total_loss": 1.0,
    "grad_norm": 1.0,
    "num_invalid_targets": 0.0,
    "skipped_steps": 0.0,
    "skipped_in_a_row": 0.0,
}


def make_run(tiny: list[str], out: Path, *flags: str) -> Run:
    arguments = with_flags(tiny, "--out", str(out), *flags)
    return Run(*parse_settings(arguments), Console(quiet=True))


def poison(state: TrainState, number: float) -> TrainState:
    """Puts a number into the embedding, where it reaches loss and gradient."""

    def change(path: jax.tree_util.KeyPath, leaf: jax.Array) -> jax.Array:
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        return leaf.at[:, 0].set(number) if name == "embed/embedding" else leaf

    return state._replace(params=jax.tree.map_with_path(change, state.params))


@pytest.mark.parametrize("number", [NAN, INF])
def test_a_step_that_is_not_finite_changes_only_its_number(
    tiny: list[str], tmp_path: Path, number: float
) -> None:
    run = make_run(tiny, tmp_path)
    before = poison(run.state, number)
    kept = jax.tree.map(np.asarray, before)
    batch = run.share.put(next(run.batches))
    after, metrics = run.train_step(before, batch)
    chex.assert_trees_all_equal(after.params, kept.params)
    chex.assert_trees_all_equal(after.optimizer, kept.optimizer)
    chex.assert_trees_all_equal(after.loss, kept.loss)
    assert (int(after.step), int(after.skipped.total)) == (1, 1)
    again, metrics = run.train_step(after, batch)
    record = metrics.fetch()
    assert (record["skipped_steps"], record["skipped_in_a_row"]) == (2, 2)
    # The schedules wait: the next good step is the first of the warm-up.
    healthy = poison(again, 0.0)
    last, metrics = run.train_step(healthy, batch)
    record = metrics.fetch()
    assert record["learning_rate"] == pytest.approx(0.0025)
    assert (record["skipped_steps"], record["skipped_in_a_row"]) == (2, 0)
    assert (int(last.step), int(last.loss.step)) == (3, 1)


def test_a_finite_step_is_the_step_without_the_guard(
    tiny: list[str], tmp_path: Path
) -> None:
    run = make_run(tiny, tmp_path)
    state, metrics = run.train_step(run.state, run.share.put(next(run.batches)))
    assert metrics.fetch()["skipped_steps"] == 0
    assert int(state.loss.step) == 1
    assert all(jnp.isfinite(leaf).all() for leaf in jax.tree.leaves(state.params))


def test_choose_and_is_finite() -> None:
    good, bad = {"a": jnp.ones(3), "b": jnp.zeros(())}, {"a": jnp.array([1, NAN, 1])}
    assert bool(is_finite(good))
    assert not bool(is_finite(bad))
    assert not bool(is_finite({"a": jnp.array(-INF)}))
    chosen = choose(jnp.array(False), {"a": jnp.array(NAN)}, {"a": jnp.array(2.0)})
    assert float(chosen["a"]) == 2.0
    counts = Skips.none()
    for is_good in (True, False, False, True, False):
        counts = counts.after(jnp.array(is_good))
    assert (int(counts.total), int(counts.in_a_row)) == (3, 1)


@pytest.mark.parametrize(
    ("change", "culprit"),
    [
        ({"nll": NAN, "total_loss": NAN, "grad_norm": NAN}, "nll"),
        ({"nll": INF, "eos_penalty": NAN, "grad_norm": NAN}, "nll, eos_penalty"),
        ({"grad_norm": INF}, "the gradient"),
        ({"total_loss": INF, "grad_norm": NAN}, "total_loss"),
        ({}, "the parameters after the step"),
    ],
)
def test_the_culprit_is_a_term_before_it_is_a_sum(change: Record, culprit: str) -> None:
    assert find_culprit(GOOD | change) == culprit


@pytest.mark.parametrize("most", [0, 2])
def test_one_more_than_allowed_names_the_first(most: int) -> None:
    guard = SkipGuard(most)
    assert guard.check(1, GOOD) is None
    for count in range(1, most + 1):
        name = "nll" if count == 1 else "entropy"
        record = GOOD | {name: NAN, "skipped_in_a_row": float(count)}
        assert f"step {6 + count} was skipped" in str(guard.check(6 + count, record))
    record = GOOD | {"nll": NAN, "skipped_in_a_row": most + 1.0}
    with pytest.raises(TrainingError, match="first, at step 7, is nll"):
        guard.check(7 + most, record)


def test_a_good_step_begins_a_new_row() -> None:
    guard = SkipGuard(1)
    for step in range(1, 20, 2):
        assert guard.check(step, GOOD | {"nll": NAN, "skipped_in_a_row": 1.0})
        assert guard.check(step + 1, GOOD) is None


def test_a_run_that_only_skips_stops_and_keeps_the_good_checkpoint(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # The rate of step 1 is the peak over two; of step 2 on, everything overflows.
    flags = ["--learning-rate", "1e38", "--checkpoint-every", "1", "--steps", "9"]
    flags += ["--max-skipped-steps", "2", "--out", str(tmp_path)]
    assert main(with_flags(tiny, *flags)) == 1
    captured = capsys.readouterr()
    message = captured.err
    assert "3 steps in a row were skipped, up to step 4" in message
    assert "first, at step 2, is " in message
    assert "is mtp_head_losses_1, mtp_head_losses_2. The last" in message
    assert "step 2 was skipped" in captured.out
    assert Checkpoints(tmp_path / "checkpoints", keep=2).latest() == 1
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    parsed = [json.loads(line, parse_constant=pytest.fail) for line in lines]
    assert [record["step"] for record in parsed] == [1, 2, 3, 4]
    assert parsed[1]["mtp_head_losses_1"] is None
    records = read_records(tmp_path / "metrics.jsonl")
    assert math.isnan(records[1]["mtp_head_losses_1"])
    assert [record["skipped_steps"] for record in records] == [0, 1, 2, 3]


def inject(run: Run, bad_steps: set[int]) -> None:
    """Makes the parameters not finite for some steps alone, as a flipped bit might."""
    step_without = run.train_step

    def step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        if int(state.step) + 1 not in bad_steps:
            return step_without(state, batch)
        good = jax.tree.map(jnp.copy, state)
        after, metrics = step_without(poison(state, NAN), batch)
        return after._replace(params=good.params), metrics

    run.train_step = step


def test_a_passing_fault_is_survived_reported_and_drawn(
    tiny: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ["--checkpoint-every", "3", "--keep", "9", "--out", str(tmp_path / "run")]
    settings, fields = parse_settings(with_flags(tiny, *flags))
    run = Run(settings, fields, Console(width=100))
    inject(run, {3, 4})
    assert run.train()
    finish(run.settings, run.model, run.state, run.text, run.console)
    screen = capsys.readouterr().out
    assert "step 3 was skipped: not finite is" in screen
    assert "2 steps were skipped" in screen
    records = read_records(tmp_path / "run" / "metrics.jsonl")
    assert [r["skipped_steps"] for r in records] == [0, 0, 1, 2, 2, 2]
    # Step 3 was skipped, so its checkpoint was left out.
    folders = (tmp_path / "run" / "checkpoints").iterdir()
    assert [folder.name for folder in folders] == ["step_00000006"]
    plot_losses(records, [], tmp_path / "losses.png")


def test_targets_outside_the_vocabulary_stop_at_once() -> None:
    check_targets(7, GOOD)
    with pytest.raises(TrainingError, match="step 7: 2 targets lie outside"):
        check_targets(7, GOOD | {"num_invalid_targets": 2.0})


def test_the_limit_is_free_to_change(tiny: list[str], tmp_path: Path) -> None:
    train(tiny, tmp_path, "--steps", "2")
    train(tiny, tmp_path, "--steps", "3", "--max-skipped-steps", "0")
    settings, _ = parse_settings([])
    with pytest.raises(ValueError, match="--max-skipped-steps must be at least 0"):
        dataclasses.replace(settings, max_skipped_steps=-1)
