"""What the unified loss promises, whatever the batch holds."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scenes import (
    ADAPTIVE,
    EVERYTHING,
    B,
    D,
    K,
    S,
    V,
    adaptive_floats,
    floats,
    integers,
    jitted,
    through,
)

import ava_jax

DOORS = ("logits", "fused")
SOURCES = ("predictions", "targets")


@functools.partial(jax.jit, static_argnames=("loss_fn", "door"))
def value_and_grads(loss_fn, state, arrays, ints, door="logits"):
    def loss(arrays: dict[str, Any]):
        total, aux, after = loss_fn(state, **through(door, arrays), **ints)
        return total, (aux, after)

    return jax.value_and_grad(loss, has_aux=True)(arrays)


def test_aux_has_exactly_the_terms_that_are_on():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    inputs = {**through("logits", floats()), **integers()}
    _, aux, _ = jitted(loss_fn)(loss_fn.init(), inputs)
    always = {
        "total_loss",
        "main_loss",
        "num_tokens",
        "nll",
        "perplexity",
        "accuracy",
        "entropy",
        "num_invalid_targets",
    }
    on = {
        "temperature",
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
    _, aux, _ = plain(
        plain.init(), logits=jnp.zeros((B, S, V)), targets=integers()["targets"]
    )
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


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("door", DOORS)
def test_masked_positions_may_hold_anything(door, bad):
    """The heads see targets ahead, so whole rows are masked for them."""
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    ints, state = integers(), loss_fn.init()
    ints["attention_mask"] = ints["attention_mask"].at[1].set(False)
    clean = floats()
    dirty = {
        **clean,
        "hidden_states": clean["hidden_states"].at[1].set(bad),
        "gate_logits": clean["gate_logits"].at[1].set(bad),
        "expert_outputs": clean["expert_outputs"].at[:, 1].set(bad),
    }
    if door == "logits":
        masked = ~ints["attention_mask"][..., None]

        def loss(arrays: dict[str, Any], filler):
            given = through("logits", arrays)
            given["logits"] = jnp.where(masked, filler, given["logits"])
            total, aux, after = loss_fn(state, **given, **ints)
            return total, (aux, after)

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        want, got = run(clean, 0.0), run(clean, bad)
        chex.assert_trees_all_equal(got, want)
    want = value_and_grads(loss_fn, state, clean, ints, "fused")
    got = value_and_grads(loss_fn, state, dirty, ints, "fused")
    chex.assert_trees_all_equal(got, want)
    for name in ("hidden_states", "gate_logits"):
        assert (np.asarray(got[1][name][1]) == 0).all()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
def test_a_loss_that_is_not_finite_leaves_the_state_alone(bad):
    """A NaN in the history would hold the temperature for as long as it stays there."""
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V, num_experts=2, use_moe_balancing=True
    )
    inputs = {
        "logits": jnp.zeros((1, 3, V)),
        "targets": jnp.array([[1, 2, 3]]),
        "gate_logits": jnp.zeros((1, 3, 2)),
        "expert_indices": jnp.zeros((1, 3, 1), int),
    }
    step = jitted(loss_fn)
    _, _, before = step(loss_fn.init(), inputs)
    broken = {**inputs, "logits": inputs["logits"].at[0, 1, 5].set(bad)}
    loss, _, after = step(before, broken)
    assert not np.isfinite(loss)
    chex.assert_trees_all_equal(after, before)
    _, _, following = step(after, inputs)
    assert int(following.step) == 2


def test_masked_targets_may_hold_anything():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    ints = integers()
    want = value_and_grads(loss_fn, loss_fn.init(), floats(), ints)
    for filler in (0, 3, -5, 10**6):
        targets = jnp.where(ints["attention_mask"], ints["targets"], filler)
        other = {**ints, "targets": targets}
        got = value_and_grads(loss_fn, loss_fn.init(), floats(), other)
        chex.assert_trees_all_close(got, want, rtol=1e-6)


@pytest.mark.parametrize("target", [-1, V, 10**6, -100])
@pytest.mark.parametrize("door", DOORS)
def test_bad_ids_are_excluded_and_counted(door, target):
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    ints, arrays = integers(), floats()
    ints["attention_mask"] = jnp.ones((B, S), bool)
    hidden = {**ints, "attention_mask": ints["attention_mask"].at[2, 4].set(False)}
    want = value_and_grads(loss_fn, loss_fn.init(), arrays, hidden, door)
    ints["targets"] = ints["targets"].at[2, 4].set(target)
    (loss, (aux, _)), grads = value_and_grads(
        loss_fn, loss_fn.init(), arrays, ints, door
    )
    assert int(aux["num_invalid_targets"]) == (target != -100)
    assert int(aux["num_tokens"]) == B * S - 1
    chex.assert_trees_all_close((loss, grads), (want[0][0], want[1]), rtol=1e-6)


@pytest.mark.parametrize("door", DOORS)
def test_padded_columns_take_no_part_in_anything(door):
    """They are as large as they can be; smoothing and entropy use the true V."""
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    arrays, ints = floats(), integers()
    want = value_and_grads(loss_fn, loss_fn.init(), arrays, ints, door)
    padded = jax.tree.map(lambda x: x, arrays)
    padded["lm_head"] = jnp.pad(
        arrays["lm_head"], ((0, 0), (0, 3)), constant_values=50.0
    )
    heads = arrays["mtp_params"]["heads"]
    padded["mtp_params"]["heads"] = {
        "kernel": jnp.pad(
            heads["kernel"], ((0, 0), (0, 0), (0, 3)), constant_values=50.0
        ),
        "bias": jnp.pad(heads["bias"], ((0, 0), (0, 3)), constant_values=50.0),
    }
    (values, grads) = value_and_grads(loss_fn, loss_fn.init(), padded, ints, door)
    cut = jax.tree.map(lambda g, x: g[tuple(map(slice, x.shape))], grads, arrays)
    chex.assert_trees_all_close((values, cut), want, rtol=1e-5, atol=1e-6)
    assert (np.asarray(grads["lm_head"][:, V:]) == 0).all()
    assert (np.asarray(grads["mtp_params"]["heads"]["kernel"][..., V:]) == 0).all()


@pytest.mark.parametrize("source", SOURCES)
def test_a_batch_in_which_nothing_counts_changes_nothing(source):
    for config, arrays in (
        ({**EVERYTHING, "penalty_source": source}, through("logits", floats())),
        (ADAPTIVE, adaptive_floats()),
    ):
        loss_fn = ava_jax.create_unified_loss(config)
        ints = integers()
        state = loss_fn.init()
        _, _, state = jitted(loss_fn)(state, {**arrays, **ints})
        ints["attention_mask"] = jnp.zeros((B, S))

        def loss(arrays: dict[str, Any], state=state, ints=ints, loss_fn=loss_fn):
            total, aux, after = loss_fn(state, **arrays, **ints)
            return total, (aux, after)

        run = jax.jit(jax.value_and_grad(loss, has_aux=True))
        (total, (aux, after)), grads = run(arrays)
        chex.assert_trees_all_equal(after, state)
        assert float(total) == 0
        assert float(aux["nll"]) == 0
        assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))
        chex.assert_tree_all_finite(aux)


@pytest.mark.parametrize("gap", [50.0, 1e4])
def test_saturated_predictions_have_finite_penalties_and_gradients(gap):
    """The model is certain of repeating, of EOS, and of being right."""
    config = {
        **{k: v for k, v in EVERYTHING.items() if "moe" not in k},
        "use_mtp": False,
        "use_auxiliary_loss": False,
        "use_diversity_loss": False,
        "use_contrastive_loss": False,
        "use_focal_loss": True,
        "focal_gamma": 0.5,
    }
    loss_fn = ava_jax.create_unified_loss(config)
    targets = jnp.array([[1, 3, 1, 4, 1, 3, 5, 5, 6]])

    @jax.jit
    def run(logits):
        def loss(logits):
            return loss_fn(loss_fn.init(), logits=logits, targets=targets)[:2]

        return jax.value_and_grad(loss, has_aux=True)(logits)

    for certain in (1, 2, 3, 5):
        logits = jnp.zeros((1, S, V)).at[:, :, certain].set(gap)
        (total, aux), grad = run(logits)
        chex.assert_tree_all_finite((total, aux["immediate_repetition_penalty"], grad))
        assert np.abs(np.asarray(grad)).max() > 0


def test_equal_huge_logits_are_uniform():
    loss_fn = ava_jax.create_unified_loss({"vocab_size": V, "label_smoothing": 0.3})
    step = jitted(loss_fn)
    for size in (1e8, -1e8):
        inputs = {
            "logits": jnp.full((B, S, V), size),
            "targets": integers()["targets"],
        }
        _, aux, _ = step(loss_fn.init(), inputs)
        np.testing.assert_allclose(aux["main_loss"], np.log(V), rtol=1e-6)
        np.testing.assert_allclose(aux["token_diversity"], 0, atol=1e-6)


@pytest.mark.parametrize("length", [1, 2, K])
def test_short_rows(length):
    config = {**EVERYTHING, "num_future_tokens": 3}
    arrays, ints = floats(), integers()
    arrays["mtp_params"]["heads"] = {
        "kernel": jnp.ones((3, D, V)),
        "bias": jnp.zeros((3, V)),
    }
    for name in ("hidden_states", "gate_logits"):
        arrays[name] = arrays[name][:, :length]
    arrays["expert_outputs"] = arrays["expert_outputs"][:, :, :length]
    ints = {k: v[:, :length] for k, v in ints.items()}
    loss_fn = ava_jax.create_unified_loss(config)
    for door in DOORS:
        (_, (aux, _)), grads = value_and_grads(
            loss_fn, loss_fn.init(), arrays, ints, door
        )
        chex.assert_tree_all_finite((aux, grads))
        assert aux["mtp_head_losses"].shape == (length - 1,)


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
            _, _, state = step(state, arrays, integers(key))
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
    kept = [float(jnp.sum(x)) for x in jax.tree.leaves((aux, later))]
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


def test_the_temperature_scales_the_main_loss_only():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    arrays, ints = through("logits", floats()), integers()
    cold = loss_fn.init()
    hot = dataclasses.replace(cold, temperature=jnp.asarray(1.7))
    step = jitted(loss_fn)
    _, one, _ = step(cold, {**arrays, **ints})
    _, two, _ = step(hot, {**arrays, **ints})
    changed = {k for k in one if not np.allclose(one[k], two[k], rtol=1e-6)}
    assert changed == {"temperature", "main_loss", "total_loss"}


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
        inputs = {**adaptive_floats(), **integers()}
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
    """Numerical differentiation of everything at once, through both doors."""
    with jax.enable_x64(True):
        loss_fn = ava_jax.create_unified_loss(
            {**EVERYTHING, "use_moe_balancing": False}
        )
        arrays = jax.tree.map(lambda x: x.astype(jnp.float64), floats())
        ints, state = integers(), loss_fn.init()
        for door in DOORS:

            def loss(arrays: dict[str, Any], door=door):
                return loss_fn(state, **through(door, arrays), **ints)[0]

            value = jax.jit(loss)
            grads = jax.jit(jax.grad(loss))(arrays)
            leaves, tree = jax.tree.flatten(arrays)
            keys = jax.random.split(jax.random.key(9), len(leaves))
            for i, leaf in enumerate(leaves):
                way = jax.random.normal(keys[i], leaf.shape, jnp.float64)
                ends = [
                    value(
                        tree.unflatten([*leaves[:i], leaf + h * way, *leaves[i + 1 :]])
                    )
                    for h in (1e-6, -1e-6)
                ]
                slope = (ends[0] - ends[1]) / 2e-6
                exact = jnp.sum(way * jax.tree.leaves(grads)[i])
                np.testing.assert_allclose(exact, slope, rtol=1e-6, atol=1e-8)
