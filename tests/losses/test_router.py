"""The router's load and its losses in one batch: oracles, masks, bad indices."""

import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from support.golden_cases import GoldenCase, assert_close, cases_of, on_device
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

from ava_jax.losses.router import (
    auxiliary_load_balancing_loss,
    auxiliary_router_z_loss,
    load_balancing_loss,
    router_load,
    router_z_loss,
    sequence_balance_loss,
)

GATES = values(6, 4)
CHOICES = np.array([[0, 1], [2, 0], [3, 1], [0, 3], [1, 2], [0, 2]], np.int32)
BALANCE_LOSSES = (load_balancing_loss, auxiliary_load_balancing_loss)
Z_LOSSES = (router_z_loss, auxiliary_router_z_loss)
AUXILIARY = [
    case
    for case in cases_of("unified")
    if case.config.get("use_auxiliary_loss") and case.config.get("num_experts")
]

# Oracles: float64, one token after another. ----------------------------------------


def softmax(row: NDArray) -> list[float]:
    exponentials = [math.exp(float(g) - float(max(row))) for g in row]
    return [e / sum(exponentials) for e in exponentials]


def log_z(row: NDArray) -> float:
    top = float(max(row))
    return top + math.log(sum(math.exp(float(g) - top) for g in row))


def load_oracle(
    gates: NDArray, choices: NDArray, keep: NDArray
) -> tuple[list[float], list[float], float]:
    experts = gates.shape[1]
    counts, scores, tokens = [0.0] * experts, [0.0] * experts, 0.0
    for gate, chosen, kept in zip(gates, choices, keep, strict=True):
        if not kept:
            continue
        tokens += 1
        for expert in chosen:
            if 0 <= expert < experts:
                counts[expert] += 1
        scores = [s + p for s, p in zip(scores, softmax(gate), strict=True)]
    return counts, scores, tokens


def auxiliary_oracle(gates: NDArray, choices: NDArray, keep: NDArray) -> float:
    counts, scores, tokens = load_oracle(gates, choices, keep)
    if not tokens:
        return 0.0
    dot = sum(p * c for p, c in zip(scores, counts, strict=True))
    return min(10.0, gates.shape[1] * dot / (tokens * choices.shape[1]) ** 2)


def switch_oracle(gates: NDArray, choices: NDArray, keep: NDArray) -> float:
    counts, scores, tokens = load_oracle(gates, choices, keep)
    if not tokens:
        return 0.0
    k = choices.shape[1]
    shares = [c / (tokens * k) for c in counts]
    means = [s / tokens for s in scores]
    products = [f * p for f, p in zip(shares, means, strict=True)]
    return gates.shape[1] * sum(products)


def sequence_oracle(scores: NDArray, choices: NDArray, keep: NDArray) -> float:
    rows = []
    for b in range(scores.shape[0]):
        kept = [t for t in range(scores.shape[1]) if keep[b, t]]
        if not kept:
            continue
        total = 0.0
        for e in range(scores.shape[2]):
            share = sum(int(c == e) for t in kept for c in choices[b, t])
            mass = sum(scores[b, t, e] / sum(scores[b, t]) for t in kept)
            total += share / len(kept) * mass / len(kept)
        rows.append(total * scores.shape[2] / choices.shape[2])
    return sum(rows) / len(rows) if rows else 0.0


def z_oracle(gates: NDArray, keep: NDArray) -> float:
    squares = [log_z(row) ** 2 for row, kept in zip(gates, keep, strict=True) if kept]
    return sum(squares) / len(squares) if squares else 0.0


# Against the reference and the oracles. --------------------------------------------


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("case", AUXILIARY, ids=lambda c: c.name)
def test_reference(case: GoldenCase, x64: bool) -> None:
    balance_weight = case.config.get("load_balancing_weight", 1e-4)
    z_weight = case.config.get("router_z_weight", 1e-3)
    tolerance = 1e-8 if x64 else 2e-5
    with jax.enable_x64(x64):
        for groups in case.arrays:
            inputs, out = on_device(groups["in"]), groups["out"]
            gates, choices = inputs["gate_logits"], inputs["expert_indices"]
            balance = value_of(auxiliary_load_balancing_loss, gates, choices)
            z = value_of(auxiliary_router_z_loss, gates)
            want = out["aux_load_balancing"]
            assert_close(balance_weight * balance, want, tolerance, "balance")
            assert_close(z_weight * z, out["aux_router_z"], tolerance, "z")


