"""Expert balance over steps, bias and routing: reference numbers, oracles."""

import functools
import math

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.golden_cases import GoldenCase, assert_close, cases_of, on_device
from support.loss_checks import (
    FEW,
    VariantsCase,
    check_explicit_axes,
    untyped,
    value_and_gradient,
    value_of,
    values,
    with_and_without_jit,
)

from ava_jax.losses.moe import (
    coefficient_of_variation,
    expert_balance_ratio,
    gradient_balance_loss,
    max_violation,
    route,
    update_bias,
    update_gradient_balance,
)
from ava_jax.losses.router import (
    RouterLoad,
    auxiliary_load_balancing_loss,
    auxiliary_router_z_loss,
    router_load,
)
from ava_jax.state import BiasBalanceState, GradientBalanceState

BALANCED = [c for c in cases_of("unified") if c.config.get("use_moe_balancing")]
GATES = values(5, 3)


def fresh(experts: int) -> GradientBalanceState:
    zeros = jnp.asarray(np.zeros(experts), jnp.result_type(float))
    none = jnp.asarray(np.zeros(()), zeros.dtype)
    return GradientBalanceState(counts=zeros, scores=zeros, tokens=none)


def balance_of(counts: list[float], tokens: float) -> GradientBalanceState:
    return GradientBalanceState(
        counts=jnp.array(counts), scores=jnp.array(counts), tokens=jnp.array(tokens)
    )


def load_of(counts: list[float], scores: list[float], tokens: float) -> RouterLoad:
    return RouterLoad(
        counts=jnp.array(counts), scores=jnp.array(scores), tokens=jnp.array(tokens)
    )


# Against the reference. ------------------------------------------------------------


@jax.jit
def balance_step(
    state: GradientBalanceState, gates: jax.Array, choices: jax.Array, weight: float
) -> tuple[GradientBalanceState, dict[str, jax.Array]]:
    """The state after a step, and what the reference has of the step."""
    state = update_gradient_balance(state, router_load(gates, choices))
    ratio = expert_balance_ratio(state)
    return state, {
        "expert_counts": state.counts,
        "expert_scores": state.scores,
        "total_tokens": state.tokens,
        "moe_balancing_term": gradient_balance_loss(gates, state, weight=weight),
        "moe_expert_balance_ratio": ratio,
        "moe_cv": coefficient_of_variation(ratio),
    }


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("case", BALANCED, ids=lambda c: c.name)
def test_reference_balance(case: GoldenCase, x64: bool) -> None:
    """State, term, ratio and variation at every step."""
    weight = case.config.get("gradient_balance_weight", 0.1)
    with jax.enable_x64(x64):
        state = fresh(case.config["num_experts"])
        for groups in case.arrays:
            inputs = on_device(groups["in"])
            gates, choices = inputs["gate_logits"], inputs["expert_indices"]
            state, got = balance_step(state, gates, choices, weight)
            want = groups["out"] | {
                key.removeprefix("moe_balancing."): value
                for key, value in groups["state"].items()
            }
            for key, value in got.items():
                assert_close(value, want[key], 1e-8 if x64 else 2e-5, key)


