"""What the unified loss promises: its total, its state, its gradient."""

import dataclasses
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support.scenes import (
    ADAPTIVE,
    EVERYTHING,
    PATHS,
    B,
    S,
    V,
    adaptive_floats,
    floats,
    integers,
    jitted,
    through,
)

import ava_jax


def test_aux_has_exactly_the_terms_that_are_on():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    inputs = {**through("logits", floats()), **integers()}
    _, aux, _ = jitted(loss_fn)(loss_fn.init(), inputs)
    always = {"total_loss", "main_loss", "num_tokens", "num_invalid_targets"}
    always.add("num_invalid_weights")
    always |= {"nll", "perplexity", "accuracy", "entropy"}
    on = {
        "temperature",
        "tempered_nll",
        "mtp_loss",
        "mtp_head_losses",
        "ngram_penalty",
        "ngram_repetition",
        "token_diversity",
        "immediate_repetition_penalty",
        "eos_penalty",
        "unlikelihood",
        "z_loss",
        "moe_balancing_term",
        "moe_expert_balance_ratio",
        "moe_cv",
        "moe_max_violation",
        "diversity_loss",
        "contrastive_loss",
        "aux_load_balancing",
        "aux_router_z",
        "aux_expert_diversity",
    }
    assert set(aux) == always | on
    plain = ava_jax.create_unified_loss(
        {
            "vocab_size": V,
            "primary_loss_type": "standard",
            "use_ngram_penalty": False,
            "use_immediate_repetition_penalty": False,
        }
    )
    logits = np.zeros((B, S, V), np.float32)
    inputs = {"logits": logits, "targets": integers()["targets"]}
    _, aux, _ = jax.eval_shape(jitted(plain), plain.init(), inputs)
    assert set(aux) == always


def test_the_total_is_the_sum_of_its_parts():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    inputs = {**through("logits", floats()), **integers()}
    loss, aux, _ = jitted(loss_fn)(loss_fn.init(), inputs)
    parts = (
        "main_loss",
        "mtp_loss",
        "ngram_penalty",
        "immediate_repetition_penalty",
        "unlikelihood",
        "moe_balancing_term",
        "diversity_loss",
        "contrastive_loss",
        "aux_load_balancing",
        "aux_router_z",
        "aux_expert_diversity",
    )
    np.testing.assert_allclose(loss, sum(aux[k] for k in parts), rtol=1e-6)
    assert loss == aux["total_loss"]


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_leaves_the_state_alone(bad):
    """A NaN in the history would hold the temperature for as long as it stays there."""
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V, num_experts=2, use_moe_balancing=True
    )
    inputs = {
        "logits": np.zeros((1, 3, V), np.float32),
        "targets": np.array([[1, 2, 3]]),
        "gate_logits": np.zeros((1, 3, 2), np.float32),
        "expert_indices": np.zeros((1, 3, 1), int),
    }
    step = jitted(loss_fn)
    _, _, before = step(loss_fn.init(), inputs)
    broken = {**inputs, "logits": inputs["logits"].copy()}
    broken["logits"][0, 1, 5] = bad
    loss, _, after = step(before, broken)
    assert not np.isfinite(loss)
    chex.assert_trees_all_equal(after, before)
    _, _, following = step(after, inputs)
    assert int(following.step) == 2


def test_step_two_does_not_recompile():
    for config, arrays in (
        (EVERYTHING, through("logits", floats())),
        (ADAPTIVE, adaptive_floats()),
        ({**EVERYTHING, "moe_balancing_type": "bias"}, through("logits", floats())),
    ):
        loss_fn = ava_jax.create_unified_loss(config)

        @jax.jit
        @chex.assert_max_traces(n=1)
        def step(state, arrays, ints, loss_fn=loss_fn):
            return loss_fn(state, **arrays, **ints)

        state = loss_fn.init()
        for key in range(3):
            before = state
            ints = integers(key, experts="gate_logits" in arrays)
            _, _, state = step(state, arrays, ints)
            chex.assert_trees_all_equal_shapes_and_dtypes(before, state)
        chex.clear_trace_counter()
        assert int(state.step) == 3


def test_the_state_may_be_donated_and_aux_outlives_it():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    arrays, ints = through("logits", floats()), integers()
    step = jax.jit(lambda state: loss_fn(state, **arrays, **ints), donate_argnums=0)
    first, state = loss_fn.init(), None
    _, aux, state = step(first)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(first))
    _, later, state = step(state)
    kept = [float(np.sum(x)) for x in jax.tree.leaves((aux, later))]
    assert np.isfinite(kept).all()


def test_evaluation_changes_no_state_and_leaves_out_train_only_terms():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    arrays, ints = through("logits", floats()), integers()
    state = loss_fn.init()
    loss, aux, after = jitted(loss_fn, train=False)(state, {**arrays, **ints})
    chex.assert_trees_all_equal(after, state)
    assert not {"moe_balancing_term", "moe_cv", "moe_max_violation"} & set(aux)
    trained, full, _ = jitted(loss_fn)(state, {**arrays, **ints})
    np.testing.assert_allclose(trained - full["moe_balancing_term"], loss, rtol=1e-6)


