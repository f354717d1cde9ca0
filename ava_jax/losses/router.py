"""The router of a mixture of experts: its load in one batch, and losses of it.

Every function takes one layer's router; map over a leading layer axis with `jax.vmap`.
Tokens with a `token_weights` of 0 are masked: they are left out and may hold NaN. Any
other weight is treated as 1. Expert indices outside `[0, E)` (a dropped token) are
assignments to no expert.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import as_ids, as_weights
from ava_jax.reduce import as_float, safe_divide, weighted_mean


@flax.struct.dataclass
class RouterLoad:
    """The load of a batch on the experts, as sums, so that micro-batches add up.

    Attributes:
      counts: assignments per expert.
      scores: router probability per expert, summed over the unmasked tokens.
      tokens: number of unmasked tokens.
    """

    counts: Float[Array, "E"]
    scores: Float[Array, "E"]
    tokens: Float[Array, ""]


def unmasked_tokens(
    token_weights: Shaped[Array, "*N"] | None, features: Float[Array, "*N E"]
) -> Bool[Array, "*N"]:
    """Marks the unmasked tokens of an array of token features."""
    # Derived from the features, so that an explicit sharding of tokens is kept.
    everything = jnp.ones_like(features[..., 0], dtype=bool)
    if token_weights is None:
        return everything
    if token_weights.shape != everything.shape:
        raise ValueError(
            f"token_weights must have shape {everything.shape}, got "
            f"{token_weights.shape}"
        )
    return as_weights("token_weights", token_weights) != 0


def zero_masked(
    values: Float[Array, "*N E"], unmasked: Bool[Array, "*N"]
) -> Float[Array, "*N E"]:
    """Zeroes masked tokens, so that their NaN cannot reach a value or a gradient."""
    return jnp.where(unmasked[..., None], as_float(values), 0)


def _assignments(
    expert_indices: Integer[Array, "*N k"],
    unmasked: Bool[Array, "*N"],
    experts: int,
) -> Float[Array, "*N E"]:
    """Returns how often each unmasked token chose each expert."""
    integers = jnp.issubdtype(expert_indices.dtype, jnp.integer)
    if not integers or expert_indices.shape[:-1] != unmasked.shape:
        raise ValueError(
            f"expert_indices must be integers of shape {(*unmasked.shape, 'k')}, got "
            f"{expert_indices.dtype} of shape {expert_indices.shape}"
        )
    shape = (*expert_indices.shape, experts)
    every = jax.lax.broadcasted_iota(jnp.int32, shape, len(shape) - 1)
    chosen = as_ids(expert_indices)[..., None] == every
    return jnp.sum(as_float(chosen & unmasked[..., None, None]), axis=-2)


@with_checked_arrays
def router_load(
    gate_logits: Float[Array, "N E"],
    expert_indices: Integer[Array, "N k"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> RouterLoad:
    """Computes the load of each expert.

    `counts_e = Σ_tokens Σ_k [index = e]`, `scores_e = Σ_tokens softmax(gate)_e`.

    Args:
      gate_logits: `[N, E]`.
      expert_indices: `[N, k]`, the chosen experts.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      `RouterLoad`: `counts [E]` assignments, `scores [E]` probability, `tokens`.

    Raises:
      ValueError: shapes do not match, or indices that are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> load = losses.router_load(jnp.zeros((3, 2)), jnp.array([[0], [0], [1]]))
      >>> load.counts.tolist(), load.scores.tolist(), float(load.tokens)
      ([2.0, 1.0], [1.5, 1.5], 3.0)
    """
    unmasked = unmasked_tokens(token_weights, gate_logits)
    chosen = _assignments(expert_indices, unmasked, gate_logits.shape[-1])
    probabilities = zero_masked(
        jax.nn.softmax(zero_masked(gate_logits, unmasked)), unmasked
    )
    return RouterLoad(
        counts=jnp.sum(chosen, axis=0),
        scores=jnp.sum(probabilities, axis=0),
        tokens=jnp.sum(as_float(unmasked)),
    )


@with_checked_arrays
def load_balancing_loss(
    gate_logits: Float[Array, "N E"],
    expert_indices: Integer[Array, "N k"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Computes the load-balancing loss of Switch Transformers.

    `E · Σ_e f_e · P_e`, with `f` the share of all `N · k` assignments and `P` the mean
    probability. It is 1 with uniform routing and E if all tokens go to one expert. Each
    micro-batch balances its own tokens.

    Args:
      gate_logits: `[N, E]`.
      expert_indices: `[N, k]`, the chosen experts.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes do not match, or indices that are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> gate = jnp.array([[2.0, 0.0], [2.0, 0.0]])
      >>> round(float(losses.load_balancing_loss(gate, jnp.array([[0], [0]]))), 4)
      1.7616

    References:
      Fedus et al., Switch Transformers, 2021.
    """
    load = router_load(gate_logits, expert_indices, token_weights=token_weights)
    experts, k = gate_logits.shape[-1], expert_indices.shape[-1]
    share = safe_divide(load.counts, load.tokens * k)
    probability = safe_divide(load.scores, load.tokens)
    return experts * jnp.sum(share * probability)