@jax.jit
def gradient_of_gates(
    fresh: GradientBalanceState,
    gates: jax.Array,
    choices: jax.Array,
    weights: dict[str, float],
) -> jax.Array:
    """The gradient of a first step's router terms."""
    state = update_gradient_balance(fresh, router_load(gates, choices))

    def total(gate: jax.Array) -> jax.Array:
        loss = gradient_balance_loss(gate, state, weight=weights["balance"])
        if "z" in weights:
            loss += weights["even"] * auxiliary_load_balancing_loss(gate, choices)
            loss += weights["z"] * auxiliary_router_z_loss(gate)
        return loss

    return jax.grad(total)(gates)


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("case", BALANCED, ids=lambda c: c.name)
def test_reference_gradient_of_the_gates(case: GoldenCase, x64: bool) -> None:
    """Nothing but the three router terms depends on the gate logits."""
    config = case.config
    weights = {"balance": config.get("gradient_balance_weight", 0.1)}
    if config.get("use_auxiliary_loss"):
        weights["even"] = config.get("load_balancing_weight", 1e-4)
        weights["z"] = config.get("router_z_weight", 1e-3)
    with jax.enable_x64(x64):
        inputs = on_device(case.arrays[0]["in"])
        gates, choices = inputs["gate_logits"], inputs["expert_indices"]
        state = fresh(config["num_experts"])
        gradient = np.asarray(gradient_of_gates(state, gates, choices, weights))
    want = case.arrays[0]["grad"]["gate_logits"]
    # `assert_close` is relative only above 1e-3, and these are below.
    scale = 1 / float(np.max(np.abs(want)))
    tolerance = 1e-7 if x64 else 2e-5
    assert_close(gradient * scale, want * scale, tolerance, "gate_logits")


# The running balance. --------------------------------------------------------------


def test_balance_is_an_average_from_zero() -> None:
    state = fresh(2)
    for counts, scores, tokens in (
        ([3.0, 1.0], [1.2, 0.8], 2.0),
        ([0.0, 8.0], [4.0, 4.0], 8.0),
    ):
        load = load_of(counts, scores, tokens)
        state = value_of(update_gradient_balance, state, load, momentum=0.75)
    np.testing.assert_allclose(state.counts, [0.5625, 2.1875])
    np.testing.assert_allclose(state.scores, [0.1125 + 0.125, 0.075 + 0.125], rtol=1e-6)
    np.testing.assert_allclose(state.tokens, 2.375)


def test_a_step_without_tokens_changes_no_balance() -> None:
    state = balance_of([3.0, 1.0], 2.0)
    nothing = load_of([0.0, 0.0], [0.0, 0.0], 0.0)
    got = value_of(update_gradient_balance, state, nothing)
    chex.assert_trees_all_equal(got, state)
    bias = BiasBalanceState(bias=jnp.array([0.25, 0.5]))
    got = value_of(update_bias, bias, nothing.counts)
    chex.assert_trees_all_equal(got, bias)


def test_states_keep_their_dtype() -> None:
    with jax.enable_x64(True):
        narrow = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), fresh(2))
        load = load_of([3.0, 1.0], [1.2, 0.8], 2.0)
        new = jax.eval_shape(update_gradient_balance, narrow, load)
        chex.assert_trees_all_equal_dtypes(new, narrow)
        bias = BiasBalanceState(bias=narrow.counts)
        new = jax.eval_shape(update_bias, bias, load.counts)
        chex.assert_trees_all_equal_dtypes(new, bias)


@pytest.mark.parametrize("momentum", [-0.1, 1.0])
def test_momentum_out_of_range(momentum: float) -> None:
    load = load_of([1.0, 1.0], [1.0, 1.0], 2.0)
    with pytest.raises(ValueError, match=rf"momentum .* got {momentum}"):
        update_gradient_balance(fresh(2), load, momentum=momentum)


def pull_oracle(counts: list[float], tokens: float, weight: float) -> list[float]:
    even = tokens / len(counts)
    return [-weight * (c - even) / tokens if tokens else 0.0 for c in counts]


