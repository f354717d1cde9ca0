"""Repetition losses: unlikelihood, contrastive tokens, decay and anti-repetition."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Integer, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import as_ids, as_labels, as_weights, check_weights
from ava_jax.config import Weight, weight_at
from ava_jax.kernel.platforms import Implementation
from ava_jax.kernel.statistics import token_statistics
from ava_jax.kernel.stats import Query, Vocabulary
from ava_jax.losses.likelihood import read_logits
from ava_jax.ranges import check_all, check_range, check_weight
from ava_jax.reduce import as_float, safe_divide, weighted_mean
from ava_jax.tokens import (
    count_ngrams,
    plain_tokens,
    read_tokens,
    sort_ngrams,
)
from ava_jax.windows import read_recent, recent_ids


@with_checked_arrays
def sequence_unlikelihood(
    logits: Float[Array, "B S V"],
    token_ids: Integer[Array, "B S"],
    mask: Shaped[Array, "B S"] | None = None,
    *,
    ngram_size: int = 4,
    implementation: Implementation | None = None,
) -> Float[Array, ""]:
    """Computes the unlikelihood of generated tokens that complete a repeated n-gram.

    `mean_w(r_t · −log(1 − p_t(y_t)))`, with r_t = 1 where `y_{t−n+1} … y_t` occurred
    earlier in the row, else 0.

    Args:
      logits: those that generated the continuations, [B, S, V]; row t gave token t.
      token_ids: the continuations [B, S].
      mask: weight per token [B, S]; ones if None.
      ngram_size: n.
      implementation: of the statistics; None lets the platform choose, and
        `"reference"` can be differentiated in any mode.

    Returns:
      The mean over w, a scalar; 0 if all tokens are masked.

    Raises:
      ValueError: `ngram_size` is below 1, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> ids = jnp.array([[1, 2, 1, 2]])
      >>> loss = losses.sequence_unlikelihood(
      ...     jnp.zeros((1, 4, 4)), ids, ngram_size=2)
      >>> round(float(loss), 4)
      0.0719

    References:
      Welleck et al., Neural Text Generation with Unlikelihood Training, 2020.
    """
    _check_logits(logits, token_ids)
    check_weights(mask=mask)
    tokens = read_tokens(token_ids, mask, vocab_size=logits.shape[-1])
    query = Query(tokens.targets, tokens.active, top=False)
    vocabulary = Vocabulary(logits.shape[-1], implementation=implementation)
    stats = token_statistics(logits, query, vocabulary)
    windows = sort_ngrams(tokens, ngram_size)
    repeats = as_float(windows.in_row_order(windows.whole & ~windows.is_first))
    return weighted_mean(-repeats * stats.log_one_minus_p, tokens.weights)


def _check_logits(logits: Float[Array, "B S V"], ids: Integer[Array, "B S"]) -> None:
    if ids.ndim != 2 or logits.shape[:-1] != ids.shape:
        raise ValueError(
            f"token ids must be [B, S] and fit the logits [B, S, V], got {ids.shape} "
            f"and {logits.shape}"
        )


@with_checked_arrays
def contrastive_token_loss(
    logits: Float[Array, "B S V"],
    targets: Integer[Array, "B S"],
    mask: Shaped[Array, "B S"] | None = None,
    *,
    window: int = 60,
    segment_ids: Integer[Array, "B S"] | None = None,
    implementation: Implementation | None = None,
) -> Float[Array, ""]:
    """Computes the contrastive token loss: the target's logit above recent tokens'.

    `mean_w log(1 + Σ_c exp(z_c − z_y))` over the distinct ids c ≠ y among the `window`
    targets before the token, in its row and segment. Masked targets are left out.

    Args:
      logits: [B, S, V].
      targets: ids [B, S]; those outside [0, V), −100 among them, are masked.
      mask: weight per token [B, S]; ones if None.
      window: how many positions before a token are looked at.
      segment_ids: of packed rows, [B, S]; 0 is padding.
      implementation: of the statistics; None lets the platform choose, and
        `"reference"` can be differentiated in any mode.

    Returns:
      The mean over w, a scalar; 0 if all tokens are masked.

    Raises:
      ValueError: `window` is below 1, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss = losses.contrastive_token_loss(
      ...     jnp.zeros((1, 4, 4)), jnp.array([[1, 2, 1, 3]]))
      >>> round(float(loss), 4)  # log(1), log(2), log(2), log(3)
      0.6212

    References:
      Jiang et al., A Simple Contrastive Learning Objective for Alleviating Neural Text
      Degeneration, 2022.
    """
    _check_logits(logits, targets)
    size = logits.shape[-1]
    check_weights(mask=mask)
    check_weights(mask=mask)
    tokens = read_tokens(targets, mask, segment_ids, vocab_size=size)
    index = jax.lax.broadcasted_iota(jnp.int32, targets.shape, 1)
    ids, found = recent_ids(read_recent(tokens), tokens.segments, index, window)
    query = Query(
        targets=tokens.targets,
        active=tokens.active,
        candidates={"recent": ids},
        log_one_minus_p=False,
        top=False,
    )
    vocabulary = Vocabulary(logits.shape[-1], implementation=implementation)
    stats = token_statistics(logits, query, vocabulary)
    others = found & (ids != tokens.targets[..., None])
    value = contrast(stats.target, stats.candidates["recent"], others)
    return weighted_mean(value, tokens.weights)


def contrast(
    target: Float[Array, "*n"],
    others: Float[Array, "*n Q"],
    exists: Bool[Array, "*n Q"],
) -> Float[Array, "*n"]:
    """Computes `log(1 + Σ_c exp(z_c − z_y))`, finite and exact for any finite z_y.

    Args:
      target: z_y.
      others: z_c; −inf adds nothing.
      exists: which of the others are summed.
    """
    exists &= others != -jnp.inf
    gaps = jnp.where(exists, others, target[..., None]) - target[..., None]
    largest = jnp.max(gaps, -1, initial=0.0, where=exists)
    shift = jax.lax.stop_gradient(jnp.where(largest == jnp.inf, 0.0, largest))
    terms = jnp.where(exists, jnp.exp(gaps - shift[..., None]), 0.0)
    # With a shift of 0 this is log1p of the sum, which may be tiny.
    return shift + jnp.log1p(jnp.sum(terms, -1) + jnp.expm1(-shift))


@with_checked_arrays
def repetition_decay_loss(
    logits: Float[Array, "B S V"],
    targets: Integer[Array, "B S"],
    mask: Shaped[Array, "B S"] | None = None,
    *,
    span_length: int | Int[Array, ""] | Int[Array, "B"],
    decay: float = 0.5,
    implementation: Implementation | None = None,
) -> Float[Array, ""]:
    """Computes the DITTO loss: a repeated span should get less likely each time.

    `mean_w [t ≥ ℓ]·−log(1 − |p_t(y_t) − λ·stop_gradient(p_{t−ℓ}(y_t))|)`, for rows made
    by `repeat_spans`. A token is left out if the one ℓ before it is masked. The loss
    needs no decoding.

    Args:
      logits: [B, S, V].
      targets: rows that repeat one span, [B, S].
      mask: weight per token [B, S]; ones if None.
      span_length: ℓ ≥ 1, one for all rows or one per row [B].
      decay: λ in [0, 1].
      implementation: of the statistics; None lets the platform choose, and
        `"reference"` can be differentiated in any mode.

    Returns:
      The mean over w, a scalar; 0 if all tokens are masked.

    Raises:
      ValueError: `decay` or `span_length` is out of its range, or shapes do not
        match.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from ava_jax import losses
      >>> rows = losses.repeat_spans(jnp.array([[1, 2]]), 6)
      >>> loss = jax.jit(losses.repetition_decay_loss)(
      ...     jnp.zeros((1, 6, 4)), rows, span_length=2)
      >>> round(float(loss), 4)
      0.089

    References:
      Xu et al., Learning to Break the Loop (DITTO), 2022.
    """
    check_range("decay", decay, 0, 1, through=True)
    _check_logits(logits, targets)
    _check_spans(span_length, targets.shape[:1])
    length = targets.shape[1]
    index = jnp.arange(length, dtype=jnp.int32)[None, :]
    span = jnp.broadcast_to(as_ids(span_length), targets.shape[:1])[:, None]
    check_weights(mask=mask)
    tokens = read_tokens(targets, mask, vocab_size=logits.shape[-1])
    upcoming = jnp.minimum(index + span, length - 1)
    query = Query(
        targets=tokens.targets,
        active=tokens.active,
        candidates={
            "next": jnp.take_along_axis(tokens.targets, upcoming, 1)[..., None]
        },
        top=False,
    )
    vocabulary = Vocabulary(logits.shape[-1], implementation=implementation)
    stats = token_statistics(logits, query, vocabulary)
    source = jnp.maximum(index - span, 0)
    log_next = stats.candidates["next"][..., 0] - stats.log_sum
    log_earlier = jax.lax.stop_gradient(jnp.take_along_axis(log_next, source, axis=1))
    repeats = (index >= span) & jnp.take_along_axis(tokens.active, source, axis=1)
    value = _decay(stats, log_earlier, decay)
    value = jnp.where(repeats, value, jnp.zeros_like(value))
    return weighted_mean(value, tokens.weights)


def _check_spans(span_length: Any, rows: tuple[int, ...]) -> None:
    shape, dtype = jnp.shape(span_length), jnp.result_type(span_length)
    if shape not in ((), rows) or not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(
            f"span_length must be an integer, or integers {rows}, one per row, got "
            f"{dtype} {shape}"
        )
    check_all("span_length", span_length, 1)


def _decay(stats, log_earlier, decay):
    """Computes `−log(1 − |p − λp'|)`, exact even where p rounds to 1 and p' to 0."""
    goal = decay * jnp.exp(log_earlier)
    probability = jnp.exp(-stats.nll)
    rising = probability > goal
    log_goal = jnp.log(as_float(decay)) + log_earlier
    above = -jnp.logaddexp(stats.log_one_minus_p, log_goal)
    below = -jnp.log1p(jnp.where(rising, 0.0, probability - goal))
    return jnp.where(rising, above, below)


