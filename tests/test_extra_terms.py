"""A term of the user's own is served by both doors, with its weight and state."""

import dataclasses
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.scenes import B, D, S, V, integers, jitted

import ava_jax
from ava_jax.config import Weight


@dataclasses.dataclass(frozen=True)
class Reward:
    """Charges `reward · nll`, and keeps a running mean of it."""

    name: str = "reward"
    weight: Weight = 0.5

    def init(self):
        return {"mean": jnp.zeros(())}

    def apply(self, state, stats, inputs):
        return inputs.extra["reward"] * stats.nll - state["mean"]

    def update(self, state, mean):
        return {"mean": 0.9 * state["mean"] + 0.1 * mean}


def inputs() -> dict[str, Any]:
    keys = jax.random.split(jax.random.key(0), 3)
    ints = {k: v for k, v in integers().items() if k != "expert_indices"}
    return {
        "hidden_states": jax.random.normal(keys[0], (B, S, D)),
        "lm_head": jax.random.normal(keys[1], (D, V)),
        "extra_inputs": {"reward": jax.random.normal(keys[2], (B, S))},
        **ints,
    }


def test_both_doors_serve_it():
    loss_fn = ava_jax.unified_loss(
        ava_jax.UnifiedLossConfig(vocab_size=V, chunk_size=4), extra_terms=(Reward(),)
    )
    given = inputs()

    step = jitted(loss_fn)

    def run(given):
        _, _, state = step(loss_fn.init(), given)
        return step(state, given)

    fused = run(given)
    hidden, head = given.pop("hidden_states"), given.pop("lm_head")
    plain = run({**given, "logits": hidden @ head})
    chex.assert_trees_all_close(fused, plain, rtol=2e-5, atol=1e-6)
    assert float(fused[2].extra["reward"]["mean"]) != 0
    without = ava_jax.create_unified_loss({"vocab_size": V})
    with_logits = {**given, "logits": hidden @ head}
    loss, _, _ = jitted(without)(without.init(), with_logits)
    first = step(loss_fn.init(), with_logits)
    np.testing.assert_allclose(first[0] - first[1]["reward"], loss, rtol=1e-5)


def test_its_weight_may_be_a_schedule():
    term = Reward(weight=optax.constant_schedule(0.0))
    loss_fn = ava_jax.unified_loss(ava_jax.UnifiedLossConfig(vocab_size=V), (term,))
    _, aux, _ = jitted(loss_fn)(loss_fn.init(), inputs())
    assert float(aux["reward"]) == 0


@pytest.mark.parametrize("name", ["nll", "main_loss", "reward"])
def test_a_name_that_is_taken_is_an_error(name):
    terms = (Reward(), Reward(name=name))
    with pytest.raises(ValueError, match=f"{name}.*taken"):
        ava_jax.unified_loss(ava_jax.UnifiedLossConfig(vocab_size=V), terms)


def test_an_object_that_is_no_term_is_an_error():
    nothing: Any = object()
    with pytest.raises(TypeError, match="ExtraTerm"):
        ava_jax.unified_loss(ava_jax.UnifiedLossConfig(vocab_size=V), (nothing,))
