"""What the oracle of the whole step reads: config, state, logits and weights."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from support import oracle_terms as term
from support.oracle_terms import Floats, Ints

Aux = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class OracleConfig:
    """The fields that change the arithmetic, with the guide's defaults."""

    vocab_size: int
    hidden_size: int | None = None
    primary_loss_type: str = "deepseek"
    ignore_index: int = -100
    initial_temperature: float = 1.0
    adaptive_temperature: bool = True
    min_temperature: float = 0.5
    max_temperature: float = 2.0
    temperature_rate: float = 0.01
    temperature_heat_threshold: float = 0.1
    temperature_cool_threshold: float = 0.05
    temperature_history: int = 100
    temperature_min_history: int = 10
    label_smoothing: float = 0.1
    use_mtp: bool = False
    num_future_tokens: int = 3
    mtp_weight: float = 0.1
    mtp_type: str = "parallel"
    use_confidence_weighting: bool = True
    stop_confidence_gradient: bool = False
    confidence_reg_strength: float = 0.01
    use_ngram_penalty: bool = True
    ngram_size: int = 4
    ngram_penalty_weight: float = 0.1
    use_immediate_repetition_penalty: bool = True
    immediate_repetition_weight: float = 0.5
    eos_token_id: int | None = None
    pad_token_id: int | None = None
    mask_boundaries: bool = False
    min_sequence_length: int = 20
    eos_penalty_weight: float = 0.05
    num_experts: int | None = None
    use_moe_balancing: bool = False
    moe_balancing_type: str = "gradient"
    gradient_balance_weight: float = 0.1
    bias_update_rate: float = 1e-3
    balancing_bins: int = 1000
    bias_momentum: float = 0.0
    use_focal_loss: bool = False
    focal_alpha: float | tuple[float, ...] = 1.0
    focal_gamma: float = 2.0
    use_diversity_loss: bool = False
    diversity_weight: float = 0.01
    diversity_similarity: str = "cosine"
    use_contrastive_loss: bool = False
    contrastive_type: str = "infonce"
    contrastive_weight: float = 0.1
    contrastive_temperature: float = 0.07
    contrastive_margin: float = 0.5
    use_auxiliary_loss: bool = False
    load_balancing_weight: float = 1e-4
    router_z_weight: float = 1e-3
    penalty_source: str = "predictions"
    ngram_max_matches: int = 8
    unlikelihood_weight: float = 0.0
    contrastive_token_weight: float = 0.0
    contrastive_token_window: int = 60
    z_loss_weight: float = 0.0
    logit_soft_cap: float | None = None
    chunk_size: int | None = None


@dataclass(frozen=True)
class OracleState:
    """What is carried from step to step."""

    step: int
    temperature: float
    ring: tuple[float, ...]
    mtp_sums: Floats
    mtp_count: int
    expert_counts: Floats
    expert_scores: Floats
    total_tokens: float
    bias: Floats


@dataclass(frozen=True)
class Tokens:
    """The step's logits and integers."""

    logits: Floats
    targets: Ints
    weights: Floats
    segments: Ints
    invalid: int
    no_weight: int
    routed: list[int]

    @property
    def places(self) -> list[int]:
        """Flat indices of the counted tokens."""
        return [int(n) for n in np.flatnonzero(self.weights.reshape(-1))]


def initial_state(config: Mapping[str, Any]) -> OracleState:
    """The state before the first step."""
    cfg = resolve(config, 0)
    zeros = np.zeros(cfg.num_experts or 0)
    return OracleState(
        step=0,
        temperature=cfg.initial_temperature,
        ring=(),
        mtp_sums=np.zeros(4),
        mtp_count=0,
        expert_counts=zeros,
        expert_scores=zeros,
        total_tokens=0.0,
        bias=zeros,
    )


def statistics(state: OracleState) -> Aux:
    """Every entry of `ava_jax.statistics`, nested names joined by dots."""
    means = state.mtp_sums / max(state.mtp_count, 1)
    names = ("primary_loss", "additional_loss", "confidence_reg", "confidence")
    mtp = {f"avg_{k}": v for k, v in zip(names, means, strict=True)}
    mtp["total_computations"] = state.mtp_count
    moe_names = ("expert_counts", "expert_scores", "total_tokens", "bias")
    moe = {name: getattr(state, name) for name in moe_names}
    return {
        "temperature": state.temperature,
        **{f"adaptive_mtp.{k}": v for k, v in mtp.items()},
        **{f"moe_balancing.{k}": v for k, v in moe.items()},
    }


