"""The package against the float64 oracle, over everything a call may be given."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import HealthCheck, Phase, given, settings
from numpy.random import Generator, default_rng
from support.golden_cases import flattened
from support.oracle_inputs import Aux
from support.oracle_scenarios import (
    SEEDS,
    Scenario,
    adaptive_mtp_scenario,
    contrastive_scenario,
    counted_places,
    draw_logits,
    draw_mask,
    draw_targets,
    expert_scenario,
    pick,
    plain_mtp_scenario,
    scenarios,
    token_scenario,
)
from support.oracle_terms import repetition_decay, sequence_unlikelihood, weighted_mean
from support.oracles import OracleState, statistics, unified_oracle

import ava_jax

pytestmark = pytest.mark.every_platform

# Float32: a few hundred roundings of 6e-8 in sums over V and S, on logits up to ~30,
# whose own rounding (2e-6) a difference of two logsumexps inherits.
FLOAT32 = (5e-5, 1e-5)
FLOAT64 = (1e-8, 1e-10)
# Central differences of step 1e-5: 1e-10 of curvature and as much of rounding, larger
# where a logit difference of 30 makes the curvature large.
GRADIENT = (1e-6, 1e-7)
DIFFERENTIABLE = (
    "logits",
    "hidden_states",
    "lm_head",
    "lm_head_bias",
    "primary_logits",
    "additional_logits",
    "confidence_scores",
    "mtp_hidden_states",
    "mtp_params",
    "gate_logits",
    "expert_outputs",
    "embeddings",
)

PRECISIONS = pytest.mark.parametrize(
    "wide",
    [
        pytest.param(False, id="float32"),
        pytest.param(True, id="x64", marks=pytest.mark.slow),
    ],
)


def examples(count: int) -> settings:
    """Fixed examples, no deadline: each one compiles. A seed cannot be shrunk."""
    return settings(
        max_examples=count,
        phases=[Phase.generate],
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )


# Comparing ----------------------------------------------------------------------


def widened(inputs: dict[str, Any]) -> dict[str, Any]:
    """The arrays on the device; float32 becomes the precision's own float."""
    wide = jnp.result_type(float)

    def widen(x: np.ndarray) -> np.ndarray:
        return x.astype(wide) if x.dtype == np.float32 else x

    arrays = {key: x for key, x in inputs.items() if not isinstance(x, bool)}
    return jax.device_put(jax.tree.map(widen, arrays))


def assert_near(
    label: str, got: Any, want: Any, tolerance: tuple[float, float]
) -> None:
    """|got − want| ≤ relative·|want| + absolute."""
    got, want = np.asarray(got, np.float64), np.asarray(want, np.float64)
    assert got.shape == want.shape, f"{label}: {got.shape}, expected {want.shape}"
    relative, absolute = tolerance
    bound = relative * np.abs(want) + absolute
    assert np.all(np.abs(got - want) <= bound), f"{label}: {got}, expected {want}"


def package_call(scenario: Scenario) -> tuple[Any, Callable[..., Any]]:
    """(fresh state, call of state and arrays); Python bools stay what they are."""
    loss_fn = ava_jax.create_unified_loss(scenario.config)
    fixed: dict[str, Any] = {
        key: value for key, value in scenario.inputs.items() if isinstance(value, bool)
    }

    def call(state: Any, arrays: dict[str, Any]) -> Any:
        given: Any = {**arrays, **fixed}
        return loss_fn(state, **loss_fn.select(given), train=scenario.train)

    return loss_fn.init(), call


def check_steps(
    scenario: Scenario, wide: bool, later: Sequence[dict[str, Any]] = ()
) -> list[OracleState]:
    """The scenario's call and `later` ones, of the package and of the oracle."""
    config, train, states = scenario.config, scenario.train, []
    tolerance = FLOAT64 if wide else FLOAT32
    with jax.enable_x64(wide):
        state, call = package_call(scenario)
        call = jax.jit(call)
        for inputs in (scenario.inputs, *later):
            loss, aux, state = call(state, widened(inputs))
            before = states[-1] if states else None
            want, want_aux, after = unified_oracle(config, before, inputs, train)
            assert_near("loss", loss, want, tolerance)
            compare_aux(aux, want_aux, tolerance)
            compare_state(state, after, tolerance)
            states.append(after)
    return states


def compare_state(got: Any, want: OracleState, tolerance: tuple[float, float]) -> None:
    """The step, and every entry of the statistics."""
    assert int(got.step) == want.step
    known = statistics(want)
    for name, value in flattened(ava_jax.statistics(got)).items():
        assert_near(f"statistics {name}", value, known[name], tolerance)


