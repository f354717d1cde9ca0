"""The whole step of the unified loss in float64 NumPy, one plain sum after another.

`unified_oracle(config, state, inputs)` takes the guide's config keys (a missing one
has its default), the oracle's own state (None: fresh) and the call's arrays.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from support import oracle_batch as batch
from support import oracle_terms as term
from support.oracle_inputs import (
    Aux,
    OracleConfig,
    OracleState,
    Tokens,
    head_logits,
    initial_state,
    mean_term,
    metrics,
    project,
    read_tokens,
    resolve,
    statistics,
)
from support.oracle_terms import Floats

__all__ = [
    "OracleConfig",
    "OracleState",
    "initial_state",
    "statistics",
    "unified_oracle",
]
LAYER_NORM_EPSILON = 1e-5


# Main loss ----------------------------------------------------------------------


def early_eos(cfg: OracleConfig, tokens: Tokens) -> Aux:
    """The weighted early-EOS penalty, where an EOS is known."""
    if cfg.eos_token_id is None:
        return {}
    eos, minimum = cfg.eos_token_id, cfg.min_sequence_length
    w, segments = tokens.weights, tokens.segments
    if cfg.penalty_source == "targets":
        value = term.early_eos_targets(tokens.targets, w, segments, eos, minimum)
    else:
        value = term.early_eos_predictions(
            tokens.logits, tokens.targets, w, segments, eos, minimum
        )
    return {"eos_penalty": cfg.eos_penalty_weight * value}


def primary(cfg: OracleConfig, tokens: Tokens, temperature: float) -> float:
    """Mean smoothed cross-entropy, or focal loss in its place."""
    if cfg.use_focal_loss:
        alpha = np.asarray(cfg.focal_alpha, np.float64)
        return mean_term(tokens, lambda z, y: term.focal(z, y, alpha, cfg.focal_gamma))
    return mean_term(
        tokens,
        lambda z, y: term.smoothed_cross_entropy(
            z, y, cfg.label_smoothing, temperature
        ),
    )


def z_loss(cfg: OracleConfig, tokens: Tokens) -> Aux:
    """The weighted mean of log_z²."""
    if not cfg.z_loss_weight:
        return {}
    mean = mean_term(tokens, lambda z, _: term.log_sum_exp(z) ** 2)
    return {"z_loss": cfg.z_loss_weight * mean}


def main_loss(
    cfg: OracleConfig, tokens: Tokens, state: OracleState, inputs: Mapping[str, Any]
) -> Aux:
    """Main loss with z-loss and early EOS, and what it reports."""
    aux = {**z_loss(cfg, tokens), **early_eos(cfg, tokens)}
    extras = sum(aux.values())
    if cfg.primary_loss_type == "adaptive_mtp":
        parts = adaptive_mtp(cfg, tokens, inputs, primary_weight=1.0)
        value = parts.pop("loss")
        aux |= {f"main_{k}": v for k, v in parts.items()}
    else:
        tempered = cfg.primary_loss_type == "deepseek"
        value = primary(cfg, tokens, state.temperature if tempered else 1.0)
    if cfg.use_focal_loss:
        aux["focal_loss"] = primary(cfg, tokens, 1.0)
    elif cfg.primary_loss_type == "deepseek":
        own = state.temperature
        aux["tempered_nll"] = mean_term(tokens, lambda z, y: term.nll(z / own, y))
    return aux | {"main_loss": value + extras}


def next_temperature(
    cfg: OracleConfig, temperature: float, ring: tuple[float, ...]
) -> float:
    """One step up where the losses vary much, down where they vary little."""
    mean = sum(ring) / len(ring)
    if len(ring) < cfg.temperature_min_history or mean <= 0:
        return temperature
    variation = batch.unbiased_std(np.array(ring)) / mean
    if variation > cfg.temperature_heat_threshold:
        temperature += cfg.temperature_rate
    elif variation < cfg.temperature_cool_threshold:
        temperature -= cfg.temperature_rate
    return min(max(temperature, cfg.min_temperature), cfg.max_temperature)


# Multi-token prediction ---------------------------------------------------------


def head_mean(
    cfg: OracleConfig, tokens: Tokens, logits: Floats, j: int, smoothing: float
) -> float:
    """Mean over the pairs t, t+j of head j's smoothed cross-entropy."""
    weights = term.shifted_weights(tokens.weights, tokens.segments, j)
    values = term.token_values(
        head_logits(cfg, logits)[:, : weights.shape[1]],
        tokens.targets[:, j:],
        weights,
        lambda z, y: term.smoothed_cross_entropy(z, y, smoothing),
    )
    return term.weighted_mean(values, weights)


