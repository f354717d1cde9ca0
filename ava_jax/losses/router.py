"""The router of a mixture of experts: its load in one batch, and losses on it.

Every function takes one layer's router; map over a leading layer axis with `jax.vmap`.
`token_weights` decides which tokens count: a weight of 0 counts nowhere and may hold
NaN, any other weight counts as 1. Expert indices outside `[0, E)` (a dropped token) are
assignments to no expert.
"""

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from ava_jax.reduce import as_float, safe_divide, weighted_mean


@flax.struct.dataclass
class RouterLoad:
    """What a batch asked of its router; sums, so that micro-batches add up.

    Attributes:
      counts: assignments per expert.
      scores: router probability per expert, summed over the counted tokens.
      tokens: number of counted tokens.
    """

    counts: Float[Array, "E"]
    scores: Float[Array, "E"]
    tokens: Float[Array, ""]


def counted_tokens(
    token_weights: Shaped[Array, "*N"] | None, features: Float[Array, "*N E"]
) -> Bool[Array, "*N"]:
    """Marks the tokens that count, of those that have the given features."""
    # Made like the features, so that explicitly sharded tokens stay so.
    everything = jnp.ones_like(features[..., 0], dtype=bool)
    if token_weights is None:
        return everything
    if token_weights.shape != everything.shape:
        raise ValueError(
            f"token_weights must have shape {everything.shape}, got "
            f"{token_weights.shape}"
        )
    return token_weights.astype(bool)


def keep_counted(
    values: Float[Array, "*N E"], counted: Bool[Array, "*N"]
) -> Float[Array, "*N E"]:
    """Zeroes the tokens that do not count, so that what they hold cannot leak."""
    return jnp.where(counted[..., None], as_float(values), 0)


def _assignments(
    expert_indices: Integer[Array, "*N k"],
    counted: Bool[Array, "*N"],
    experts: int,
) -> Float[Array, "*N E"]:
    """Returns how many of its choices each counted token gave to each expert."""
    integers = jnp.issubdtype(expert_indices.dtype, jnp.integer)
    if not integers or expert_indices.shape[:-1] != counted.shape:
        raise ValueError(
            f"expert_indices must be integers of shape {(*counted.shape, 'k')}, got "
            f"{expert_indices.dtype} of shape {expert_indices.shape}"
        )
    expert = jnp.arange(experts, dtype=expert_indices.dtype)
    chosen = expert_indices[..., None] == expert
    return jnp.sum(as_float(chosen & counted[..., None, None]), axis=-2)


