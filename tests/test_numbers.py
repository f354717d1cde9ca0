"""Numbers that mean nothing are refused, wherever they come in, by name."""

import dataclasses
import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.experimental import checkify

import ava_jax
from ava_jax import losses, metrics, terms
from ava_jax.losses.moe import BiasBalanceState, GradientBalanceState
from ava_jax.ranges import RANGES, WEIGHTS, check_range

V = 11
LOGITS = jnp.zeros((2, 6, V))
IDS = jnp.zeros((2, 6), jnp.int32)
ROWS = jnp.zeros((4,))
PAIR = jnp.full((2,), -1.0), jnp.full((2,), -2.0)
LOG_PROBS = jnp.full((2, 6), -1.0)
EMBEDDINGS, LABELS = jnp.ones((4, 3)), jnp.zeros((4,), jnp.int32)
GATES, HISTOGRAM = jnp.zeros((4, 3)), jnp.ones((3, 5))
BALANCE = GradientBalanceState(jnp.ones(3), jnp.ones(3), jnp.ones(()))
# Concrete while a function is traced.
ARRAY: Any = np.asarray
NOT_FINITE = (math.nan, math.inf, -math.inf)
NO_NUMBERS = (True, "1", [1.0], Fraction(1, 3), np.ones(2))
NEGATIVE = (*NOT_FINITE, -1e-3)
NOT_POSITIVE = (*NEGATIVE, 0.0)
NO_SHARE = (*NEGATIVE, 1.0, 2.0)
NO_COUNT = (0, -1, 1.5, math.nan)


def policy(**options: Any) -> Any:
    """A policy loss with everything that an option may need."""
    return losses.policy_loss(
        LOG_PROBS,
        jnp.ones(2),
        jnp.ones((2, 6)),
        ref_log_probs=LOG_PROBS,
        entropy=LOG_PROBS,
        **options,
    )


def statistics() -> Any:
    query = ava_jax.Query(targets=IDS, active=IDS == 0)
    return ava_jax.token_statistics(LOGITS, query, ava_jax.Vocabulary(V))


