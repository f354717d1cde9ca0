"""Likelihood losses: functions of `TokenStats`, and the same from plain logits."""

from collections.abc import Sequence

import jax.numpy as jnp
from jaxtyping import Array, Float, Int, Integer, Shaped

from ava_jax.kernel.statistics import token_statistics
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.reduce import as_float, safe_divide, weighted_mean


def smoothed_cross_entropy(
    stats: TokenStats, smoothing: float = 0.0
) -> Float[Array, "*n"]:
    """Cross-entropy at temperature T with the mass ε on the V−1 other classes.

    `(1−ε)·(log_z_T − z_y/T) + ε/(V−1)·Σ_{v≠y} (log_z_T − z_v/T)`, the sum running over
    the finite entries only.

    Args:
      stats: token statistics [...].
      smoothing: ε in [0, 1).

    Returns:
      The loss per token in nats, [...].

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import Query, Vocabulary, losses, token_statistics
      >>> query = Query(targets=jnp.array([0]), active=jnp.array([True]))
      >>> stats = token_statistics(jnp.array([[2.0, 0, 0, 0]]), query, Vocabulary(4))
      >>> round(float(losses.smoothed_cross_entropy(stats, 0.1)[0]), 4)
      0.5408

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016.
    """
    nll = stats.log_sum_tempered - stats.target / stats.temperature
    if smoothing == 0:
        return nll
    others = safe_divide(stats.total - stats.target, stats.count - 1)
    spread = stats.log_sum_tempered - others / stats.temperature
    return (1 - smoothing) * nll + smoothing * spread


def focal_cross_entropy(
    stats: TokenStats,
    targets: Integer[Array, "*n"],
    alpha: float | Sequence[float] | Float[Array, "V"] = 1.0,
    gamma: float = 2.0,
) -> Float[Array, "*n"]:
    """Cross-entropy that fades as the target's probability grows.

    `α_y · (1−p_y)^γ · nll`, at temperature 1. Value and gradient are finite for every
    γ ≥ 0, also where p_y rounds to 1.

    Args:
      stats: token statistics [...].
      targets: ids [...], used where `alpha` has one weight per class.
      alpha: α, a number or one per class [V].
      gamma: γ ≥ 0.

    Returns:
      The loss per token in nats, [...].

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import Query, Vocabulary, losses, token_statistics
      >>> targets = jnp.array([0])
      >>> query = Query(targets=targets, active=jnp.array([True]))
      >>> stats = token_statistics(jnp.zeros((1, 4)), query, Vocabulary(4))
      >>> round(float(losses.focal_cross_entropy(stats, targets)[0]), 4)
      0.7798

    References:
      Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    weight = as_float(jnp.asarray(alpha))
    if weight.ndim:
        weight = weight[targets]
    return weight * jnp.exp(gamma * stats.log_one_minus_p) * stats.nll


def log_z_squared(stats: TokenStats) -> Float[Array, "*n"]:
    """The squared log-normaliser, which keeps logits from drifting.

    `log_z²` at temperature 1.

    Args:
      stats: token statistics [...].

    Returns:
      The value per token, [...].

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import Query, Vocabulary, losses, token_statistics
      >>> query = Query(targets=jnp.array([0]), active=jnp.array([True]))
      >>> stats = token_statistics(jnp.zeros((1, 4)), query, Vocabulary(4))
      >>> round(float(losses.log_z_squared(stats)[0]), 4)
      1.9218

    References:
      Chowdhery et al., PaLM, 2022.
    """
    return stats.log_z**2


def token_diversity(stats: TokenStats, vocab_size: int) -> Float[Array, "*n"]:
    """How far a prediction is from uniform, 0 (uniform) to 1 (certain).

    `1 − H/log V`, H the entropy at temperature 1.

    Args:
      stats: token statistics [...].
      vocab_size: V.

    Returns:
      The value per token, [...].

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import Query, Vocabulary, losses, token_statistics
      >>> query = Query(targets=jnp.array([0]), active=jnp.array([True]))
      >>> stats = token_statistics(jnp.zeros((1, 4)), query, Vocabulary(4))
      >>> abs(round(float(losses.token_diversity(stats, 4)[0]), 4))
      0.0
    """
    return 1 - stats.entropy / jnp.log(as_float(vocab_size))


def read_logits(
    logits: Float[Array, "*n V"],
    targets: Integer[Array, "*n"],
    weights: Shaped[Array, "*n"] | None = None,
    *,
    log_one_minus_p: bool = False,
) -> tuple[TokenStats, Float[Array, "*n"], Int[Array, "*n"]]:
    """Statistics of plain logits; ids outside [0, V) get weight 0 and become id 0."""
    if targets.shape != logits.shape[:-1]:
        raise ValueError(
            f"targets must have the shape {logits.shape[:-1]} of the logits without "
            f"their last axis, got {targets.shape}"
        )
    given = jnp.ones(targets.shape) if weights is None else weights
    inside = (targets >= 0) & (targets < logits.shape[-1])
    counted = jnp.where(inside, as_float(given), 0.0)
    ids = jnp.where(counted != 0, targets, 0)
    query = Query(targets=ids, active=counted != 0, log_one_minus_p=log_one_minus_p)
    stats = token_statistics(logits, query, Vocabulary(logits.shape[-1]))
    return stats, counted, ids


def focal_loss(
    inputs: Float[Array, "*n V"],
    targets: Integer[Array, "*n"],
    *,
    alpha: float | Sequence[float] | Float[Array, "V"] = 1.0,
    gamma: float = 2.0,
) -> Float[Array, "*n"]:
    """Focal loss of plain logits, unreduced.

    `α_y · (1−p_y)^γ · (−log p_y)`.

    Args:
      inputs: logits [..., V].
      targets: ids in [0, V), [...]; other ids are excluded, with loss 0.
      alpha: α, a number or one per class [V].
      gamma: γ ≥ 0.

    Returns:
      The loss per row in nats, [...].

    Raises:
      ValueError: the shapes of logits and targets do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss = losses.focal_loss(jnp.zeros((2, 4)), jnp.array([0, 3]), alpha=0.25)
      >>> [round(float(x), 4) for x in loss]
      [0.1949, 0.1949]

    References:
      Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    stats, counted, ids = read_logits(inputs, targets, log_one_minus_p=True)
    return counted * focal_cross_entropy(stats, ids, alpha, gamma)