def resolve(config: Mapping[str, Any], step: int) -> OracleConfig:
    """The config with every schedule evaluated at `step`; unknown keys are ours."""
    known = {field.name for field in fields(OracleConfig)}
    values: dict[str, Any] = {k: v for k, v in config.items() if k in known}
    for name, value in values.items():
        if callable(value):
            values[name] = float(np.asarray(value(step)))
    return OracleConfig(**values)


def head_logits(cfg: OracleConfig, logits: Floats) -> Floats:
    """The config's own vocabulary, soft-capped."""
    kept = np.asarray(logits, np.float64)[..., : cfg.vocab_size]
    return term.soft_cap(kept, cfg.logit_soft_cap)


def project(hidden: Floats, inputs: Mapping[str, Any]) -> Floats:
    """Logits of the shared head: h·W + b."""
    head = np.asarray(inputs["lm_head"], np.float64)
    with np.errstate(invalid="ignore"):
        logits = np.asarray(hidden, np.float64) @ head
    bias = inputs.get("lm_head_bias")
    return logits if bias is None else logits + np.asarray(bias, np.float64)


def read_tokens(cfg: OracleConfig, inputs: Mapping[str, Any]) -> Tokens:
    """Logits through whichever path, weights and segments."""
    targets = np.asarray(inputs["targets"], np.int64)
    mask, segments = inputs.get("attention_mask"), inputs.get("segment_ids")
    if segments is not None:
        segments = np.asarray(segments, np.int64)
    no_weight = 0
    if mask is not None:
        mask = np.asarray(mask, np.float64)
        usable = (mask >= 0) & (mask < math.inf)
        no_weight, mask = int(np.sum(~usable)), np.where(usable, mask, 0.0)
    padding = cfg.pad_token_id, cfg.eos_token_id
    attention = term.attention_weights(targets, mask, segments, *padding)
    routed = attention != 0
    if inputs.get("router_mask") is not None:
        routed = np.asarray(inputs["router_mask"]) > 0
    if cfg.mask_boundaries:
        assert segments is not None
        segments = term.without_boundaries(segments)
        attention = np.where(segments == 0, 0.0, attention)
    valid = term.valid_targets(targets, cfg.vocab_size, cfg.ignore_index)
    bad = (attention != 0) & ~valid & (targets != cfg.ignore_index)
    if cfg.primary_loss_type == "adaptive_mtp" and "primary_logits" in inputs:
        logits = head_logits(cfg, inputs["primary_logits"])
    elif inputs.get("logits") is not None:
        logits = head_logits(cfg, inputs["logits"])
    else:
        logits = head_logits(cfg, project(inputs["hidden_states"], inputs))
    return Tokens(
        logits=logits,
        targets=targets,
        weights=np.where(valid, attention, 0.0),
        segments=np.ones(targets.shape, np.int64) if segments is None else segments,
        invalid=int(bad.sum()),
        no_weight=no_weight,
        routed=[int(n) for n in np.flatnonzero(routed.reshape(-1))],
    )


def mean_term(tokens: Tokens, function: Callable[[Floats, int], float]) -> float:
    """Weighted mean of function(z, y)."""
    values = term.token_values(tokens.logits, tokens.targets, tokens.weights, function)
    return term.weighted_mean(values, tokens.weights)


def metrics(tokens: Tokens) -> Aux:
    """The untouched truth: T = 1, no smoothing, no penalty."""
    mean_nll = mean_term(tokens, term.nll)
    return {
        "nll": mean_nll,
        "perplexity": math.exp(mean_nll),
        "accuracy": mean_term(tokens, lambda z, y: float(np.argmax(z) == y)),
        "entropy": mean_term(tokens, lambda z, _: term.entropy(z)),
        "num_tokens": float(np.sum(tokens.weights != 0)),
        "num_invalid_targets": tokens.invalid,
        "num_invalid_weights": tokens.no_weight,
    }
