"""A small valid call of every public function that takes arrays."""

from collections.abc import Callable
from typing import Any

import numpy as np

import ava_jax
from ava_jax import losses, metrics
from ava_jax.losses.moe import BiasBalanceState, GradientBalanceState

B, S, D, V, E, N, K = 2, 6, 4, 11, 3, 8, 2
RNG = np.random.default_rng(0)


def normal(*shape: int) -> Any:
    return RNG.normal(size=shape).astype(np.float32)


def ids(high: int, *shape: int) -> Any:
    return RNG.integers(0, high, shape, np.int32)


Z, IDS = normal(B, S, V), ids(V, B, S)
MASK: Any = np.ones((B, S), np.float32)
GATES, CHOSEN, WEIGHTS = normal(N, E), ids(E, N, K), np.ones(N, np.float32)
P = -1 - RNG.random((B, S)).astype(np.float32)
ROWS, LABELS = normal(N, D), np.arange(N, dtype=np.int32) % 2
EVEN: Any = np.ones(E, np.float32)
CE = ava_jax.create_unified_loss(vocab_size=V)
EXPERTS = ava_jax.create_unified_loss(
    vocab_size=V, num_experts=E, use_auxiliary_loss=True, use_contrastive_loss=True
)


def loss(**inputs: Any) -> Any:
    return CE(CE.init(), **inputs)


def loss_of_experts(**inputs: Any) -> Any:
    return EXPERTS(EXPERTS.init(), **inputs)


def fold_temperature(lm_head: Any) -> Any:
    return ava_jax.fold_temperature(lm_head, CE.init())


def gradient_balance_loss(**arrays: Any) -> Any:
    balance = GradientBalanceState(EVEN, EVEN, EVEN[0])
    return losses.gradient_balance_loss(balance=balance, weight=0.1, **arrays)


def update_bias(counts: Any) -> Any:
    return losses.update_bias(BiasBalanceState(EVEN), counts)


