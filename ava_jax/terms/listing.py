"""The terms of a flat config: the one place that knows them all."""

from collections.abc import Iterator

from ava_jax.config import UnifiedLossConfig
from ava_jax.terms import (
    adaptive,
    contrastive,
    distillation,
    likelihood,
    mtp,
    policy,
    repetition,
    router,
    temperature,
)
from ava_jax.terms.base import Term, entries_of

MEASUREMENTS = ("nll", "accuracy", "entropy")
_ALWAYS = (
    "total_loss",
    "main_loss",
    "perplexity",
    "num_tokens",
    "num_invalid_targets",
    "num_invalid_weights",
    *MEASUREMENTS,
)

# Terms that no config switches on; they are given as extra terms.
_GIVEN = (policy.PolicyTerm, distillation.Distillation, distillation.TopKDistillation)


def terms_of(config: UnifiedLossConfig) -> tuple[Term, ...]:
    """Lists the terms that a config switches on, the main loss first.

    Args:
      config: the flat config.

    Returns:
      The terms, each with its weight and everything else it needs.

    Example:
      >>> import ava_jax
      >>> config = ava_jax.UnifiedLossConfig(vocab_size=8, z_loss_weight=1e-4)
      >>> [term.name for term in ava_jax.terms.terms_of(config)][:2]
      ['cross_entropy', 'z_loss']
    """
    return (
        _primary(config),
        *_likelihood(config),
        *_repetition(config),
        *_heads(config),
        *_experts(config),
        *_embeddings(config),
    )


def _primary(config: UnifiedLossConfig) -> Term:
    if config.primary_loss_type == "deepseek":
        moves = temperature.AdaptiveTemperature(
            initial=config.initial_temperature,
            is_adaptive=config.adaptive_temperature,
            low=config.min_temperature,
            high=config.max_temperature,
            rate=config.temperature_rate,
            heat_threshold=config.temperature_heat_threshold,
            cool_threshold=config.temperature_cool_threshold,
            history=config.temperature_history,
            min_history=config.temperature_min_history,
        )
        if config.use_focal_loss:
            return temperature.TemperedFocalLoss(
                config.focal_alpha, config.focal_gamma, adaptive=moves
            )
        return temperature.TemperedCrossEntropy(config.label_smoothing, adaptive=moves)
    if config.use_focal_loss:
        primary = likelihood.FocalLoss(config.focal_alpha, config.focal_gamma)
    else:
        primary = likelihood.CrossEntropy(config.label_smoothing)
    if config.primary_loss_type == "adaptive_mtp":
        return adaptive.AdaptivePrimary(primary, _adaptive_heads(config))
    return primary


def _likelihood(config: UnifiedLossConfig) -> Iterator[Term]:
    if config.is_on("z_loss_weight"):
        yield likelihood.ZLoss(config.z_loss_weight)
    if config.use_ngram_penalty:
        weight = config.ngram_penalty_weight
        yield likelihood.TokenDiversity(config.vocab_size, weight)


def _repetition(config: UnifiedLossConfig) -> Iterator[Term]:
    of_targets = config.penalty_source == "targets"
    if config.use_ngram_penalty:
        size, weight = config.ngram_size, config.ngram_penalty_weight
        if of_targets:
            yield repetition.TargetNgrams(size, weight)
        else:
            yield repetition.NgramPenalty(size, config.ngram_max_matches, weight)
    if config.use_immediate_repetition_penalty:
        kind = repetition.TargetRuns if of_targets else repetition.ImmediatePenalty
        yield kind(config.immediate_repetition_weight)
    if config.eos_token_id is not None and config.is_on("eos_penalty_weight"):
        kind = repetition.TargetEarlyEOS if of_targets else repetition.EarlyEOSPenalty
        yield kind(
            config.eos_token_id, config.min_sequence_length, config.eos_penalty_weight
        )
    if config.is_on("unlikelihood_weight"):
        yield repetition.TokenUnlikelihood(config.unlikelihood_weight)
    if config.is_on("contrastive_token_weight"):
        window = config.contrastive_token_window
        yield repetition.ContrastiveToken(window, config.contrastive_token_weight)


