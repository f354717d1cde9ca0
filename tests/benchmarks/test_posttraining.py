"""The benchmarks of post-training: their losses agree, and their masks are right."""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import SingleDeviceSharding

from benchmarks import (
    compiled,
    goals,
    posttraining,
    programs,
    shapes,
    timing,
    topologies,
)
from benchmarks.arrays import make_batch
from benchmarks.cases import IMPLEMENTATIONS, Case, Goal, table
from benchmarks.timing import Figures

SHAPE = shapes.tiny(shapes.FUSED)
BATCH = make_batch(SHAPE)


def rollout(mask: jax.Array | None = None) -> posttraining.Rollout:
    return posttraining.make_rollout(BATCH, SHAPE.vocab, mask)


@functools.cache
def step(name: str) -> jax.stages.Wrapped:
    loss = posttraining.LOSSES[name]
    return posttraining.implementation(loss, BATCH, rollout()).function


def value_and_gradients(name: str, given: posttraining.Rollout) -> list[np.ndarray]:
    return [np.asarray(x) for x in jax.tree.leaves(step(name)(BATCH.floats, given))]


def exact_log_probs() -> np.ndarray:
    hidden, head = (np.asarray(BATCH.floats[k], np.float64) for k in BATCH.floats)
    logits = hidden @ head
    log_z = np.log(np.exp(logits).sum(-1))
    ids = np.asarray(BATCH.targets)[..., None]
    return np.take_along_axis(logits, ids, -1)[..., 0] - log_z


