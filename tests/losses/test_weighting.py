"""Learned weighting: plain sums, what each form is for."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.loss_checks import (
    FEW,
    VariantsCase,
    check_gradient,
    untyped,
    value_of,
    with_and_without_jit,
)

from ava_jax.losses.weighting import homoscedastic_weighting, weigh_losses

NUMBERS = st.lists(
    st.tuples(st.integers(0, 40), st.integers(-24, 24)), min_size=1, max_size=6
)


def vectors(pairs: list[tuple[int, int]]) -> tuple[np.ndarray, np.ndarray]:
    losses, parameters = np.array(pairs, np.float64).T / 8
    return losses, parameters


@FEW
@given(NUMBERS)
def test_weigh_losses_is_the_weighted_sum(pairs: list[tuple[int, int]]) -> None:
    losses, log_weights = vectors(pairs)
    total = sum(np.exp(w) for w in log_weights)
    want = sum(x * np.exp(w) / total for x, w in zip(losses, log_weights, strict=True))
    loss, weights = value_of(weigh_losses, np.float32(losses), np.float32(log_weights))
    np.testing.assert_allclose(loss, want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(weights, np.exp(log_weights) / total, rtol=1e-5)


@FEW
@given(NUMBERS)
def test_homoscedastic_is_the_sum(pairs: list[tuple[int, int]]) -> None:
    losses, s = vectors(pairs)
    want = sum(np.exp(-v) * x + v / 2 for x, v in zip(losses, s, strict=True))
    got = value_of(homoscedastic_weighting, np.float32(losses), np.float32(s))
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)


def test_homoscedastic_rests_where_the_variance_fits_the_loss() -> None:
    losses = np.array([0.5, 2.0, 7.0], np.float32)
    gradient = jax.jit(jax.grad(homoscedastic_weighting, argnums=1))
    np.testing.assert_allclose(gradient(losses, np.log(2 * losses)), 0, atol=1e-6)
    assert np.all(np.asarray(gradient(losses, np.log(losses))) < -0.1)


def test_only_softmax_weights_collapse_onto_the_smallest_loss() -> None:
    losses = jnp.array([1.0, 3.0])

    def train(loss_of, steps: int) -> jax.Array:
        def step(_: int, p: jax.Array) -> jax.Array:
            return p - 0.5 * jax.grad(loss_of)(p)

        return jax.lax.fori_loop(0, steps, step, jnp.zeros(2))

    collapsed = train(lambda p: weigh_losses(losses, p)[0], 200)
    assert weigh_losses(losses, collapsed)[1][1] < 0.01
    kept = train(lambda p: homoscedastic_weighting(losses, p), 200)
    np.testing.assert_allclose(jnp.exp(-kept), 1 / (2 * losses), rtol=1e-3)


def test_huge_log_weights_stay_finite() -> None:
    weights = jnp.array([1e4, -1e4, 1e4])
    loss, shares = weigh_losses(jnp.array([1.0, 5.0, 3.0]), weights)
    np.testing.assert_allclose(loss, 2.0)
    np.testing.assert_allclose(shares, [0.5, 0, 0.5])


def test_gradients() -> None:
    losses, parameters = np.array([0.5, 1.5, 2.0]), np.array([0.3, -0.2, 0.1])
    check_gradient(lambda x, p: weigh_losses(x, p)[0], losses, parameters)
    check_gradient(homoscedastic_weighting, losses, parameters)


def test_low_precision_inputs_give_float32() -> None:
    low = jnp.array([1.0, 2.0], jnp.bfloat16)
    weighed = jax.eval_shape(weigh_losses, low, low)
    summed = jax.eval_shape(homoscedastic_weighting, low, low)
    chex.assert_type([*weighed, summed], "f4")
    gradient = jax.eval_shape(jax.grad(lambda x: weigh_losses(x, x)[0]), low)
    chex.assert_type(gradient, jnp.bfloat16)


def test_lengths_must_agree() -> None:
    with untyped():
        with pytest.raises(
            ValueError, match=r"log_weights must have the shape \(3,\) of losses"
        ):
            weigh_losses(jnp.ones(3), jnp.ones(2))
        with pytest.raises(ValueError, match=r"losses must be \[L\], got .* \(1, 2\)"):
            homoscedastic_weighting(jnp.ones((1, 2)), jnp.ones((1, 2)))


class Variants(VariantsCase):
    @with_and_without_jit
    def test_jit_changes_nothing(self) -> None:
        losses, parameters = jnp.array([1.0, 3.0]), jnp.log(jnp.array([3.0, 1.0]))
        loss, weights = self.under(weigh_losses)(losses, parameters)
        chex.assert_trees_all_close((loss, weights), (1.5, jnp.array([0.75, 0.25])))
        total = self.under(homoscedastic_weighting)(losses, parameters)
        np.testing.assert_allclose(total, 1 / 3 + 3 + np.log(3) / 2, rtol=1e-6)
