"""Likelihood losses, as functions of `TokenStats` and of plain logits."""

from collections.abc import Sequence

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, Integer, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import as_ids, as_weights
from ava_jax.kernel.platforms import Implementation
from ava_jax.kernel.statistics import token_statistics
from ava_jax.kernel.stats import Query, TokenStats, Vocabulary
from ava_jax.ranges import check_all, check_range
from ava_jax.reduce import as_float, safe_divide, weighted_mean


@with_checked_arrays
def smoothed_cross_entropy(
    stats: TokenStats, smoothing: float = 0.0
) -> Float[Array, "*n"]:
    """Computes the cross-entropy with label smoothing, at temperature T.

    `(1−ε)·(log_z_T − z_y/T) + ε/(V−1)·Σ_{v≠y} (log_z_T − z_v/T)`, with the sum over the
    finite entries only: the probability ε is spread over the other classes.

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
    check_range("smoothing", smoothing, 0, 1)
    nll = stats.tempered_nll
    if smoothing == 0:
        return nll
    others = safe_divide(stats.total - stats.target, stats.count - 1)
    spread = stats.log_sum_tempered - others / stats.temperature
    return (1 - smoothing) * nll + smoothing * spread


@with_checked_arrays
def focal_cross_entropy(
    stats: TokenStats,
    targets: Integer[Array, "*n"],
    alpha: float | Sequence[float] | Float[Array, "V"] = 1.0,
    gamma: float = 2.0,
) -> Float[Array, "*n"]:
    """Computes the focal loss, a cross-entropy that weighs hard tokens more.

    `α_y · (1−p_y)^γ · nll`, at temperature 1. Value and gradient are finite for every
    γ ≥ 0, even where p_y rounds to 1.

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
    check_all("alpha", alpha, 0)
    check_range("gamma", gamma, 0)
    weight = as_float(jnp.asarray(alpha))
    if weight.ndim:
        # NaN, not the last weight, where alpha has too few of them.
        ids = as_ids(targets)
        weight = weight.at[ids].get(mode="fill", fill_value=jnp.nan)
    return weight * jnp.exp(gamma * stats.log_one_minus_p) * stats.nll


@with_checked_arrays
def log_z_squared(stats: TokenStats) -> Float[Array, "*n"]:
    """Computes the z-loss, the squared log-normalizer, which keeps it close to 0.

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


@with_checked_arrays
def token_diversity(stats: TokenStats, vocab_size: int) -> Float[Array, "*n"]:
    """Computes how peaked a prediction is, from 0 (uniform) to 1 (certain).

    `1 − H/log V`, with H the entropy at temperature 1.

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
    check_range("vocab_size", vocab_size, 2, whole=True)
    return 1 - stats.entropy / jnp.log(as_float(vocab_size))


def read_logits(
    logits: Float[Array, "*n V"],
    targets: Integer[Array, "*n"],
    weights: Shaped[Array, "*n"] | None = None,
    *,
    log_one_minus_p: bool = False,
    implementation: Implementation | None = None,
) -> tuple[TokenStats, Float[Array, "*n"], Int[Array, "*n"]]:
    """Computes the statistics of plain logits, for losses without a configuration.

    Returns:
      The statistics, the weights with 0 for ids outside [0, V), and the ids with 0 in
      place of those.
    """
    targets = as_ids(targets)
    inside = (targets >= 0) & (targets < logits.shape[-1])
    given = as_float(inside) if weights is None else as_weights("weights", weights)
    kept = jnp.where(inside, given, 0.0)
    ids = jnp.where(kept != 0, targets, 0)
    query = Query(
        targets=ids, active=kept != 0, log_one_minus_p=log_one_minus_p, top=False
    )
    vocabulary = Vocabulary(logits.shape[-1], implementation=implementation)
    return token_statistics(logits, query, vocabulary), kept, ids