Call = Callable[[Any], Any]
FUNCTIONS: dict[str, tuple[str, Call, tuple[Any, ...]]] = {
    "focal alpha": (
        "alpha",
        lambda x: losses.focal_loss(LOGITS, IDS, alpha=x),
        (*NEGATIVE, jnp.ones(3), [math.nan] * V, [-1.0] * V),
    ),
    "focal gamma": (
        "gamma",
        lambda x: losses.focal_loss(LOGITS, IDS, gamma=x),
        (*NEGATIVE, True),
    ),
    "smoothing": (
        "smoothing",
        lambda x: losses.label_smoothing_loss(LOGITS, IDS, smoothing=x),
        (*NO_SHARE, True),
    ),
    "smoothing of statistics": (
        "smoothing",
        lambda x: losses.smoothed_cross_entropy(statistics(), x),
        NO_SHARE,
    ),
    "diversity": (
        "vocab_size",
        lambda x: losses.token_diversity(statistics(), x),
        (*NO_COUNT, 1),
    ),
    "eps": ("eps", lambda x: losses.group_advantages(ROWS, 2, eps=x), NEGATIVE),
    "group size": (
        "group_size",
        lambda x: losses.group_advantages(ROWS, x),
        (*NO_COUNT, 1, True),
    ),
    "clip_low": ("clip_low", lambda x: policy(clip_low=x), (*NEGATIVE, 1.5, True)),
    "clip_high": ("clip_high", lambda x: policy(clip_high=x), NEGATIVE),
    "cispo": (
        "clip_high",
        lambda x: policy(kind="cispo", clip_high=x),
        NOT_POSITIVE,
    ),
    "ratio_cap": ("ratio_cap", lambda x: policy(ratio_cap=x), NOT_POSITIVE),
    "kl_weight": ("kl_weight", lambda x: policy(kl_weight=x), NEGATIVE),
    "entropy_weight": (
        "entropy_weight",
        lambda x: policy(entropy_weight=x),
        (*NOT_FINITE, True),
    ),
    "sapo": (
        "sapo_temperatures",
        lambda x: policy(kind="sapo", sapo_temperatures=(1.0, x)),
        NOT_POSITIVE,
    ),
    "max_length": (
        "max_length",
        lambda x: policy(kind="dr_grpo", max_length=x),
        NOT_POSITIVE,
    ),
    "num_tokens": ("num_tokens", lambda x: policy(num_tokens=x), NEGATIVE),
    "num_rows": ("num_rows", lambda x: policy(num_rows=x), NEGATIVE),
    "sampler cap": (
        "cap",
        lambda x: losses.sampler_weights(LOG_PROBS, LOG_PROBS, IDS, cap=x),
        NOT_POSITIVE,
    ),
    "dpo beta": (
        "beta",
        lambda x: losses.dpo_loss(*PAIR, *PAIR, beta=x),
        (*NOT_POSITIVE, True),
    ),
    "dpo smoothing": (
        "label_smoothing",
        lambda x: losses.dpo_loss(*PAIR, *PAIR, kind="robust", label_smoothing=x),
        (*NEGATIVE, 0.5),
    ),
    "cpo": ("beta", lambda x: losses.cpo_loss(*PAIR, beta=x), NOT_POSITIVE),
    "simpo": ("gamma", lambda x: losses.simpo_loss(*PAIR, gamma=x), NEGATIVE),
    "orpo": ("beta", lambda x: losses.orpo_loss(*PAIR, beta=x), NOT_POSITIVE),
    "distillation temperature": (
        "temperature",
        lambda x: distilled(temperature=x),
        NOT_POSITIVE,
    ),
    "distillation beta": ("beta", lambda x: distilled(beta=x), (*NEGATIVE, 1.1)),
    "distillation cap": (
        "teacher_logit_soft_cap",
        lambda x: distilled(teacher_logit_soft_cap=x),
        NOT_POSITIVE,
    ),
    "log-probabilities": (
        "temperature",
        lambda x: ava_jax.token_log_probs(targets=IDS, logits=LOGITS, temperature=x),
        (*NOT_POSITIVE, True),
    ),
    "consistency": (
        "temperature",
        lambda x: losses.consistency_loss(LOGITS, LOGITS, temperature=x),
        NOT_POSITIVE,
    ),
    "infonce": (
        "temperature",
        lambda x: losses.contrastive_infonce_loss(EMBEDDINGS, temperature=x),
        NOT_POSITIVE,
    ),
    "margin": (
        "margin",
        lambda x: losses.contrastive_margin_loss(EMBEDDINGS, labels=LABELS, margin=x),
        NEGATIVE,
    ),
    "triplet": (
        "margin",
        lambda x: losses.contrastive_triplet_loss(EMBEDDINGS, labels=LABELS, margin=x),
        NEGATIVE,
    ),
    "simctg": ("margin", lambda x: losses.simctg_loss(LOGITS, margin=x), NEGATIVE),
    "window": (
        "window",
        lambda x: losses.contrastive_token_loss(LOGITS, IDS, window=x),
        NO_COUNT,
    ),
    "decay": (
        "decay",
        lambda x: losses.repetition_decay_loss(LOGITS, IDS, span_length=2, decay=x),
        (*NEGATIVE, 1.1),
    ),
    "span_length": (
        "span_length",
        lambda x: losses.repetition_decay_loss(LOGITS, IDS, span_length=x),
        (*NO_COUNT, jnp.array([2, 0]), jnp.array([2, 2, 2])),
    ),
    "repeated length": ("length", lambda x: losses.repeat_spans(IDS, x), NO_COUNT),
    "unlikelihood n-grams": (
        "ngram_size",
        lambda x: losses.sequence_unlikelihood(LOGITS, IDS, ngram_size=x),
        NO_COUNT,
    ),
    "anti-repetition n-grams": (
        "ngram_size",
        lambda x: losses.anti_repetition_loss(LOGITS, IDS, ngram_size=x),
        NO_COUNT,
    ),
    "anti-repetition weight": (
        "repetition_penalty_weight",
        lambda x: losses.anti_repetition_loss(LOGITS, IDS, repetition_penalty_weight=x),
        (*NEGATIVE, lambda step: -1.0),
    ),
    "router momentum": (
        "momentum",
        lambda x: losses.update_gradient_balance(
            BALANCE, losses.router_load(GATES, LABELS[:, None]), momentum=x
        ),
        NO_SHARE,
    ),
    "balance weight": (
        "weight",
        lambda x: losses.gradient_balance_loss(GATES, BALANCE, weight=x),
        NEGATIVE,
    ),
    "bias rate": (
        "rate",
        lambda x: losses.update_bias(
            BiasBalanceState(jnp.zeros(3)), jnp.ones(3), rate=x
        ),
        NEGATIVE,
    ),
    "route": ("k", lambda x: losses.route(GATES, jnp.zeros(3), x), (*NO_COUNT, 4)),
    "cutoffs": (
        "k",
        lambda x: losses.cutoff_histogram(GATES, jnp.zeros(3), x),
        (*NO_COUNT, 3),
    ),
    "bins": (
        "bins",
        lambda x: losses.cutoff_histogram(GATES, jnp.zeros(3), 1, bins=x),
        NO_COUNT,
    ),
    "quantile momentum": (
        "momentum",
        lambda x: losses.quantile_bias(jnp.zeros(3), HISTOGRAM, 1, momentum=x),
        NO_SHARE,
    ),
    "confidence": (
        "confidence",
        lambda x: losses.confidence_regularizer(ARRAY([0.5, x])),
        (*NEGATIVE, 1.1),
    ),
    "mean confidence": (
        "mean_confidence",
        lambda x: losses.effective_mtp_weight(ARRAY(0.1), ARRAY(x)),
        (*NEGATIVE, 1.1),
    ),
    "heads' weight": (
        "weight",
        lambda x: losses.effective_mtp_weight(ARRAY(x)),
        NEGATIVE,
    ),
    "calibration": (
        "num_bins",
        lambda x: metrics.calibration_bins(PAIR[0], PAIR[0], num_bins=x),
        NO_COUNT,
    ),
    "repeated n-grams": (
        "ngram_size",
        lambda x: metrics.repeated_ngrams(IDS, ngram_size=x),
        NO_COUNT,
    ),
    "loops": (
        "max_period",
        lambda x: metrics.longest_loop(IDS, max_period=x),
        NO_COUNT,
    ),
}


