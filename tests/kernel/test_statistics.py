"""The statistics: values, gradients, and inputs that must not affect them."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.loss_checks import check_gradient

from ava_jax import Query, Vocabulary, token_statistics
from ava_jax.tokens import read_tokens

B, S, V = 2, 7, 6
SEGMENTS = np.array([[1, 1, 1, 1, 2, 2, 2], [1, 1, 1, 1, 1, 1, 0]], np.int32)
STATS = {
    "log_z": lambda s: s.log_z,
    "nll": lambda s: s.nll,
    "entropy": lambda s: s.entropy,
    "log_one_minus_p": lambda s: s.log_one_minus_p,
    "candidates": lambda s: jnp.sum(s.unlikelihood("a"), -1),
    "tempered": lambda s: s.log_sum_tempered - s.target / s.temperature,
    "spread": lambda s: s.count * s.log_sum - s.total,
}

statistics_of = jax.jit(token_statistics, static_argnums=2)


@pytest.mark.parametrize("cap", [None, 2.0])
@pytest.mark.parametrize("name", STATS)
def test_gradients_are_those_of_the_values(name, cap):
    rng = np.random.default_rng(0)
    targets = rng.integers(0, 4, (B, S), np.int32)
    ids = rng.integers(0, 5, (B, S, 3), np.int32)
    logits, mix = rng.normal(size=(B, S, V)), rng.normal(size=(B, S))

    def value(logits, temperature):
        tokens = read_tokens(
            jax.device_put(targets), None, jax.device_put(SEGMENTS), vocab_size=5
        )
        query = Query(
            targets=tokens.targets,
            active=tokens.active,
            candidates={"a": jax.device_put(ids)},
        )
        stats = token_statistics(logits, query, Vocabulary(5, cap), temperature)
        return jnp.sum(mix * tokens.weights * STATS[name](stats))

    check_gradient(value, logits, np.asarray(1.3))


def one_token(logits, target=0, active=True, **query):
    wanted = Query(
        targets=jnp.array([target]),
        active=jnp.array([active]),
        candidates={k: jnp.array([ids]) for k, ids in query.items()},
    )
    return statistics_of(jnp.asarray([logits]), wanted, Vocabulary(len(logits)))


def test_equal_logits_of_any_size_lose_nothing():
    for size in (0.0, 1e8, -1e8):
        stats = one_token([size] * 50)
        np.testing.assert_allclose(stats.nll, np.log(50), rtol=1e-6)
        np.testing.assert_allclose(stats.entropy, np.log(50), rtol=1e-6)
        assert float(stats.total[0]) == 0


@jax.jit
@jax.value_and_grad
def penalty_of_the_first(logits):
    stats = token_statistics(
        logits[None],
        Query(
            targets=jnp.array([1]),
            active=jnp.array([True]),
            candidates={"c": jnp.array([[0]])},
        ),
        Vocabulary(4),
    )
    return stats.unlikelihood("c")[0, 0]


@pytest.mark.parametrize("gap", [20.0, 1e3, 1e6])
def test_unlikelihood_is_exact_where_the_probability_rounds_to_one(gap):
    logits = np.array([gap, 0.0, 0.0, 0.0], np.float32)
    value, grad = penalty_of_the_first(logits)
    np.testing.assert_allclose(value, gap - np.log(3), rtol=1e-6)
    np.testing.assert_allclose(grad, [1, -1 / 3, -1 / 3, -1 / 3], rtol=1e-5)
    # The textbook form, log(1 - p), is infinite here.
    powers = np.exp(logits - logits.max())
    assert powers[0] / powers.sum() == 1


def test_masked_entries_have_no_probability_and_no_gradient():
    logits = jnp.array([1.0, -jnp.inf, 0.5, -jnp.inf])

    def loss(logits):
        query = Query(targets=jnp.array([0]), active=jnp.array([True]))
        stats = token_statistics(logits[None], query, Vocabulary(4))
        return (stats.nll + stats.entropy + stats.total / stats.count)[0], stats

    (_, stats), grad = jax.jit(jax.value_and_grad(loss, has_aux=True))(logits)
    two = np.array([1.0, 0.5])
    p = np.exp(two) / np.exp(two).sum()
    assert float(stats.count[0]) == 2
    np.testing.assert_allclose(stats.entropy[0], -(p * np.log(p)).sum(), rtol=1e-6)
    assert np.isfinite(grad).all()
    assert float(grad[1]) == float(grad[3]) == 0


def test_rows_with_and_without_impossible_classes_are_computed_in_one_block():
    z = np.array([[1.0, -np.inf, 0.5, 2.0], [0.5, 3.0, -1.0, 0.0]], np.float32)
    query = Query(targets=jnp.array([0, 1]), active=jnp.array([True, True]))
    stats = statistics_of(jnp.asarray(z), query, Vocabulary(4))
    np.testing.assert_array_equal(stats.count, [3, 4])
    for row, (total, entropy) in enumerate(
        zip(stats.total, stats.entropy, strict=True)
    ):
        possible = z[row][z[row] > -np.inf].astype(np.float64)
        p = np.exp(possible) / np.exp(possible).sum()
        np.testing.assert_allclose(total, (possible - possible.max()).sum(), rtol=1e-6)
        np.testing.assert_allclose(entropy, -(p * np.log(p)).sum(), rtol=1e-6)


@pytest.mark.parametrize("log_one_minus_p", [True, False])
def test_a_token_without_a_possible_class_is_infinite_and_has_no_gradient(
    log_one_minus_p,
):
    def nll(logits):
        query = Query(
            targets=jnp.array([1]),
            active=jnp.array([True]),
            log_one_minus_p=log_one_minus_p,
        )
        return token_statistics(logits, query, Vocabulary(3)).nll[0]

    value, grad = jax.jit(jax.value_and_grad(nll))(np.full((1, 3), -np.inf, np.float32))
    assert not np.isfinite(value)
    np.testing.assert_array_equal(grad, 0)


def test_inactive_tokens_may_hold_anything():
    good = np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32)
    active = jnp.array([True, False, True])

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1), has_aux=True)
    def run(logits, temperature):
        query = Query(targets=jnp.array([0, 1, 2]), active=active)
        stats = token_statistics(logits, query, Vocabulary(5), temperature)
        values = stats.nll + stats.entropy + stats.log_z + stats.log_one_minus_p
        return jnp.sum(jnp.where(active, values + stats.log_sum_tempered, 0.0)), stats

    temperature = jnp.asarray(1.5)
    want, (grad, of_temperature) = run(good, temperature)
    for bad in (np.nan, np.inf, -np.inf, 1e30):
        spoilt = np.where(np.arange(3)[:, None] == 1, np.float32(bad), good)
        got, (dirty, dirty_of_temperature) = run(spoilt, temperature)
        assert got[0] == want[0]
        np.testing.assert_array_equal(dirty, grad)
        assert (np.asarray(dirty[1]) == 0).all()
        assert dirty_of_temperature == of_temperature != 0
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(got[1]))


def test_some_numbers_must_be_requested():
    query = Query(
        targets=jnp.array([0]), active=jnp.array([True]), log_one_minus_p=False
    )
    stats = statistics_of(np.zeros((1, 4), np.float32), query, Vocabulary(4))
    np.testing.assert_allclose(stats.nll, np.log(4), rtol=1e-6)
    with pytest.raises(ValueError, match="log_one_minus_p=True"):
        _ = stats.log_one_minus_p
    with pytest.raises(ValueError, match="tempered_entropy=True"):
        _ = stats.tempered_entropy


@pytest.mark.parametrize("width", [5, 256, 1000])
def test_the_largest_logit_is_found_in_any_segment(width):
    """Rows have several segments from 128 classes on; the first of ties is the top."""
    z = np.random.default_rng(0).normal(size=(40, width)).astype(np.float32)
    z[1] = 0.0
    z[2, -1] = z[2, 3] = 9.0
    z[3, -1] = 400.0
    wanted = Query(
        targets=jax.device_put(np.zeros(40, np.int32)),
        active=jax.device_put(np.ones(40, bool)),
        candidates={"first": jax.device_put(np.zeros((40, 1), np.int32))},
    )
    stats = statistics_of(jax.device_put(z), wanted, Vocabulary(width))
    np.testing.assert_array_equal(stats.top, z.argmax(-1))
    others = np.where(np.arange(width) == z.argmax(-1)[:, None], -np.inf, z)
    exact = others.astype(np.float64) - z.max(-1, keepdims=True)
    high = exact.max(-1, keepdims=True)
    log_sum_without_top = high[:, 0] + np.log(np.exp(exact - high).sum(-1))
    np.testing.assert_allclose(
        stats.log_sum_without_top, log_sum_without_top, rtol=2e-6, atol=2e-6
    )


def test_nan_at_an_active_token_is_not_hidden():
    assert np.isnan(one_token([0.0, jnp.nan, 1.0]).nll[0])


def test_gradient_comes_back_in_the_dtype_of_the_logits():
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float16):
        logits = np.ones((2, 4), dtype)
        query = Query(targets=jnp.array([0, 1]), active=jnp.array([True, True]))

        @jax.jit
        @jax.grad
        def gradient(z, query=query):
            return jnp.sum(token_statistics(z, query, Vocabulary(4)).nll)

        grad = gradient(jax.device_put(logits))
        assert grad.dtype == dtype


@pytest.mark.usefixtures("optimized_text")
def test_plain_cross_entropy_pays_for_nothing_else():
    """The derivative of a term that is not in the loss is not computed."""
    targets, active = np.zeros(8, np.int32), np.ones(8, bool)
    query = Query(targets=jax.device_put(targets), active=jax.device_put(active))
    shape = jax.ShapeDtypeStruct((8, 64), jnp.float32)

    def plain(z):
        return jnp.sum(token_statistics(z, query, Vocabulary(64)).nll)

    def more(z):
        stats = token_statistics(z, query, Vocabulary(64))
        return jnp.sum(stats.nll + stats.entropy + stats.log_one_minus_p)

    def exps(f):
        compiled = jax.jit(jax.grad(f)).lower(shape).compile()
        return str(compiled.as_text()).count(" exponential(")

    assert exps(plain) < exps(more)
