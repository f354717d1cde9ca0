"""Mixture of experts: balancing with state across steps, and the experts' diversity.

Every function takes one layer; map over a leading layer axis with `jax.vmap`. Tokens
with a `token_weights` of 0 are masked: they are left out and may hold NaN. Any other
weight is treated as 1.
"""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float, Int, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.kernel.sharding import in_one_program
from ava_jax.losses.contrastive import unit_vectors
from ava_jax.losses.router import RouterLoad, unmasked_tokens, zero_masked
from ava_jax.ranges import check_range
from ava_jax.reduce import along_axis, as_float, centered, safe_divide, weighted_mean


@flax.struct.dataclass
class GradientBalanceState:
    """Moving averages of the router's load (`moe_balancing_type="gradient"`).

    Attributes:
      counts: assignments per expert.
      scores: mean router probability per expert.
      tokens: number of tokens.
    """

    counts: Float[Array, "E"]
    scores: Float[Array, "E"]
    tokens: Float[Array, ""]

    def statistics(self) -> dict[str, Array]:
        """Returns the numbers under the names of `ava_jax.statistics`."""
        return {
            "expert_counts": self.counts,
            "expert_scores": self.scores,
            "total_tokens": self.tokens,
        }


@flax.struct.dataclass
class BiasBalanceState:
    """The routing bias per expert (`moe_balancing_type="bias"` or `"quantile"`)."""

    bias: Float[Array, "E"]

    def statistics(self) -> dict[str, Array]:
        """Returns the bias under its name in `ava_jax.statistics`."""
        return {"bias": self.bias}


@with_checked_arrays
def update_gradient_balance(
    state: GradientBalanceState, load: RouterLoad, *, momentum: float | int = 0.9
) -> GradientBalanceState:
    """Computes the exponential moving average of the load.

    `new = momentum · old + (1 − momentum) · step` of the counts, the mean probabilities
    and the number of tokens, starting at zeros. A step without tokens changes nothing.

    Args:
      state: the running load, `[E]` each and a scalar.
      load: the load of the whole optimizer step.
      momentum: in `[0, 1)`.

    Returns:
      The new state, of the same dtypes.

    Raises:
      ValueError: `momentum` is out of range.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses, state
      >>> start = state.GradientBalanceState(jnp.zeros(2), jnp.zeros(2), jnp.zeros(()))
      >>> load = losses.router_load(jnp.zeros((3, 2)), jnp.array([[0], [0], [1]]))
      >>> new = losses.update_gradient_balance(start, load)
      >>> [round(float(c), 4) for c in new.counts], round(float(new.tokens), 4)
      ([0.2, 0.1], 0.3)
    """
    check_range("momentum", momentum, 0, 1)
    step = GradientBalanceState(
        counts=load.counts,
        scores=safe_divide(load.scores, load.tokens),
        tokens=load.tokens,
    )

    def move(old: Float[Array, "*E"], new: Float[Array, "*E"]) -> Float[Array, "*E"]:
        new = jax.lax.stop_gradient(new).astype(old.dtype)
        moved = momentum * old + (1 - momentum) * new
        return jnp.where(load.tokens > 0, moved, old)

    return jax.tree.map(move, state, step)


@with_checked_arrays
def gradient_balance_loss(
    gate_logits: Float[Array, "N E"],
    balance: GradientBalanceState,
    *,
    weight: Float[Array, ""] | float | int,
    token_weights: Shaped[Array, "N"] | None = None,
) -> Float[Array, ""]:
    """Computes a loss whose gradient moves gate logits against the experts' imbalance.

    `weight · mean((g − stop_gradient(g + a))²)` over the entries of unmasked tokens,
    with `a = −weight · (counts − tokens / E) / tokens`. Logits of −inf get no gradient.
    Each micro-batch uses its own running load.

    Args:
      gate_logits: `[N, E]`, `g`.
      balance: the running load, this step's included (`update_gradient_balance`).
      weight: scales both `a` and the loss.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar that includes the weight.

    Raises:
      ValueError: shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses, state
      >>> balance = state.GradientBalanceState(
      ...     jnp.array([3.0, 1.0]), jnp.array([0.5, 0.5]), jnp.array(4.0))
      >>> loss = losses.gradient_balance_loss(jnp.zeros((4, 2)), balance, weight=0.1)
      >>> round(float(loss), 8)
      6.25e-05
    """
    check_range("weight", weight, 0)
    experts = gate_logits.shape[-1]
    if balance.counts.shape != (experts,):
        raise ValueError(
            f"gate_logits have {experts} experts, the balance state has "
            f"{balance.counts.shape[0]}; set num_experts to {experts}"
        )
    unmasked = unmasked_tokens(token_weights, gate_logits)
    gate = zero_masked(gate_logits, unmasked)
    gate = jnp.where(gate == -jnp.inf, 0, gate)
    excess = as_float(balance.counts) - as_float(balance.tokens) / experts
    pull = -as_float(weight) * safe_divide(excess, balance.tokens)
    pull = along_axis(pull, gate.ndim)
    # g − (g + a) would lose a to rounding if g is large.
    error = (gate - jax.lax.stop_gradient(gate)) - jax.lax.stop_gradient(pull)
    per_token = jnp.mean(jnp.square(error), axis=-1)
    return as_float(weight) * weighted_mean(per_token, as_float(unmasked))


