"""SimCTG: a naive loop, masks, segments, degenerate vectors."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.loss_checks import (
    FEW,
    VariantsCase,
    check_explicit_axes,
    check_gradient,
    untyped,
    value_and_gradient,
    value_of,
    values,
    with_and_without_jit,
)

from ava_jax.losses.contrastive import simctg_loss


def simctg_oracle(h: NDArray, keep: NDArray, segments: NDArray, margin: float) -> float:
    costs = []
    for b in range(h.shape[0]):
        rows = [row.astype(float) for row in h[b]]
        z = [row / (float(np.linalg.norm(row)) or 1.0) for row in rows]
        for i in range(h.shape[1]):
            for j in range(h.shape[1]):
                together = segments[b, i] == segments[b, j] != 0
                if i != j and keep[b, i] and keep[b, j] and together:
                    costs.append(max(0.0, margin - 1 + float(z[i] @ z[j])))
    return sum(costs) / len(costs) if costs else 0.0


@FEW
@given(
    shape=st.sampled_from([(1, 1, 3), (2, 9, 1), (3, 5, 4)]),
    margin=st.sampled_from([0.0, 0.5, 1.0, 2.0]),
    seed=st.integers(0, 1000),
    packed=st.booleans(),
)
def test_simctg_matches_the_oracle(shape, margin, seed, packed) -> None:
    random, rows = np.random.default_rng(seed), shape[:2]
    h, keep = values(*shape, seed=seed), random.random(rows) < 0.7
    segments = random.integers(0, 3, rows) if packed else np.ones(rows, int)
    got = value_of(
        simctg_loss,
        jax.device_put(np.where(keep[..., None], h, np.nan)),
        margin=margin,
        mask=jax.device_put(keep),
        segment_ids=jax.device_put(segments) if packed else None,
    )
    want = simctg_oracle(h, keep, segments, margin)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_simctg_leaves_the_diagonal_out() -> None:
    h, ones = np.eye(4, dtype=np.float32)[None], np.ones((2, 3, 4), np.float32)
    np.testing.assert_allclose(value_of(simctg_loss, h, margin=0.9), 0, atol=1e-7)
    np.testing.assert_allclose(value_of(simctg_loss, h, margin=1.2), 0.2, rtol=1e-5)
    np.testing.assert_allclose(value_of(simctg_loss, ones), 0.5, rtol=1e-5)


def test_simctg_gradient() -> None:
    check_gradient(lambda h: simctg_loss(h, margin=1.1), values(2, 4, 3))


def test_tiny_vectors_are_divided_by_the_smallest_norm() -> None:
    h = jnp.array([[[1e-13, 0.0], [1.0, 0.0]]])
    np.testing.assert_allclose(value_of(simctg_loss, h, margin=1.0), 0.1, rtol=1e-5)


def test_simctg_of_zero_and_equal_rows_is_finite() -> None:
    h = jnp.array([[[0.0, 0.0], [0.0, 0.0], [1.0, 2.0], [1.0, 2.0]]])
    value, gradient = value_and_gradient(simctg_loss, h, margin=1.5)
    chex.assert_tree_all_finite((value, gradient))
    np.testing.assert_array_equal(np.asarray(gradient)[0, :2], 0)


def test_masked_positions_change_nothing_in_simctg() -> None:
    h, mask = values(1, 5, 3), np.array([[1, 1, 1, 0, 0]])
    h[0, 3:] = np.nan
    value, gradient = jax.device_get(
        value_and_gradient(simctg_loss, h, margin=1.5, mask=mask)
    )
    kept = value_and_gradient(simctg_loss, h[:, :3], margin=1.5)
    chex.assert_trees_all_close((value, gradient[:, :3]), kept, rtol=1e-6)
    np.testing.assert_array_equal(gradient[:, 3:], 0)
    segments = np.array([[7, 7, 7, 0, 0]])
    got = value_of(simctg_loss, h, margin=1.5, segment_ids=segments)
    chex.assert_trees_all_equal(got, value)


def test_nothing_to_compare_is_zero() -> None:
    ones, zeros = np.ones((3, 1, 2), np.float32), np.zeros((1, 3, 2), np.float32)
    np.testing.assert_array_equal(value_of(simctg_loss, ones), 0)
    mask = np.zeros((1, 3), bool)
    got = value_and_gradient(simctg_loss, zeros + np.nan, mask=mask)
    chex.assert_trees_all_equal(got, (np.float32(0), zeros))


def test_low_precision_inputs() -> None:
    low = jnp.asarray(values(1, 4, 3), jnp.bfloat16)
    value, gradient = value_and_gradient(simctg_loss, low)
    chex.assert_type([value, gradient], [jnp.float32, jnp.bfloat16])


def test_shapes_that_do_not_fit() -> None:
    h = jnp.ones((1, 3, 2))
    with untyped():
        with pytest.raises(
            ValueError, match=r"mask must be \[B, S\], got float32 \(3,\)"
        ):
            simctg_loss(h, mask=jnp.ones(3))
        with pytest.raises(ValueError, match=r"segment_ids must have .* \(1, 3\)"):
            simctg_loss(h, segment_ids=jnp.ones((1, 2), int))


def test_explicit_axes() -> None:
    check_explicit_axes(simctg_loss, jax.device_put(values(2, 4, 3)))


class Variants(VariantsCase):
    @with_and_without_jit
    def test_jit_changes_nothing(self) -> None:
        h, ones = values(2, 4, 3), np.ones((2, 4))
        got = self.under(simctg_loss)(jax.device_put(h))
        np.testing.assert_allclose(got, simctg_oracle(h, ones, ones, 0.5), rtol=1e-4)