@with_checked_arrays
def focal_loss(
    inputs: Float[Array, "*n V"],
    targets: Integer[Array, "*n"],
    *,
    alpha: float | Sequence[float] | Float[Array, "V"] = 1.0,
    gamma: float = 2.0,
    implementation: Implementation | None = None,
) -> Float[Array, "*n"]:
    """Computes the focal loss of plain logits, unreduced.

    `α_y · (1−p_y)^γ · (−log p_y)`.

    Args:
      inputs: logits [..., V].
      targets: ids in [0, V), [...]; other ids are excluded, with loss 0.
      alpha: α, a number or one per class [V].
      gamma: γ ≥ 0.
      implementation: of the statistics; None lets the platform choose, and
        `"reference"` can be differentiated in any mode.

    Returns:
      The loss per row in nats, [...].

    Raises:
      ValueError: the shapes of logits, targets and `alpha` do not match, or a number is
        negative or not finite.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss = losses.focal_loss(jnp.zeros((2, 4)), jnp.array([0, 3]), alpha=0.25)
      >>> [round(float(x), 4) for x in loss]
      [0.1949, 0.1949]

    References:
      Lin et al., Focal Loss for Dense Object Detection, 2017.
    """
    if np.shape(alpha) not in ((), inputs.shape[-1:]):
        raise ValueError(
            f"alpha must be a number or one per class, [{inputs.shape[-1]}], got "
            f"{np.shape(alpha)}"
        )
    stats, weights, ids = read_logits(
        inputs, targets, log_one_minus_p=True, implementation=implementation
    )
    return weights * focal_cross_entropy(stats, ids, alpha, gamma)


@with_checked_arrays
def label_smoothing_loss(
    inputs: Float[Array, "*n V"],
    targets: Integer[Array, "*n"],
    *,
    smoothing: float = 0.1,
    implementation: Implementation | None = None,
) -> Float[Array, "*n"]:
    """Computes the cross-entropy of plain logits with label smoothing, unreduced.

    `(1−ε)·(−log p_y) + ε/(V−1)·Σ_{v≠y} (−log p_v)`; optax spreads ε over all V classes.

    Args:
      inputs: logits [..., V].
      targets: ids in [0, V), [...]; other ids are excluded, with loss 0.
      smoothing: ε in [0, 1).
      implementation: of the statistics; None lets the platform choose, and
        `"reference"` can be differentiated in any mode.

    Returns:
      The loss per row in nats, [...].

    Raises:
      ValueError: `smoothing` is out of its range, or the shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> logits = jnp.array([[2.0, 0.0, 0.0, 0.0]])
      >>> round(float(losses.label_smoothing_loss(logits, jnp.array([0]))[0]), 4)
      0.5408

    References:
      Szegedy et al., Rethinking the Inception Architecture, 2016.
    """
    stats, weights, _ = read_logits(inputs, targets, implementation=implementation)
    return weights * smoothed_cross_entropy(stats, smoothing)


@with_checked_arrays
def perplexity(
    logits: Float[Array, "*n V"],
    targets: Integer[Array, "*n"],
    weights: Shaped[Array, "*n"] | None = None,
    *,
    implementation: Implementation | None = None,
) -> Float[Array, ""]:
    """Computes the perplexity, the exponential of the mean negative log-likelihood.

    `exp(Σ w·(−log p_y) / Σ w)`.

    Args:
      logits: [..., V].
      targets: ids, [...]; those outside [0, V) are excluded.
      weights: weight per token [...]; ones if None.
      implementation: of the statistics; None lets the platform choose, and
        `"reference"` can be differentiated in any mode.

    Returns:
      The perplexity, a scalar; 1 if all tokens are masked.

    Raises:
      ValueError: the shapes of logits and targets do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> float(losses.perplexity(jnp.zeros((1, 5, 8)), jnp.zeros((1, 5), int)))
      8.0
    """
    stats, kept, _ = read_logits(
        logits, targets, weights, implementation=implementation
    )
    return jnp.exp(weighted_mean(stats.nll, kept))
