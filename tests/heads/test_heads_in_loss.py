"""The outputs of the head modules are the inputs of the unified loss."""

from typing import Any

import chex
import jax
import numpy as np
import optax
import pytest
from support.head_checks import (
    B,
    CausalBlock,
    D,
    K,
    S,
    V,
    adaptive,
    apply,
    init,
    normal,
)

import ava_jax
from ava_jax.heads import MTPHeads, SequentialMTP

TARGETS = jax.device_put(np.random.default_rng(5).integers(V, size=(B, S)))


def loss_function(**options: Any) -> ava_jax.UnifiedLoss:
    config = ava_jax.UnifiedLossConfig(
        vocab_size=V,
        hidden_size=D,
        num_future_tokens=K,
        use_ngram_penalty=False,
        use_immediate_repetition_penalty=False,
        label_smoothing=0.0,
        **options,
    )
    return ava_jax.unified_loss(config)


def call(loss_fn: ava_jax.UnifiedLoss, **inputs: Any) -> dict[str, jax.Array]:
    run = jax.jit(lambda state, inputs: loss_fn(state, **inputs, train=True))
    return run(loss_fn.init(), {"targets": TARGETS, **inputs})[1]


@jax.jit
def head_losses(logits: jax.Array) -> list[jax.Array]:
    """Computes optax's cross-entropy of head j at t with the target at t + j."""
    nll = optax.softmax_cross_entropy_with_integer_labels
    return [nll(logits[j - 1, :, :-j], TARGETS[:, j:]).mean() for j in range(1, K + 1)]


def test_parallel_heads_give_the_loss_their_parameters() -> None:
    module, h = MTPHeads(K, V), normal(B, S, D)
    variables = init(module, h)
    aux = call(
        loss_function(use_mtp=True),
        logits=normal(B, S, V),
        hidden_states=h,
        mtp_params=variables["params"],
    )
    want = head_losses(apply(module, variables, h))
    np.testing.assert_allclose(aux["mtp_head_losses"], want, rtol=1e-4)


def test_sequential_heads_give_the_loss_their_hidden_states() -> None:
    module, h = SequentialMTP(K, CausalBlock), normal(B, S, D)
    variables, lm_head = init(module, h, h), normal(D, V)
    hidden = apply(module, variables, h, normal(B, S, D, seed=1))
    aux = call(
        loss_function(use_mtp=True, mtp_type="sequential"),
        hidden_states=h,
        lm_head=lm_head,
        mtp_hidden_states=hidden,
    )
    want = head_losses(np.asarray(hidden) @ np.asarray(lm_head))
    np.testing.assert_allclose(aux["mtp_head_losses"], want, rtol=1e-4)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_adaptive_heads_give_the_loss_their_whole_output(threshold: float) -> None:
    module, h = adaptive(confidence_threshold=threshold), normal(B, S, D)
    out = apply(module, init(module, h), h)
    loss_fn = loss_function(primary_loss_type="adaptive_mtp", mtp_weight=0.5)
    aux = call(loss_fn, logits=normal(B, S, V), **vars(out))
    weight = float(np.mean(out.confidence_scores)) * (0.5 if threshold == 0 else 0.0)
    want = weight * np.mean(head_losses(out.additional_logits))
    np.testing.assert_allclose(aux["main_additional_loss"], want, rtol=1e-4)
    np.testing.assert_allclose(aux["main_effective_mtp_weight"], weight, rtol=1e-5)
    chex.assert_tree_all_finite(aux)