@st.composite
def routed(draw: st.DrawFn) -> tuple[NDArray, NDArray, NDArray]:
    """Gate logits, choices (some of no expert), and the unmasked tokens."""
    n, e, k = draw(st.sampled_from([(1, 1, 1), (5, 2, 1), (9, 6, 3)]))
    random = np.random.default_rng(draw(st.integers(0, 10_000)))
    gates = random.normal(size=(n, e)) * draw(st.sampled_from([0.1, 2.0, 30.0]))
    choices = random.integers(-2, e + 2, (n, k)).astype(np.int32)
    return gates.astype(np.float32), choices, random.random(n) < 0.7


@FEW
@given(routed())
def test_load_matches_the_oracle(batch: tuple[NDArray, NDArray, NDArray]) -> None:
    gates, choices, keep = batch
    dirty = jax.device_put(np.where(keep[:, None], gates, np.nan))
    mask = jax.device_put(np.where(keep, 0.3, 0.0))
    got = value_of(router_load, dirty, jax.device_put(choices), token_weights=mask)
    counts, scores, tokens = load_oracle(gates, choices, keep)
    np.testing.assert_array_equal(got.counts, counts)
    np.testing.assert_allclose(got.scores, scores, rtol=1e-5, atol=1e-6)
    assert float(got.tokens) == tokens


@FEW
@given(routed())
def test_balance_losses_match_the_oracles(batch) -> None:
    gates, choices, keep = batch
    dirty = jax.device_put(np.where(keep[:, None], gates, np.inf))
    options = {"token_weights": jax.device_put(keep)}
    for loss, oracle in zip(
        BALANCE_LOSSES, (switch_oracle, auxiliary_oracle), strict=True
    ):
        got = value_of(loss, dirty, jax.device_put(choices), **options)
        want = oracle(gates, choices, keep)
        np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)
    got = value_of(router_z_loss, dirty, **options)
    np.testing.assert_allclose(got, z_oracle(gates, keep), rtol=1e-5)
    got = value_of(auxiliary_router_z_loss, dirty, **options)
    want = min(100.0, z_oracle(np.clip(gates, -10, 10), keep))
    np.testing.assert_allclose(got, want, rtol=1e-5)


@FEW
@given(
    shape=st.sampled_from([(1, 1, 2, 1), (3, 4, 5, 2)]),
    seed=st.integers(0, 10_000),
    scale=st.sampled_from([0.5, 5.0]),
)
def test_sequence_balance_matches_the_oracle(shape, seed: int, scale: float) -> None:
    b, s, e, k = shape
    random = np.random.default_rng(seed)
    scores = 1 / (1 + np.exp(-scale * random.normal(size=(b, s, e))))
    choices, keep = random.integers(0, e, (b, s, k)), random.random((b, s)) < 0.6
    got = value_of(
        sequence_balance_loss,
        jax.device_put(np.where(keep[..., None], scores, np.nan)),
        jax.device_put(choices),
        token_weights=jax.device_put(keep),
    )
    want = sequence_oracle(scores, choices, keep)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


# What each loss is. ----------------------------------------------------------------


def test_loads_of_micro_batches_add_up() -> None:
    whole = value_of(router_load, GATES, CHOICES)
    parts = [
        jax.device_get(value_of(router_load, GATES[i : i + 2], CHOICES[i : i + 2]))
        for i in (0, 2, 4)
    ]
    total = jax.tree.map(lambda *x: sum(x), *parts)
    chex.assert_trees_all_close(whole, total, rtol=1e-6)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_uniform_routing_and_collapse(k: int) -> None:
    gates = np.zeros((8, 4), np.float32)
    choices = (np.arange(8)[:, None] + np.arange(k)) % 4
    even = value_of(load_balancing_loss, gates, choices)
    np.testing.assert_allclose(even, 1, rtol=1e-6)
    capped = value_of(auxiliary_load_balancing_loss, gates, choices)
    np.testing.assert_allclose(capped, 1 / k, rtol=1e-6)
    rows = value_of(sequence_balance_loss, gates[None] + np.float32(0.3), choices[None])
    np.testing.assert_allclose(rows, 1, rtol=1e-6)
    collapsed = np.tile(np.array([50, 0, 0, 0], np.float32), (8, 1))
    uneven = value_of(load_balancing_loss, collapsed, np.zeros_like(choices))
    np.testing.assert_allclose(uneven, 4, rtol=1e-5)