@with_checked_arrays
def repeat_spans(spans: Integer[Array, "B L"], length: int) -> Int[Array, "B S"]:
    """Repeats each span to `length` tokens, for `repetition_decay_loss`.

    Args:
      spans: one span per row, [B, L].
      length: S, the length of the rows.

    Returns:
      The rows [B, S]; the last repeat is cut.

    Raises:
      ValueError: `length` or L is below 1.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> losses.repeat_spans(jnp.array([[5, 6, 7]]), 5).tolist()
      [[5, 6, 7, 5, 6]]

    References:
      Xu et al., Learning to Break the Loop (DITTO), 2022.
    """
    check_range("length", length, 1, whole=True)
    if spans.ndim != 2 or not spans.shape[1]:
        raise ValueError(f"spans must be [B, L] with L of 1 or more, got {spans.shape}")
    return as_ids(spans)[:, jnp.arange(length) % spans.shape[1]]


@with_checked_arrays
def anti_repetition_loss(
    logits: Float[Array, "B S V"],
    labels: Integer[Array, "B S"],
    attention_mask: Shaped[Array, "B S"] | None = None,
    *,
    eos_token_id: int | None = None,
    pad_token_id: int | None = None,
    ngram_size: int = 4,
    repetition_penalty_weight: Weight = 0.1,
    eos_penalty_weight: Weight = 0.05,
    diversity_bonus_weight: Weight = 0.05,
    step: int | Int[Array, ""] = 0,
    implementation: Implementation | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Computes the anti-repetition loss of the PyTorch pipeline, kept for migration.

    `CE + a·(1 − distinct/total n-grams) + b·EOS misuse − c·distinct/total tokens`. The
    three scores are functions of the labels, per row over the first `Σ mask` of them,
    and have no gradient. EOS misuse is count/length if EOS occurs more than once,
    0.5/length if it occurs once and not last, else 0. New code should use the penalties
    of the unified loss.

    Args:
      logits: [B, S, V].
      labels: ids [B, S]; those outside [0, V), −100 among them, have no cross-entropy.
      attention_mask: [B, S]; its row sums are the lengths; ones if None.
      eos_token_id: the end-of-sequence id.
      pad_token_id: n-grams that contain it are left out.
      ngram_size: n.
      repetition_penalty_weight: a, a number or an optax schedule of `step`.
      eos_penalty_weight: b, likewise.
      diversity_bonus_weight: c, likewise.
      step: where the schedules are evaluated.
      implementation: of the statistics; None lets the platform choose, and
        `"reference"` can be differentiated in any mode.

    Returns:
      The loss, and `base_loss`, `repetition_penalty`, `eos_penalty`, `diversity_bonus`
      (unweighted scores, means over the batch) and `total_loss`.

    Raises:
      ValueError: `ngram_size` is below 1, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss, aux = losses.anti_repetition_loss(
      ...     jnp.zeros((1, 4, 4)), jnp.array([[1, 2, 1, 2]]), ngram_size=2)
      >>> {k: round(float(v), 4) for k, v in aux.items()}["repetition_penalty"]
      0.3333
    """
    _check_logits(logits, labels)
    check_range("ngram_size", ngram_size, 1, whole=True)
    check_range("step", step, 0, whole=True)
    labels = as_labels("labels", labels)
    stats, kept, _ = read_logits(logits, labels, implementation=implementation)
    base = weighted_mean(stats.nll, kept)
    scores = _row_scores(labels, attention_mask, eos_token_id, pad_token_id, ngram_size)
    rows = max(labels.shape[0], 1)
    repetition, misuse, diversity = (jnp.sum(s) / rows for s in scores)
    weights = {
        "repetition_penalty_weight": repetition_penalty_weight,
        "eos_penalty_weight": eos_penalty_weight,
        "diversity_bonus_weight": diversity_bonus_weight,
    }
    for name, weight in weights.items():
        check_weight(name, weight, 0)
    a, b, c = (weight_at(w, jnp.asarray(step)) for w in weights.values())
    loss = base + a * repetition + b * misuse - c * diversity
    return loss, {
        "base_loss": base,
        "repetition_penalty": repetition,
        "eos_penalty": misuse,
        "diversity_bonus": diversity,
        "total_loss": loss,
    }


def _row_scores(labels, mask, eos_token_id, pad_token_id, ngram_size):
    """Computes repetition, EOS misuse and diversity per row, each [B]."""
    given = jnp.ones(labels.shape) if mask is None else mask
    length = jnp.sum(as_weights("attention_mask", given), 1, keepdims=True)
    index = as_float(jnp.arange(labels.shape[1]))[None, :]
    inside = index < length
    nowhere = jnp.zeros_like(inside)
    pad = nowhere if pad_token_id is None else labels == pad_token_id
    eos = nowhere if eos_token_id is None else (labels == eos_token_id) & inside
    distinct, total = count_ngrams(plain_tokens(labels, inside & ~pad), ngram_size)
    repetition = safe_divide(total - distinct, total)
    distinct, total = count_ngrams(plain_tokens(labels, inside & ~pad & ~eos), 1)
    diversity = safe_divide(distinct, total)
    count = jnp.sum(as_float(eos), 1)
    is_last = jnp.any(eos & (index == length - 1), 1)
    once = jnp.where((count == 1) & ~is_last, 0.5, 0.0)
    misuse = safe_divide(jnp.where(count > 1, count, once), length[:, 0])
    return repetition, misuse, diversity
