"""Measurements against plain loops, by hand-made rows and on random ones."""

import re
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import ArrayLike, NDArray

from ava_jax import losses, metrics

B, S, K = 4, 14, 3
ANYTHING = np.array([-100, -1, 0, 1, 2, 2**31 - 1, -(2**31)], np.int32)
NUM_BINS = 15

calibration_bins = jax.jit(metrics.calibration_bins, static_argnames="num_bins")
expected_calibration_error = jax.jit(metrics.expected_calibration_error)
accepted_lengths = jax.jit(metrics.accepted_lengths)
acceptance_length = jax.jit(metrics.acceptance_length)
acceptance_rates = jax.jit(metrics.acceptance_rates)


# Oracles: text -------------------------------------------------------------------

Row = Sequence[int]


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
    """Tries every stretch and every period."""
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
    # What is looped over has to come twice, whole.
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
    # Rows are looked at alone, and together; no window runs from row to row.
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


# Calibration ---------------------------------------------------------------------


def bin_of(confidence: float) -> int:
    inner = [np.float32(k / NUM_BINS) for k in range(1, NUM_BINS)]
    return sum(bool(edge < confidence) for edge in inner)


def bins_oracle(
    confidence: NDArray[Any], correct: NDArray[Any], weights: NDArray[Any]
) -> tuple[list[float], list[float], list[float]]:
    weight, level, right = ([0.0] * NUM_BINS for _ in range(3))
    for c, r, w in zip(
        confidence.ravel(), correct.ravel(), weights.ravel(), strict=True
    ):
        if w != 0:
            k = bin_of(c)
            weight[k] += float(w)
            level[k] += float(w) * float(c)
            right[k] += float(w) * float(r)
    return weight, level, right


def error_oracle(
    confidence: NDArray[Any], correct: NDArray[Any], weights: NDArray[Any]
) -> float:
    weight, level, right = bins_oracle(confidence, correct, weights)
    return sum(
        w / sum(weight) * abs(r / w - c / w)
        for w, c, r in zip(weight, level, right, strict=True)
        if w
    )