def label_smoothing_loss(
    inputs: Float[Array, "*n V"],
    targets: Integer[Array, "*n"],
    *,
    smoothing: float = 0.1,
) -> Float[Array, "*n"]:
    """Cross-entropy of plain logits with label smoothing, unreduced.

    `(1−ε)·(−log p_y) + ε/(V−1)·Σ_{v≠y} (−log p_v)`; optax spreads ε over all V classes.

    Args:
      inputs: logits [..., V].
      targets: ids in [0, V), [...]; other ids are excluded, with loss 0.
      smoothing: ε in [0, 1).

    Returns:
      The loss per row in nats, [...].

    Raises:
      ValueError: `smoothing` is out of its range, or the shapes do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> logits = jnp.array([[2.0, 0.0, 0.0, 0.0]])
      >>> round(float(losses.label_smoothing_loss(logits, jnp.array([0]))[0]), 4)
      0.5408

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016.
    """
    if not 0 <= smoothing < 1:
        raise ValueError(f"smoothing must be in [0, 1), got {smoothing}")
    stats, counted, _ = read_logits(inputs, targets)
    return counted * smoothed_cross_entropy(stats, smoothing)


def perplexity(
    logits: Float[Array, "*n V"],
    targets: Integer[Array, "*n"],
    weights: Shaped[Array, "*n"] | None = None,
) -> Float[Array, ""]:
    """The exponential of the mean negative log-likelihood.

    `exp(Σ w·(−log p_y) / Σ w)`.

    Args:
      logits: [..., V].
      targets: ids, [...]; those outside [0, V) are excluded.
      weights: weight per token [...]; ones if None.

    Returns:
      The perplexity, a scalar; 1 where no token counts.

    Raises:
      ValueError: the shapes of logits and targets do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> float(losses.perplexity(jnp.zeros((1, 5, 8)), jnp.zeros((1, 5), int)))
      8.0
    """
    stats, counted, _ = read_logits(logits, targets, weights)
    return jnp.exp(weighted_mean(stats.nll, counted))