def layer_norm(x: Floats, scale: Floats, bias: Floats) -> Floats:
    """(x − mean)/√(var + ε)·scale + bias."""
    with np.errstate(invalid="ignore"):
        centred = x - x.mean(axis=-1, keepdims=True)
        variance = (centred**2).mean(axis=-1, keepdims=True)
        return centred / np.sqrt(variance + LAYER_NORM_EPSILON) * scale + bias


def parallel_logits(inputs: Mapping[str, Any]) -> list[Floats]:
    """DeepSeek-style heads over one LayerNorm."""
    norm, heads = inputs["mtp_params"]["norm"], inputs["mtp_params"]["heads"]
    hidden = np.asarray(inputs["hidden_states"], np.float64)
    normed = layer_norm(
        hidden,
        np.asarray(norm["scale"], np.float64),
        np.asarray(norm["bias"], np.float64),
    )
    kernel = np.asarray(heads["kernel"], np.float64)
    bias = np.asarray(heads["bias"], np.float64)
    return [normed @ k + b for k, b in zip(kernel, bias, strict=True)]


def sequential_logits(inputs: Mapping[str, Any]) -> list[Floats]:
    """One hidden state a depth, all through the shared head."""
    return [project(hidden, inputs) for hidden in inputs["mtp_hidden_states"]]


def plain_mtp(cfg: OracleConfig, tokens: Tokens, inputs: Mapping[str, Any]) -> Aux:
    """mtp_weight · Σ_j mean_j(nll) / min(K, S−1)."""
    read = sequential_logits if cfg.mtp_type == "sequential" else parallel_logits
    heads = read(inputs)[: tokens.targets.shape[1] - 1]
    losses = [
        head_mean(cfg, tokens, logits, j, 0.0) for j, logits in enumerate(heads, 1)
    ]
    mean = sum(losses) / len(losses) if losses else 0.0
    return {"mtp_loss": cfg.mtp_weight * mean, "mtp_head_losses": np.array(losses)}


def confidence_means(scores: Any, weights: Floats) -> tuple[float, float]:
    """(mean c, mean −log max(|2c−1|, 1e-7)): over rows or over tokens."""
    c = np.asarray(scores, np.float64)
    if c.ndim == 3 or c.shape == weights.shape:
        c, w = c.reshape(weights.shape), weights
    else:
        c, w = c.reshape(-1), (weights != 0).any(axis=1).astype(np.float64)
    safe = np.where(w != 0, c, 0.5)
    sureness = -np.log(np.maximum(np.abs(2 * safe - 1), 1e-7))
    return term.weighted_mean(safe, w), term.weighted_mean(sureness, w)


def adaptive_mtp(
    cfg: OracleConfig,
    tokens: Tokens,
    inputs: Mapping[str, Any],
    primary_weight: float,
) -> Aux:
    """Loss = primary + additional + confidence_reg."""
    scores, heads = inputs.get("confidence_scores"), inputs.get("additional_logits")
    confidence, sureness = 0.0, 0.0
    if scores is not None:
        confidence, sureness = confidence_means(scores, tokens.weights)
    weight, additional = 0.0, 0.0
    if tokens.places and bool(inputs.get("mtp_active", True)) and heads is not None:
        weight = cfg.mtp_weight
        if cfg.use_confidence_weighting and scores is not None:
            weight *= min(max(confidence, 0.0), 1.0)
        usable = list(heads)[: tokens.targets.shape[1] - 1]
        losses = [
            head_mean(cfg, tokens, logits, j, cfg.label_smoothing)
            for j, logits in enumerate(usable, 1)
        ]
        additional = weight * sum(losses) / len(losses) if losses else 0.0
    first = primary_weight * primary(cfg, tokens, 1.0) if primary_weight else 0.0
    regulariser = cfg.confidence_reg_strength * sureness
    return {
        "loss": first + additional + regulariser,
        "primary_loss": first,
        "additional_loss": additional,
        "confidence_reg": regulariser,
        "avg_confidence": confidence,
        "effective_mtp_weight": weight,
    }


def mtp(cfg: OracleConfig, tokens: Tokens, inputs: Mapping[str, Any]) -> Aux:
    """The secondary loss of `use_mtp`."""
    if not cfg.use_mtp:
        return {}
    if cfg.mtp_type != "adaptive":
        return plain_mtp(cfg, tokens, inputs)
    parts = adaptive_mtp(cfg, tokens, inputs, primary_weight=0.0)
    return {f"adaptive_mtp_{name}": value for name, value in parts.items()}