def test_schedules_are_evaluated_at_the_step_of_the_state():
    schedule = optax.linear_schedule(0.0, 1.0, 2)
    loss_fn = ava_jax.create_unified_loss(
        {"vocab_size": V}, immediate_repetition_weight=schedule
    )
    state = loss_fn.init()
    step = jax.jit(
        lambda s: loss_fn(
            s,
            logits=jnp.zeros((B, S, V)),
            targets=integers()["targets"],
        )
    )
    seen = []
    for _ in range(3):
        _, aux, state = step(state)
        seen.append(float(aux["immediate_repetition_penalty"]))
    np.testing.assert_allclose(seen, [0, seen[2] / 2, seen[2]], rtol=1e-6)
    assert seen[2] > 0


@pytest.mark.parametrize("layers", [None, 2])
def test_the_rate_of_the_routing_bias_may_be_a_schedule(layers):
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V,
        num_experts=2,
        num_moe_layers=layers,
        use_moe_balancing=True,
        moe_balancing_type="bias",
        bias_update_rate=optax.linear_schedule(0.5, 0.0, 2),
    )
    tokens = (layers or 1, B * S)
    step = jax.jit(
        lambda s: loss_fn(
            s,
            logits=jnp.zeros((B, S, V)),
            targets=integers()["targets"],
            gate_logits=jnp.zeros((*tokens, 2)),
            expert_indices=jnp.zeros((*tokens, 1), jnp.int32),
        )
    )
    state, seen = loss_fn.init(), []
    for _ in range(3):
        _, _, state = step(state)
        seen.append(np.asarray(state.moe_balancing.bias).reshape(-1, 2))
    for bias, moved in zip(seen, (0.5, 0.75, 0.75), strict=True):
        np.testing.assert_allclose(bias, [[-moved, moved]] * (layers or 1), rtol=1e-6)


@pytest.mark.parametrize("config", [EVERYTHING, ADAPTIVE], ids=["all", "adaptive"])
def test_a_fresh_state_may_be_donated(config):
    """An array in two places would be donated twice."""
    leaves = jax.tree.leaves(ava_jax.create_unified_loss(config).init())
    assert len({leaf.unsafe_buffer_pointer() for leaf in leaves}) == len(leaves)


def test_the_temperature_scales_the_main_loss_only():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    arrays, ints = through("logits", floats()), integers()
    cold = loss_fn.init()
    hot = dataclasses.replace(cold, temperature=jnp.asarray(1.7))
    step = jitted(loss_fn)
    _, one, _ = step(cold, {**arrays, **ints})
    _, two, _ = step(hot, {**arrays, **ints})
    changed = {k for k in one if not np.allclose(one[k], two[k], rtol=1e-6)}
    assert changed == {"temperature", "tempered_nll", "main_loss", "total_loss"}


variants: Any = chex.variants


class VariantsTest(chex.TestCase):
    """The same numbers with jit and without."""

    variant: Callable[..., Any]

    @variants(with_jit=True, without_jit=True)
    def test_the_adaptive_loss_adds_up(self):
        loss_fn = ava_jax.create_unified_loss(
            ADAPTIVE, use_ngram_penalty=False, use_immediate_repetition_penalty=False
        )
        call = self.variant(lambda s, inputs: loss_fn(s, **inputs))
        inputs = {**adaptive_floats(), **integers(experts=False)}
        loss, aux, state = call(loss_fn.init(), inputs)
        heads = aux["main_additional_loss"] + aux["main_confidence_reg"]
        want = aux["main_primary_loss"] + heads + aux["eos_penalty"]
        np.testing.assert_allclose(loss, want, rtol=1e-6)
        scores = inputs["confidence_scores"][inputs["attention_mask"]]
        np.testing.assert_allclose(
            aux["main_effective_mtp_weight"], 0.1 * jnp.mean(scores), rtol=1e-5
        )
        after = ava_jax.statistics(state)["adaptive_mtp"]
        np.testing.assert_allclose(after["avg_primary_loss"], aux["main_primary_loss"])
        cleared = ava_jax.statistics(ava_jax.reset_statistics(state))["adaptive_mtp"]
        assert all(float(value) == 0 for value in cleared.values())


def test_the_whole_loss_has_the_gradient_of_its_value():
    """Numerical differentiation of everything at once, through both paths."""
    with jax.enable_x64(True):
        loss_fn = ava_jax.create_unified_loss(
            {**EVERYTHING, "use_moe_balancing": False}
        )
        arrays = jax.tree.map(lambda x: np.asarray(x, np.float64), floats())
        ints, state = integers(), loss_fn.init()
        for path in PATHS:

            def loss(arrays: dict[str, Any], path=path):
                return loss_fn(state, **through(path, arrays), **ints)[0]

            run = jax.jit(jax.value_and_grad(loss))
            _, grads = run(arrays)
            leaves, tree = jax.tree.flatten(arrays)
            rng = np.random.default_rng(9)
            for i, leaf in enumerate(leaves):
                way = rng.normal(size=leaf.shape)
                ends = [
                    run(tree.unflatten([*leaves[:i], leaf + h * way, *leaves[i + 1 :]]))
                    for h in (1e-6, -1e-6)
                ]
                slope = (float(ends[0][0]) - float(ends[1][0])) / 2e-6
                exact = np.sum(way * np.asarray(jax.tree.leaves(grads)[i]))
                np.testing.assert_allclose(exact, slope, rtol=1e-6, atol=1e-8)
