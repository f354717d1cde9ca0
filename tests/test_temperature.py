"""A model trained at a temperature T is softmax(z/T): its likelihood, and its head."""

import dataclasses
import functools
import inspect
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import ava_jax

B, S, D, V, COLUMNS = 2, 7, 6, 11, 13
T = 0.6
CAP = 2.5


def arrays():
    rng = np.random.default_rng(5)
    hidden = rng.normal(size=(B, S, D)).astype(np.float32)
    lm_head = rng.normal(size=(D, COLUMNS)).astype(np.float32)
    bias = rng.normal(size=COLUMNS).astype(np.float32)
    targets = rng.integers(0, V, (B, S)).astype(np.int32)
    mask = np.ones((B, S), np.int32)
    mask[0, 4:] = 0
    hidden[0, 5] = np.nan
    return hidden, lm_head, bias, targets, mask


def loss_at(temperature=T, **options):
    """Returns a loss and its state at a temperature."""
    loss_fn = ava_jax.create_unified_loss(vocab_size=V, **options)
    state = dataclasses.replace(
        loss_fn.init(), temperature=jnp.asarray(temperature, jnp.float32)
    )
    return loss_fn, state


def mean_nll(temperature, cap=None):
    """The mean over unmasked tokens of −log softmax(z/T)_y in float64, by loops."""
    hidden, lm_head, bias, targets, mask = arrays()
    found = []
    for row, place in np.argwhere(mask):
        z = hidden[row, place].astype(np.float64) @ lm_head[:, :V] + bias[:V]
        z = z if cap is None else cap * np.tanh(z / cap)
        z = z / temperature
        found.append(np.log(np.exp(z).sum()) - z[targets[row, place]])
    return np.mean(found)


@functools.lru_cache
def reports(cap=None, train=True):
    """The `aux` of both paths, with everything on that should not matter."""
    hidden, lm_head, bias, targets, mask = map(jnp.asarray, arrays())
    loss_fn, state = loss_at(logit_soft_cap=cap, label_smoothing=0.2, z_loss_weight=0.1)
    given = {"targets": targets, "attention_mask": mask}
    fused = {"hidden_states": hidden, "lm_head": lm_head, "lm_head_bias": bias}
    call = jax.jit(functools.partial(loss_fn, train=train))
    logits = hidden @ lm_head + bias
    return {
        "fused": call(state, **given, **fused)[1],
        "logits": call(state, **given, logits=logits)[1],
    }


@pytest.mark.parametrize("cap", [None, CAP])
@pytest.mark.parametrize("path", ["fused", "logits"])
def test_the_likelihood_at_the_temperature_of_the_state(path, cap):
    want, at_one = mean_nll(T, cap), mean_nll(1.0, cap)
    assert abs(want - at_one) > 0.1
    aux = reports(cap)[path]
    np.testing.assert_allclose(aux["tempered_nll"], want, rtol=2e-6)
    np.testing.assert_allclose(aux["nll"], at_one, rtol=2e-6)


def test_evaluation_has_the_temperature_in_use():
    aux = reports(train=False)["fused"]
    np.testing.assert_allclose(aux["tempered_nll"], mean_nll(T), rtol=2e-6)
    assert float(aux["temperature"]) == np.float32(T)


def test_a_step_has_the_temperature_from_before_it():
    loss_fn, state = loss_at()
    logits, targets = jnp.zeros((1, 4, V)).at[..., 0].set(3.0), jnp.zeros((1, 4), int)
    call = jax.jit(loss_fn)
    for _ in range(9):
        _, _, state = call(state, logits=logits, targets=targets)
    before = float(ava_jax.statistics(state)["temperature"])
    _, aux, _ = call(state, logits=logits, targets=targets)
    assert float(aux["temperature"]) == pytest.approx(before - 0.01)
    want = np.log(np.exp(3 / before) + V - 1) - 3 / before
    assert float(aux["tempered_nll"]) == pytest.approx(want, rel=1e-5)


