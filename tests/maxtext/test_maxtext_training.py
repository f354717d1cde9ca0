"""MaxText's own train loop with its loss and with ours."""

from pathlib import Path
from typing import Any
from unittest import mock

import jax
import numpy as np
import pytest
from support.maxtext_models import REASON
from support.pages import DOCS, run_section

from benchmarks import maxtext_training
from benchmarks.maxtext_training import (
    CASES,
    EVERYTHING,
    PLAIN,
    Metrics,
    Options,
    Settings,
)

trainer = pytest.importorskip("maxtext.trainers.pre_train.train", reason=REASON)

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.mark.parametrize("head", maxtext_training.HEADS)
def test_metrics_are_those_of_maxtext(head: str) -> None:
    settings = CASES[f"{head}, z-loss, packed"]
    theirs = maxtext_training.train(settings, None)
    ours = maxtext_training.train(settings, PLAIN)
    assert len(ours) == maxtext_training.STEPS
    assert theirs[-1]["learning/loss"] < 0.5 * theirs[0]["learning/loss"]
    assert theirs[0]["learning/z_loss"] > 1e-3
    gaps = maxtext_training.largest_gaps(ours, theirs)
    assert max(gaps.values()) < 1e-5, gaps


def trained(settings: Settings, options: Options) -> tuple[list[Metrics], Any]:
    """Trains; the metrics of every step, and the loss's state after the last."""
    states = []
    real = trainer.train_loop

    def train_loop(*args: Any) -> None:
        states.append(real(*args))

    with mock.patch.object(trainer, "train_loop", train_loop):
        metrics = maxtext_training.train(settings, options)
    return metrics, states[0].model.loss_state.get_value()


def test_micro_batches_add_up() -> None:
    settings: Settings = {
        **CASES["untied, z-loss, packed"],
        "steps": 4,
        "gradient_accumulation_steps": 2,
    }
    theirs = maxtext_training.train(settings, None)
    ours, state = trained(settings, PLAIN)
    gaps = maxtext_training.largest_gaps(ours, theirs)
    assert max(gaps.values()) < 1e-5, gaps
    assert int(state.step) == 8


def test_the_state_is_trained_and_checkpointed(tmp_path: Path) -> None:
    settings: Settings = {
        **CASES["untied, z-loss, packed"],
        "learning_rate_schedule_steps": 8,
        "base_output_directory": str(tmp_path),
        "async_checkpointing": "false",
    }
    saved: Settings = {**settings, "enable_checkpointing": "true"}
    options = {**EVERYTHING, "temperature_history": 4, "temperature_min_history": 2}
    metrics, state = trained({**saved, "steps": 6}, options)
    assert len(metrics) == int(state.step) == 6
    metrics, resumed = trained({**saved, "steps": 8}, options)
    assert len(metrics) == 2
    metrics, whole = trained({**settings, "steps": 8}, options)
    assert metrics[-1]["learning/loss"] < metrics[0]["learning/loss"]
    assert int(whole.step) == 8
    assert float(whole.temperature) != 1
    jax.tree.map(np.testing.assert_array_equal, resumed, whole)


def test_recipe_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with maxtext_training.restored():
        run_section(DOCS / "integrations.md", "MaxText")