def distilled(**options: Any) -> Any:
    return ava_jax.distillation_loss(logits=LOGITS, teacher_logits=LOGITS, **options)


@pytest.mark.parametrize("name", list(FUNCTIONS))
@pytest.mark.usefixtures("unannotated")
def test_a_number_out_of_its_range_is_refused_by_name(name):
    argument, call, wrong = FUNCTIONS[name]
    for value in wrong:
        with pytest.raises((TypeError, ValueError), match=argument):
            jax.eval_shape(lambda value=value: call(value))


def wrong_values(name: str) -> list[Any]:
    """Values outside the range of a field."""
    if name in WEIGHTS:
        return [*NEGATIVE, *NO_NUMBERS, lambda step: -1.0, lambda step: step[None]]
    limits = RANGES[name]
    wrong: list[Any] = [*NOT_FINITE, *NO_NUMBERS]
    low = limits["low"]
    wrong.append(low if not limits.get("inclusive", True) else low - 1)
    if (high := limits.get("high")) is not None:
        wrong.append(high + 1 if limits.get("through") else high)
    return [*wrong, 2.5] if limits.get("whole") else wrong


def numbers_of(owner: Any) -> list[str]:
    names = (field.name for field in dataclasses.fields(owner))
    return [name for name in names if name in RANGES or name in WEIGHTS]


@pytest.mark.parametrize("name", numbers_of(ava_jax.UnifiedLossConfig))
@pytest.mark.usefixtures("unannotated")
def test_a_field_out_of_its_range_is_refused_by_name(name):
    for value in wrong_values(name):
        fields: Any = {"vocab_size": V, name: value}
        with pytest.raises((TypeError, ValueError), match=name):
            ava_jax.UnifiedLossConfig(**fields)


