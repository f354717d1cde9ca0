"""Runs that balance experts by quantiles: what the loss gets, and that they balance."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from run_helpers import assert_close, train

import ava_jax
from trainer.model.language_model import LanguageModel, loss_inputs
from trainer.model.layers import Batch, ModelConfig
from trainer.run.evaluate import routing_bias
from trainer.run.settings import make_loss_config, parse_settings

QUANTILE = ["--loss.moe-balancing-type", "quantile", "--loss.no-use-auxiliary-loss"]


BATCH_IDS = jax.random.randint(jax.random.key(0), (4, 64), 0, 500)
BATCH = Batch(
    BATCH_IDS,
    BATCH_IDS,
    jnp.ones_like(BATCH_IDS),
    jnp.broadcast_to(jnp.arange(64), (4, 64)),
)


@functools.cache
def model_under(balancing: str) -> tuple[LanguageModel, optax.Params]:
    """A model with one layer of four experts, and its first parameters."""
    config = ModelConfig(layers=2, width=16, heads=2, experts=4, dense_layers=1)
    loss = ava_jax.create_unified_loss(
        vocab_size=500,
        num_experts=4,
        num_moe_layers=1,
        use_moe_balancing=True,
        moe_balancing_type=balancing,
    ).config
    model = LanguageModel(
        config=config, loss=loss, columns=500, dtype=jnp.float32, fused=True
    )
    return model, jax.jit(model.init)(jax.random.key(1), BATCH)["params"]


def test_the_loss_gets_the_scores_that_the_experts_were_chosen_by() -> None:
    bias = jnp.array([[0.2, -0.1, 0.0, -0.1]])
    apply = jax.jit(loss_inputs, static_argnums=0)
    found, other = (
        apply(*model_under(kind), BATCH, bias) for kind in ("quantile", "bias")
    )
    scores, logits = (
        np.asarray(inputs.get("gate_logits"), np.float64) for inputs in (found, other)
    )
    raised = np.exp(logits)
    np.testing.assert_allclose(scores, raised / raised.sum(-1, keepdims=True), 1e-5)
    assert np.abs(scores - logits).max() > 0.1
    chosen = np.argsort(-(scores + np.asarray(bias)), axis=-1)[..., :2]
    indices = np.asarray(found.get("expert_indices"))
    np.testing.assert_array_equal(np.sort(indices), np.sort(chosen))
    np.testing.assert_array_equal(indices, other.get("expert_indices"))


def test_terms_of_the_logits_are_refused() -> None:
    flags = ["--preset", "moe", "--loss.moe-balancing-type", "quantile"]
    with pytest.raises(ValueError, match=r"pass --loss\.no-use-auxiliary-loss"):
        make_loss_config(*parse_settings(flags), 300, 299)
    # Without the balancing its type changes nothing.
    off = [*flags, "--loss.no-use-moe-balancing"]
    assert make_loss_config(*parse_settings(off), 300, 299).use_auxiliary_loss
    made = make_loss_config(*parse_settings(["--preset", "moe", *QUANTILE]), 300, 299)
    assert made.moe_balancing_type == "quantile"


def test_a_few_steps_balance_a_batch() -> None:
    model, params = model_under("quantile")
    loss_fn = ava_jax.unified_loss(model.loss)

    @jax.jit
    def step(state: ava_jax.LossState) -> tuple[jax.Array, ava_jax.LossState]:
        inputs = loss_inputs(model, params, BATCH, routing_bias(state))
        _, aux, state = loss_fn(state, **loss_fn.select(inputs))
        return aux["moe_max_violation"], state

    state, violations = loss_fn.init(), []
    for _ in range(6):
        violation, state = step(state)
        violations.append(float(violation))
    assert violations[0] > 0.1
    assert violations[-1] < 0.03


@pytest.mark.slow
def test_microbatches_add_up_to_the_same_bias(tiny: list[str], tmp_path: Path) -> None:
    whole = train(tiny, tmp_path / "a", *QUANTILE, preset="moe")
    assert all("moe_max_violation" in record for record in whole)
    flags = ["--microbatches", "4", *QUANTILE]
    parts = train(tiny, tmp_path / "b", *flags, preset="moe")
    assert_close(parts, whole, rtol=2e-4)