# Penalties ----------------------------------------------------------------------


def ngram(cfg: OracleConfig, tokens: Tokens) -> Aux:
    """ngram_penalty_weight · (n-gram term + token diversity)."""
    if not cfg.use_ngram_penalty:
        return {}
    ids = (tokens.targets, tokens.weights, tokens.segments)
    if cfg.penalty_source == "targets":
        repetition = term.ngram_targets(*ids, cfg.ngram_size)
    else:
        repetition = term.ngram_predictions(
            tokens.logits, *ids, cfg.ngram_size, cfg.ngram_max_matches
        )
    diversity = term.token_diversity(tokens.logits, tokens.weights)
    if not tokens.places:
        diversity = 0.0
    weight = cfg.ngram_penalty_weight
    return {
        "ngram_penalty": weight * (repetition + diversity),
        "ngram_repetition": weight * repetition,
        "token_diversity": weight * diversity,
    }


def repetition(cfg: OracleConfig, tokens: Tokens) -> Aux:
    """Immediate repetition, token unlikelihood and contrastive tokens."""
    aux: Aux = {}
    ids = (tokens.targets, tokens.weights, tokens.segments)
    if cfg.use_immediate_repetition_penalty:
        if cfg.penalty_source == "targets":
            value = term.immediate_targets(*ids)
        else:
            value = term.immediate_predictions(tokens.logits, *ids)
        weight = cfg.immediate_repetition_weight
        aux["immediate_repetition_penalty"] = weight * value
    if cfg.unlikelihood_weight:
        value = term.token_unlikelihood(tokens.logits, *ids)
        aux["unlikelihood"] = cfg.unlikelihood_weight * value
    if cfg.contrastive_token_weight:
        size = cfg.contrastive_token_window
        value = term.contrastive_token(tokens.logits, *ids, size)
        aux["contrastive_token"] = cfg.contrastive_token_weight * value
    return aux


# Experts ------------------------------------------------------------------------


def moe_balancing(
    cfg: OracleConfig,
    tokens: Tokens,
    state: OracleState,
    inputs: Mapping[str, Any],
) -> tuple[Aux, OracleState]:
    """The balancing term and the state after it; train only."""
    gates, load = router(cfg, tokens, inputs)
    aux: Aux = {"moe_max_violation": batch.max_violation(load)}
    if cfg.moe_balancing_type == "bias":
        bias = batch.next_bias(state.bias, load, cfg.bias_update_rate)
        return aux, replace(state, bias=bias)
    if cfg.moe_balancing_type == "quantile":
        k = np.shape(inputs["expert_indices"])[-1]
        bins, places = cfg.balancing_bins, tokens.routed
        layers = [batch.cutoff_histogram(g, state.bias, k, places, bins) for g in gates]
        counts = np.sum(layers, axis=0)
        bias = batch.next_quantile_bias(state.bias, counts, k, cfg.bias_momentum)
        return aux, replace(state, bias=bias)
    count = len(tokens.routed)
    if count:
        mass = batch.router_mass(gates, tokens.routed).mean(axis=0)
        counts = load.mean(axis=0)
        state = replace(
            state,
            expert_counts=0.9 * state.expert_counts + 0.1 * counts,
            expert_scores=0.9 * state.expert_scores + 0.1 * mass / count,
            total_tokens=0.9 * state.total_tokens + 0.1 * count,
        )
    value, ratio, cv = batch.gradient_balance(
        state.expert_counts, state.total_tokens, cfg.gradient_balance_weight
    )
    aux |= {
        "moe_balancing_term": value if count else 0.0,
        "moe_expert_balance_ratio": ratio,
        "moe_cv": cv,
    }
    return aux, state


def router(
    cfg: OracleConfig, tokens: Tokens, inputs: Mapping[str, Any]
) -> tuple[Floats, Floats]:
    """Gate logits [L, N, E] and assignments [L, E]."""
    shape = tokens.targets.shape
    gates = batch.by_layer(np.asarray(inputs["gate_logits"], np.float64), shape)
    indices = batch.by_layer(np.asarray(inputs["expert_indices"], np.int64), shape)
    return gates, batch.expert_load(indices, tokens.routed, cfg.num_experts or 0)


