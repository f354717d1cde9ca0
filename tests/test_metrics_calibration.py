"""Calibration against plain loops, on handmade rows and random ones."""

import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, PartitionSpec
from numpy.typing import ArrayLike, NDArray

from ava_jax import metrics

NUM_BINS = 15
calibration_bins = jax.jit(metrics.calibration_bins, static_argnames="num_bins")
expected_calibration_error = jax.jit(metrics.expected_calibration_error)


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
    """Confidences, many of them edges of bins, and NaN where they are masked."""
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


LEVELS, ONE = jnp.ones((2, 4)), jnp.ones(1)


def error_of(weight: jax.Array) -> jax.Array:
    bins = metrics.CalibrationBins(weight, ONE, ONE, jnp.zeros(()))
    return metrics.expected_calibration_error(bins)


@pytest.mark.usefixtures("unannotated")
@pytest.mark.parametrize(
    ("message", "call", "arrays"),
    [
        ("num_bins must be in [1, inf)", partial(bins_of, num_bins=0), (ONE, ONE)),
        ("the shape (2, 4) of confidence, got (1, 4)", bins_of, (LEVELS, LEVELS[:1])),
        (
            "must have the shape (2, 4) of confidence, got (4,)",
            bins_of,
            (LEVELS, LEVELS, LEVELS[0]),
        ),
        ("one length, got shapes (2, 4), (1,) and (1,)", error_of, (LEVELS,)),
        ("one length, got shapes (4,), (1,) and (1,)", error_of, (LEVELS[0],)),
    ],
)
def test_bad_arguments(message, call, arrays):
    with pytest.raises(ValueError, match=re.escape(message)):
        call(*arrays)
