"""The divergence from a teacher's top k: values, gradients, what float32 can hold."""

import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import distillation_oracles as oracles
from support.loss_checks import check_gradient, untyped

from ava_jax import losses

N, V, K = 7, 12, 4
NAMES = ("log_probs", "teacher_log_probs")
EPS = float(np.finfo(np.float32).eps)


def batch(seed=0, k=K):
    """Log-probabilities of both at the teacher's k most probable classes."""
    rng = np.random.default_rng(seed)
    p, q = (
        np.array(
            [oracles.log_softmax(z, V, 1.0, None) for z in rng.normal(size=(N, V))]
        )
        for _ in range(2)
    )
    ids = np.argsort(-q, -1)[:, :k]
    picked = (np.take_along_axis(x, ids, -1).astype(np.float32) for x in (p, q))
    return tuple(picked)


@functools.partial(jax.jit, static_argnames="tail")
def run(p, q, tail=True):
    """The values, and the gradients of their sum."""

    def total(p, q):
        values = losses.top_k_divergence(p, q, tail=tail)
        return jnp.sum(values), values

    (_, values), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(p, q)
    return values, *grads


def oracle(p, q, tail=True):
    rows = zip(p.astype(float), q.astype(float), strict=True)
    return np.array([oracles.top_k_token(list(x), list(y), tail=tail) for x, y in rows])


@pytest.mark.parametrize("tail", [True, False])
def test_it_is_the_oracles(tail):
    p, q = batch()
    values, of_student, of_teacher = run(p, q, tail)
    np.testing.assert_allclose(values, oracle(p, q, tail), rtol=2e-5)
    assert np.max(np.abs(values - oracle(p, q, not tail))) > 0.05
    assert np.max(np.abs(of_student)) > 0.01
    np.testing.assert_array_equal(of_teacher, np.zeros((N, K)))


@pytest.mark.parametrize("tail", [True, False])
def test_the_gradient_is_that_of_numerical_differentiation(tail):
    p, q = batch(1)
    of_rows = np.arange(1.0, N + 1)

    def weighted(p):
        rows = losses.top_k_divergence(p, jnp.asarray(q, p.dtype), tail=tail)
        return jnp.sum(rows * of_rows)

    check_gradient(weighted, p, tolerance=1e-7)


@pytest.mark.parametrize("tail", [True, False])
def test_of_all_classes_it_is_the_whole_divergence(tail):
    p, q = batch(2, k=V)
    values, gradient, _ = run(p, q, tail)
    want = [oracles.kl(list(y), list(x)) for x, y in zip(p, q, strict=True)]
    np.testing.assert_allclose(values, want, rtol=2e-5)
    assert np.all(np.isfinite(gradient))


@pytest.mark.parametrize("tail", [True, False])
def test_equal_log_probabilities_have_none_and_no_gradient(tail):
    _, q = batch(3)
    values, gradient, _ = run(q, q, tail)
    np.testing.assert_allclose(values, 0, atol=1e-7)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("tail", [True, False])
def test_classes_of_no_probability_are_left_out(tail):
    """However many there are, and whatever the student holds there."""
    p, q = batch(4)
    values, gradient, _ = run(p, q, tail)
    rows = np.full((N, 1), -np.inf, np.float32)
    more_q = np.concatenate([q, rows, rows, rows], -1)
    more_p = np.concatenate([p, rows, p[:, :1], rows + np.nan], -1)
    got = run(more_p, more_q, tail)
    np.testing.assert_allclose(got[0], values, rtol=1e-6)
    np.testing.assert_allclose(got[1][:, :K], gradient, rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(got[1][:, K:], 0)


@pytest.mark.parametrize("tail", [True, False])
def test_without_any_class_it_is_zero(tail):
    p, q = batch(5)
    q[2] = -np.inf
    values, gradient, _ = run(p, q, tail)
    assert values[2] == 0
    np.testing.assert_array_equal(gradient[2], 0)
    np.testing.assert_allclose(values, oracle(p, q, tail), rtol=2e-5, atol=1e-7)


@pytest.mark.parametrize("rest", [1e-3, 1e-6, EPS / 8, 0.0])
@pytest.mark.parametrize("whose", ["student", "teacher", "both"])
def test_a_small_rest_has_a_finite_value_and_gradient(rest, whose):
    small = np.log(np.array([[0.75 - rest, 0.25]], np.float32))
    large = np.log(np.array([[0.5, 0.25]], np.float32))
    p = large if whose == "teacher" else small
    q = large if whose == "student" else small
    values, gradient, _ = run(p, q)
    assert np.all(np.isfinite(gradient))
    least = [max(1 - float(np.sum(np.exp(x.astype(float)))), EPS) for x in (p, q)]
    known = float(np.sum(np.exp(q.astype(float)) * (q.astype(float) - p)))
    want = known + least[1] * math.log(least[1] / least[0])
    # What is known of the rest: one rounding error of the whole.
    uncertain = 2 * EPS / max(least[0], EPS) * least[1]
    np.testing.assert_allclose(values, [want], atol=uncertain + 1e-6)


def test_a_rest_below_a_rounding_error_counts_as_one():
    """The documented limit: the teacher's rest is 1/4, the student's nothing."""
    p, q = (np.log(np.array([x], np.float32)) for x in ([0.75, 0.25], [0.5, 0.25]))
    (value,), gradient, _ = run(p, q)
    want = 0.5 * math.log(0.5 / 0.75) + 0.25 * math.log(0.25 / EPS)
    np.testing.assert_allclose(value, want, rtol=1e-5)
    assert np.all(np.isfinite(gradient))


def test_it_takes_any_leading_axes_and_half_precision():
    p, q = batch(6)
    want = run(p, q)[0]
    np.testing.assert_allclose(run(p[0], q[0])[0], want[0], rtol=1e-6)
    values, gradient, _ = run(*(jnp.asarray(x, jnp.bfloat16)[None] for x in (p, q)))
    assert values.dtype == jnp.float32
    assert gradient.dtype == jnp.bfloat16
    np.testing.assert_allclose(values[0], want, rtol=0.2, atol=0.02)


def test_errors_name_the_argument():
    p, q = batch()
    with untyped():
        with pytest.raises(ValueError, match="teacher_log_probs must have the shape"):
            losses.top_k_divergence(jax.device_put(p), jax.device_put(q[:, :2]))
        for wrong in NAMES:
            ids = jnp.ones((N, K), jnp.int32)
            own, other = (ids if wrong == x else jax.device_put(p) for x in NAMES)
            with pytest.raises(TypeError, match=f"^{wrong} must be floating"):
                losses.top_k_divergence(own, other)