def test_sequence_balance_looks_at_each_row() -> None:
    # Each row uses one expert only, though the batch as a whole is even.
    scores = np.array([[[1, 0]] * 3, [[0, 1]] * 3], np.float32)
    choices = np.array([[[0]] * 3, [[1]] * 3])
    rows = value_of(sequence_balance_loss, scores, choices)
    np.testing.assert_allclose(rows, 2, rtol=1e-6)
    logits = 60 * scores.reshape(6, 2) - 30
    flat = value_of(load_balancing_loss, logits, choices.reshape(6, 1))
    np.testing.assert_allclose(flat, 1, rtol=1e-6)


def test_auxiliary_caps() -> None:
    gates = np.zeros((2, 64), np.float32)
    gates[:, 0] = 50
    choices = np.zeros((2, 1), np.int32)
    value, gradient = value_and_gradient(
        auxiliary_load_balancing_loss, gates, expert_indices=choices
    )
    assert float(value) == 10
    np.testing.assert_array_equal(gradient, 0)
    assert float(value_of(load_balancing_loss, gates, choices)) > 60
    value, gradient = value_and_gradient(auxiliary_router_z_loss, gates)
    assert float(value) == 100
    np.testing.assert_array_equal(gradient, 0)
    assert float(value_of(router_z_loss, gates)) > 2000


def test_gradient_at_the_clip() -> None:
    # Exactly at the bound the gradient is whole, outside it is nothing.
    whole = value_and_gradient(router_z_loss, jnp.array([[-10.0, -3.0, -10.0]]))
    got = value_and_gradient(auxiliary_router_z_loss, jnp.array([[-10.0, -3.0, -11.0]]))
    np.testing.assert_allclose(got[0], whole[0], rtol=1e-6)
    want = whole[1] * np.array([1, 1, 0], np.float32)
    np.testing.assert_allclose(got[1], want, rtol=1e-6)


# Gradients, masks, odd input. ------------------------------------------------------


def test_gradients() -> None:
    choices = jax.device_put(CHOICES)
    for loss in BALANCE_LOSSES:
        check_gradient(lambda g, loss=loss: loss(g, choices), GATES)
    for loss in Z_LOSSES:
        check_gradient(loss, GATES)
    scores = np.abs(GATES.reshape(2, 3, 4)) + 0.1
    check_gradient(lambda s: sequence_balance_loss(s, choices.reshape(2, 3, 2)), scores)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_tokens_of_weight_zero_change_nothing(bad: float) -> None:
    weights = np.array([1, 0, 0.5, 0, 1, 1], np.float32)
    kept = weights != 0
    gates = np.where(kept[:, None], GATES, np.float32(bad))
    for loss in (*BALANCE_LOSSES, *Z_LOSSES):
        routed = {"expert_indices": CHOICES} if loss in BALANCE_LOSSES else {}
        value, gradient = jax.device_get(
            value_and_gradient(loss, gates, token_weights=weights, **routed)
        )
        routed = {name: choices[kept] for name, choices in routed.items()}
        want = value_and_gradient(loss, gates[kept], **routed)
        chex.assert_trees_all_close((value, gradient[kept]), want, rtol=1e-5)
        np.testing.assert_array_equal(gradient[~kept], 0)


def test_no_tokens_is_zero() -> None:
    gates, nothing = np.full((3, 2), np.nan, np.float32), np.zeros(3, bool)
    choices = np.zeros((3, 1), np.int32)
    zeros = (np.float32(0), np.zeros((3, 2), np.float32))
    for loss in BALANCE_LOSSES:
        got = value_and_gradient(
            loss, gates, expert_indices=choices, token_weights=nothing
        )
        chex.assert_trees_all_equal(got, zeros)
    for loss in Z_LOSSES:
        got = value_and_gradient(loss, gates, token_weights=nothing)
        chex.assert_trees_all_equal(got, zeros)
    got = value_and_gradient(
        sequence_balance_loss,
        gates[None],
        expert_indices=choices[None],
        token_weights=nothing[None],
    )
    chex.assert_trees_all_equal(got, (zeros[0], zeros[1][None]))
    load = value_of(router_load, gates, choices, token_weights=nothing)
    chex.assert_trees_all_equal(load, jax.tree.map(np.zeros_like, load))


