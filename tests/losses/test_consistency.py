"""Consistency: reference numbers, a plain oracle, weights, −inf, direction."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.golden_cases import GoldenCase, cases_of, on_device
from support.loss_checks import (
    FEW,
    VariantsCase,
    check_explicit_axes,
    check_gradient,
    untyped,
    value_of,
    values,
    with_and_without_jit,
)

from ava_jax.losses.consistency import consistency_loss

KINDS = ("mse", "kl", "ce")
A, B = values(4, 6), values(4, 6, seed=1)


@functools.partial(jax.jit, static_argnames="kind")
def total_and_gradients(
    original: jax.Array,
    augmented: jax.Array,
    kind: str,
    weights: jax.Array | None = None,
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    """The sum over rows, and its gradients with respect to both sides."""

    def total(original: jax.Array, augmented: jax.Array) -> jax.Array:
        return consistency_loss(original, augmented, kind=kind, weights=weights).sum()

    return jax.value_and_grad(total, argnums=(0, 1))(original, augmented)


def log_softmax(row: NDArray) -> list[float]:
    top = max(row)
    log_z = top + math.log(sum(math.exp(x - top) for x in row))
    return [float(x) - log_z for x in row]


def oracle(
    original: NDArray, augmented: NDArray, kind: str, temperature: float
) -> list[float]:
    rows = []
    for a, b in zip(original.astype(float), augmented.astype(float), strict=True):
        if kind == "ce":
            label = max(range(len(a)), key=lambda c: a[c])
            rows.append(-log_softmax(b)[label])
            continue
        pairs = list(
            zip(log_softmax(a / temperature), log_softmax(b / temperature), strict=True)
        )
        if kind == "mse":
            squares = [(math.exp(p) - math.exp(q)) ** 2 for p, q in pairs]
            rows.append(sum(squares) / len(squares))
        else:
            rows.append(sum(math.exp(q) * (q - p) for p, q in pairs))
    return rows


@pytest.mark.parametrize("case", cases_of("consistency"), ids=lambda c: c.name)
def test_reference_mask_as_weights(case: GoldenCase) -> None:
    arrays = on_device(case.arrays[0]["in"])
    rows = value_of(
        consistency_loss,
        arrays["outputs_original"],
        arrays["outputs_augmented"],
        kind=case.config["consistency_type"],
        temperature=case.config["temperature"],
        weights=arrays.get("confidence_mask"),
    )
    np.testing.assert_allclose(np.mean(rows), case.arrays[0]["out"]["loss"], rtol=2e-5)


@FEW
@given(
    kind=st.sampled_from(KINDS),
    shape=st.sampled_from([(1, 1), (3, 2), (4, 40), (2, 300)]),
    temperature=st.sampled_from([0.5, 1.0, 3.0]),
    scale=st.sampled_from([0.1, 1.0, 10.0]),
    seed=st.integers(0, 1000),
)
def test_matches_the_oracle(kind, shape, temperature, scale, seed) -> None:
    a, b = scale * values(2, *shape, seed=seed)
    got = value_of(
        consistency_loss,
        jax.device_put(a),
        jax.device_put(b),
        kind=kind,
        temperature=jnp.float32(temperature),
    )
    want = oracle(a, b, kind, temperature)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_divergence_is_taken_under_the_augmented_side() -> None:
    forward = np.asarray(value_of(consistency_loss, A, B, kind="kl"))
    backward = np.asarray(value_of(consistency_loss, B, A, kind="kl"))
    assert np.max(np.abs(forward - backward)) > 0.1
    np.testing.assert_allclose(forward, oracle(A, B, "kl", 1.0), rtol=1e-4)


def test_label_is_compared_at_temperature_one() -> None:
    hot = value_of(consistency_loss, A, B, kind="ce", temperature=5.0)
    np.testing.assert_allclose(hot, oracle(A, B, "ce", 1.0), rtol=1e-5)
    tempered = oracle(A, B / 5, "ce", 1.0)
    assert float(np.max(np.abs(np.asarray(hot) - tempered))) > 0.1


@pytest.mark.parametrize("kind", KINDS)
def test_gradients(kind: str) -> None:
    check_gradient(
        lambda a, b: consistency_loss(a, b, kind=kind, temperature=1.5).sum(), A, B
    )


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_rows_of_weight_zero_cannot_leak(kind: str, bad: float) -> None:
    weights = np.array([1.0, 0.0, 0.5, 0.0], np.float32)
    absent = weights[:, None] == 0
    poisoned = [np.where(absent, np.float32(bad), x) for x in (A, B)]
    clean = total_and_gradients(A, B, kind=kind, weights=weights)
    dirty = total_and_gradients(*poisoned, kind=kind, weights=weights)
    chex.assert_trees_all_equal(clean, dirty)
    rows = oracle(A, B, kind, 1.0)
    np.testing.assert_allclose(clean[0], rows[0] + rows[2] / 2, rtol=1e-5)
    for gradient in dirty[1]:
        np.testing.assert_array_equal(np.asarray(gradient)[weights == 0], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_weights_may_be_bool_and_all_zero(kind: str) -> None:
    nothing, a = np.zeros(4, bool), np.full((4, 6), np.nan, np.float32)
    rows = value_of(consistency_loss, a, a, kind=kind, weights=nothing)
    np.testing.assert_array_equal(rows, 0)


@pytest.mark.parametrize("kind", KINDS)
def test_a_class_masked_on_both_sides_is_absent(kind: str) -> None:
    absent = np.arange(6) == 2
    masked = (np.where(absent, np.float32(-np.inf), x) for x in (A, B))
    value, gradients = total_and_gradients(*masked, kind=kind)
    want = sum(oracle(np.delete(A, 2, 1), np.delete(B, 2, 1), kind, 1.0))
    # A mean over classes includes the absent one.
    np.testing.assert_allclose(value, want * (5 / 6 if kind == "mse" else 1), rtol=1e-5)
    for gradient in gradients:
        chex.assert_tree_all_finite(gradient)
        np.testing.assert_array_equal(np.asarray(gradient)[:, 2], 0)


@pytest.mark.parametrize("kind", KINDS)
def test_saturated_logits_stay_finite(kind: str) -> None:
    a, b = jnp.array([[1e4, -1e4, 0.0]]), jnp.array([[-1e4, 1e4, 0.0]])
    chex.assert_tree_all_finite(total_and_gradients(a, b, kind=kind))


def test_equal_outputs_agree() -> None:
    for kind in ("mse", "kl"):
        rows = value_of(consistency_loss, A, A, kind=kind)
        np.testing.assert_allclose(rows, 0, atol=1e-7)


def test_shapes_and_dtypes() -> None:
    low = A.reshape(2, 2, 6).astype(jnp.bfloat16)
    for kind in KINDS:
        rows = value_of(consistency_loss, low, low, kind=kind)
        chex.assert_shape(rows, (2, 2))
        chex.assert_type(rows, jnp.float32)
        one = value_of(consistency_loss, low[0, 0], low[0, 0], kind=kind)
        chex.assert_shape(one, ())
    for gradient in total_and_gradients(low, low[::-1], kind="mse")[1]:
        chex.assert_type(gradient, jnp.bfloat16)


def test_bad_arguments() -> None:
    a = jax.device_put(A)
    with pytest.raises(ValueError, match='"mse", "kl" or "ce", got \'l1\''):
        consistency_loss(a, a, kind="l1")
    with pytest.raises(ValueError, match=r"temperature must be in \(0, inf\), got 0"):
        consistency_loss(a, a, temperature=0.0)
    with untyped():
        with pytest.raises(ValueError, match="outputs_augmented must have the shape"):
            consistency_loss(a, jax.device_put(A[:, :4]))
        with pytest.raises(ValueError, match="weights must have the shape"):
            consistency_loss(a, a, weights=a)


@pytest.mark.parametrize("kind", KINDS)
def test_explicit_axes(kind: str) -> None:
    check_explicit_axes(
        lambda a, b, w: jnp.sum(consistency_loss(a, b, kind=kind, weights=w)),
        jax.device_put(A),
        jax.device_put(B),
        jnp.array([1.0, 0.0, 0.5, 1.0]),
    )


class Variants(VariantsCase):
    @with_and_without_jit
    def test_jit_changes_nothing(self) -> None:
        for kind in KINDS:
            rows = self.under(lambda a, b, kind=kind: consistency_loss(a, b, kind=kind))
            got = rows(jax.device_put(A), jax.device_put(B))
            np.testing.assert_allclose(got, oracle(A, B, kind, 1.0), rtol=1e-4)


def test_a_traced_temperature_does_not_recompile() -> None:
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def rows(temperature: jax.Array) -> jax.Array:
        return consistency_loss(
            jax.device_put(A), jax.device_put(B), temperature=temperature
        )

    cool, hot = rows(jnp.float32(1.0)), rows(jnp.float32(4.0))
    assert np.max(np.asarray(hot) / np.asarray(cool)) < 1
