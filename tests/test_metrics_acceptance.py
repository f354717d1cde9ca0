"""Speculative decoding's acceptance against plain loops, by hand and at random."""

import re
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from ava_jax import metrics

K = 3
Row = Sequence[int]
accepted_lengths = jax.jit(metrics.accepted_lengths)
acceptance_length = jax.jit(metrics.acceptance_length)
acceptance_rates = jax.jit(metrics.acceptance_rates)


def calls(seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    rng = np.random.default_rng(seed)
    drafts = rng.integers(-1, 3, (5, 4, K)).astype(np.int32)
    verified = np.where(rng.random(drafts.shape) < 0.6, drafts, drafts + 1)
    weights = (rng.random((5, 4)) < 0.8) * rng.uniform(0.5, 2, (5, 4))
    return drafts, verified, weights.astype(np.float32)


def accepted_oracle(draft: Row, verified: Row) -> int:
    for j in range(len(draft)):
        if draft[j] != verified[j]:
            return j
    return len(draft)


def speed_oracle(
    drafts: NDArray[Any], verified: NDArray[Any], weights: NDArray[Any]
) -> tuple[float, list[float]]:
    """Mean tokens per call, and the rates of the drafts one after another."""
    tokens, reached, passed = 0.0, [0.0] * K, [0.0] * K
    flat = (x.reshape(-1, K).tolist() for x in (drafts, verified))
    for draft, true, w in zip(*flat, weights.ravel().tolist(), strict=True):
        tokens += w
        for j in range(K):
            reached[j] += w
            if draft[j] != true[j]:
                break
            passed[j] += w
            tokens += w
    rates = [p / r if r else 0.0 for p, r in zip(passed, reached, strict=True)]
    return tokens / sum(weights.ravel().tolist()), rates


def test_accepted_lengths_are_the_oracles():
    for seed in range(4):
        drafts, verified, _ = calls(seed)
        flat = zip(*(x.reshape(-1, K) for x in (drafts, verified)), strict=True)
        want = np.reshape([accepted_oracle(d, v) for d, v in flat], drafts.shape[:-1])
        got = accepted_lengths(jnp.asarray(drafts), jnp.asarray(verified))
        np.testing.assert_array_equal(got, want)
        assert got.dtype == jnp.int32
        assert set(want.ravel()) == set(range(K + 1))


def test_length_and_rates_are_the_oracles():
    for seed in range(4):
        arrays = calls(seed)
        length, rates = speed_oracle(*arrays)
        given = [jnp.asarray(x) for x in arrays]
        np.testing.assert_allclose(acceptance_length(*given), length, rtol=1e-5)
        got = acceptance_rates(*given)
        np.testing.assert_allclose(got, rates, rtol=1e-5)
        np.testing.assert_allclose(1 + np.cumprod(got).sum(), length, rtol=1e-5)


def test_acceptance_by_hand():
    drafts = jnp.array([[1, 2, 3], [1, 2, 3], [1, 2, 3], [1, 2, 3]])
    verified = jnp.array([[1, 2, 3], [1, 2, 0], [1, 0, 3], [0, 2, 3]])
    assert accepted_lengths(drafts, verified).tolist() == [3, 2, 1, 0]
    assert float(acceptance_length(drafts, verified)) == 2.5
    rates = acceptance_rates(drafts, verified)
    np.testing.assert_allclose(rates, [3 / 4, 2 / 3, 1 / 2], rtol=1e-6)
    last = jnp.array([False, False, False, True])
    assert float(acceptance_length(drafts, verified, last)) == 1
    assert acceptance_rates(drafts, verified, last).tolist() == [0, 0, 0]


def test_acceptance_in_float64_and_over_batches():
    arrays = calls(0)
    length, rates = speed_oracle(*arrays)
    with jax.enable_x64(True):
        wide = [
            jnp.asarray(x, kind)
            for x, kind in zip(arrays, ("int64", "int64", "float64"), strict=True)
        ]
        assert accepted_lengths(*wide[:2]).dtype == jnp.int32
        np.testing.assert_allclose(acceptance_length(*wide), length, 1e-12)
        np.testing.assert_allclose(acceptance_rates(*wide), rates, 1e-12)
    given = [jnp.asarray(x) for x in arrays]
    mapped = jax.jit(jax.vmap(acceptance_rates))(*given)
    for i, got in enumerate(mapped):
        want = speed_oracle(*(x[i] for x in arrays))[1]
        np.testing.assert_allclose(got, want, rtol=1e-5)


def test_acceptance_of_nothing():
    drafts = jnp.ones((2, K), jnp.int32)
    nowhere = jnp.zeros(2)
    assert float(acceptance_length(drafts, drafts, nowhere)) == 0
    assert acceptance_rates(drafts, drafts, nowhere).tolist() == [0] * K
    assert float(acceptance_length(drafts[:0], drafts[:0])) == 0
    no_drafts = drafts[:, :0]
    assert accepted_lengths(no_drafts, no_drafts).tolist() == [0, 0]
    assert float(acceptance_length(no_drafts, no_drafts)) == 1
    assert acceptance_rates(no_drafts, no_drafts).shape == (0,)


IDS, LEVELS, ONE = jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4)), jnp.ones(1)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("message", "call", "arrays"),
    [
        (
            "verified must have the shape (2, 4) of drafts, got (2, 3)",
            accepted_lengths,
            (IDS, IDS[:, :3]),
        ),
        (
            "verified must be integers, got float32 (2, 4)",
            accepted_lengths,
            (IDS, LEVELS),
        ),
        ("int32 () and int32 ()", accepted_lengths, (IDS[0, 0], IDS[0, 0])),
        (
            "must have the shape (2,), to fit drafts, got (1,)",
            acceptance_length,
            (IDS, IDS, ONE),
        ),
        (
            "must have the shape (2,), to fit drafts, got (1,)",
            acceptance_rates,
            (IDS, IDS, ONE),
        ),
    ],
)
def test_bad_arguments(message, call, arrays):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call(*arrays)