def router_load(
    gate_logits: Float[Array, "N E"],
    expert_indices: Integer[Array, "N k"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> RouterLoad:
    """Counts what the router asked of each expert.

    `counts_e = Σ_tokens Σ_k [index = e]`, `scores_e = Σ_tokens softmax(gate)_e`.

    Args:
      gate_logits: `[N, E]`.
      expert_indices: `[N, k]`, the chosen experts.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      `RouterLoad`: `counts [E]` assignments, `scores [E]` probability, `tokens`.

    Raises:
      ValueError: shapes that do not fit, or indices that are not integers.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> load = losses.router_load(jnp.zeros((3, 2)), jnp.array([[0], [0], [1]]))
      >>> load.counts.tolist(), load.scores.tolist(), float(load.tokens)
      ([2.0, 1.0], [1.5, 1.5], 3.0)
    """
    counted = counted_tokens(token_weights, gate_logits)
    chosen = _assignments(expert_indices, counted, gate_logits.shape[-1])
    probabilities = keep_counted(
        jax.nn.softmax(keep_counted(gate_logits, counted)), counted
    )
    return RouterLoad(
        counts=jnp.sum(chosen, axis=0),
        scores=jnp.sum(probabilities, axis=0),
        tokens=jnp.sum(as_float(counted)),
    )


def load_balancing_loss(
    gate_logits: Float[Array, "N E"],
    expert_indices: Integer[Array, "N k"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Switch balance loss: probability mass on the experts that are already busy.

    `E · Σ_e f_e · P_e`, with `f` the share of all `N · k` assignments and `P` the mean
    probability. 1 at uniform routing, E when all goes to one expert. The product
    couples the batch: over micro-batches, each balances its own tokens.

    Args:
      gate_logits: `[N, E]`.
      expert_indices: `[N, k]`, the chosen experts.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes that do not fit, or indices that are not integers.

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


def auxiliary_load_balancing_loss(
    gate_logits: Float[Array, "N E"],
    expert_indices: Integer[Array, "N k"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Balance loss of the Ava pipeline: `min(10, E · Σ_e P_e · c_e / (N · k)²)`.

    `P_e` sums probabilities, `c_e` counts assignments: the Switch loss divided by k.
    Past the cap there is no gradient. The product couples the batch: over
    micro-batches, each balances its own tokens.

    Args:
      gate_logits: `[N, E]`.
      expert_indices: `[N, k]`, the chosen experts.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes that do not fit, or indices that are not integers.

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


def sequence_balance_loss(
    scores: Float[Array, "B S E"],
    expert_indices: Integer[Array, "B S k"],
    *,
    token_weights: Shaped[Array, "B S"] | None = None,
) -> Float[Array, ""]:
    """Sequence-wise balance loss: each row of the batch spreads its own tokens.

    `E / (k · T²) · Σ_e c_e · Σ_t s_te / Σ_e' s_te'` per row of T counted tokens with
    `c_e` assignments; the mean over the rows that have any. 1 at uniform routing.

    Args:
      scores: `[B, S, E]`, sigmoid or softmax of the gate logits: at least 0.
      expert_indices: `[B, S, k]`, the chosen experts.
      token_weights: `[B, S]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes that do not fit, or indices that are not integers.

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
    counted = counted_tokens(token_weights, scores)
    chosen = _assignments(expert_indices, counted, experts)
    kept = keep_counted(scores, counted)
    affinity = safe_divide(kept, jnp.sum(kept, axis=-1, keepdims=True))
    length = jnp.sum(as_float(counted), axis=-1)
    share = safe_divide(jnp.sum(chosen, axis=1), length[:, None])
    probability = safe_divide(jnp.sum(affinity, axis=1), length[:, None])
    row = jnp.sum(share * probability, axis=-1) * experts / expert_indices.shape[-1]
    return weighted_mean(row, as_float(length > 0))


def router_z_loss(
    gate_logits: Float[Array, "N E"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Keeps gate logits small: the mean of `logsumexp(g)²`.

    Args:
      gate_logits: `[N, E]`, `g`.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> round(float(losses.router_z_loss(jnp.zeros((3, 4)))), 4)
      1.9218

    References:
      Zoph et al., ST-MoE, 2022.
    """
    counted = counted_tokens(token_weights, gate_logits)
    log_z = jax.nn.logsumexp(keep_counted(gate_logits, counted), axis=-1)
    return weighted_mean(jnp.square(log_z), as_float(counted))


def auxiliary_router_z_loss(
    gate_logits: Float[Array, "N E"],
    *,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Z-loss of the Ava pipeline: `min(100, mean(logsumexp(clip(g, ±10))²))`.

    There is no gradient past either cap.

    Args:
      gate_logits: `[N, E]`, `g`.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens.

    Raises:
      ValueError: shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> round(float(losses.auxiliary_router_z_loss(jnp.full((3, 1), 99.0))), 4)
      100.0
    """
    gate = as_float(gate_logits)
    # A logit exactly at the cap keeps its whole gradient, unlike with jnp.clip.
    clipped = jax.lax.stop_gradient(jnp.clip(gate, -10, 10))
    gate = jnp.where(jnp.abs(gate) <= 10, gate, clipped)
    return jnp.minimum(router_z_loss(gate, token_weights=token_weights), 100)