@with_checked_arrays
def expert_balance_ratio(balance: GradientBalanceState) -> Float[Array, "E"]:
    """Computes each expert's load relative to an even share.

    `counts / (tokens / E + 1e-6)`.

    Args:
      balance: the running load.

    Returns:
      `[E]`; for an even load 1 with one expert per token, k with k experts.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses, state
      >>> balance = state.GradientBalanceState(
      ...     jnp.array([3.0, 1.0]), jnp.array([0.5, 0.5]), jnp.array(4.0))
      >>> [round(float(r), 4) for r in losses.expert_balance_ratio(balance)]
      [1.5, 0.5]
    """
    share = as_float(balance.tokens) / balance.counts.shape[0]
    return as_float(balance.counts) / (share + 1e-6)


@with_checked_arrays
def coefficient_of_variation(ratio: Float[Array, "E"]) -> Float[Array, ""]:
    """Computes the coefficient of variation of the experts' load.

    The unbiased standard deviation / (mean + 1e-6).

    Args:
      ratio: `[E]`, loads or balance ratios.

    Returns:
      A scalar; 0 if all loads are equal, and for a single expert.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> round(float(losses.coefficient_of_variation(jnp.array([1.5, 0.5]))), 4)
      0.7071
    """
    mean = jnp.mean(as_float(ratio))
    degrees = max(ratio.shape[0] - 1, 1)
    # The norm, not the square root of a variance, has a gradient at 0.
    deviation = optax.safe_norm(centered(ratio), 0.0) / degrees**0.5
    return deviation / (mean + 1e-6)


@with_checked_arrays
def max_violation(counts: Float[Array, "E"]) -> Float[Array, ""]:
    """Computes by how much the largest load exceeds an even share (MaxVio).

    `max / mean − 1`.

    Args:
      counts: `[E]`, assignments per expert.

    Returns:
      A scalar; 0 for an even load, and without any load.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> round(float(losses.max_violation(jnp.array([3.0, 1.0]))), 4)
      0.5

    References:
      Wang et al., Auxiliary-Loss-Free Load Balancing, 2024.
    """
    counts = as_float(counts)
    total = jnp.sum(counts)
    # Whole numbers, so that an even load is equal to its mean.
    return safe_divide(counts.shape[-1] * jnp.max(counts) - total, total)


@with_checked_arrays
def update_bias(
    state: BiasBalanceState,
    counts: Float[Array, "E"],
    *,
    rate: Float[Array, ""] | float | int = 1e-3,
) -> BiasBalanceState:
    """Computes the routing bias after a step: higher for underloaded experts.

    `bias += rate · sign(mean(counts) − counts)`, then the mean of the bias is
    subtracted. It has no gradient. A step without load changes nothing.

    Args:
      state: the bias, `[E]`.
      counts: `[E]`, assignments of the whole optimizer step, over all devices.
      rate: the step, in units of the router's scores.

    Returns:
      The new state, of the same dtype.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses, state
      >>> new = losses.update_bias(
      ...     state.BiasBalanceState(jnp.zeros(2)), jnp.array([3.0, 1.0]), rate=0.5)
      >>> new.bias.tolist()
      [-0.5, 0.5]

    References:
      Wang et al., Auxiliary-Loss-Free Load Balancing, 2024.
      DeepSeek-V3 Technical Report, 2024.
    """
    if counts.shape != state.bias.shape:
        raise ValueError(
            f"counts must have the shape {state.bias.shape} of the state's bias, got "
            f"{counts.shape}"
        )
    check_range("rate", rate, 0)
    load = jax.lax.stop_gradient(as_float(counts))
    # Whole numbers, so that a load at the mean is equal to it: a compiled mean rounds.
    distance = jnp.sum(load) - load.shape[-1] * load
    step = as_float(rate) * jnp.sign(distance)
    bias = state.bias + step.astype(state.bias.dtype)
    bias = jnp.where(jnp.sum(load) > 0, bias - jnp.mean(bias), state.bias)
    return BiasBalanceState(bias=bias)