HEADS = terms.AdaptiveHeads(2, 0.1)
TERMS: list[Any] = [
    terms.CrossEntropy(),
    terms.FocalLoss(),
    terms.ZLoss(0.1),
    terms.TokenDiversity(V, 0.1),
    terms.TemperedCrossEntropy(),
    terms.TemperedFocalLoss(),
    terms.NgramPenalty(3, 2, 0.1),
    terms.ImmediatePenalty(0.1),
    terms.EarlyEOSPenalty(1, 4, 0.1),
    terms.TokenUnlikelihood(0.1),
    terms.ContrastiveToken(5, 0.1),
    terms.TargetNgrams(3, 0.1),
    terms.TargetRuns(0.1),
    terms.TargetEarlyEOS(1, 4, 0.1),
    terms.ParallelHeads(2, 4, 0.1),
    terms.SequentialHeads(2, 0.1),
    terms.AdaptivePrimary(terms.CrossEntropy(), HEADS),
    terms.AdaptiveSecondary(HEADS),
    terms.GradientBalancing(3),
    terms.BiasBalancing(3),
    terms.QuantileBalancing(3),
    terms.LoadBalancing(3),
    terms.RouterZLoss(3),
    terms.ExpertDiversity(),
    terms.InfoNCE(0.1, 0.1),
    terms.Margin(0.5, 0.1),
    terms.Triplet(0.5, 0.1),
    terms.SimCTG(0.5, 0.1),
    terms.TopKDistillation(V),
    terms.Distillation(),
    terms.PolicyTerm(),
]


def changed(owner: Any, path: tuple[str, ...], value: Any) -> Any:
    name, *rest = path
    if rest:
        value = changed(getattr(owner, name), tuple(rest), value)
    return dataclasses.replace(owner, **{name: value})


def paths(owner: Any) -> list[tuple[str, ...]]:
    """The numbers of a term and of its fields."""
    inner = (
        (field.name, *path)
        for field in dataclasses.fields(owner)
        if dataclasses.is_dataclass(getattr(owner, field.name))
        for path in paths(getattr(owner, field.name))
    )
    return [*((name,) for name in numbers_of(owner)), *inner]


@pytest.mark.parametrize("term", TERMS, ids=lambda term: type(term).__name__)
@pytest.mark.usefixtures("unannotated")
def test_a_number_of_a_built_in_term_is_refused_by_name(term):
    assert paths(term)
    for path in paths(term):
        for value in wrong_values(path[-1]):
            if getattr(term, path[-1], 0) is None and value is None:
                continue
            with pytest.raises((TypeError, ValueError), match=path[-1]):
                ava_jax.compose([changed(term, path, value)], vocab_size=V)


def test_alpha_of_a_term_fits_the_vocabulary():
    loss_fn = ava_jax.compose([terms.FocalLoss(alpha=(0.5, 1.0))], vocab_size=V)
    with pytest.raises(ValueError, match=r"alpha must be .*11.* got 2"):
        loss_fn(loss_fn.init(), logits=LOGITS, targets=IDS)
    for alpha in (-1.0, math.nan, (math.nan,) * V, (-1.0,) * V):
        with pytest.raises(ValueError, match="alpha"):
            ava_jax.compose([terms.FocalLoss(alpha=alpha)], vocab_size=V)
        with pytest.raises(ValueError, match="focal_alpha"):
            ava_jax.UnifiedLossConfig(vocab_size=V, focal_alpha=alpha)
    query = ava_jax.Query(targets=IDS + 2, active=IDS == 0)
    stats = ava_jax.token_statistics(LOGITS, query, ava_jax.Vocabulary(V))
    value = losses.focal_cross_entropy(stats, IDS + 2, jnp.array([0.5, 1.0]))
    assert np.isnan(value).all()  # two weights, and an id of 2