def compare_aux(got: Aux, want: Aux, tolerance: tuple[float, float]) -> None:
    """The same keys, and near values."""
    assert set(got) == set(want), set(got) ^ set(want)
    for name, value in want.items():
        assert_near(name, got[name], value, tolerance)


# Gradients ----------------------------------------------------------------------


def slope_of_oracle(scenario: Scenario, direction: dict[str, Any]) -> float:
    """Along the direction, by central difference."""
    step, ends = 1e-5, []
    for sign in (1.0, -1.0):
        moved = jax.tree.map(
            lambda x, along, sign=sign: np.asarray(x, np.float64) + sign * step * along,
            {name: scenario.inputs[name] for name in direction},
            direction,
        )
        inputs = {**scenario.inputs, **moved}
        ends.append(unified_oracle(scenario.config, None, inputs, scenario.train)[0])
    return (ends[0] - ends[1]) / (2 * step)


def gradients(scenario: Scenario, names: list[str]) -> dict[str, Any]:
    """The package's gradient of the loss with respect to the named inputs."""
    inputs = widened(scenario.inputs)
    state, call = package_call(scenario)

    def loss(moving: dict[str, jax.Array], fixed: dict[str, Any]) -> jax.Array:
        return call(state, {**fixed, **moving})[0]

    grads = jax.jit(jax.grad(loss))({name: inputs[name] for name in names}, inputs)
    return jax.tree.map(np.asarray, grads)


def in_float32(scenario: Scenario) -> Scenario:
    """Without bfloat16, in which gradients would come back rounded."""

    def convert(x: Any) -> Any:
        rounded = isinstance(x, np.ndarray) and x.dtype == jnp.bfloat16
        return x.astype(np.float32) if rounded else x

    return replace(scenario, inputs=jax.tree.map(convert, scenario.inputs))


def movable(scenario: Scenario) -> list[str]:
    """The inputs to differentiate by, but for confidences at their kink."""
    names = [name for name in DIFFERENTIABLE if name in scenario.inputs]
    if np.any(scenario.inputs.get("confidence_scores") == 0.5):
        names.remove("confidence_scores")
    return names


def check_gradient(scenario: Scenario) -> None:
    """Right along a random direction, and finite (so 0) where the inputs are not."""
    scenario = in_float32(scenario)
    rng, names = default_rng(0), movable(scenario)
    direction = jax.tree.map(
        lambda x: rng.standard_normal(x.shape),
        {name: scenario.inputs[name] for name in names},
    )
    with jax.enable_x64(True):
        grads = gradients(scenario, names)
    products = jax.tree.map(lambda g, along: np.sum(g * along), grads, direction)
    slope = sum(float(product) for product in jax.tree.leaves(products))
    assert_near("slope", slope, slope_of_oracle(scenario, direction), GRADIENT)
    check_zeros(scenario, grads)


def check_zeros(scenario: Scenario, grads: dict[str, Any]) -> None:
    """Exactly 0 where an input is not finite, not counted or padding."""
    for grad, x in zip(
        jax.tree.leaves(grads),
        jax.tree.leaves({name: scenario.inputs[name] for name in grads}),
        strict=True,
    ):
        assert not grad[~np.isfinite(x)].any()
    vocab = scenario.config["vocab_size"]
    for name in {"logits", "lm_head", "lm_head_bias"} & set(grads):
        assert not grads[name][..., vocab:].any(), name
    if "logits" in grads:
        keep = counted_places(scenario.config, scenario.inputs)
        assert not grads["logits"][~keep].any()


# Tests --------------------------------------------------------------------------


@PRECISIONS
@examples(26)
@given(scenario=scenarios(token_scenario, "logits"))
def test_logits_path(wide: bool, scenario: Scenario) -> None:
    check_steps(scenario, wide)


@PRECISIONS
@examples(14)
@given(scenario=scenarios(token_scenario, "fused"))
def test_paths_of_one_pass(wide: bool, scenario: Scenario) -> None:
    check_steps(scenario, wide)


@PRECISIONS
@examples(10)
@given(scenario=scenarios(plain_mtp_scenario))
def test_plain_mtp(wide: bool, scenario: Scenario) -> None:
    check_steps(scenario, wide)


@PRECISIONS
@examples(10)
@given(scenario=scenarios(adaptive_mtp_scenario))
def test_adaptive_mtp(wide: bool, scenario: Scenario) -> None:
    check_steps(scenario, wide, later=[scenario.inputs])


@PRECISIONS
@examples(10)
@given(scenario=scenarios(expert_scenario))
def test_experts(wide: bool, scenario: Scenario) -> None:
    check_steps(scenario, wide, later=[scenario.inputs])