@with_checked_arrays
def route(
    scores: Float[Array, "*N E"],
    bias: Float[Array, "E"],
    k: int,
    *,
    normalize: bool = True,
) -> tuple[Float[Array, "*N k"], Int[Array, "*N k"]]:
    """Selects k experts by biased scores and weights them by the unbiased ones.

    `indices = top_k(scores + bias)`, `weights = scores[indices]`, divided by their sum
    if `normalize` (0 where the sum is 0). The bias gets no gradient.

    Args:
      scores: `[..., E]`, sigmoid or softmax of the gate logits: at least 0.
      bias: `[E]`, from `BiasBalanceState`.
      k: experts per token.
      normalize: whether a token's weights sum to 1.

    Returns:
      `weights [..., k]` in the dtype of `scores`, and `indices [..., k]`, int32, the
      largest biased score first.

    Raises:
      ValueError: `k` is not in `[1, E]`, or the bias has another length than E.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> weights, indices = losses.route(
      ...     jnp.array([0.6, 0.3, 0.1]), jnp.array([0.0, 0.0, 0.3]), 2)
      >>> indices.tolist(), [round(float(w), 4) for w in weights]
      ([0, 2], [0.8571, 0.1429])

    References:
      DeepSeek-V3 Technical Report, 2024.
    """
    experts = scores.shape[-1]
    check_range("k", k, 1, experts, through=True, whole=True)
    if bias.shape != (experts,):
        raise ValueError(f"bias must have shape ({experts},), got {bias.shape}")
    exact = as_float(scores)
    biased = jax.lax.stop_gradient(exact + along_axis(as_float(bias), exact.ndim))
    _, indices = jax.lax.top_k(biased, k)
    chosen = indices[..., None] == along_axis(
        jnp.arange(experts, dtype=indices.dtype), indices.ndim + 1
    )
    weights = jnp.sum(jnp.where(chosen, exact[..., None, :], 0), axis=-1)
    if normalize:
        weights = safe_divide(weights, jnp.sum(weights, axis=-1, keepdims=True))
    return weights.astype(scores.dtype), indices


def _l2_similarity(
    x: Float[Array, "E *N D"], unmasked: Bool[Array, "*N"]
) -> Float[Array, "E E"]:
    return in_one_program(_l2_of_each, (), x, unmasked)


def _l2_of_each(
    x: Float[Array, "E *N D"], unmasked: Bool[Array, "*N"]
) -> Float[Array, "E E"]:
    weights = as_float(unmasked)

    # One expert at a time, recomputed in the backward pass: no [E, E, N, D] array.
    @jax.checkpoint
    def distances(one: Float[Array, "*N D"]) -> Float[Array, "E"]:
        apart = optax.safe_norm(one[None] - x, 0.0, axis=-1)
        return jax.vmap(lambda row: weighted_mean(row, weights))(apart)

    empty = jnp.sum(weights) == 0
    return jnp.where(empty, 0, 1 / (1 + jax.lax.map(distances, x)))


@with_checked_arrays
def expert_diversity_loss(
    expert_outputs: Float[Array, "E *N D"],
    *,
    similarity: str = "cosine",
    token_weights: Shaped[Array, "*N"] | None = None,
) -> Float[Array, ""]:
    """Computes the similarity of the experts' outputs for the same token.

    The mean over all pairs of experts of

    - `"cosine"`: the mean over tokens of the cosine, norms clamped at 1e-8;
    - `"l2"`: `1 / (1 + mean over tokens of the distance)`;
    - `"dot"`: the mean over tokens of the dot product.

    A zero vector (an expert that a token was not routed to) has cosine 0, without a
    gradient. The average of `"l2"` over micro-batches differs from that of the whole
    batch.

    Args:
      expert_outputs: `[E, N, D]`, or with more token axes.
      similarity: `"cosine"`, `"l2"` or `"dot"`.
      token_weights: `[N]`; 0 leaves a token out.

    Returns:
      A scalar, unweighted; 0 without tokens and for a single expert.

    Raises:
      ValueError: an unknown `similarity`, or shapes do not match.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> outputs = jnp.array([[[1.0, 0.0]], [[1.0, 1.0]]])
      >>> [round(float(losses.expert_diversity_loss(outputs, similarity=kind)), 4)
      ...  for kind in ("cosine", "l2", "dot")]
      [0.7071, 0.5, 1.0]
    """
    if similarity not in ("cosine", "l2", "dot"):
        raise ValueError(
            f'similarity must be "cosine", "l2" or "dot", got {similarity!r}'
        )
    unmasked = unmasked_tokens(token_weights, expert_outputs[0])
    x = jnp.where(unmasked[..., None], as_float(expert_outputs), 0)
    if similarity == "cosine":
        x = unit_vectors(x, min_norm=1e-8)
    if similarity == "l2":
        pairs = _l2_similarity(x, unmasked)
    else:
        each = jnp.einsum("e...d,f...d->...ef", x, x, precision="highest")
        total = jnp.sum(each, axis=tuple(range(unmasked.ndim)))
        pairs = safe_divide(total, jnp.sum(as_float(unmasked)))
    upper = jnp.triu(jnp.ones_like(pairs, dtype=bool), k=1)
    return weighted_mean(pairs, as_float(upper))