def predictions(seed: int) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Confidences, many of them edges of bins, and NaN where nothing counts."""
    rng = np.random.default_rng(seed)
    edges = (np.arange(NUM_BINS + 1) / NUM_BINS).astype(np.float32)
    confidence = rng.random((6, 10)).astype(np.float32)
    on_edges = rng.choice(edges, (6, 10))
    confidence = np.where(rng.random((6, 10)) < 0.5, confidence, on_edges)
    weights = (rng.random((6, 10)) < 0.8) * rng.uniform(0.5, 2, (6, 10))
    correct = (rng.random((6, 10)) < confidence).astype(np.float32)
    gone = weights == 0
    return (
        np.where(gone, np.nan, confidence),
        np.where(gone, np.nan, correct),
        weights.astype(np.float32),
    )


def bins_of(*arrays: ArrayLike, **options: int) -> metrics.CalibrationBins:
    return calibration_bins(*(jnp.asarray(x) for x in arrays), **options)


def test_bins_and_their_error_are_the_oracles():
    for seed in range(8):
        arrays = predictions(seed)
        bins = bins_of(*arrays)
        want = bins_oracle(*arrays)
        for got, sums in zip(
            (bins.weight, bins.confidence, bins.correct), want, strict=True
        ):
            np.testing.assert_allclose(got, sums, rtol=1e-5, atol=1e-6)
        assert float(bins.invalid) == 0
        error = expected_calibration_error(bins)
        np.testing.assert_allclose(error, error_oracle(*arrays), rtol=1e-4)


def test_bins_of_batches_add_up_to_the_whole():
    arrays = predictions(0)
    parts = [bins_of(*(x[rows] for x in arrays)) for rows in (slice(2), slice(2, 6))]
    added, whole = jax.tree.map(jnp.add, *parts), bins_of(*arrays)
    for got, want in zip(jax.tree.leaves(added), jax.tree.leaves(whole), strict=True):
        np.testing.assert_allclose(got, want, rtol=1e-5)
    # The error itself does not: the mean of the parts' errors is another number.
    error = float(expected_calibration_error(whole))
    np.testing.assert_allclose(expected_calibration_error(added), error, rtol=1e-5)
    mean = np.mean([float(expected_calibration_error(part)) for part in parts])
    assert abs(mean - error) > 1e-3


def test_bins_of_devices_add_up_to_the_whole():
    mesh = Mesh(np.array(jax.devices()[:2]), ("data",))

    @partial(
        jax.shard_map,
        mesh=mesh,
        in_specs=PartitionSpec("data"),
        out_specs=PartitionSpec(),
    )
    def everywhere(*arrays: jax.Array) -> metrics.CalibrationBins:
        return jax.lax.psum(calibration_bins(*arrays), "data")

    arrays = predictions(1)
    got = jax.jit(everywhere)(*(jnp.asarray(x) for x in arrays))
    for one, want in zip(
        jax.tree.leaves(got), jax.tree.leaves(bins_of(*arrays)), strict=True
    ):
        np.testing.assert_allclose(one, want, rtol=1e-5)


def test_an_edge_belongs_to_the_bin_below():
    edges = (np.arange(NUM_BINS + 1) / NUM_BINS).astype(np.float32)
    right = np.ones_like(edges)
    below = bins_of(edges, right)
    assert below.weight.tolist() == [2.0] + [1.0] * (NUM_BINS - 1)
    above = bins_of(np.nextafter(edges[:-1], np.float32(2)), right[:-1])
    assert above.weight.tolist() == [1.0] * NUM_BINS


def test_confidences_that_are_none_are_counted():
    confidence = np.array([-0.1, 1.5, np.nan, np.inf, -np.inf, 0.5, np.nan], np.float32)
    weights = np.array([1, 1, 0.5, 1, 1, 2, 0], np.float32)
    bins = bins_of(confidence, np.ones(7, bool), weights, num_bins=1)
    assert float(bins.invalid) == 5
    assert [float(x[0]) for x in (bins.weight, bins.confidence)] == [2, 1]
    assert float(expected_calibration_error(bins)) == 0.5


def test_an_unknown_outcome_is_not_hidden():
    bins = bins_of([0.5, 0.9], [np.nan, 1.0], num_bins=2)
    assert np.isnan(expected_calibration_error(bins))


def test_bins_are_float32_whatever_comes_in():
    half = jnp.full((1000,), 0.3, jnp.bfloat16)
    outcome = jnp.arange(1000) % 4 == 0
    want = bins_of(half.astype(jnp.float32), outcome)
    weights = jnp.ones(1000, jnp.bfloat16)
    for got in (bins_of(half, outcome), bins_of(half, outcome, weights)):
        for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
            assert x.dtype == jnp.float32
            np.testing.assert_array_equal(x, y)
    np.testing.assert_allclose(want.confidence.sum(), 1000 * float(half[0]), rtol=1e-6)


def test_calibration_in_float64():
    arrays = predictions(2)
    arrays = (np.where(np.isnan(arrays[0]), 0.5, arrays[0]) * 0.99, *arrays[1:])
    with jax.enable_x64(True):
        wide = [jnp.asarray(x, jnp.float64) for x in arrays]
        error = expected_calibration_error(calibration_bins(*wide))
    assert error.dtype == jnp.float64
    np.testing.assert_allclose(error, error_oracle(*arrays), rtol=1e-12)


def test_calibration_maps_over_predictors_and_takes_any_shape():
    arrays = [
        jnp.asarray(np.stack(x)) for x in zip(*map(predictions, (0, 1, 2)), strict=True)
    ]

    def error(*one: jax.Array) -> jax.Array:
        bins = calibration_bins(*one, num_bins=4)
        return expected_calibration_error(bins)

    flat = jax.jit(error)
    want = [flat(*(x[i].reshape(-1) for x in arrays)) for i in range(3)]
    np.testing.assert_allclose(jax.jit(jax.vmap(error))(*arrays), want, rtol=1e-5)
    scalar = bins_of(0.7, True, num_bins=2)
    assert scalar.weight.tolist() == [0, 1]


def test_the_error_of_nothing_is_0():
    for bins in (
        bins_of(np.zeros((0, 3), np.float32), np.zeros((0, 3), bool)),
        bins_of([np.nan], [True], [0]),
        bins_of([np.nan], [True]),
    ):
        assert float(expected_calibration_error(bins)) == 0


# Expert balance ------------------------------------------------------------------


def test_the_maximal_violation_is_that_of_the_losses():
    assert metrics.max_violation is losses.max_violation


# Speculative decoding ------------------------------------------------------------


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


# Errors --------------------------------------------------------------------------

IDS = jnp.ones((2, 4), jnp.int32)
LEVELS, ONE = jnp.ones((2, 4)), jnp.ones(1)
REPEATED, DISTINCT, LOOP = TEXT_METRICS


def error_of(weight: jax.Array) -> jax.Array:
    bins = metrics.CalibrationBins(weight, ONE, ONE, jnp.zeros(()))
    return metrics.expected_calibration_error(bins)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("message", "call", "arrays"),
    [
        ("ngram_size must be at least 1", partial(REPEATED, ngram_size=0), (IDS,)),
        ("ngram_size must be at least 1", partial(DISTINCT, ngram_size=-1), (IDS,)),
        ("max_period must be at least 1, got 0", partial(LOOP, max_period=0), (IDS,)),
        ("integers [B, S], got int32 of shape (4,)", REPEATED, (IDS[0],)),
        ("integers [B, S], got float32 of shape (2, 4)", LOOP, (LEVELS,)),
        ("the shape of ids, (2, 4), got (2, 1)", DISTINCT, (IDS, IDS[:, :1])),
        ("num_bins must be at least 1", partial(bins_of, num_bins=0), (ONE, ONE)),
        ("of confidence, (2, 4), got (1, 4)", bins_of, (LEVELS, LEVELS[:1])),
        ("must have shape (2, 4), got (4,)", bins_of, (LEVELS, LEVELS, LEVELS[0])),
        ("one length, got shapes (2, 4), (1,) and (1,)", error_of, (LEVELS,)),
        ("one length, got shapes (4,), (1,) and (1,)", error_of, (LEVELS[0],)),
        ("int32 (2, 4) and int32 (2, 3)", accepted_lengths, (IDS, IDS[:, :3])),
        ("int32 (2, 4) and float32 (2, 4)", accepted_lengths, (IDS, LEVELS)),
        ("int32 () and int32 ()", accepted_lengths, (IDS[0, 0], IDS[0, 0])),
        ("must have shape (2,), got (1,)", acceptance_length, (IDS, IDS, ONE)),
        ("must have shape (2,), got (1,)", acceptance_rates, (IDS, IDS, ONE)),
    ],
)
def test_bad_arguments(message, call, arrays):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*arrays)