@PRECISIONS
@examples(8)
@given(scenario=scenarios(contrastive_scenario))
def test_contrastive(wide: bool, scenario: Scenario) -> None:
    check_steps(scenario, wide)


@pytest.mark.parametrize("path", ["logits", "fused"])
@examples(10)
@given(seed=SEEDS)
def test_gradient_of_a_path(path: str, seed: int) -> None:
    check_gradient(token_scenario(default_rng(seed), path))


@pytest.mark.parametrize(
    "make",
    [plain_mtp_scenario, adaptive_mtp_scenario, expert_scenario, contrastive_scenario],
    ids=lambda make: make.__name__,
)
@examples(6)
@given(seed=SEEDS)
def test_gradient(make: Callable[[Generator], Scenario], seed: int) -> None:
    scenario = make(default_rng(seed))
    # Gradient-style balancing has a gradient that is not its value's.
    config = {**scenario.config, "use_moe_balancing": False}
    check_gradient(replace(scenario, config=config))


@PRECISIONS
def test_many_steps(wide: bool) -> None:
    rng = default_rng(3)
    config = {
        "vocab_size": 7,
        "temperature_min_history": 3,
        "temperature_history": 4,
        "num_experts": 4,
        "use_moe_balancing": True,
        "use_mtp": True,
        "mtp_type": "adaptive",
        "num_future_tokens": 1,
        # Exact in float32, in which optax evaluates a schedule at an int32 step.
        "ngram_penalty_weight": optax.linear_schedule(0.125, 1.125, 8),
    }
    inputs = [
        {
            "targets": draw_targets(rng, (2, 5), 7),
            "logits": draw_logits(rng, (2, 5, 7), 0.1 if step < 5 else step),
            "additional_logits": draw_logits(rng, (1, 2, 5, 7), 1.0),
            "confidence_scores": rng.random(2).astype(np.float32),
            "gate_logits": draw_logits(rng, (10, 4), 1.0),
            "expert_indices": rng.integers(0, 4, (10, 1)).astype(np.int32),
            "attention_mask": np.full((2, 5), step != 6),
        }
        for step in range(10)
    ]
    states = check_steps(Scenario(config, inputs[0]), wide, later=inputs[1:])
    temperatures = [state.temperature for state in states]
    assert min(temperatures) < 1
    assert temperatures[-1] > min(temperatures)
    assert states[6] is states[5]
    assert states[-1].step == 9


# Functions of their own ---------------------------------------------------------


@PRECISIONS
@examples(8)
@given(seed=SEEDS)
def test_sequence_unlikelihood(wide: bool, seed: int) -> None:
    rng = default_rng(seed)
    n, ids = int(rng.integers(1, 4)), draw_targets(rng, (3, 12), 5)
    logits = draw_logits(rng, (3, 12, 5), 3.0)
    mask = np.asarray(draw_mask(rng, pick(rng, ["bool", "float", "empty"]), ids.shape))
    weights = mask.astype(np.float64)
    terms = sequence_unlikelihood(logits.astype(np.float64), ids, weights, n)
    arrays = {"logits": logits, "token_ids": ids, "mask": mask}
    run = jax.jit(ava_jax.losses.sequence_unlikelihood, static_argnames="ngram_size")
    with jax.enable_x64(wide):
        got = run(**widened(arrays), ngram_size=n)
        want = weighted_mean(terms, weights)
        assert_near("mean", got, want, FLOAT64 if wide else FLOAT32)


@PRECISIONS
@examples(8)
@given(seed=SEEDS)
def test_repetition_decay(wide: bool, seed: int) -> None:
    rng = default_rng(seed)
    span, decay = int(rng.integers(1, 5)), float(rng.choice([0.25, 0.5]))
    ids = np.tile(draw_targets(rng, (3, span), 5), 12)[:, :12]
    logits = draw_logits(rng, (3, 12, 5), 2.0)
    # Padding only at the end: what is repeated must be known.
    kept = np.arange(12) < rng.integers(0, 13, (3, 1))
    weights = kept * rng.integers(1, 5, (3, 12)) / 2
    terms = repetition_decay(logits.astype(np.float64), ids, weights, span, decay)
    arrays = {"logits": logits, "targets": ids, "mask": weights.astype(np.float32)}
    run = jax.jit(
        ava_jax.losses.repetition_decay_loss, static_argnames=("span_length", "decay")
    )
    with jax.enable_x64(wide):
        got = run(**widened(arrays), span_length=span, decay=decay)
        want = weighted_mean(terms, weights)
        assert_near("mean", got, want, FLOAT64 if wide else FLOAT32)