@FEW
@given(
    counts=st.lists(st.integers(0, 9), min_size=4, max_size=4),
    tokens=st.integers(0, 9),
    weight=st.sampled_from([0.1, 0.3, 1.0]),
    keep=st.lists(st.booleans(), min_size=5, max_size=5),
    scale=st.sampled_from([1.0, 1e4]),
)
def test_gradient_balance_matches_the_oracle(
    counts, tokens, weight, keep, scale: float
) -> None:
    gates = scale * values(5, 4)
    kept = [row for row, k in zip(gates.astype(float), keep, strict=True) if k]
    a = pull_oracle(counts, tokens, weight)
    # g − (g + a) in float64, as the formula says.
    squares = [
        (g - (g + pull)) ** 2 for row in kept for g, pull in zip(row, a, strict=True)
    ]
    entries = len(squares)
    want = weight * sum(squares) / entries if entries else 0.0
    value, gradient = value_and_gradient(
        gradient_balance_loss,
        jax.device_put(np.where(np.array(keep)[:, None], gates, np.nan)),
        balance=balance_of([float(c) for c in counts], float(tokens)),
        weight=weight,
        token_weights=np.array(keep),
    )
    np.testing.assert_allclose(value, want, rtol=1e-4, atol=1e-9)
    per_expert = [-2 * weight * pull / max(entries, 1) for pull in a]
    expected = np.where(np.array(keep)[:, None], per_expert, 0)
    np.testing.assert_allclose(gradient, expected, rtol=1e-5, atol=1e-9)


def test_balance_pulls_busy_experts_down() -> None:
    balance = balance_of([3.0, 1.0, 2.0], 6.0)
    _, gradient = value_and_gradient(
        gradient_balance_loss, GATES, balance=balance, weight=0.1
    )
    gradient = np.asarray(gradient)
    assert np.all(gradient[:, 0] > 0)
    assert np.all(gradient[:, 1] < 0)
    np.testing.assert_allclose(gradient[:, 2], 0, atol=1e-9)


def test_a_masked_expert_gets_no_gradient_from_balance() -> None:
    gates = GATES.copy()
    gates[:, 0] = -np.inf
    balance = balance_of([3.0, 1.0, 2.0], 6.0)
    options = {"balance": balance, "weight": 0.1}
    value, gradient = value_and_gradient(gradient_balance_loss, gates, **options)
    whole = value_and_gradient(gradient_balance_loss, GATES, **options)
    np.testing.assert_array_equal(value, whole[0])
    want = np.array(whole[1])
    want[:, 0] = 0
    np.testing.assert_array_equal(gradient, want)


def test_balance_of_nothing_is_zero() -> None:
    zeros = np.zeros((5, 3), np.float32)
    got = value_and_gradient(gradient_balance_loss, GATES, balance=fresh(3), weight=0.1)
    chex.assert_trees_all_equal(got, (np.float32(0), zeros))
    got = value_and_gradient(
        gradient_balance_loss,
        zeros + np.nan,
        balance=balance_of([3.0, 1.0, 2.0], 6.0),
        weight=0.1,
        token_weights=np.zeros(5, np.float32),
    )
    chex.assert_trees_all_equal(got, (np.float32(0), zeros))


def test_another_number_of_experts() -> None:
    with untyped(), pytest.raises(ValueError, match=r"3 experts, .* has 2; set num_ex"):
        gradient_balance_loss(jax.device_put(GATES), fresh(2), weight=0.1)


def diagnostics(
    loads: jax.Array, balance: GradientBalanceState
) -> tuple[jax.Array, jax.Array, jax.Array]:
    ratio = expert_balance_ratio(balance)
    return coefficient_of_variation(loads), max_violation(loads), ratio


@FEW
@given(st.lists(st.integers(0, 50), min_size=1, max_size=6))
def test_diagnostics_match_the_oracles(counts: list[int]) -> None:
    loads, n = jnp.array(counts, jnp.float32), len(counts)
    mean = sum(counts) / n
    spread = math.sqrt(sum((c - mean) ** 2 for c in counts) / max(n - 1, 1))
    balance = balance_of([float(c) for c in counts], 8.0)
    variation, violation, ratio = value_of(diagnostics, loads, balance)
    want = spread / (mean + 1e-6)
    np.testing.assert_allclose(variation, want, rtol=1e-5, atol=1e-6)
    worst = max(counts) / mean - 1 if mean else 0.0
    np.testing.assert_allclose(violation, worst, rtol=1e-5, atol=1e-6)
    want = [c / (8 / n + 1e-6) for c in counts]
    np.testing.assert_allclose(ratio, want, rtol=1e-5)


