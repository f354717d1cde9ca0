"""The divergence of two distributions: values, gradients, extremes, shards."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P
from jax.test_util import check_grads
from support import distillation_oracles as oracles

from ava_jax.kernel.divergence import divergence
from ava_jax.kernel.stats import Vocabulary

N, V = 6, 9
BETAS = (0.0, 0.1, 0.5, 0.9, 1.0)


def logits(seed=0, scale=2.0):
    rng = np.random.default_rng(seed)
    drawn = scale * rng.normal(size=(2, N, V))
    return drawn[0].astype(np.float32), drawn[1].astype(np.float32)


def values_of(axis, beta, student, teacher, active, implementation=None) -> jax.Array:
    vocabulary = Vocabulary(V, axis=axis, implementation=implementation)
    return divergence(vocabulary, beta, student, teacher, active)


@functools.partial(jax.jit, static_argnums=0, static_argnames="implementation")
def run(beta, student, teacher, active=None, implementation=None):
    """The values, and the gradients of their sum."""
    active = jnp.ones(student.shape[:-1], bool) if active is None else active

    def total(student, teacher):
        values = values_of(None, beta, student, teacher, active, implementation)
        return jnp.sum(values), values

    (_, values), grads = jax.value_and_grad(total, (0, 1), has_aux=True)(
        student, teacher
    )
    return values, *grads


def oracle(beta, student, teacher):
    rows = [
        oracles.divergence(
            oracles.log_softmax(z, V, 1.0, None),
            oracles.log_softmax(y, V, 1.0, None),
            beta,
        )
        for z, y in zip(student, teacher, strict=True)
    ]
    return np.array(rows)


@pytest.mark.parametrize("beta", BETAS)
def test_it_is_the_oracles(beta):
    student, teacher = logits()
    values, _, of_teacher = run(beta, student, teacher)
    np.testing.assert_allclose(values, oracle(beta, student, teacher), rtol=2e-5)
    wrong = oracle(1 - beta if beta != 0.5 else 0.1, student, teacher)
    assert np.max(np.abs(values - wrong)) > 0.02
    np.testing.assert_array_equal(of_teacher, np.zeros((N, V)))


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_is_that_of_numerical_differentiation(beta):
    with jax.enable_x64(True):
        student, teacher = (jnp.asarray(x, float) for x in logits(1))
        active = jnp.ones(N, bool)

        def value(student):
            return values_of(None, beta, student, teacher, active)

        check_grads(jax.jit(value), (student,), 2, ["rev"], atol=1e-7, rtol=1e-7)


@pytest.mark.parametrize("beta", BETAS)
def test_the_reference_is_differentiated_by_jax_to_the_same_gradient(beta):
    student, teacher = logits(9)
    student[:, 2] = teacher[:, 2] = -np.inf
    teacher[1, 3] = -np.inf if beta != 1 else 0
    student[2, 4] = -np.inf if beta != 0 else 0
    student[3], teacher[4] = 1e4 * np.sign(student[3]), 1e4 * np.sign(teacher[4])
    active = np.arange(N) != 5
    student[5] = np.nan
    with jax.enable_x64(True):
        given = beta, *(np.asarray(x, float) for x in (student, teacher)), active
        want, got = run(*given), run(*given, implementation="reference")
    np.testing.assert_allclose(got[0], want[0], rtol=1e-9)
    np.testing.assert_allclose(got[1], want[1], rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("beta", BETAS)
def test_equal_distributions_have_none_and_no_gradient(beta):
    student, _ = logits(2)
    student[0, 3] = student[1, :] = -np.inf
    student[1, 5] = 3.0
    values, gradient, _ = run(beta, student, student)
    np.testing.assert_allclose(values, 0, atol=1e-6)
    np.testing.assert_allclose(gradient, 0, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_the_gradient_of_every_token_sums_to_zero(beta):
    """A shift of all logits changes no distribution."""
    gradient = run(beta, *logits(3))[1]
    assert np.max(np.abs(gradient)) > 0.01
    np.testing.assert_allclose(np.sum(gradient, -1), 0, atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_impossible_classes_have_neither_a_part_nor_a_gradient(beta):
    student, teacher = logits(4)
    student[:, 2] = teacher[:, 2] = -np.inf
    values, gradient, _ = run(beta, student, teacher)
    rest = np.delete(np.arange(V), 2)
    less = run(beta, student[:, rest], teacher[:, rest])
    np.testing.assert_allclose(values, less[0], rtol=1e-6)
    np.testing.assert_allclose(gradient[:, rest], less[1], rtol=1e-5, atol=1e-7)
    np.testing.assert_array_equal(gradient[:, 2], 0)


@pytest.mark.parametrize("beta", BETAS)
@pytest.mark.parametrize("whose", ["student", "teacher"])
def test_a_class_that_only_one_of_them_has(beta, whose):
    """It is infinite just where a probability meets an impossible class."""
    student, teacher = logits(5)
    own = student if whose == "student" else teacher
    own[:, 4] = -np.inf
    values, gradient, _ = run(beta, student, teacher)
    if beta == (0 if whose == "student" else 1):
        assert np.all(values == np.inf)
    else:
        np.testing.assert_allclose(values, oracle(beta, student, teacher), rtol=2e-5)
        assert np.all(np.isfinite(gradient))
    if whose == "student":
        np.testing.assert_array_equal(gradient[:, 4], 0)


@pytest.mark.parametrize("beta", BETAS)
def test_extreme_logits_are_finite(beta):
    one_hot = np.full((N, V), -1e4, np.float32)
    one_hot[np.arange(N), np.arange(N)] = 1e4
    other = np.roll(one_hot, 1, -1)
    flat = logits(6)[0]
    for student, teacher in ((one_hot, other), (one_hot, flat), (flat, one_hot)):
        values, gradient, _ = run(beta, student, teacher)
        np.testing.assert_allclose(values, oracle(beta, student, teacher), rtol=1e-5)
        assert np.all(np.isfinite(gradient))
        if student is flat:
            assert np.max(np.abs(gradient)) > 0.01


@pytest.mark.parametrize("beta", BETAS)
def test_masked_tokens_have_zero_and_no_gradient(beta):
    student, teacher = logits(7)
    active = np.arange(N) % 2 == 0
    values, gradient, _ = run(beta, student, teacher, active)
    want = run(beta, student, teacher)
    np.testing.assert_allclose(values[active], want[0][active], rtol=1e-6)
    np.testing.assert_allclose(gradient[active], want[1][active], rtol=1e-5, atol=1e-8)
    np.testing.assert_array_equal(values[~active], 0)
    np.testing.assert_array_equal(gradient[~active], 0)


@pytest.mark.parametrize("beta", BETAS)
def test_shards_of_the_vocabulary_agree(beta):
    student, teacher = logits(8)
    # One shard of the student has no class at all.
    student[:, 3:6] = teacher[:, 3:6] = -np.inf
    student[::2, 0] = 60.0
    mesh = jax.make_mesh((3,), ("v",), axis_types=(AxisType.Auto,))

    def local(student, teacher):
        active = jnp.ones(N, bool)
        values, pull = jax.vjp(
            lambda z: values_of("v", beta, z, teacher, active), student
        )
        return values, pull(jnp.ones_like(values))[0]

    columns = P(None, "v")
    sharded = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(columns, columns),
        out_specs=(P(), columns),
        check_vma=False,
    )
    values, gradient = jax.jit(sharded)(student, teacher)
    want = run(beta, student, teacher)
    np.testing.assert_allclose(values, want[0], rtol=1e-5)
    np.testing.assert_allclose(gradient, want[1], rtol=1e-5, atol=1e-6)