def expert_losses(cfg: OracleConfig, tokens: Tokens, inputs: Mapping[str, Any]) -> Aux:
    """Diversity and the auxiliary losses."""
    aux: Aux = {}
    outputs = inputs.get("expert_outputs")
    diversity = 0.0
    if outputs is not None:
        stacked = np.asarray(outputs, np.float64)
        flat = stacked.reshape(stacked.shape[0], -1, stacked.shape[-1])
        metric = cfg.diversity_similarity
        diversity = batch.expert_diversity(flat, tokens.routed, metric)
    if cfg.use_diversity_loss:
        aux["diversity_loss"] = cfg.diversity_weight * diversity
    if cfg.use_auxiliary_loss:
        gates, load = router(cfg, tokens, inputs)
        balance = batch.auxiliary_load_balancing(gates, load, tokens.routed)
        router_z = batch.auxiliary_router_z(gates, tokens.routed)
        aux["aux_load_balancing"] = cfg.load_balancing_weight * balance
        aux["aux_router_z"] = cfg.router_z_weight * router_z
        if outputs is not None:
            aux["aux_expert_diversity"] = 0.0001 * diversity
    return aux


def contrastive(cfg: OracleConfig, tokens: Tokens, inputs: Mapping[str, Any]) -> Aux:
    """The weighted contrastive loss of `embeddings`, or of the hidden states."""
    if not cfg.use_contrastive_loss:
        return {}
    if not tokens.places:
        return {"contrastive_loss": 0.0}
    kind, margin = cfg.contrastive_type, cfg.contrastive_margin
    if kind == "simctg":
        hidden = np.asarray(inputs["hidden_states"], np.float64)
        value = batch.simctg(hidden, tokens.weights, tokens.segments, margin)
        return {"contrastive_loss": cfg.contrastive_weight * value}
    embeddings = np.asarray(inputs["embeddings"], np.float64)
    labels = np.asarray(inputs["labels"], np.int64)
    if kind == "infonce":
        value = batch.infonce(embeddings, labels, cfg.contrastive_temperature)
    elif kind == "margin":
        pairs = batch.label_pairs(labels)
        value = batch.margin_contrastive(embeddings, *pairs, margin)
    else:
        value = batch.triplet(embeddings, labels, margin)
    return {"contrastive_loss": cfg.contrastive_weight * value}


# The step -----------------------------------------------------------------------

ADDED = (
    "main_loss",
    "mtp_loss",
    "adaptive_mtp_loss",
    "ngram_penalty",
    "immediate_repetition_penalty",
    "unlikelihood",
    "contrastive_token",
    "moe_balancing_term",
    "diversity_loss",
    "contrastive_loss",
    "aux_load_balancing",
    "aux_router_z",
    "aux_expert_diversity",
)


def next_state(cfg: OracleConfig, state: OracleState, aux: Aux) -> OracleState:
    """Step, temperature and the running sums of the adaptive loss."""
    state = replace(state, step=state.step + 1)
    if cfg.primary_loss_type == "deepseek" and cfg.adaptive_temperature:
        ring = (*state.ring, aux["main_loss"])[-cfg.temperature_history :]
        temperature = next_temperature(cfg, state.temperature, ring)
        state = replace(state, ring=ring, temperature=temperature)
    prefix = "main" if cfg.primary_loss_type == "adaptive_mtp" else "adaptive_mtp"
    if f"{prefix}_effective_mtp_weight" in aux:
        names = ("primary_loss", "additional_loss", "confidence_reg", "avg_confidence")
        parts = np.array([aux[f"{prefix}_{name}"] for name in names])
        state = replace(
            state, mtp_sums=state.mtp_sums + parts, mtp_count=state.mtp_count + 1
        )
    return state


def unified_oracle(
    config: Mapping[str, Any],
    state: OracleState | None,
    inputs: Mapping[str, Any],
    train: bool = True,
) -> tuple[float, Aux, OracleState]:
    """(total loss, aux, state after the step)."""
    state = initial_state(config) if state is None else state
    cfg = resolve(config, state.step)
    tokens = read_tokens(cfg, inputs)
    aux: Aux = metrics(tokens)
    aux |= main_loss(cfg, tokens, state, inputs)
    aux |= mtp(cfg, tokens, inputs) | ngram(cfg, tokens) | repetition(cfg, tokens)
    aux |= expert_losses(cfg, tokens, inputs) | contrastive(cfg, tokens, inputs)
    after = state
    if cfg.use_moe_balancing and train:
        balance, after = moe_balancing(cfg, tokens, state, inputs)
        aux |= balance
    after = next_state(cfg, after, aux) if train and tokens.places else state
    if cfg.primary_loss_type == "deepseek":
        aux["temperature"] = after.temperature
    aux["total_loss"] = sum(float(aux.get(name, 0.0)) for name in ADDED)
    return aux["total_loss"], aux, after
