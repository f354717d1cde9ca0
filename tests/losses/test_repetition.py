"""Sequence unlikelihood, repetition decay and the anti-repetition loss."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from support import oracle_terms
from support.loss_checks import check_gradient

from ava_jax import losses

B, S, V = 3, 12, 7


def batch(seed: int = 0, vocab: int = 4) -> tuple[Any, Any, Any]:
    rng = np.random.default_rng(seed)
    logits = rng.normal(size=(B, S, V)).astype(np.float32)
    ids = rng.integers(0, vocab, (B, S)).astype(np.int32)
    weights = (rng.random((B, S)) < 0.8) * rng.uniform(0.5, 1.5, (B, S))
    return logits, ids, weights.astype(np.float32)


def decay_oracle(logits, ids, weights, span):
    """Computes the mean; a token whose source is masked is left out."""
    terms = oracle_terms.repetition_decay(logits, ids, weights, span)
    terms[:, span:] *= weights[:, :-span] != 0
    return oracle_terms.weighted_mean(terms, weights)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_sequence_unlikelihood_is_the_oracles(n):
    run = jax.jit(functools.partial(losses.sequence_unlikelihood, ngram_size=n))
    for seed in range(4):
        logits, ids, weights = batch(seed)
        got = run(jax.device_put(logits), jax.device_put(ids), jax.device_put(weights))
        terms = oracle_terms.sequence_unlikelihood(logits, ids, weights, n)
        want = oracle_terms.weighted_mean(terms, weights)
        np.testing.assert_allclose(got, want, rtol=2e-5)


@pytest.mark.parametrize("span", [1, 3])
def test_repetition_decay_is_the_oracles(span):
    run = jax.jit(functools.partial(losses.repetition_decay_loss, span_length=span))
    for seed in range(4):
        logits, ids, weights = batch(seed)
        got = run(jax.device_put(logits), jax.device_put(ids), jax.device_put(weights))
        want = decay_oracle(logits, ids, weights, span)
        np.testing.assert_allclose(got, want, rtol=2e-5)


def test_spans_may_differ_by_row():
    logits, ids, _ = batch()
    spans = jnp.array([1, 4, 2])
    run = jax.jit(losses.repetition_decay_loss)
    got = run(jax.device_put(logits), jax.device_put(ids), span_length=spans)
    ones = np.ones((1, S))
    rows = [
        decay_oracle(logits[b : b + 1], ids[b : b + 1], ones, span)
        for b, span in enumerate((1, 4, 2))
    ]
    np.testing.assert_allclose(got, np.mean(rows), rtol=2e-5)


def test_gradients():
    logits, ids, weights = batch()

    def sequence(z):
        return losses.sequence_unlikelihood(
            z, jax.device_put(ids), jax.device_put(weights)
        )

    def repeats(z):
        return losses.sequence_unlikelihood(z, jax.device_put(ids), ngram_size=2)

    for loss in (sequence, repeats):
        check_gradient(loss, logits)


def test_decay_has_a_gradient_through_the_later_repeat_only():
    rows = losses.repeat_spans(jnp.array([[1, 2]]), 4)

    @jax.jit
    @jax.grad
    def gradient(z):
        return losses.repetition_decay_loss(z, rows, span_length=2)

    grad = np.asarray(gradient(np.zeros((1, 4, V), np.float32)))
    assert (grad[0, :2] == 0).all()
    # At equal probabilities p > p/2, so the repeat is pushed down.
    assert float(grad[0, 2, 1]) > 0


def test_a_certain_repeat_is_finite():
    ids = jnp.array([[1, 1, 1, 1]])
    for loss in (
        lambda z: losses.sequence_unlikelihood(z, ids, ngram_size=2),
        lambda z: losses.repetition_decay_loss(z, ids, span_length=2),
        lambda z: losses.repetition_decay_loss(z, ids, span_length=2, decay=0.0),
    ):
        run = jax.jit(jax.value_and_grad(loss))
        for gap in (30.0, 1e4):
            logits = np.zeros((1, 4, V), np.float32)
            logits[:, 2:, 1] = gap
            value, grad = run(logits)
            assert np.isfinite(value)
            assert np.isfinite(grad).all()


def test_masked_tokens_may_hold_anything():
    logits, ids, weights = batch()
    weights[:, 5] = 0
    dirty, other = logits.copy(), ids.copy()
    dirty[:, 5], other[:, 5] = np.nan, -9
    for loss in (
        losses.sequence_unlikelihood,
        lambda z, y, w: losses.repetition_decay_loss(z, y, w, span_length=2),
    ):
        run = jax.jit(jax.value_and_grad(loss))
        want, got = run(logits, ids, weights), run(dirty, other, weights)
        np.testing.assert_array_equal(got[0], want[0])
        np.testing.assert_array_equal(got[1], want[1])
        assert float(run(logits, ids, np.zeros_like(weights))[0]) == 0


@pytest.mark.usefixtures("unannotated")
def test_bad_arguments():
    logits, ids, _ = (jax.device_put(x) for x in batch())
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 2"):
        losses.repetition_decay_loss(logits, ids, span_length=2, decay=2.0)
    with pytest.raises(ValueError, match=r"token_ids must have the shape"):
        losses.sequence_unlikelihood(logits, jax.device_put(batch()[1][:, :4]))
    for loss in (losses.sequence_unlikelihood, losses.anti_repetition_loss):
        with pytest.raises(
            ValueError, match=r"ngram_size must be in \[1, inf\), got 0"
        ):
            jax.eval_shape(functools.partial(loss, ngram_size=0), logits, ids)
    with pytest.raises(ValueError, match=r"length must be in \[1, inf\)"):
        losses.repeat_spans(ids, 0)


def test_anti_repetition_weights_may_be_schedules():
    logits, ids, _ = (jax.device_put(x) for x in batch())
    schedule = optax.linear_schedule(0.2, 0.0, 10)

    @jax.jit
    def run(step):
        return losses.anti_repetition_loss(
            logits, ids, repetition_penalty_weight=schedule, step=step
        )

    (first, aux), (last, _) = run(0), run(10)
    np.testing.assert_allclose(first - last, 0.2 * aux["repetition_penalty"], rtol=1e-4)