def test_the_temperature_starts_within_its_bounds():
    for initial in (0.4, 2.5):
        with pytest.raises(ValueError, match=r"initial_temperature.*adaptive_temp"):
            ava_jax.UnifiedLossConfig(vocab_size=V, initial_temperature=initial)
        ava_jax.UnifiedLossConfig(
            vocab_size=V, initial_temperature=initial, adaptive_temperature=False
        )
    with pytest.raises(ValueError, match=r"cool_threshold.*heat_threshold"):
        ava_jax.UnifiedLossConfig(vocab_size=V, temperature_cool_threshold=0.2)


@pytest.mark.usefixtures("unannotated")
def test_schedules_are_traced_when_a_loss_is_built():
    schedule = optax.linear_schedule(0.0, 1.0, 10)
    ava_jax.UnifiedLossConfig(vocab_size=V, z_loss_weight=schedule)
    wrong: dict[Any, str] = {
        lambda step: -1.0: "step 0.*must be in",
        lambda step: jnp.nan * step.astype(jnp.float32): "step 0.*must be in",
        lambda step: step > 3: "must return a number",
        lambda step: jnp.ones(2) * step.astype(jnp.float32): "must return a number",
        lambda step: "0.1": "must return a number",
        lambda step: 0.1 if step > 5 else 0.0: "jnp.where",
    }
    for weight, words in wrong.items():
        with pytest.raises((TypeError, ValueError), match=f"z_loss_weight.*{words}"):
            ava_jax.UnifiedLossConfig(vocab_size=V, z_loss_weight=weight)
        with pytest.raises((TypeError, ValueError), match=f"'z_loss'.*{words}"):
            ava_jax.compose([terms.ZLoss(weight)], vocab_size=V)


def test_checked_looks_at_a_schedules_value_at_the_step():
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V, z_loss_weight=lambda step: 0.5 - step.astype(jnp.float32) / 2
    )
    checked, inputs = ava_jax.checked(loss_fn), {"logits": LOGITS, "targets": IDS}
    state = loss_fn.init()
    checked(state, **inputs)
    late = dataclasses.replace(state, step=jnp.int32(2))
    with pytest.raises(ValueError, match=r"weight of the term 'z_loss' -0.5 is neg"):
        checked(late, **inputs)


@pytest.mark.parametrize("shape", [(2,), (2, 6)])
@pytest.mark.parametrize("wrong", [-3.0, 1.5, math.nan])
def test_confidences_outside_of_0_and_1(shape, wrong):
    """Refused outside of jit and by `checked`; masked ones may hold anything."""
    loss_fn = ava_jax.create_unified_loss(
        vocab_size=V, primary_loss_type="adaptive_mtp", num_future_tokens=1
    )
    scores = np.full(shape, 0.5, np.float32)
    scores[1] = wrong
    inputs: dict[str, Any] = {
        "logits": LOGITS,
        "targets": IDS,
        "additional_logits": LOGITS[None],
        "confidence_scores": jnp.asarray(scores),
    }
    state = loss_fn.init()
    with pytest.raises(ValueError, match=r"confidence_scores must be in \[0, 1\]"):
        loss_fn(state, **inputs)

    def call(inputs):
        return ava_jax.checked(loss_fn)(state, **inputs)

    error, _ = jax.jit(checkify.checkify(call))(inputs)
    with pytest.raises(ValueError, match=r"confidence score .*not in \[0, 1\]"):
        error.throw()
    masked: dict[str, Any] = inputs | {"attention_mask": jnp.array([[1] * 6, [0] * 6])}
    jax.eval_shape(lambda: loss_fn(state, **masked))
    error, _ = jax.jit(checkify.checkify(call))(masked)
    error.throw()


@pytest.mark.usefixtures("unannotated")
def test_concrete_arrays_are_checked_and_traced_ones_are_not():
    wrong: list[Any] = [np.float32(-1), np.array(-1.0), jnp.float32(-1), -1, -1.0]
    for value in wrong:
        with pytest.raises(ValueError, match=r"x must be in \[0, inf\), got -1"):
            check_range("x", value, 0)
    jax.eval_shape(lambda x: check_range("x", x, 0), jnp.float32(-1))
    for value in (jnp.ones(2), jnp.bool_(True)):
        with pytest.raises(TypeError, match="x must be a number, got"):
            jax.eval_shape(lambda x: check_range("x", x, 0), value)
