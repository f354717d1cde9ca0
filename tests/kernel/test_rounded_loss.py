"""Exponentials rounded to 16 bits do not change the loss and its gradients."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.kernel_batches import (
    WHOLE,
    B,
    Lead,
    S,
    V,
    compile_for,
    normal,
    whole_batch,
)
from support.trees import assert_trees_close

import ava_jax
from ava_jax.kernel import rounded
from ava_jax.kernel.platforms import Implementation

OF_16_BITS: dict[str, dict[str, Any]] = {
    "one id": {
        "primary_loss_type": "standard",
        "use_immediate_repetition_penalty": False,
    },
    "eleven ids": {
        "use_ngram_penalty": True,
        "eos_token_id": 3,
        "min_sequence_length": 9,
        "eos_penalty_weight": 0.1,
        "z_loss_weight": 1e-2,
        "initial_temperature": 1.4,
    },
    "focal": {"use_focal_loss": True, "focal_gamma": 2.0},
    "bias": {"label_smoothing": 0.2},
    # The main loss queries all earlier ids, the heads one each.
    "heads": WHOLE | {"logit_soft_cap": None, "use_ngram_penalty": True},
}


def loss_of_16_bits(config, implementation: Implementation, arrays, ints):
    """Returns loss, aux and gradients."""
    config = {"vocab_size": V - 3, "use_ngram_penalty": False} | config
    loss_fn = ava_jax.create_unified_loss(config, implementation=implementation)

    def loss(arrays: dict[str, Any]):
        total, aux, _ = loss_fn(loss_fn.init(), **arrays, **ints)
        return total, aux

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(arrays)


def batch_of_16_bits(name):
    arrays, ints = whole_batch()
    if name == "bias":
        arrays["lm_head_bias"] = arrays["lm_head_bias"].at[7].set(-jnp.inf)
    else:
        del arrays["lm_head_bias"]
    if name != "heads":
        del arrays["mtp_hidden_states"]
    return arrays, ints


@functools.cache
def definition_of_16_bits(name):
    """The loss of one of `OF_16_BITS` by its definition, whole rows at a time."""
    return loss_of_16_bits(OF_16_BITS[name], "reference", *batch_of_16_bits(name))


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("name", OF_16_BITS)
def test_the_whole_loss_of_16_bits_as_a_tpu_makes_it(monkeypatch, name, blocks):
    """The exponentials are rounded; the loss is not."""
    (loss, aux), want = definition_of_16_bits(name)
    config = OF_16_BITS[name] | {"chunk_size": 15, "block_size": 15 // blocks}
    compile_for(monkeypatch, "tpu", rounds=True)
    calls = []
    real = rounded.logits_gradient
    monkeypatch.setattr(
        rounded, "logits_gradient", lambda *a, **k: calls.append(a) or real(*a, **k)
    )
    arrays, ints = batch_of_16_bits(name)
    (own_loss, own_aux), got = loss_of_16_bits(config, "xla", arrays, ints)
    assert calls
    assert_trees_close((own_loss, own_aux), (loss, aux), 2e-5)
    for key, gradient in want.items():
        error = np.abs(got[key] - gradient).max()
        assert error <= 2**-9 * np.abs(gradient).max(), key


def test_rounded_exponentials_leave_a_certain_target_its_gradient(monkeypatch):
    """p − 1 is −9e-5 there, where bfloat16 knows no p between 0.996 and 1."""
    targets = jax.random.randint(jax.random.key(0), (B, S), 0, V - 3)
    hidden = 12 * jax.nn.one_hot(targets, V)
    hidden += normal(jax.random.key(1), B, S, V) / 4
    arrays = {"hidden_states": hidden, "lm_head": jnp.eye(V)}
    config = OF_16_BITS["one id"] | {"label_smoothing": 0.0}
    ints = {"targets": targets}
    # Like this one, it rounds the gradient of the logits to the operands' dtype.
    _, want = loss_of_16_bits(config, "cpu", arrays, ints)
    compile_for(monkeypatch, "tpu", rounds=True)
    _, got = loss_of_16_bits(config, "xla", arrays, ints)
    for key, gradient in want.items():
        largest = np.abs(gradient).max()
        assert largest < 3e-4
        error = np.abs(got[key] - gradient).max()
        assert error <= 2**-9 * largest, (key, error / largest)


@pytest.mark.parametrize("known", ["hidden_states", "lm_head", "both"])
def test_the_bias_alone_has_its_gradient(monkeypatch, known):
    """Also where nothing else needs the gradient of the logits."""
    arrays, ints = batch_of_16_bits("bias")
    names = {"both": ("hidden_states", "lm_head")}.get(known, (known,))
    fixed = {k: arrays[k] for k in names}
    given = {k: v for k, v in arrays.items() if k not in names}
    config = {"vocab_size": V - 3, "use_ngram_penalty": False, "chunk_size": 15}

    def gradients(implementation: Implementation):
        loss_fn = ava_jax.create_unified_loss(config, implementation=implementation)

        def loss(given: dict[str, Any]):
            return loss_fn(loss_fn.init(), **given, **fixed, **ints)[0]

        return jax.jit(jax.grad(loss))(given)

    want = gradients("reference")
    assert want["lm_head_bias"][7] == 0
    for platform, rounds in (("gpu", False), ("tpu", False), ("tpu", True)):
        compile_for(monkeypatch, platform, rounds=rounds)
        got = gradients("xla")
        tolerance = 2**-9 if rounds else 2e-6
        for key, gradient in want.items():
            error = np.abs(got[key] - gradient).max()
            assert error <= tolerance * np.abs(gradient).max(), (key, platform)


@pytest.mark.parametrize("change", ["cap", "extra", "temperature"])
def test_exponentials_are_not_rounded_where_logits_are_wanted(monkeypatch, change):
    compile_for(monkeypatch, "tpu", rounds=True)
    monkeypatch.delattr(rounded, "logits_gradient")
    arrays, ints = whole_batch()
    arrays = {k: arrays[k] for k in ("hidden_states", "lm_head")}
    config = ava_jax.UnifiedLossConfig(
        vocab_size=V,
        use_ngram_penalty=False,
        logit_soft_cap=5.0 if change == "cap" else None,
    )
    extra = (Lead(),) if change == "extra" else ()
    loss_fn = ava_jax.unified_loss(config, extra_terms=extra)

    def loss(arrays, temperature):
        state = loss_fn.init()
        if change == "temperature":
            state = dataclasses.replace(state, temperature=temperature)
        return loss_fn(state, **arrays, **ints)[0]

    run = jax.jit(jax.grad(loss, argnums=(0, 1)))
    slopes, of_temperature = run(arrays, jnp.float32(1.2))
    assert all(np.isfinite(x).all() for x in slopes.values())
    assert (of_temperature != 0) == (change == "temperature")