@with_checked_arrays
def auxiliary_load_balancing_loss(
    gate_logits: Float[Array, "N E"],
    expert_indices: Integer[Array, "N k"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Computes the load-balancing loss of the Ava pipeline.

    `min(10, E · Σ_e P_e · c_e / (N · k)²)`, with `P_e` the sum of probabilities and
    `c_e` the number of assignments: the Switch loss divided by k. Above the cap there
    is no gradient. Each micro-batch balances its own tokens.

    Args:
      gate_logits: `[N, E]`.
      expert_indices: `[N, k]`, the chosen experts.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes do not match, or indices that are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> indices = jnp.array([[0, 1], [1, 0]])
      >>> float(losses.auxiliary_load_balancing_loss(jnp.zeros((2, 2)), indices))
      0.5
    """
    balance = load_balancing_loss(
        gate_logits, expert_indices, token_weights=token_weights
    )
    return jnp.minimum(balance / expert_indices.shape[-1], 10)


@with_checked_arrays
def sequence_balance_loss(
    scores: Float[Array, "B S E"],
    expert_indices: Integer[Array, "B S k"],
    *,
    token_weights: Shaped[Array, "B S"] | None = None,
) -> Float[Array, ""]:
    """Computes the sequence-wise load-balancing loss, one balance per row.

    `E / (k · T²) · Σ_e c_e · Σ_t s_te / Σ_e' s_te'` per row of T unmasked tokens with
    `c_e` assignments; the mean over the rows that have any. It is 1 with uniform
    routing.

    Args:
      scores: `[B, S, E]`, sigmoid or softmax of the gate logits: at least 0.
      expert_indices: `[B, S, k]`, the chosen experts.
      token_weights: `[B, S]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes do not match, or indices that are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> scores = jnp.array([[[0.9, 0.1], [0.6, 0.4]]])
      >>> indices = jnp.array([[[0], [0]]])
      >>> round(float(losses.sequence_balance_loss(scores, indices)), 4)
      1.5

    References:
      DeepSeek-V3 Technical Report, 2024.
    """
    experts = scores.shape[-1]
    unmasked = unmasked_tokens(token_weights, scores)
    chosen = _assignments(expert_indices, unmasked, experts)
    kept = zero_masked(scores, unmasked)
    affinity = safe_divide(kept, jnp.sum(kept, axis=-1, keepdims=True))
    length = jnp.sum(as_float(unmasked), axis=-1)
    share = safe_divide(jnp.sum(chosen, axis=1), length[:, None])
    probability = safe_divide(jnp.sum(affinity, axis=1), length[:, None])
    row = jnp.sum(share * probability, axis=-1) * experts / expert_indices.shape[-1]
    return weighted_mean(row, as_float(length > 0))


@with_checked_arrays
def router_z_loss(
    gate_logits: Float[Array, "N E"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Computes the router z-loss, the mean of `logsumexp(g)²`, for small gate logits.

    Args:
      gate_logits: `[N, E]`, `g`.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> round(float(losses.router_z_loss(jnp.zeros((3, 4)))), 4)
      1.9218

    References:
      Zoph et al., ST-MoE, 2022.
    """
    unmasked = unmasked_tokens(token_weights, gate_logits)
    log_z = jax.nn.logsumexp(zero_masked(gate_logits, unmasked), axis=-1)
    return weighted_mean(jnp.square(log_z), as_float(unmasked))


@with_checked_arrays
def auxiliary_router_z_loss(
    gate_logits: Float[Array, "N E"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Computes the router z-loss of the Ava pipeline.

    `min(100, mean(logsumexp(clip(g, ±10))²))`, without a gradient above either cap.

    Args:
      gate_logits: `[N, E]`, `g`.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> round(float(losses.auxiliary_router_z_loss(jnp.full((3, 1), 99.0))), 4)
      100.0
    """
    gate = as_float(gate_logits)
    # Unlike with jnp.clip, a logit exactly at the cap keeps its whole gradient.
    clipped = jax.lax.stop_gradient(jnp.clip(gate, -10, 10))
    gate = jnp.where(jnp.abs(gate) <= 10, gate, clipped)
    return jnp.minimum(router_z_loss(gate, token_weights=token_weights), 100)
