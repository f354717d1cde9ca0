"""Metrics of generated text against plain loops, on handmade rows and random ones."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from numpy.typing import NDArray

from ava_jax import losses, metrics

B, S = 4, 14
ANYTHING = np.array([-100, -1, 0, 1, 2, 2**31 - 1, -(2**31)], np.int32)
Row = Sequence[int]

# Oracles -------------------------------------------------------------------------


def ngrams(row: Row, mask: Row, n: int) -> list[tuple[int, ...]]:
    starts = range(len(row) - n + 1)
    return [tuple(row[i : i + n]) for i in starts if all(mask[i : i + n])]


def row_pairs(ids: NDArray[Any], mask: NDArray[Any]) -> Iterator[tuple[Row, Row]]:
    yield from zip(ids.tolist(), mask.tolist(), strict=True)


def repeated_oracle(row: Row, mask: Row, n: int) -> float:
    seen, repeats, total = set(), 0, 0
    for ngram in ngrams(row, mask, n):
        repeats += ngram in seen
        total += 1
        seen.add(ngram)
    return repeats / total if total else 0.0


def distinct_oracle(rows: NDArray[Any], mask: NDArray[Any], n: int) -> float:
    found = [g for row, m in row_pairs(rows, mask) for g in ngrams(row, m, n)]
    return len(set(found)) / len(found) if found else 0.0


def loop_oracle(row: Row, mask: Row, max_period: int) -> int:
    """Tries every span and every period."""
    longest = 0
    for start in range(len(row)):
        for end in range(start + 2, len(row) + 1):
            part = row[start:end]
            periods = range(1, min(max_period, len(part) // 2) + 1)
            if all(mask[start:end]) and any(part[p:] == part[:-p] for p in periods):
                longest = max(longest, len(part))
    return longest


def texts(count: int) -> Iterator[tuple[NDArray[np.int32], NDArray[np.float32]]]:
    """Rows of few different ids, with holes, padding, and anything where masked."""
    for seed in range(count):
        rng = np.random.default_rng(seed)
        ids = rng.integers(0, 2 + seed % 3, (B, S)).astype(np.int32)
        mask = rng.random((B, S)) < (0.8, 0.95, 1.0)[seed % 3]
        mask &= np.arange(S) < rng.integers(0, S + 1, (B, 1)) + S // 2
        ids = np.where(mask, ids, rng.choice(ANYTHING, (B, S)))
        yield ids, (mask * rng.uniform(0.1, 2, (B, S))).astype(np.float32)


# Generated text ------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 4])
def test_ngram_shares_are_the_oracles(n: int):
    repeated = jax.jit(partial(metrics.repeated_ngrams, ngram_size=n))
    distinct = jax.jit(partial(metrics.distinct_ngrams, ngram_size=n))
    for ids, mask in texts(30):
        want = [repeated_oracle(row, m, n) for row, m in row_pairs(ids, mask)]
        got = repeated(jnp.asarray(ids), jnp.asarray(mask))
        np.testing.assert_allclose(got, want, rtol=1e-6)
        got = distinct(jnp.asarray(ids), jnp.asarray(mask))
        np.testing.assert_allclose(got, distinct_oracle(ids, mask, n), rtol=1e-6)


@pytest.mark.parametrize("max_period", [1, 3, S])
def test_the_longest_loop_is_the_oracles(max_period: int):
    loop = jax.jit(partial(metrics.longest_loop, max_period=max_period))
    lengths = set()
    for ids, mask in texts(30):
        want = [loop_oracle(row, m, max_period) for row, m in row_pairs(ids, mask)]
        np.testing.assert_array_equal(loop(jnp.asarray(ids), jnp.asarray(mask)), want)
        lengths |= set(want)
    assert {0, 2, 3, 4} <= lengths


def loops_of(max_period: int, *lines: str, holes: str = "") -> list[int]:
    """The longest loop of each line; the letters in `holes` are masked."""
    letters = np.array([[ord(letter) for letter in line.ljust(10)] for line in lines])
    mask = ~np.isin(letters, [ord(hole) for hole in holes + " "])
    loop = jax.jit(partial(metrics.longest_loop, max_period=max_period))
    return loop(jnp.asarray(letters), jnp.asarray(mask)).tolist()


def test_loops_by_hand():
    assert loops_of(2, "aaaaaa", "abcabcab", "xababay") == [6, 0, 5]
    # The period has to occur twice, in full.
    lines = "aaaaaa", "abcabcab", "abcdeabcd", "abcdeabcde", "aabcdabcdx", "a"
    assert loops_of(9, *lines) == [6, 8, 0, 10, 8, 0]
    assert loops_of(4, "abab.abab", "ab.ab.ab", "aa.a.a", holes=".") == [4, 0, 2]
    assert loops_of(4, "abab.abab", "ab.ab.ab", "aa.a.a") == [4, 8, 5]


def test_ngrams_by_hand():
    @partial(jax.jit, static_argnames="n")
    def shares(ids: jax.Array, mask: jax.Array | None = None, *, n: int):
        repeated = metrics.repeated_ngrams(ids, mask, ngram_size=n)
        return repeated, metrics.distinct_ngrams(ids, mask, ngram_size=n)

    repeated, distinct = shares(jnp.array([[7, 7, 7, 7, 7]]), n=2)
    assert (repeated.tolist(), float(distinct)) == ([0.75], 0.25)
    # Per row, and over all rows; no window crosses rows.
    repeated, distinct = shares(jnp.array([[1, 2, 3], [2, 3, 1]]), n=2)
    assert (repeated.tolist(), float(distinct)) == ([0, 0], 0.75)
    holes = jnp.array([[1, 2, 9, 1, 2]]), jnp.array([[1, 1, 0, 1, 1]])
    repeated, distinct = shares(*holes, n=2)
    assert (repeated.tolist(), float(distinct)) == ([0.5], 0.5)
    repeated, distinct = shares(*holes, n=3)
    assert (repeated.tolist(), float(distinct)) == ([0], 0)


TEXT_METRICS = (
    partial(metrics.repeated_ngrams, ngram_size=2),
    partial(metrics.distinct_ngrams, ngram_size=2),
    partial(metrics.longest_loop, max_period=3),
)


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_a_text_metric_maps_over_batches(metric: Callable[..., jax.Array]):
    ids, mask = (jnp.asarray(np.stack(x)) for x in zip(*texts(3), strict=True))
    one = jax.jit(metric)
    one_by_one = jnp.stack([one(i, m) for i, m in zip(ids, mask, strict=True)])
    mapped = jax.jit(jax.vmap(metric))(ids, mask)
    np.testing.assert_array_equal(mapped, one_by_one)
    assert len(np.unique(one_by_one)) > 1


@pytest.mark.parametrize("metric", TEXT_METRICS)
def test_text_metrics_of_nothing_are_0(metric: Callable[..., jax.Array]):
    metric = jax.jit(metric)
    for shape in ((2, 0), (0, 5), (2, 1)):
        assert (np.asarray(metric(jnp.zeros(shape, jnp.int32))) == 0).all()
    ids = jnp.full((2, 5), -100)
    assert (np.asarray(metric(ids, jnp.zeros((2, 5), bool))) == 0).all()
    assert (np.asarray(metric(ids, jnp.full((2, 5), 0.1))) != 0).all()


@pytest.mark.parametrize("metric", TEXT_METRICS)
@pytest.mark.parametrize("kind", ["uint8", "uint32", "int64", "uint64"])
def test_ids_may_be_of_any_range(metric: Callable[..., jax.Array], kind: str):
    want = jax.jit(metric)(jnp.array([[3, 4, 3, 4, 3, 4], [1, 2, 3, 4, 1, 2]]))
    # The same rows under other names, which differ in one of the highest bits alone.
    high = 2 ** (np.iinfo(kind).bits - 2)
    first = [1 + high, 2 + high] * 3
    ids = np.array([first, [1, 2, 1 + high, 2 + high, 1, 2]], kind)
    with jax.enable_x64(True):
        got = jax.jit(metric)(jnp.asarray(ids))
    np.testing.assert_allclose(got, want, rtol=1e-6)
    assert got.dtype == ("int32" if want.dtype == "int32" else "float64")


# Experts and errors ---------------------------------------------------------------


def test_the_maximal_violation_is_that_of_the_losses():
    assert metrics.max_violation is losses.max_violation


IDS, LEVELS = jnp.ones((2, 4), jnp.int32), jnp.ones((2, 4))
REPEATED, DISTINCT, LOOP = TEXT_METRICS


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("message", "call", "arrays"),
    [
        ("ngram_size must be in [1, inf)", partial(REPEATED, ngram_size=0), (IDS,)),
        ("ngram_size must be in [1, inf)", partial(DISTINCT, ngram_size=-1), (IDS,)),
        ("max_period must be in [1, inf), got 0", partial(LOOP, max_period=0), (IDS,)),
        ("ids must be [B, S], got int32 (4,)", REPEATED, (IDS[0],)),
        ("ids must be integers, got float32 (2, 4)", LOOP, (LEVELS,)),
        ("the shape (2, 4) of ids, got (2, 1)", DISTINCT, (IDS, IDS[:, :1])),
    ],
)
def test_bad_arguments(message, call, arrays):
    with pytest.raises((TypeError, ValueError), match=re.escape(message)):
        call(*arrays)
