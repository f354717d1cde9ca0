"""Balancing experts by quantiles: the routing bias that gives each its even share.

Every function takes one layer; map over a leading layer axis with `jax.vmap`. Tokens
with a `token_weights` of 0 are masked: they are left out and may hold NaN. Any other
weight is treated as 1.
"""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.kernel.sharding import run_whole
from ava_jax.losses.router import unmasked_tokens, zero_masked
from ava_jax.ranges import check_range
from ava_jax.reduce import along_axis, as_float, safe_divide


@with_checked_arrays
def cutoff_histogram(
    scores: Float[Array, "N E"],
    bias: Float[Array, "E"],
    k: int,
    *,
    bins: int = 1000,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, "E bins"]:
    """Computes histograms of the bias at which each token would choose each expert.

    A token's cutoff is its (k+1)-th largest `scores + bias`; it would choose expert e
    if the bias of e were at least `cutoff − scores_e`. Those numbers are counted in
    equal bins over `[min(bias) − 1, max(bias) + 1]`, which holds all of them if scores
    are in [0, 1]; others are counted in the first and the last bin. Histograms of equal
    `bias` add up over micro-batches and devices.

    Args:
      scores: `[N, E]`, those that `route` chooses by; experts of −inf are never chosen.
      bias: `[E]`, the routing bias that the experts were chosen with.
      k: experts per token, below E.
      bins: how many bins.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      `[E, bins]`, numbers of tokens; each expert's add up to the unmasked tokens.

    Raises:
      ValueError: `k` is not in `[1, E)`, `bins` is below 1, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> scores = jnp.array([[0.9, 0.4, 0.1], [0.8, 0.1, 0.7]])
      >>> losses.cutoff_histogram(scores, jnp.zeros(3), 1, bins=4).tolist()
      [[0.0, 2.0, 0.0, 0.0], [0.0, 0.0, 1.0, 1.0], [0.0, 0.0, 2.0, 0.0]]

    References:
      Su, 2026, as described in Kimi K3, section 2.3.3.
    """
    experts = scores.shape[-1]
    _check(experts, bias, k)
    check_range("bins", bins, 1, whole=True)
    unmasked = unmasked_tokens(token_weights, scores)
    exact = lax.stop_gradient(zero_masked(scores, unmasked))
    # XLA would gather sharded tokens for a top_k.
    biased = jnp.sort(exact + along_axis(as_float(bias), exact.ndim), axis=-1)
    cutoffs = biased[:, experts - 1 - k, None]
    # −inf − (−inf) would be no number.
    wanted = jnp.where(exact == -jnp.inf, jnp.inf, cutoffs - exact)
    low, high = _range(bias)
    places = (wanted - low) * bins / (high - low)
    places = jnp.clip(jnp.floor(places), 0, bins - 1).astype(jnp.int32)
    return run_whole(_count, (bins,), places, as_float(unmasked))


def _count(
    bins: int, places: Int[Array, "N E"], weights: Float[Array, "N"]
) -> Float[Array, "E bins"]:
    count = functools.partial(jnp.bincount, length=bins)
    return jax.vmap(count, in_axes=(1, None))(places, weights)


@with_checked_arrays
def quantile_bias(
    bias: Float[Array, "E"],
    histogram: Float[Array, "E bins"],
    k: int,
    *,
    momentum: float | int = 0.0,
) -> Float[Array, "E"]:
    """Computes the routing bias with which k/E of the tokens would choose each expert.

    `bias = momentum · old + (1 − momentum) · (q − mean(q))`, with `q_e` the k/E
    quantile of the expert's histogram, linear inside a bin. It has no gradient. A step
    without tokens changes nothing.

    Args:
      bias: `[E]`, the old bias, which the histogram was made with.
      histogram: `[E, bins]`, of the whole optimizer step, over all devices.
      k: experts per token, below E.
      momentum: in `[0, 1)`.

    Returns:
      The new bias `[E]`, of the same dtype.

    Raises:
      ValueError: `k` or `momentum` is out of range, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> scores = jnp.array([[0.9, 0.4], [0.8, 0.1], [0.7, 0.6], [0.6, 0.5]])
      >>> histogram = losses.cutoff_histogram(scores, jnp.zeros(2), 1)
      >>> new = losses.quantile_bias(jnp.zeros(2), histogram, 1)
      >>> [round(float(b), 3) for b in new]
      [-0.25, 0.25]

    References:
      Su, 2026, as described in Kimi K3, section 2.3.3.
    """
    experts, bins = histogram.shape
    _check(experts, bias, k)
    check_range("momentum", momentum, 0, 1)
    counts = lax.stop_gradient(as_float(histogram))
    total = jnp.sum(counts, -1)
    sums = jnp.cumsum(counts, -1)
    # Products of whole numbers: a rounded k/E could miss a bin that just reaches it.
    reached = sums * experts >= total[:, None] * k
    first = jnp.argmax(reached, -1)
    own, upto = (
        jnp.take_along_axis(x, first[:, None], -1)[:, 0] for x in (counts, sums)
    )
    before = upto - own
    inside = safe_divide(total * k / experts - before, own)
    low, high = _range(bias)
    quantiles = low + (as_float(first) + inside) * (high - low) / bins
    centred = quantiles - jnp.mean(quantiles)
    moved = momentum * as_float(bias) + (1 - momentum) * centred
    return jnp.where(jnp.any(total > 0), moved.astype(bias.dtype), bias)


def _check(experts: int, bias: Float[Array, "_"], k: int) -> None:
    check_range("k", k, whole=True)
    if not 1 <= k < experts:
        raise ValueError(
            f"k must be in [1, {experts}), got {k}: with all {experts} experts chosen "
            "there is nothing to balance"
        )
    if bias.shape != (experts,):
        raise ValueError(f"bias must have shape ({experts},), got {bias.shape}")


def _range(bias: Float[Array, "E"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Returns the ends of the histogram's bins."""
    exact = as_float(bias)
    return jnp.min(exact) - 1, jnp.max(exact) + 1
