"""Diversity of the experts' outputs: reference numbers, a naive loop, zero vectors."""

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

from ava_jax.losses.moe import expert_diversity_loss

WITH_OUTPUTS = [
    case for case in cases_of("unified") if "expert_outputs" in case.arrays[0]["in"]
]
SIMILARITIES = ("cosine", "l2", "dot")


@pytest.mark.parametrize("x64", [False, True])
@pytest.mark.parametrize("case", WITH_OUTPUTS, ids=lambda c: c.name)
def test_reference_diversity(case: GoldenCase, x64: bool) -> None:
    config, weight, tolerance = case.config, 0.0, 1e-8 if x64 else 2e-5
    with jax.enable_x64(x64):
        outputs = on_device(case.arrays[0]["in"])["expert_outputs"]
        value, gradient = value_and_gradient(expert_diversity_loss, outputs)
        out = case.arrays[0]["out"]
        if config.get("use_diversity_loss"):
            weight += config.get("diversity_weight", 0.01)
            assert_close(weight * value, out["diversity_loss"], tolerance, "loss")
        if config.get("use_auxiliary_loss"):
            weight += 1e-4
            auxiliary = 1e4 * out["aux_expert_diversity"]
            assert_close(value, auxiliary, tolerance, "auxiliary")
        stored = case.arrays[0]["grad"]
        want = np.stack(
            [stored[f"expert_outputs.{i}"] for i in range(outputs.shape[0])]
        )
        assert_close(weight * gradient, want, max(tolerance, 1e-7), "gradient")


def diversity_oracle(outputs: NDArray, keep: NDArray, similarity: str) -> float:
    x, tokens = outputs.astype(float), [t for t, k in enumerate(keep) if k]
    pairs = [(i, j) for i in range(len(x)) for j in range(i + 1, len(x))]
    if not tokens or not pairs:
        return 0.0
    total = 0.0
    for i, j in pairs:
        if similarity == "l2":
            apart = [float(np.linalg.norm(x[i, t] - x[j, t])) for t in tokens]
            total += 1 / (1 + sum(apart) / len(apart))
            continue
        each = []
        for t in tokens:
            norms = [max(float(np.linalg.norm(x[e, t])), 1e-8) for e in (i, j)]
            scale = norms[0] * norms[1] if similarity == "cosine" else 1.0
            each.append(float(x[i, t] @ x[j, t]) / scale)
        total += sum(each) / len(each)
    return total / len(pairs)


@FEW
@given(
    shape=st.sampled_from([(1, 2, 3), (2, 1, 1), (4, 5, 3)]),
    similarity=st.sampled_from(SIMILARITIES),
    seed=st.integers(0, 1000),
    share=st.sampled_from([0.0, 0.6, 1.0]),
)
def test_diversity_matches_the_oracle(shape, similarity, seed, share) -> None:
    random = np.random.default_rng(seed)
    outputs = random.integers(-2, 3, shape).astype(np.float32) / 2
    keep = random.random(shape[1]) < share
    got = value_of(
        expert_diversity_loss,
        jax.device_put(np.where(keep[:, None], outputs, np.nan)),
        similarity=similarity,
        token_weights=jax.device_put(keep),
    )
    want = diversity_oracle(outputs, keep, similarity)
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_diversity_gradient(similarity: str) -> None:
    check_gradient(
        lambda x: expert_diversity_loss(x, similarity=similarity), values(3, 4, 2)
    )


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_skipped_and_equal_experts_have_finite_gradients(similarity: str) -> None:
    x = values(3, 4, 2)
    x[0] = x[1, 2] = 0
    x[2, 0] = x[1, 0]
    value, gradient = value_and_gradient(
        expert_diversity_loss, x, similarity=similarity
    )
    chex.assert_tree_all_finite((value, gradient))
    # With a clamped norm alone the cosine's would be about 1e8.
    assert np.max(np.abs(gradient)) < 10


def test_tiny_outputs_are_divided_by_the_smallest_norm() -> None:
    outputs = jnp.array([[[1e-9, 0.0]], [[3.0, 0.0]]])
    got = value_of(expert_diversity_loss, outputs)
    np.testing.assert_allclose(got, 0.1, rtol=1e-5)


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_masked_tokens_change_no_diversity(similarity: str) -> None:
    x, weights = values(3, 4, 2), np.array([0.5, 0.0, 1.0, 0.0], np.float32)
    kept = weights != 0
    value, gradient = jax.device_get(
        value_and_gradient(
            expert_diversity_loss,
            np.where(kept[:, None], x, np.float32(np.inf)),
            similarity=similarity,
            token_weights=weights,
        )
    )
    want = value_and_gradient(expert_diversity_loss, x[:, kept], similarity=similarity)
    chex.assert_trees_all_close((value, gradient[:, kept]), want, rtol=1e-5)
    np.testing.assert_array_equal(gradient[:, ~kept], 0)
    zeros = np.zeros_like(x)
    got = value_and_gradient(
        expert_diversity_loss,
        zeros + np.nan,
        similarity=similarity,
        token_weights=np.zeros(4, np.float32),
    )
    chex.assert_trees_all_equal(got, (np.float32(0), zeros))


@pytest.mark.parametrize("similarity", SIMILARITIES)
def test_tokens_on_two_axes(similarity: str) -> None:
    x = values(3, 6, 2)
    flat = value_of(expert_diversity_loss, x, similarity=similarity)
    got = value_of(
        expert_diversity_loss,
        x.reshape(3, 2, 3, 2),
        similarity=similarity,
        token_weights=np.ones((2, 3), bool),
    )
    np.testing.assert_allclose(got, flat, rtol=1e-6)


def test_diversity_arguments() -> None:
    x = jnp.ones((2, 3, 4))
    with pytest.raises(ValueError, match='"cosine", "l2" or "dot", got \'l1\''):
        expert_diversity_loss(x, similarity="l1")
    with (
        untyped(),
        pytest.raises(ValueError, match=r"token_weights .*\(3,\).* got \(2,\)"),
    ):
        expert_diversity_loss(x, token_weights=jnp.ones(2))
    low = x.astype(jnp.bfloat16)
    value, gradient = value_and_gradient(expert_diversity_loss, low)
    chex.assert_type([value, gradient], [jnp.float32, jnp.bfloat16])


def test_distances_hold_no_array_of_all_differences() -> None:
    e, n, d = 32, 16, 64
    step = jax.jit(
        jax.value_and_grad(lambda x: expert_diversity_loss(x, similarity="l2"))
    )
    memory = step.lower(jnp.ones((e, n, d))).compile().memory_analysis()
    assert memory is not None
    assert memory.temp_size_in_bytes < e * e * n * d * 4 / 4


def test_explicit_axes() -> None:
    outputs = jax.device_put(values(3, 4, 2))
    for similarity in SIMILARITIES:
        check_explicit_axes(
            lambda x, similarity=similarity: expert_diversity_loss(
                x, similarity=similarity
            ),
            outputs,
            axis=1,
        )


class Variants(VariantsCase):
    @with_and_without_jit
    def test_jit_changes_nothing(self) -> None:
        outputs = values(3, 4, 2)
        got = self.under(expert_diversity_loss)(jax.device_put(outputs))
        want = diversity_oracle(outputs, np.ones(4), "cosine")
        np.testing.assert_allclose(got, want, rtol=1e-5)