def _heads(config: UnifiedLossConfig) -> Iterator[Term]:
    if not config.use_mtp:
        return
    count, weight = config.num_future_tokens, config.mtp_weight
    if config.mtp_type == "adaptive":
        yield adaptive.AdaptiveSecondary(_adaptive_heads(config))
    elif config.mtp_type == "sequential":
        yield mtp.SequentialHeads(count, weight)
    else:
        assert config.hidden_size is not None  # checked by the config
        yield mtp.ParallelHeads(count, config.hidden_size, weight)


def _adaptive_heads(config: UnifiedLossConfig) -> adaptive.AdaptiveHeads:
    return adaptive.AdaptiveHeads(
        config.num_future_tokens,
        config.mtp_weight,
        config.label_smoothing,
        config.use_confidence_weighting,
        config.stop_confidence_gradient,
        config.confidence_reg_strength,
    )


def _experts(config: UnifiedLossConfig) -> Iterator[Term]:
    if config.num_experts is not None:
        experts = config.num_experts, config.num_moe_layers
        if config.use_moe_balancing and config.moe_balancing_type == "bias":
            yield router.BiasBalancing(*experts, config.bias_update_rate)
        elif config.use_moe_balancing and config.moe_balancing_type == "quantile":
            bins, momentum = config.balancing_bins, config.bias_momentum
            yield router.QuantileBalancing(*experts, bins, momentum)
        elif config.use_moe_balancing:
            yield router.GradientBalancing(*experts, config.gradient_balance_weight)
        if config.use_auxiliary_loss:
            yield router.LoadBalancing(*experts, config.load_balancing_weight)
            yield router.RouterZLoss(*experts, config.router_z_weight)
            yield router.AuxiliaryDiversity(config.diversity_similarity)
    if config.use_diversity_loss:
        weight = config.diversity_weight
        yield router.ExpertDiversity(config.diversity_similarity, weight)


def _embeddings(config: UnifiedLossConfig) -> Iterator[Term]:
    if config.use_contrastive_loss:
        yield contrastive.contrastive_term(
            config.contrastive_type,
            config.contrastive_temperature,
            config.contrastive_margin,
            config.contrastive_weight,
        )


def built_in(base: type[Term] = Term) -> Iterator[type[Term]]:
    """Lists the classes of the built-in terms."""
    for kind in base.__subclasses__():
        if kind.__module__.startswith("ava_jax.terms."):
            if not kind.__name__.startswith("_"):
                yield kind
            yield from built_in(kind)


def _entries_of(kind: type) -> set[str]:
    """Returns the entries of `aux` of a built-in class."""
    own = {*kind.keys, *getattr(kind, "measured", ())}
    return own | {kind.name} if hasattr(kind, "name") else own


# No term of a user's may be called so.
RESERVED_NAMES = frozenset(_ALWAYS).union(*map(_entries_of, built_in()))


def not_reserved(
    terms: tuple[Term, ...], built_in: tuple[type[Term], ...] = _GIVEN
) -> tuple[Term, ...]:
    """Raises if a term would overwrite an entry of aux; returns the terms.

    Args:
      terms: the terms.
      built_in: the classes whose own names are theirs.
    """
    for term in terms:
        wanted = entries_of(term)
        if term.part != "main_loss" and term.part is not None:
            wanted.add(term.part)
        known = (kind for kind in type(term).__mro__ if kind in built_in)
        for kind in known:
            wanted -= _entries_of(kind)
        if taken := wanted & RESERVED_NAMES:
            raise ValueError(
                f"term {term.name!r}: the name {min(taken)!r} is taken; choose another"
            )
    return terms


def distinct(terms: tuple[Term, ...]) -> tuple[Term, ...]:
    """Raises if two terms make the same entry of aux or have the same state."""
    parts = {term.part for term in terms} | {"main_loss"}
    seen: set[str] = set()
    fields: set[str] = set()
    for term in terms:
        own = entries_of(term) - parts
        if taken := own & seen or {term.name} & parts:
            raise ValueError(
                f"term {term.name!r}: the name {min(taken)!r} is taken; choose another"
            )
        if taken := fields.intersection(term.fields):
            raise ValueError(
                f"term {term.name!r}: another term already keeps its state in "
                f"{min(taken)!r}"
            )
        seen |= own
        fields.update(term.fields)
    return terms
