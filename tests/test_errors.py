"""A bad call is an error that names the argument, what it got and what to do."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import checkify
from support.scenes import EVERYTHING, B, D, E, K, S, V, floats, integers, through

import ava_jax

LOGITS = jnp.zeros((B, S, V))
TARGETS = jnp.ones((B, S), jnp.int32)
HIDDEN = jnp.zeros((B, S, D))
HEAD = jnp.zeros((D, V))


@pytest.mark.parametrize(
    ("config", "inputs", "error", "words"),
    [
        ({}, {}, ValueError, ["no logits", "hidden_states", "lm_head"]),
        ({}, {"logits": LOGITS, "lm_head": HEAD}, ValueError, ["not both"]),
        ({}, {"lm_head": HEAD}, ValueError, ["lm_head needs hidden_states"]),
        ({}, {"logits": LOGITS[..., :5]}, ValueError, ["5", "vocab_size=13"]),
        ({}, {"hidden_states": HIDDEN, "lm_head": HEAD.T}, ValueError, ["lm_head"]),
        (
            {},
            {"hidden_states": HIDDEN, "lm_head": HEAD[:, :5]},
            ValueError,
            ["lm_head", "vocab_size=13"],
        ),
        ({}, {"logits": LOGITS[:, :4]}, ValueError, ["logits", "(4, 9)"]),
        ({}, {"logits": TARGETS}, TypeError, ["logits", "int32"]),
        ({}, {"logits": LOGITS, "logit": LOGITS}, TypeError, ["'logit'", "'logits'"]),
        ({}, {"logits": LOGITS, "targets": LOGITS}, TypeError, ["targets", "integer"]),
        ({}, {"logits": LOGITS, "targets": None}, ValueError, ["targets is required"]),
        (
            {},
            {"logits": LOGITS, "attention_mask": TARGETS[:, :3]},
            ValueError,
            ["attention_mask", "(4, 9)", "(4, 3)"],
        ),
        (
            {},
            {"logits": LOGITS, "segment_ids": LOGITS[..., 0]},
            TypeError,
            ["segment_ids", "float32"],
        ),
        (
            {"use_mtp": True, "hidden_size": D},
            {"logits": LOGITS},
            ValueError,
            ["hidden_states and mtp_params"],
        ),
        (
            {"use_mtp": True, "hidden_size": D + 1},
            {"logits": LOGITS, "hidden_states": HIDDEN},
            ValueError,
            ["hidden_size=6"],
        ),
        (
            {"use_mtp": True, "mtp_type": "sequential"},
            {"hidden_states": HIDDEN, "lm_head": HEAD},
            ValueError,
            ["mtp_hidden_states"],
        ),
        (
            {"use_mtp": True, "mtp_type": "adaptive"},
            {"logits": LOGITS},
            ValueError,
            ["additional_logits"],
        ),
        (
            {"use_moe_balancing": True, "num_experts": E},
            {"logits": LOGITS},
            ValueError,
            ["use_moe_balancing needs gate_logits and expert_indices"],
        ),
        (
            {"use_moe_balancing": True, "num_experts": E},
            {
                "logits": LOGITS,
                "gate_logits": jnp.zeros((7, E)),
                "expert_indices": jnp.zeros((7, 1), jnp.int32),
            },
            ValueError,
            ["gate_logits", "36", "(7, 3)"],
        ),
        (
            {"use_moe_balancing": True, "num_experts": E + 1},
            {
                "logits": LOGITS,
                "gate_logits": jnp.zeros((B * S, E)),
                "expert_indices": jnp.zeros((B * S, 1), jnp.int32),
            },
            ValueError,
            ["num_experts=4"],
        ),
        ({"use_diversity_loss": True}, {"logits": LOGITS}, ValueError, ["expert_out"]),
        (
            {"use_contrastive_loss": True, "contrastive_type": "margin"},
            {"logits": LOGITS},
            ValueError,
            ["embeddings and labels"],
        ),
        (
            {"primary_loss_type": "adaptive_mtp"},
            {"logits": LOGITS, "confidence_scores": jnp.zeros((B, S + 1))},
            ValueError,
            ["confidence_scores", "(4, 10)"],
        ),
    ],
)
def test_bad_calls(config, inputs, error, words):
    loss_fn = ava_jax.create_unified_loss({"vocab_size": V, **config})
    given: dict[str, Any] = {"targets": TARGETS, **inputs}
    with pytest.raises(error) as caught:
        loss_fn(loss_fn.init(), **given)
    for word in words:
        assert word in str(caught.value)


@functools.cache
def checked_everything():
    """A checked loss under jit, its state, and arguments that are fine."""
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    ints = integers() | {"attention_mask": np.ones((B, S), bool)}
    run = jax.jit(checkify.checkify(ava_jax.checked(loss_fn)))
    return run, loss_fn.init(), through("logits", floats()), ints


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": (1, 4, -7)}, r"target -7 at \[1, 4\].*13 ids"),
        ({"targets": (0, 0, V)}, r"target 13 at \[0, 0\]"),
        ({"targets": (3, 8, 10**6)}, r"target 1000000 at \[3, 8\]"),
        ({"expert_indices": (2, 3, E)}, r"expert index 3 at .*3 experts"),
    ],
)
def test_checked_names_the_position_and_the_value(change, message):
    run, state, arrays, ints = checked_everything()
    run(state, **arrays, **ints)[0].throw()
    [(name, (row, column, value))] = change.items()
    ints = ints | {name: np.array(ints[name])}
    ints[name][row, column] = value
    error, _ = run(state, **arrays, **ints)
    with pytest.raises(checkify.JaxRuntimeError, match=message):
        error.throw()


@pytest.mark.parametrize("bad", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("name", ["logits", "hidden_states", "lm_head"])
def test_checked_finds_what_is_not_finite(name, bad):
    loss_fn = ava_jax.create_unified_loss({"vocab_size": V})
    fused = {"hidden_states": HIDDEN, "lm_head": HEAD}
    arrays = {"logits": LOGITS} if name == "logits" else fused
    arrays = {**arrays, name: arrays[name].at[1, 2].set(bad)}
    with pytest.raises(checkify.JaxRuntimeError, match=rf"{name} .*\[1, 2"):
        ava_jax.checked(loss_fn)(loss_fn.init(), targets=TARGETS, **arrays)
    if name != "lm_head":
        mask = jnp.ones((B, S)).at[1, 2].set(0)
        ava_jax.checked(loss_fn)(
            loss_fn.init(), targets=TARGETS, attention_mask=mask, **arrays
        )


def test_checked_allows_masked_vocabulary_entries():
    loss_fn = ava_jax.create_unified_loss({"vocab_size": V})
    fine = LOGITS.at[..., 5].set(-jnp.inf)
    ava_jax.checked(loss_fn)(loss_fn.init(), targets=TARGETS, logits=fine)
    with pytest.raises(checkify.JaxRuntimeError, match=r"logits -inf at \[0, 0, 1\]"):
        ava_jax.checked(loss_fn)(
            loss_fn.init(), targets=TARGETS, logits=LOGITS.at[..., 1].set(-jnp.inf)
        )


def test_checked_inside_jit_and_grad():
    loss_fn = ava_jax.create_unified_loss({"vocab_size": V})
    call = ava_jax.checked(loss_fn)

    def step(state, logits, targets):
        def loss(logits):
            return call(state, logits=logits, targets=targets)[0]

        return jax.value_and_grad(loss)(logits)

    run = jax.jit(checkify.checkify(step))
    error, _ = run(loss_fn.init(), LOGITS, TARGETS)
    error.throw()
    error, _ = run(loss_fn.init(), LOGITS, TARGETS.at[2, 1].set(-1))
    with pytest.raises(checkify.JaxRuntimeError, match=r"target -1 at \[2, 1\]"):
        error.throw()


def test_heads_of_the_wrong_shape():
    loss_fn = ava_jax.create_unified_loss(EVERYTHING)
    arrays = through("logits", floats())
    arrays["mtp_params"] = {
        **arrays["mtp_params"],
        "heads": {"kernel": jnp.ones((K, D + 1, V)), "bias": jnp.ones((K, V))},
    }
    with pytest.raises(ValueError, match=r"kernel.*\(2, 5, 13\).*\(2, 6, 13\)"):
        loss_fn(loss_fn.init(), **arrays, **integers())