# Bias and routing. -----------------------------------------------------------------


@FEW
@given(
    counts=st.lists(st.integers(0, 5), min_size=4, max_size=4),
    bias=st.lists(st.integers(-4, 4), min_size=4, max_size=4),
)
def test_bias_update_matches_the_oracle(counts: list[int], bias: list[int]) -> None:
    old, mean = [b / 8 for b in bias], sum(counts) / 4
    moved = [
        b + 0.25 * ((mean > c) - (mean < c)) for b, c in zip(old, counts, strict=True)
    ]
    centred = [b - sum(moved) / 4 for b in moved]
    state = BiasBalanceState(bias=jnp.array(old))
    new = value_of(update_bias, state, jnp.array(counts, jnp.float32), rate=0.25)
    np.testing.assert_allclose(new.bias, centred if sum(counts) else old, atol=1e-6)


@pytest.mark.parametrize("counts", [[7, 6, 5], [70_001, 60_001, 50_001]])
def test_an_expert_with_the_mean_load_keeps_its_bias(counts: list[int]) -> None:
    # Compiled, a mean over three may be a multiplication by a rounded third.
    state = BiasBalanceState(bias=jnp.zeros(3))
    new = value_of(update_bias, state, np.array(counts, np.float32), rate=0.5)
    np.testing.assert_array_equal(new.bias, [-0.5, 0, 0.5])


@FEW
@given(seed=st.integers(0, 1000), k=st.integers(1, 4), normalize=st.booleans())
def test_route_matches_the_oracle(seed: int, k: int, normalize: bool) -> None:
    random = np.random.default_rng(seed)
    scores = random.random((2, 3, 4)).astype(np.float32)
    bias = random.normal(size=4).astype(np.float32)
    weights, indices = jax.device_get(
        value_of(route, scores, bias, k=k, normalize=normalize)
    )
    chex.assert_shape([weights, indices], (2, 3, k))
    chex.assert_type([weights, indices], [jnp.float32, jnp.int32])
    for b in range(2):
        for s in range(3):
            best = sorted(range(4), key=lambda e: -(scores[b, s, e] + bias[e]))[:k]
            chosen = [float(scores[b, s, e]) for e in best]
            total = sum(chosen) if normalize else 1.0
            np.testing.assert_array_equal(indices[b, s], best)
            np.testing.assert_allclose(
                weights[b, s], [c / total for c in chosen], rtol=1e-5
            )


def test_the_bias_chooses_but_does_not_weigh() -> None:
    scores, bias = jnp.array([0.6, 0.3, 0.1]), jnp.array([0.0, 0.0, 10.0])
    weights, indices = value_of(route, scores, bias, k=1, normalize=False)
    np.testing.assert_array_equal(indices, [2])
    np.testing.assert_allclose(weights, [0.1])

    @jax.jit
    @functools.partial(jax.grad, argnums=(0, 1))
    def gradients(s: jax.Array, b: jax.Array) -> jax.Array:
        return jnp.sum(route(s, b, 2)[0] * jnp.array([1.0, 2.0]))

    by_scores, by_bias = gradients(scores, bias)
    np.testing.assert_array_equal(by_bias, 0)
    # Experts 2 and 0: (0.1 + 2 · 0.6) / 0.7.
    np.testing.assert_allclose(by_scores, [0.1 / 0.49, 0, -0.6 / 0.49], rtol=1e-5)


def test_routing_without_scores_is_finite() -> None:
    def total(scores: jax.Array) -> tuple[jax.Array, jax.Array]:
        weights, _ = route(scores, jnp.zeros(3), 2)
        return weights.sum(), weights

    run = jax.jit(jax.grad(total, has_aux=True))
    gradient, weights = run(np.zeros((2, 3), np.float32))
    np.testing.assert_array_equal(weights, 0)
    chex.assert_tree_all_finite(gradient)