def exact_grpo(given: posttraining.Rollout) -> float:
    log_probs, rows = exact_log_probs(), []
    for b, row in enumerate(log_probs):
        each = []
        for t, log_prob in enumerate(row):
            if not given.mask[b, t]:
                continue
            ratio = np.exp(log_prob - float(given.old_log_probs[b, t]))
            clipped, a = np.clip(ratio, 0.8, 1.2), float(given.advantages[b, t])
            each.append(-min(ratio * a, clipped * a))
        rows.append(np.mean(each))
    return float(np.mean(rows))


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Several chunks of the checkpointed baselines."""
    monkeypatch.setattr(posttraining, "CHUNK", 16)


@pytest.mark.parametrize("group", [posttraining.LOG_PROBS, posttraining.GRPO])
def test_candidates_have_the_loss_and_gradients_of_the_baselines(group):
    naive, *others = (value_and_gradients(name, rollout()) for name in group)
    for other in others:
        for one, expected in zip(other, naive, strict=True):
            np.testing.assert_allclose(one, expected, rtol=1e-4, atol=1e-6)
    assert all(abs(gradient).max() > 1e-4 for gradient in naive[1:])


def test_losses_are_those_of_float64():
    given = rollout()
    advantages = np.asarray(given.advantages, np.float64)
    expected = -np.mean(advantages * exact_log_probs())
    for name in posttraining.LOG_PROBS:
        assert value_and_gradients(name, given)[0] == pytest.approx(expected, rel=1e-5)
    # Rows of different numbers of tokens: their means are not that of all tokens.
    scattered = posttraining.masks(*BATCH.targets.shape)["a quarter, scattered"]
    for given in (rollout(), rollout(scattered.at[0].set(1))):
        expected = exact_grpo(given)
        for name in posttraining.GRPO:
            found = value_and_gradients(name, given)[0]
            assert found == pytest.approx(expected, rel=1e-5), name


def test_some_ratios_are_clipped_and_others_are_not():
    ratios = np.exp(exact_log_probs() - np.asarray(rollout().old_log_probs))
    assert 0.1 < np.mean(abs(ratios - 1) > 0.2) < 0.98


def test_masks_are_of_all_tokens_and_of_a_quarter():
    everything, at_end, scattered = posttraining.masks(4, 16).values()
    assert (everything == 1).all()
    np.testing.assert_array_equal(at_end, np.tile([0] * 12 + [1] * 4, (4, 1)))
    np.testing.assert_array_equal(scattered.sum(-1), [4] * 4)
    assert (scattered != at_end).any(-1).all()


def test_masked_tokens_are_left_out():
    found = {}
    for name, mask in posttraining.masks(*BATCH.targets.shape).items():
        case = Case("masked", "masked", SHAPE, ())
        made = IMPLEMENTATIONS[name](case, BATCH)
        (loss, _) = made.function(*made.args)
        expected = -np.mean(exact_log_probs()[np.asarray(mask) == 1])
        assert float(loss) == pytest.approx(expected, rel=1e-5)
        found[name] = float(loss)
    assert len({round(loss, 4) for loss in found.values()}) == 3


def test_every_group_has_the_goals_of_both_dtypes():
    for group, limits in (
        ("policy", {0.75, 1.0}),
        ("log-probs", {1.0}),
        ("masked", {0.40}),
    ):
        cases = [case for case in table("cpu") if case.group == group]
        assert [case.shape.dtype for case in cases] == ["float32", "bfloat16"]
        for case in cases:
            assert {goal.limit for goal in case.goals} - {None} == limits
            assert {"time", "cpu_time"} <= {goal.metric for goal in case.goals}


def test_processors_time_is_compared_with_processors_time():
    def figures(seconds: float, cpu_seconds: float) -> Figures:
        return Figures(0.5, 1, 8, 2.0, (seconds,), (cpu_seconds,))

    goal = Goal("own", "other", "cpu_time", 0.4)
    case = Case("masked", "masked", SHAPE, (goal,))
    timed = {"own": figures(9.0, 1.0), "other": figures(1.0, 4.0)}
    (outcome,) = goals.judge(case, {**timed})
    assert outcome.ratio == (0.25, 0.25, 0.25)
    assert outcome.status == "met"
    assert timed["own"].summary().get("cpu_times") == [1.0]


def test_both_clocks_are_read_in_every_round():
    step = timing.Implementation(jax.jit(lambda x: x.sum()), (jnp.ones(4),))
    (found,) = timing.time_interleaved({"sum": step}, rounds=3).values()
    assert isinstance(found, Figures)
    assert len(found.times) == len(found.cpu_times) == 3
    assert min(found.times) > 0
    assert min(found.cpu_times) > 0


# Compiled programs ---------------------------------------------------------------


class Here:
    """This machine as a device to compile for."""

    mesh = None
    are_gpus = False

    @staticmethod
    def sharding(*_: Any) -> SingleDeviceSharding:
        return SingleDeviceSharding(jax.devices("cpu")[0])


def test_entries_are_compared_with_the_naive_ones():
    target: Any = Here()
    entries = list(programs.posttraining_entries(SHAPE, target))
    names = [entry.name for entry in entries]
    assert len(set(names)) == len(names) == 9
    for entry in entries:
        assert entry.reference in names[: names.index(entry.name) + 1]
        assert (entry.kind == "candidate") == (
            entry.name.removesuffix(", forward only") in posttraining.OWN
        )
        assert bool(entry.gradients) != entry.name.endswith("forward only")
        outputs = jax.tree.leaves(jax.eval_shape(entry.step, *entry.arguments))
        expected = [(), (4, 16, 16), (16, 256)] if entry.gradients else [()]
        assert [x.shape for x in outputs] == expected


def test_table_has_a_file_of_its_own_and_no_mesh(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setitem(compiled.CHIPS, "here", topologies.Chip("cpu", 2**30))
    monkeypatch.setattr(compiled, "devices_of", lambda *_: Here())
    given = ["--chip", "here", "--shape", "4x16x16x256", "--post-training"]
    compiled.main([*given, "--only", "naive GRPO", "--out", str(tmp_path)])
    assert "| naive GRPO |" in capsys.readouterr().out
    name = f"compiled-here-4x16x16x256-post-training-jax{jax.__version__}.json"
    record = json.loads((tmp_path / name).read_text())
    assert [row["name"] for row in record["rows"]] == ["naive GRPO"]
    with pytest.raises(SystemExit):
        compiled.parse(["--post-training", "--mesh", "data=4"])
    assert "--mesh" in capsys.readouterr().err