def test_micro_batches_add_up():
    hidden, lm_head, _, targets, mask = arrays()
    loss_fn, state = loss_at()
    normalizers = jax.jit(loss_fn.normalizers)(targets=targets, attention_mask=mask)
    accumulate = jax.jit(loss_fn.accumulate)

    def inputs(rows: slice) -> ava_jax.LossInputs:
        return {
            "targets": jnp.asarray(targets[rows]),
            "attention_mask": jnp.asarray(mask[rows]),
            "hidden_states": jnp.asarray(hidden[rows]),
            "lm_head": jnp.asarray(lm_head),
        }

    _, aux, _ = jax.jit(loss_fn)(state, **inputs(slice(None)))
    parts = []
    for row in range(B):
        own = inputs(slice(row, row + 1))
        parts += accumulate(state, normalizers=normalizers, **own)[2:]
    stats = jax.tree.map(jnp.add, *parts)
    found = jax.jit(loss_fn.summary)(state, stats)["tempered_nll"]
    np.testing.assert_allclose(found, aux["tempered_nll"], rtol=1e-6)


@pytest.mark.parametrize(
    "options",
    [
        {"primary_loss_type": "standard"},
        {"primary_loss_type": "adaptive_mtp"},
        # It trains the model at 1, so that there is nothing to report.
        {"use_focal_loss": True},
    ],
)
def test_a_loss_at_temperature_one_has_no_such_entry(options):
    loss_fn = ava_jax.create_unified_loss(vocab_size=V, **options)
    names = {name for term in loss_fn.terms for name in getattr(term, "measured", ())}
    assert "tempered_nll" not in names


@functools.partial(jax.jit, static_argnames="cap")
def log_probs(lm_head, bias, cap):
    hidden, _, _, targets, _ = arrays()
    return ava_jax.token_log_probs(
        targets=jnp.asarray(targets),
        hidden_states=jnp.asarray(hidden),
        lm_head=lm_head,
        lm_head_bias=bias,
        attention_mask=jnp.asarray(arrays()[4]),
        vocab_size=V,
        logit_soft_cap=cap,
    ).log_probs


@pytest.mark.parametrize("cap", [None, CAP])
def test_the_folded_head_is_the_trained_model(cap):
    _, lm_head, bias, _, mask = arrays()
    _, state = loss_at()
    folded, shift = jax.jit(ava_jax.fold_temperature)((lm_head, bias), state)
    cap_of_folded = None if cap is None else cap / T
    found = np.asarray(log_probs(folded, shift, cap_of_folded))
    np.testing.assert_allclose(-found[mask > 0].mean(), mean_nll(T, cap), rtol=2e-6)
    untouched = np.asarray(log_probs(lm_head, bias, cap))
    assert abs(untouched[mask > 0].mean() + mean_nll(T, cap)) > 0.1


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16, jnp.float32])
def test_folding_divides_in_float32_and_keeps_the_dtype(dtype):
    _, state = loss_at(0.7)
    head = jax.random.normal(jax.random.key(0), (D, V), dtype)
    folded = ava_jax.fold_temperature({"kernel": head}, state)["kernel"]
    assert folded.dtype == dtype
    want = np.asarray(head, np.float64) / np.float64(np.float32(0.7))
    error = np.abs(np.asarray(folded, np.float64) - want) / np.abs(want)
    assert error.max() < jnp.finfo(dtype).eps


def test_a_state_without_temperature_leaves_the_head_as_it_is():
    loss_fn = ava_jax.create_unified_loss(vocab_size=V, primary_loss_type="standard")
    head = jnp.ones((D, V))
    assert ava_jax.fold_temperature(head, loss_fn.init()) is head


def test_what_cannot_be_folded_says_so():
    _, state = loss_at()
    # Without the checks of types that only the tests have.
    fold = cast(Any, inspect.unwrap(ava_jax.fold_temperature))
    with pytest.raises(TypeError, match=r"state must be a LossState, got float"):
        fold(jnp.ones((D, V)), 0.5)
    with pytest.raises(TypeError, match=r"got int8: fold .* before quantization"):
        ava_jax.fold_temperature(jnp.ones((D, V), jnp.int8), state)