def test_a_small_bias_matters_with_low_precision_scores() -> None:
    scores = jnp.array([0.5, 0.5], jnp.bfloat16)
    weights, indices = value_of(route, scores, jnp.array([0.0, 1e-4]), k=1)
    np.testing.assert_array_equal(indices, [1])
    chex.assert_type(weights, jnp.bfloat16)


@pytest.mark.parametrize("k", [0, 4])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(ValueError, match=rf"k must be in \[1, 3\], got {k}"):
        route(jnp.ones((2, 3)), jnp.zeros(3), k)


def test_bias_of_another_length() -> None:
    with untyped(), pytest.raises(ValueError, match=r"bias .*\(3,\).* got \(2,\)"):
        route(jnp.ones((2, 3)), jnp.zeros(2), 1)


def test_the_bias_evens_out_a_skewed_router() -> None:
    gates = values(64, 4) + np.array([1.0, 0.5, 0, -1], np.float32)
    scores = 1 / (1 + np.exp(-gates))

    def step(_: int, state: BiasBalanceState) -> BiasBalanceState:
        return update_bias(state, counts(state), rate=0.01)

    def counts(state: BiasBalanceState) -> jax.Array:
        _, indices = route(jax.device_put(scores), state.bias, 1)
        return jnp.sum(jax.nn.one_hot(indices[:, 0], 4), axis=0)

    @jax.jit
    def train(
        start: BiasBalanceState,
    ) -> tuple[BiasBalanceState, tuple[jax.Array, jax.Array]]:
        end = jax.lax.fori_loop(0, 200, step, start)
        return end, (max_violation(counts(start)), max_violation(counts(end)))

    end, (before, after) = train(BiasBalanceState(bias=jnp.zeros(4)))
    assert float(before) > 0.8
    assert float(after) < 0.2
    np.testing.assert_allclose(np.mean(end.bias), 0, atol=1e-6)


def test_explicit_axes() -> None:
    gates = jax.device_put(values(6, 3))
    scores = jax.device_put(1 / (1 + np.exp(-values(6, 3))))
    balance = balance_of([3.0, 1.0, 2.0], 6.0)
    check_explicit_axes(lambda g: gradient_balance_loss(g, balance, weight=0.1), gates)
    bias, taken = jnp.array([0.5, 0.0, -0.5]), jnp.array([1.0, 2.0])
    check_explicit_axes(lambda s: jnp.sum(route(s, bias, 2)[0] * taken), scores)


# Jit. ------------------------------------------------------------------------------


class Variants(VariantsCase):
    @with_and_without_jit
    def test_jit_changes_nothing(self) -> None:
        load = load_of([3.0, 1.0], [1.2, 0.8], 2.0)
        new = self.under(update_gradient_balance)(fresh(2), load)
        np.testing.assert_allclose(new.counts, [0.3, 0.1], rtol=1e-5)
        bias = self.under(update_bias)(BiasBalanceState(jnp.zeros(2)), load.counts)
        np.testing.assert_allclose(bias.bias, [-1e-3, 1e-3], rtol=1e-5)


def test_steps_do_not_recompile() -> None:
    chex.clear_trace_counter()

    @jax.jit
    @chex.assert_max_traces(n=1)
    def step(
        state: GradientBalanceState, gates: jax.Array, weight: jax.Array
    ) -> tuple[jax.Array, GradientBalanceState]:
        choices = jnp.argmax(gates, axis=-1, keepdims=True)
        state = update_gradient_balance(state, router_load(gates, choices))
        return gradient_balance_loss(gates, state, weight=weight), state

    state, losses = fresh(3), []
    for i in range(3):
        loss, state = step(
            state, jax.device_put(values(5, 3, seed=i)), jnp.float32(i + 1)
        )
        losses.append(float(loss))
    assert 0 < losses[0] < losses[1] < losses[2]
