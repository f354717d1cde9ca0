"""Losses of plain logits: values, gradients, and ids outside the vocabulary."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import oracle_terms
from support.loss_checks import check_gradient

from ava_jax import losses

N, V = 6, 9
TARGETS = np.array([0, 3, 8, 3, 1, 5], np.int32)
LOGITS = np.random.default_rng(0).normal(size=(N, V)).astype(np.float32)
CALLS = {
    "focal": lambda z, y: losses.focal_loss(z, y, alpha=0.3, gamma=1.5),
    "focal_sqrt": lambda z, y: losses.focal_loss(z, y, gamma=0.5),
    "smoothing": lambda z, y: losses.label_smoothing_loss(z, y, smoothing=0.2),
}
ORACLES = {
    "focal": lambda z, y: oracle_terms.focal(z, y, 0.3, 1.5),
    "focal_sqrt": lambda z, y: oracle_terms.focal(z, y, 1.0, 0.5),
    "smoothing": lambda z, y: oracle_terms.smoothed_cross_entropy(z, y, 0.2, 1.0),
}


@functools.partial(jax.jit, static_argnames="name")
@functools.partial(jax.value_and_grad, argnums=1, has_aux=True)
def sum_and_gradient(name, logits, targets):
    """The losses' sum with the losses beside it, and its gradient."""
    values = CALLS[name](logits, targets)
    return jnp.sum(values), values


@pytest.mark.parametrize("name", CALLS)
def test_values_and_gradients(name):
    (_, got), _ = sum_and_gradient(
        name, jax.device_put(LOGITS), jax.device_put(TARGETS)
    )
    wide = LOGITS.astype(np.float64)
    want = [ORACLES[name](z, int(y)) for z, y in zip(wide, TARGETS, strict=True)]
    np.testing.assert_allclose(got, want, rtol=2e-5)
    check_gradient(lambda z: jnp.sum(CALLS[name](z, jax.device_put(TARGETS))), LOGITS)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("bad", [-1, V, -100])
def test_an_id_outside_the_vocabulary_is_excluded(name, bad):
    targets = TARGETS.copy()
    targets[2] = bad
    (_, value), grad = jax.device_get(sum_and_gradient(name, LOGITS, targets))
    assert value[2] == 0
    assert (grad[2] == 0).all()
    assert (value[[0, 1, 3, 4, 5]] > 0).all()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 1.0, 2.0])
def test_focal_is_finite_where_the_target_is_certain(gamma):
    @jax.jit
    @jax.value_and_grad
    def run(logits):
        return losses.focal_loss(logits, jnp.array([3]), gamma=gamma)[0]

    for gap in (40.0, 1e6):
        logits = np.zeros((1, V), np.float32)
        logits[0, 3] = gap
        value, grad = run(logits)
        assert np.isfinite(value)
        assert np.isfinite(grad).all()


def test_focal_alpha_per_class():
    alpha = np.arange(1, V + 1, dtype=np.float32)
    run = jax.jit(losses.focal_loss)
    got = run(LOGITS, TARGETS, alpha=alpha)
    plain = np.asarray(run(LOGITS, TARGETS))
    np.testing.assert_allclose(got, plain * (1.0 + TARGETS), rtol=1e-6)


def test_perplexity_of_what_counts():
    weights = np.array([1.0, 2, 0, 1, 0, 1], np.float32)
    dirty, targets = LOGITS.copy(), TARGETS.copy()
    dirty[2], targets[4] = np.nan, -7
    perplexity = jax.jit(losses.perplexity)
    got = perplexity(dirty, targets, weights)
    nll = [oracle_terms.nll(z, int(y)) for z, y in zip(LOGITS, TARGETS, strict=True)]
    want = np.exp(np.dot(nll, weights) / np.sum(weights))
    np.testing.assert_allclose(got, want, rtol=2e-5)
    nothing = perplexity(dirty, TARGETS, np.zeros(N, np.float32))
    assert float(nothing) == 1


@pytest.mark.usefixtures("unannotated")
def test_bad_arguments():
    logits, targets = jax.device_put(LOGITS), jax.device_put(TARGETS)
    with pytest.raises(ValueError, match=r"smoothing must be in \[0, 1\), got 1"):
        losses.label_smoothing_loss(logits, targets, smoothing=1.0)
    with pytest.raises(ValueError, match=r"targets must have the shape \(6,\)"):
        losses.focal_loss(logits, targets[:3])
