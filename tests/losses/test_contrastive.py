"""Contrastive losses: naive loops, masks, pairs, degenerate rows."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.contrastive_oracles import (
    Pairs,
    infonce_oracle,
    margin_oracle,
    mean,
    rows_of,
    split_pairs,
    triplet_oracle,
)
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

from ava_jax.losses.contrastive import (
    contrastive_infonce_loss,
    contrastive_margin_loss,
    contrastive_triplet_loss,
)

X = values(6, 3)
LABELS = np.array([0, 1, 0, 2, 1, 0])
ONES = np.ones((3, 2), np.float32)
LABEL_LOSSES = (
    contrastive_margin_loss,
    contrastive_triplet_loss,
    contrastive_infonce_loss,
)

# Against the oracles. --------------------------------------------------------------


@st.composite
def labelled(draw: st.DrawFn) -> tuple[NDArray, NDArray, NDArray]:
    """Embeddings (zero and equal rows among them), labels, and the unmasked rows."""
    # Few shapes, each compiled once; the mask varies the number of rows.
    n, d = draw(st.sampled_from([(1, 1), (3, 4), (7, 2)]))
    numbers = st.lists(st.integers(-4, 4), min_size=d, max_size=d)
    x = draw(st.lists(numbers, min_size=n, max_size=n))
    labels = draw(st.lists(st.integers(0, 2), min_size=n, max_size=n))
    keep = draw(st.lists(st.booleans(), min_size=n, max_size=n))
    return np.array(x, np.float32) / 2, np.array(labels), np.array(keep)


def poisoned(x: NDArray, keep: NDArray) -> jax.Array:
    return jax.device_put(np.where(keep[..., None], x, np.nan))


@FEW
@given(labelled(), st.booleans())
def test_label_losses_match_the_oracles(batch, normalize: bool) -> None:
    x, labels, keep = batch
    given_rows = {
        "labels": jax.device_put(labels),
        "mask": jax.device_put(keep),
        "normalize": normalize,
    }
    dirty = poisoned(x, keep)
    x, labels = x[keep], labels[keep]
    same, other = split_pairs(labels)
    got = value_of(contrastive_margin_loss, dirty, margin=1.3, **given_rows)
    want = margin_oracle(x, same, other, 1.3, normalize)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    got = value_of(contrastive_triplet_loss, dirty, margin=0.4, **given_rows)
    want = triplet_oracle(x, labels, 0.4, normalize)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    got = value_of(contrastive_infonce_loss, dirty, temperature=0.5, **given_rows)
    want = infonce_oracle(x, same, None, 0.5, normalize)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


PAIRS = st.lists(
    st.tuples(st.integers(-2, 8), st.integers(-2, 8)), min_size=5, max_size=5
)


@FEW
@given(labelled(), PAIRS, PAIRS, st.booleans())
def test_pair_losses_match_the_oracles(
    batch, positive: Pairs, negative: Pairs, normalize: bool
) -> None:
    x, _, keep = batch
    n = len(x)

    def valid(pairs: Pairs) -> Pairs:
        inside = [(i, j) for i, j in pairs if 0 <= i < n and 0 <= j < n]
        return [(i, j) for i, j in inside if keep[i] and keep[j] and i != j]

    named = {
        "positive_pairs": jnp.asarray(positive, jnp.int32).reshape(-1, 2),
        "negative_pairs": jnp.asarray(negative, jnp.int32).reshape(-1, 2),
        "mask": jax.device_put(keep),
        "normalize": normalize,
    }
    got = value_of(contrastive_margin_loss, poisoned(x, keep), margin=1.3, **named)
    want = margin_oracle(x, valid(positive), valid(negative), 1.3, normalize)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)
    got = value_of(
        contrastive_infonce_loss, poisoned(x, keep), temperature=0.5, **named
    )
    want = infonce_oracle(x, valid(positive), valid(negative), 0.5, normalize)
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


# What each loss is. ----------------------------------------------------------------


def test_infonce_is_the_outside_form() -> None:
    got = float(value_of(contrastive_infonce_loss, X, labels=LABELS, temperature=0.5))
    z, inside, with_self = rows_of(X), [], []
    for i in range(6):
        others = [j for j in range(6) if j != i]
        mine = [j for j in others if LABELS[j] == LABELS[i]]
        p = {j: math.exp(float(z[i] @ z[j]) / 0.5) for j in range(6)}
        total = sum(p[j] for j in others)
        if mine:
            inside.append(-math.log(mean([p[j] for j in mine]) / total))
            with_self.append(-mean([math.log(p[j] / sum(p.values())) for j in mine]))
    assert abs(got - mean(inside)) > 0.01
    assert abs(got - mean(with_self)) > 0.1
    want = infonce_oracle(X, split_pairs(LABELS)[0], None, 0.5, True)
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_infonce_of_halves_is_the_mean_cross_entropy_of_both_directions() -> None:
    z = X.astype(float) / np.linalg.norm(X.astype(float), axis=-1, keepdims=True)
    scores = np.where(np.eye(6, dtype=bool), -np.inf, z @ z.T / 0.07)
    log_z = np.log(np.exp(scores).sum(-1))
    partner = np.array([3, 4, 5, 0, 1, 2])
    want = (log_z - scores[np.arange(6), partner]).mean()
    got = value_of(contrastive_infonce_loss, X)
    np.testing.assert_allclose(got, want, rtol=1e-5)
    halves = np.array([0, 1, 2, 0, 1, 2])
    labels = value_of(contrastive_infonce_loss, X, labels=halves)
    np.testing.assert_allclose(got, labels, rtol=1e-6)
    pairs = np.array([[0, 3], [4, 1], [2, 5], [5, 2], [-1, -1], [2, 2], [0, 6]])
    pairs = value_of(contrastive_infonce_loss, X, positive_pairs=pairs)
    np.testing.assert_allclose(got, pairs, rtol=1e-6)


def test_a_masked_half_leaves_its_partner_without_a_positive() -> None:
    mask = np.array([1, 1, 0, 1, 1, 1])
    got = value_of(contrastive_infonce_loss, X, mask=mask)
    others, pairs = np.delete(X, 2, 0), np.array([[0, 2], [1, 3]])
    want = value_of(contrastive_infonce_loss, others, positive_pairs=pairs)
    np.testing.assert_allclose(got, want, rtol=1e-6)


def test_negative_pairs_narrow_the_choice() -> None:
    def loss(negative: NDArray | None) -> float:
        return float(
            value_of(
                contrastive_infonce_loss,
                X,
                positive_pairs=np.array([[0, 1]]),
                negative_pairs=negative,
                temperature=1.0,
            )
        )

    assert loss(np.zeros((0, 2), np.int32)) == pytest.approx(0, abs=1e-6)
    assert loss(None) > loss(np.array([[2, 0]])) > 0.01


def test_triplet_takes_the_hardest_pair_not_the_mean() -> None:
    x = np.array([[0, 0], [1, 0], [3, 0], [0, 2], [0, 9]], np.float32)
    labels = np.array([0, 0, 0, 1, 2])
    got = value_of(
        contrastive_triplet_loss, x, labels=labels, margin=0.5, normalize=False
    )
    # Only the first three have a positive: 0.5 + 3 − 2, 0.5 + 2 − √5, 0.5 + 3 − √13.
    want = (1.5 + 2.5 - math.sqrt(5) + 0.0) / 3
    np.testing.assert_allclose(got, want, rtol=1e-5)


def test_embeddings_are_normalised_by_default() -> None:
    scaled = X * np.array([1.0, 9.0, 0.1, 3.0, 2.0, 50.0], np.float32)[:, None]
    for loss in LABEL_LOSSES:
        want = value_and_gradient(loss, X, labels=LABELS)[0]
        got = value_and_gradient(loss, scaled, labels=LABELS)[0]
        np.testing.assert_allclose(got, want, rtol=1e-4)
        raw = value_of(loss, scaled, labels=LABELS, normalize=False)
        assert abs(float(raw) / float(want) - 1) > 0.1


# Gradients and rows that have none. ------------------------------------------------


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients(normalize: bool) -> None:
    labels = jnp.asarray(LABELS, jnp.int32)
    positive, negative = jnp.array([[0, 1], [2, 3]]), jnp.array([[0, 4], [5, 2]])
    for loss in LABEL_LOSSES:
        check_gradient(
            lambda x, loss=loss: loss(x, labels=labels, normalize=normalize), X
        )
    for loss in (contrastive_margin_loss, contrastive_infonce_loss):
        check_gradient(
            lambda x, loss=loss: loss(
                x,
                positive_pairs=positive,
                negative_pairs=negative,
                normalize=normalize,
            ),
            X,
        )
    check_gradient(lambda x: contrastive_infonce_loss(x, normalize=normalize), X)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_zero_and_equal_rows_have_finite_gradients(loss, normalize: bool) -> None:
    x = np.array([[0, 0], [0, 0], [3, 4], [3, 4], [3, 4]], np.float32)
    for labels in ([0, 0, 1, 1, 1], [0, 1, 0, 1, 2]):
        value, gradient = value_and_gradient(
            loss, x, labels=np.array(labels), normalize=normalize
        )
        chex.assert_tree_all_finite((value, gradient))
        # With a clamped norm alone this would be about 1e12.
        assert np.max(np.abs(gradient)) < 100


@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_no_nan_is_made_on_the_way(loss) -> None:
    rows = [[0, 0, 0], [3, 4, 0], [3, 4, 0], [1, 0, 0], [2, 1, 0], [0, 0, 0]]
    x, mask = jnp.array(rows, jnp.float32), jnp.array([1, 1, 1, 1, 0, 0])
    with jax.debug_nans(True):
        for labels in ([0, 1, 1, 2, 1, 2], [0, 1, 2, 3, 4, 5], [0, 0, 0, 0, 0, 0]):
            gradient = jax.grad(loss)(x, labels=jnp.array(labels), mask=mask)
            chex.assert_tree_all_finite(gradient)


@pytest.mark.parametrize("loss", LABEL_LOSSES)
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_masked_rows_change_nothing(loss, bad: float) -> None:
    mask = np.array([1.0, 1.0, 0.0, 1.0, 0.5, 0.0], np.float32)
    x = np.where(mask[:, None] != 0, X, bad)
    value, gradient = jax.device_get(
        value_and_gradient(loss, x, labels=LABELS, mask=mask)
    )
    kept = value_and_gradient(loss, x[mask != 0], labels=LABELS[mask != 0])
    chex.assert_trees_all_close((value, gradient[mask != 0]), kept, rtol=1e-5)
    np.testing.assert_array_equal(gradient[mask == 0], 0)


def test_a_row_in_no_pair_may_hold_nan() -> None:
    x = np.append(X[:5], np.full((1, 3), np.nan, np.float32), axis=0)
    positive, negative = jnp.array([[0, 1]]), jnp.array([[2, 3], [-1, 4], [4, 6]])

    def loss(rows: jax.Array) -> jax.Array:
        return contrastive_margin_loss(
            rows, positive_pairs=positive, negative_pairs=negative
        )

    value, gradient = value_and_gradient(loss, x)
    np.testing.assert_allclose(
        value, margin_oracle(X, [(0, 1)], [(2, 3)], 0.5, True), rtol=1e-5
    )
    np.testing.assert_array_equal(np.asarray(gradient)[4:], 0)


@pytest.mark.parametrize("loss", LABEL_LOSSES)
def test_nothing_to_compare_is_zero(loss) -> None:
    zeros, labels = np.zeros((4, 2), np.float32), np.array([0, 0, 1, 1])
    got = value_and_gradient(loss, zeros + np.nan, labels=labels, mask=np.zeros(4))
    chex.assert_trees_all_equal(got, (np.float32(0), zeros))
    got = value_and_gradient(loss, zeros[:0], labels=labels[:0])
    chex.assert_trees_all_equal(got, (np.float32(0), zeros[:0]))
    lonely = value_of(loss, zeros[:1] + 1, labels=labels[:1])
    np.testing.assert_array_equal(lonely, 0)


def test_an_empty_side_is_zero() -> None:
    equal, different = np.zeros(6, np.int32), np.arange(6, dtype=np.int32)
    both = value_of(contrastive_margin_loss, X, labels=equal)
    want = margin_oracle(X, split_pairs(np.zeros(6))[0], [], 0.5, True)
    np.testing.assert_allclose(both, want, rtol=1e-5)
    pushed = value_of(contrastive_margin_loss, X, labels=different, margin=1.5)
    want = margin_oracle(X, [], split_pairs(np.arange(6))[1], 1.5, True)
    np.testing.assert_allclose(pushed, want, rtol=1e-5)
    one = value_of(contrastive_margin_loss, X, positive_pairs=np.array([[0, 1]]))
    np.testing.assert_allclose(
        one, margin_oracle(X, [(0, 1)], [], 0.5, True), rtol=1e-5
    )
    for labels in (equal, different):
        triplet = value_of(contrastive_triplet_loss, X, labels=labels)
        np.testing.assert_array_equal(triplet, 0)
    infonce = value_of(contrastive_infonce_loss, X, labels=different)
    np.testing.assert_array_equal(infonce, 0)


# Types, errors, size. --------------------------------------------------------------


def test_low_precision_inputs() -> None:
    low = X.astype(jnp.bfloat16)
    for loss in LABEL_LOSSES:
        value, gradient = value_and_gradient(loss, low, labels=LABELS)
        chex.assert_type([value, gradient], [jnp.float32, jnp.bfloat16])
        exact = value_and_gradient(loss, low.astype(np.float32), labels=LABELS)[0]
        np.testing.assert_array_equal(value, exact)


def test_inputs_that_do_not_go_together() -> None:
    x, labels, pairs = (jnp.array(n) for n in (ONES, [0, 1, 2], [[0, 1]]))
    with pytest.raises(ValueError, match="needs labels, or positive_pairs"):
        contrastive_margin_loss(x)
    for loss in (contrastive_margin_loss, contrastive_infonce_loss):
        with pytest.raises(ValueError, match="labels together with positive_pairs"):
            loss(x, labels=labels, positive_pairs=pairs)
        with pytest.raises(ValueError, match="or negative_pairs"):
            loss(x, labels=labels, negative_pairs=pairs)
    with pytest.raises(ValueError, match="negative_pairs needs positive_pairs"):
        contrastive_infonce_loss(x, negative_pairs=pairs)
    with pytest.raises(ValueError, match=r"even number of rows, got 3"):
        contrastive_infonce_loss(x)
    with pytest.raises(ValueError, match=r"temperature must be in \(0, inf\), got -1"):
        contrastive_infonce_loss(x, labels=labels, temperature=-1.0)


def test_shapes_that_do_not_fit() -> None:
    x, labels = jnp.array(ONES), jnp.array([0, 1, 2])
    with untyped():
        for loss in LABEL_LOSSES:
            with pytest.raises(ValueError, match=r"labels .*\(3,\).* got \(2,\)"):
                loss(x, labels=labels[:2])
            with pytest.raises(ValueError, match=r"mask .*\(3,\).* got \(4,\)"):
                loss(x, labels=labels, mask=jnp.array([1, 1, 1, 1]))
            with pytest.raises(ValueError, match=r"embeddings must be \[N, D\]"):
                loss(x[None], labels=labels)
        for loss in (contrastive_margin_loss, contrastive_infonce_loss):
            with pytest.raises(ValueError, match=r"positive_pairs must be \[P, 2\]"):
                loss(x, positive_pairs=labels)


@pytest.mark.parametrize("loss", [contrastive_margin_loss, contrastive_triplet_loss])
def test_distances_hold_no_array_of_all_differences(loss) -> None:
    n, d = 128, 256
    x, labels = jnp.ones((n, d)), jnp.arange(n) % 8
    step = jax.jit(jax.value_and_grad(lambda y: loss(y, labels=labels)))
    memory = step.lower(x).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < n * n * d * 4 / 4


def test_explicit_axes() -> None:
    x, labels, mask = (
        jax.device_put(X),
        jax.device_put(LABELS),
        jnp.array([1, 1, 1, 1, 0, 1]),
    )
    for loss in LABEL_LOSSES:
        check_explicit_axes(
            lambda x, labels, mask, loss=loss: loss(x, labels=labels, mask=mask),
            x,
            labels,
            mask,
        )
    pairs = jnp.array([[0, 1], [2, 3], [5, 0], [-1, 2]])
    for loss in (contrastive_margin_loss, contrastive_infonce_loss):
        check_explicit_axes(
            lambda x, pairs, loss=loss: loss(x, positive_pairs=pairs), x, pairs
        )
    check_explicit_axes(contrastive_infonce_loss, x)


class Variants(VariantsCase):
    @with_and_without_jit
    def test_jit_changes_nothing(self) -> None:
        same, other = split_pairs(LABELS)
        wants = (
            margin_oracle(X, same, other, 0.5, True),
            triplet_oracle(X, LABELS, 0.5, True),
            infonce_oracle(X, same, None, 0.07, True),
        )
        for loss, want in zip(LABEL_LOSSES, wants, strict=True):
            got = self.under(lambda x, y, loss=loss: loss(x, labels=y))(
                jax.device_put(X), jax.device_put(LABELS)
            )
            np.testing.assert_allclose(got, want, rtol=1e-4)


def test_new_numbers_do_not_recompile() -> None:
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(x: jax.Array, labels: jax.Array) -> list[jax.Array]:
        return [loss(x, labels=labels) for loss in LABEL_LOSSES]

    first = step(jax.device_put(X), jax.device_put(LABELS))
    second = step(jax.device_put(X), jax.device_put(LABELS[::-1].copy()))
    assert all(float(a) != float(b) for a, b in zip(first, second, strict=True))