TARGETS = {"targets": IDS, "attention_mask": MASK, "segment_ids": IDS + 1}
PAIRS = {name: normal(N) for name in ("chosen", "rejected")}
# By name: the function, and its arguments.
CALLS: dict[str, tuple[Callable[..., Any], dict[str, Any]]] = {
    "loss": (loss, {"logits": Z, **TARGETS}),
    "loss, from hidden states": (
        loss,
        {
            "hidden_states": normal(B, S, D),
            "lm_head": normal(D, V),
            "lm_head_bias": normal(V),
            **TARGETS,
        },
    ),
    "loss, of experts": (
        loss_of_experts,
        {
            "logits": Z,
            "targets": IDS,
            "gate_logits": normal(B, S, E),
            "expert_indices": ids(E, B, S, K),
            "expert_outputs": normal(E, B, S, D),
            "router_mask": MASK,
            "embeddings": ROWS,
            "labels": LABELS,
        },
    ),
    "normalizers": (CE.normalizers, TARGETS),
    "token_log_probs": (
        ava_jax.token_log_probs,
        {
            "targets": IDS,
            "hidden_states": normal(B, S, D),
            "lm_head": normal(D, V),
            "lm_head_bias": normal(V),
            "attention_mask": MASK,
        },
    ),
    "distillation_loss": (
        ava_jax.distillation_loss,
        {
            "logits": Z,
            "teacher_hidden_states": normal(B, S, D),
            "teacher_lm_head": normal(D, V),
            "teacher_lm_head_bias": normal(V),
            "attention_mask": MASK,
        },
    ),
    "distillation_loss, top k": (
        ava_jax.distillation_loss,
        {
            "logits": Z,
            "teacher_ids": np.argsort(Z, -1)[..., :K].astype(np.int32),
            "teacher_log_probs": -2 - RNG.random((B, S, K)).astype(np.float32),
        },
    ),
    "fold_temperature": (fold_temperature, {"lm_head": normal(D, V)}),
    "anti_repetition_loss": (
        losses.anti_repetition_loss,
        {"logits": Z, "labels": IDS, "attention_mask": MASK},
    ),
    "auxiliary_load_balancing_loss": (
        losses.auxiliary_load_balancing_loss,
        {"gate_logits": GATES, "expert_indices": CHOSEN, "token_weights": WEIGHTS},
    ),
    "auxiliary_router_z_loss": (
        losses.auxiliary_router_z_loss,
        {"gate_logits": GATES, "token_weights": WEIGHTS},
    ),
    "coefficient_of_variation": (losses.coefficient_of_variation, {"ratio": EVEN}),
    "confidence_regularizer": (
        losses.confidence_regularizer,
        {"confidence": RNG.uniform(0.6, 0.9, (B, S)).astype(np.float32)},
    ),
    "consistency_loss": (
        losses.consistency_loss,
        {
            "outputs_original": normal(N, V),
            "outputs_augmented": normal(N, V),
            "weights": WEIGHTS,
        },
    ),
    "contrastive_infonce_loss": (
        losses.contrastive_infonce_loss,
        {"embeddings": ROWS, "labels": LABELS, "mask": WEIGHTS},
    ),
    "contrastive_infonce_loss, pairs": (
        losses.contrastive_infonce_loss,
        {"embeddings": ROWS, "positive_pairs": np.array([[0, 1], [2, 3]], np.int32)},
    ),
    "contrastive_margin_loss": (
        losses.contrastive_margin_loss,
        {"embeddings": ROWS, "labels": LABELS, "mask": WEIGHTS},
    ),
    "contrastive_triplet_loss": (
        losses.contrastive_triplet_loss,
        {"embeddings": ROWS, "labels": LABELS, "mask": WEIGHTS},
    ),
    "contrastive_token_loss": (
        losses.contrastive_token_loss,
        {"logits": Z, "targets": IDS, "mask": MASK, "segment_ids": IDS + 1},
    ),
    "cpo_loss": (losses.cpo_loss, PAIRS),
    "cutoff_histogram": (
        lambda **x: losses.cutoff_histogram(k=1, bins=4, **x),
        {"scores": GATES, "bias": EVEN, "token_weights": WEIGHTS},
    ),
    "dpo_loss": (
        losses.dpo_loss,
        {**PAIRS, "ref_chosen": normal(N), "ref_rejected": normal(N)},
    ),
    "effective_mtp_weight": (
        losses.effective_mtp_weight,
        {"weight": EVEN[0], "mean_confidence": EVEN[0]},
    ),
    "expert_diversity_loss": (
        losses.expert_diversity_loss,
        {"expert_outputs": normal(E, N, D), "token_weights": WEIGHTS},
    ),
    "focal_loss": (losses.focal_loss, {"inputs": Z, "targets": IDS}),
    "gradient_balance_loss": (
        gradient_balance_loss,
        {"gate_logits": GATES, "token_weights": WEIGHTS},
    ),
    "group_advantages": (
        lambda rewards: losses.group_advantages(rewards, 4),
        {"rewards": normal(N)},
    ),
    "homoscedastic_weighting": (
        losses.homoscedastic_weighting,
        {"losses": EVEN, "log_variances": EVEN},
    ),
    "kto_loss": (
        losses.kto_loss,
        {
            "log_probs": normal(N),
            "ref_log_probs": normal(N),
            "desirable": LABELS == 1,
        },
    ),
    "label_smoothing_loss": (
        losses.label_smoothing_loss,
        {"inputs": Z, "targets": IDS},
    ),
    "layer_norm": (
        losses.layer_norm,
        {"x": ROWS, "scale": normal(D), "bias": normal(D)},
    ),
    "load_balancing_loss": (
        losses.load_balancing_loss,
        {"gate_logits": GATES, "expert_indices": CHOSEN, "token_weights": WEIGHTS},
    ),
    "max_violation": (losses.max_violation, {"counts": EVEN}),
    "orpo_loss": (losses.orpo_loss, {k: -1 - x**2 for k, x in PAIRS.items()}),
    "perplexity": (losses.perplexity, {"logits": Z, "targets": IDS, "weights": MASK}),
    "policy_loss": (
        losses.policy_loss,
        {
            "log_probs": P,
            "advantages": normal(B),
            "mask": MASK,
            "old_log_probs": P - 0.1,
            "ref_log_probs": P + 0.1,
            "sampler_weights": MASK,
            "entropy": -P,
        },
    ),
    "policy_values": (
        losses.policy_values,
        {"log_probs": P, "advantages": P, "mask": MASK, "old_log_probs": P},
    ),
    "quantile_bias": (
        lambda **x: losses.quantile_bias(k=1, **x),
        {"bias": EVEN, "histogram": np.ones((E, 4), np.float32)},
    ),
    "repeat_spans": (lambda spans: losses.repeat_spans(spans, 9), {"spans": IDS}),
    "repetition_decay_loss": (
        lambda **x: losses.repetition_decay_loss(span_length=2, **x),
        {"logits": Z, "targets": IDS, "mask": MASK},
    ),
    "route": (
        lambda **x: losses.route(k=1, **x),
        {"scores": GATES, "bias": EVEN},
    ),
    "router_load": (
        losses.router_load,
        {"gate_logits": GATES, "expert_indices": CHOSEN, "token_weights": WEIGHTS},
    ),
    "router_z_loss": (
        losses.router_z_loss,
        {"gate_logits": GATES, "token_weights": WEIGHTS},
    ),
    "sampler_weights": (
        losses.sampler_weights,
        {"log_probs": P, "sampler_log_probs": P - 0.1, "mask": MASK},
    ),
    "sequence_balance_loss": (
        losses.sequence_balance_loss,
        {
            "scores": np.exp(normal(B, S, E)),
            "expert_indices": ids(E, B, S, K),
            "token_weights": MASK,
        },
    ),
    "sequence_log_probs": (losses.sequence_log_probs, {"log_probs": P, "mask": MASK}),
    "sequence_unlikelihood": (
        lambda **x: losses.sequence_unlikelihood(ngram_size=1, **x),
        {"logits": Z, "token_ids": IDS, "mask": MASK},
    ),
    "simctg_loss": (
        losses.simctg_loss,
        {"hidden_states": normal(B, S, D), "mask": MASK, "segment_ids": IDS + 1},
    ),
    "simpo_loss": (losses.simpo_loss, PAIRS),
    "top_k_divergence": (
        losses.top_k_divergence,
        {"log_probs": P - 2, "teacher_log_probs": P - 3},
    ),
    "update_bias": (update_bias, {"counts": EVEN}),
    "weigh_losses": (losses.weigh_losses, {"losses": EVEN, "log_weights": EVEN}),
    "acceptance_length": (
        metrics.acceptance_length,
        {"drafts": IDS, "verified": IDS, "weights": np.ones(B, np.float32)},
    ),
    "acceptance_rates": (
        metrics.acceptance_rates,
        {"drafts": IDS, "verified": IDS, "weights": np.ones(B, np.float32)},
    ),
    "accepted_lengths": (metrics.accepted_lengths, {"drafts": IDS, "verified": IDS}),
    "calibration_bins": (
        metrics.calibration_bins,
        {"confidence": -P / 2, "correct": P < -1.5, "weights": MASK},
    ),
    "distinct_ngrams": (
        lambda **x: metrics.distinct_ngrams(ngram_size=1, **x),
        {"ids": IDS, "mask": MASK},
    ),
    "longest_loop": (
        lambda **x: metrics.longest_loop(max_period=2, **x),
        {"ids": IDS, "mask": MASK},
    ),
    "repeated_ngrams": (
        lambda **x: metrics.repeated_ngrams(ngram_size=1, **x),
        {"ids": IDS, "mask": MASK},
    ),
}
# Those whose arguments are records, states or numbers.
WITHOUT_ARRAYS = {
    "expected_calibration_error",
    "expert_balance_ratio",
    "focal_cross_entropy",
    "log_z_squared",
    "smoothed_cross_entropy",
    "token_diversity",
    "update_gradient_balance",
}
