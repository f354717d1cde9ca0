"""Every implementation agrees with the definition on every row."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.kernel_rows import (
    IMPLEMENTATIONS,
    OPTIONS,
    SHARED,
    assert_rows_agree,
    batch,
    gradient_of_temperature,
    measured,
)

from ava_jax import Query, Vocabulary, token_statistics

CASES = [
    *((name, None, i) for name in OPTIONS for i in IMPLEMENTATIONS),
    *((name, "vocab", i) for name in SHARED for i in IMPLEMENTATIONS),
    ("finite", "vocab", "reference"),
    ("plain", None, "reference"),
    ("soft cap", None, "reference"),
]


@pytest.mark.parametrize(("name", "axis", "implementation"), CASES)
def test_statistics_and_gradients_are_those_of_the_definition(
    name, axis, implementation
):
    options = OPTIONS[name]
    with jax.enable_x64(options.dtype == "float64"):
        _, z, _ = batch(options)
        want = measured(options, "reference", None)
        got = measured(options, implementation, axis)
        exact = gradient_of_temperature(options) if options.tempered else 0.0
    tolerance = 1e-12 if options.dtype == "float64" else 4e-6
    # Programs round tanh differently, by few units in the last place of the cap.
    absolute = tolerance if options.cap is None else options.cap * 5e-7
    assert_rows_agree(
        options,
        got,
        want,
        absolute=absolute,
        of_inactive=implementation != "reference",
    )
    grad, of_temperature = got[2]
    assert grad.dtype == z.dtype
    np.testing.assert_allclose(of_temperature, exact, rtol=1e-4)


@pytest.mark.parametrize("top", [True, False])
@pytest.mark.parametrize("log_one_minus_p", [True, False])
@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_a_row_without_classes_is_infinite_and_has_no_gradient(
    implementation, log_one_minus_p, top
):
    z = jnp.stack([jnp.full(8, -jnp.inf), jnp.arange(8.0)])
    query = Query(
        targets=jnp.array([1, 2]),
        active=jnp.ones(2, bool),
        log_one_minus_p=log_one_minus_p,
        top=top,
    )

    def nll(z):
        vocabulary = Vocabulary(8, implementation=implementation)
        values = token_statistics(z, query, vocabulary).nll
        return jnp.sum(values), values

    grad, values = jax.jit(jax.grad(nll, has_aux=True))(z)
    assert values[0] == np.inf
    assert np.isfinite(values[1])
    np.testing.assert_array_equal(grad[0], 0)
    assert np.isfinite(grad[1]).all()
    assert grad[1].any()


@pytest.mark.parametrize("implementation", ["reference", *IMPLEMENTATIONS])
def test_a_row_without_a_class_leaves_the_temperature_alone(implementation):
    query = Query(targets=jnp.array([0, 1]), active=jnp.ones(2, bool))
    logits = jnp.array([[1.0, 2.0, 0.0], [-jnp.inf] * 3])
    vocabulary = Vocabulary(3, implementation=implementation)

    def first(temperature):
        stats = token_statistics(logits, query, vocabulary, temperature)
        return stats.log_sum_tempered[0], stats

    slope, stats = jax.jit(jax.grad(first, has_aux=True))(jnp.asarray(2.0))
    z = np.array([1.0, 2.0, 0.0])
    p = np.exp(z / 2) / np.exp(z / 2).sum()
    np.testing.assert_allclose(slope, -(p * (z - 2)).sum() / 4, rtol=1e-5)
    assert stats.nll[1] == jnp.inf
    assert stats.entropy[1] == 0