@pytest.mark.parametrize("bad", [-1, -4, 4, 10**6, -100])
def test_an_index_outside_is_no_expert(bad: int) -> None:
    choices = CHOICES.copy()
    choices[2] = bad
    counts = value_of(router_load, GATES, choices).counts
    expected = np.bincount(np.delete(CHOICES, 2, 0).ravel(), minlength=4)
    np.testing.assert_array_equal(counts, expected)


def test_a_masked_expert_has_no_probability() -> None:
    gates, choices = GATES.copy(), CHOICES % 3
    gates[:, 3] = -np.inf
    scores = np.asarray(value_of(router_load, gates, choices).scores)
    assert scores[3] == 0
    for loss in BALANCE_LOSSES:
        value, gradient = value_and_gradient(loss, gates, expert_indices=choices)
        chex.assert_tree_all_finite((value, gradient))
        np.testing.assert_array_equal(np.asarray(gradient)[:, 3], 0)
    value, gradient = value_and_gradient(router_z_loss, gates)
    np.testing.assert_allclose(value, z_oracle(GATES[:, :3], np.ones(6)), rtol=1e-5)
    np.testing.assert_array_equal(np.asarray(gradient)[:, 3], 0)


def test_low_precision_inputs() -> None:
    low, choices = jnp.asarray(GATES, jnp.bfloat16), jnp.asarray(CHOICES, jnp.uint8)
    load = value_of(router_load, low, choices)
    chex.assert_type(jax.tree.leaves(load), jnp.float32)
    got = value_and_gradient(load_balancing_loss, low, expert_indices=choices)
    chex.assert_type(got, [jnp.float32, jnp.bfloat16])
    got = value_and_gradient(router_z_loss, low)
    chex.assert_type(got, [jnp.float32, jnp.bfloat16])


def test_shapes_and_types_that_do_not_fit() -> None:
    gates, choices = jax.device_put(GATES), jax.device_put(CHOICES)
    with untyped():
        for loss in (*BALANCE_LOSSES, router_load):
            with pytest.raises(
                ValueError, match=r"expert_indices must be .* got \(5, 2\)"
            ):
                loss(gates, choices[:5])
            with pytest.raises(TypeError, match=r"integers, got float32"):
                loss(gates, choices.astype(jnp.float32))
            with pytest.raises(ValueError, match=r"token_weights .*\(6,\).*\(5,\)"):
                loss(gates, choices, token_weights=jnp.ones(5))
        for loss in Z_LOSSES:
            with pytest.raises(ValueError, match=r"token_weights .*\(6,\).*\(2,\)"):
                loss(gates, token_weights=jnp.ones(2))
        with pytest.raises(ValueError, match=r"expert_indices must be"):
            sequence_balance_loss(gates[None], choices)


def test_layers_by_vmap() -> None:
    gates = values(3, 6, 4)
    by_layer = jax.jit(jax.vmap(load_balancing_loss, in_axes=(0, None)))
    layers = by_layer(gates, CHOICES)
    singly = [value_of(load_balancing_loss, layer, CHOICES) for layer in gates]
    np.testing.assert_allclose(layers, singly, rtol=1e-5)


def test_explicit_axes() -> None:
    gates, choices = jax.device_put(GATES), jax.device_put(CHOICES)
    weights = jnp.array([1.0, 0.0, 1.0, 1.0, 1.0, 1.0])
    for loss in BALANCE_LOSSES:
        check_explicit_axes(loss, gates, choices)
        check_explicit_axes(
            lambda g, c, w, loss=loss: loss(g, c, token_weights=w),
            gates,
            choices,
            weights,
        )
    for loss in Z_LOSSES:
        check_explicit_axes(loss, gates)
    scores = jax.device_put(1 / (1 + np.exp(-GATES.reshape(2, 3, 4))))
    check_explicit_axes(
        sequence_balance_loss, scores, jax.device_put(CHOICES.reshape(2, 3, 2))
    )


class Variants(VariantsCase):
    @with_and_without_jit
    def test_jit_changes_nothing(self) -> None:
        gates, choices = jax.device_put(GATES), jax.device_put(CHOICES)
        everything = np.ones(6)
        got = self.under(load_balancing_loss)(gates, choices)
        want = switch_oracle(GATES, CHOICES, everything)
        np.testing.assert_allclose(got, want, rtol=1e-5)
        got = self.under(router_z_loss)(gates)
        np.testing.assert_allclose(got, z_oracle(GATES, everything), rtol=1e-5)
