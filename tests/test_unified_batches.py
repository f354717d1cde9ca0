"""What the unified loss promises whatever the batch holds."""

import functools
import itertools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.scenes import (
    ADAPTIVE,
    EVERYTHING,
    PATHS,
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
    value_and_grads,
)

import ava_jax


@functools.partial(jax.jit, static_argnames="loss_fn")
def with_filled_logits(loss_fn, state, arrays, ints, filler):
    """Value and gradients, with a filler for the logits of masked positions."""
    masked = ~ints["attention_mask"][..., None]

    def loss(arrays: dict[str, Any]):
        given = through("logits", arrays)
        given["logits"] = jnp.where(masked, filler, given["logits"])
        total, aux, after = loss_fn(state, **given, **ints)
        return total, (aux, after)

    return jax.value_and_grad(loss, has_aux=True)(arrays)


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf, -jnp.inf])
@pytest.mark.parametrize("path", PATHS)
def test_masked_positions_may_hold_anything(path, bad):
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
    if path == "logits":
        run = functools.partial(with_filled_logits, loss_fn, state, clean, ints)
        chex.assert_trees_all_equal(run(bad), run(0.0))
    want = value_and_grads(loss_fn, state, clean, ints, "fused")
    got = value_and_grads(loss_fn, state, dirty, ints, "fused")
    chex.assert_trees_all_equal(got, want)
    for name in ("hidden_states", "gate_logits"):
        assert (np.asarray(got[1][name][1]) == 0).all()


def test_masked_targets_may_hold_anything():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    ints = integers()
    want = value_and_grads(loss_fn, loss_fn.init(), floats(), ints, "logits")
    for filler in (0, 3, -5, 10**6):
        targets = jnp.where(ints["attention_mask"], ints["targets"], filler)
        other = {**ints, "targets": targets}
        got = value_and_grads(loss_fn, loss_fn.init(), floats(), other, "logits")
        chex.assert_trees_all_close(got, want, rtol=1e-6)


@pytest.mark.parametrize("target", [-1, V, 10**6, -100])
@pytest.mark.parametrize("path", PATHS)
def test_bad_ids_are_excluded_and_counted(path, target):
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    ints, arrays = integers(), floats()
    ints["attention_mask"] = jnp.ones((B, S), bool)
    # Routers see it all the same.
    hidden = {**ints, "router_mask": ints["attention_mask"]}
    hidden["attention_mask"] = hidden["attention_mask"].at[2, 4].set(False)
    want = value_and_grads(loss_fn, loss_fn.init(), arrays, hidden, path)
    ints["targets"] = ints["targets"].at[2, 4].set(target)
    (loss, (aux, _)), grads = value_and_grads(
        loss_fn, loss_fn.init(), arrays, ints, path
    )
    assert int(aux["num_invalid_targets"]) == (target != -100)
    assert int(aux["num_tokens"]) == B * S - 1
    chex.assert_trees_all_close((loss, grads), (want[0][0], want[1]), rtol=1e-6)


@pytest.mark.parametrize("path", PATHS)
def test_padded_columns_take_no_part_in_anything(path):
    """They are as large as they can be; smoothing and entropy use the true V."""
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    arrays, ints = floats(), integers()
    want = value_and_grads(loss_fn, loss_fn.init(), arrays, ints, path)
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
    (values, grads) = value_and_grads(loss_fn, loss_fn.init(), padded, ints, path)
    cut = jax.tree.map(lambda g, x: g[tuple(map(slice, x.shape))], grads, arrays)
    chex.assert_trees_all_close((values, cut), want, rtol=1e-5, atol=1e-6)
    assert (np.asarray(grads["lm_head"][:, V:]) == 0).all()
    assert (np.asarray(grads["mtp_params"]["heads"]["kernel"][..., V:]) == 0).all()


@pytest.mark.parametrize(
    ("config", "path"),
    [
        ({**EVERYTHING, "penalty_source": "predictions"}, "logits"),
        ({**EVERYTHING, "penalty_source": "targets"}, "logits"),
        (ADAPTIVE, "given"),
    ],
    ids=["predictions", "targets", "adaptive"],
)
def test_a_batch_without_an_unmasked_token_changes_nothing(config, path):
    loss_fn = ava_jax.create_unified_loss(config)
    arrays = adaptive_floats() if path == "given" else floats()
    ints = integers(experts=path != "given")
    (_, (_, state)), _ = value_and_grads(loss_fn, loss_fn.init(), arrays, ints, path)
    ints["attention_mask"] = jnp.zeros_like(ints["attention_mask"])
    (total, (aux, after)), grads = value_and_grads(loss_fn, state, arrays, ints, path)
    chex.assert_trees_all_equal(after, state)
    assert float(total) == 0
    assert float(aux["nll"]) == 0
    assert all((np.asarray(g) == 0).all() for g in jax.tree.leaves(grads))
    chex.assert_tree_all_finite(aux)


def test_saturated_predictions_have_finite_penalties_and_gradients():
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

    for certain, gap in itertools.product((1, 2, 3, 5), (50.0, 1e4)):
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
    for path in PATHS:
        (_, (aux, _)), grads = value_and_grads(
            loss_fn, loss_fn.init(), arrays, ints, path
        )
        chex.assert_tree_all_finite((aux, grads))
        assert aux["mtp_head_losses"].shape == (length - 1,)
