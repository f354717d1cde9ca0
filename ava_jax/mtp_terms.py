"""Multi-token prediction inside the unified loss: three kinds of heads."""

import dataclasses

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.config import UnifiedLossConfig
from ava_jax.inputs import (
    LossInputs,
    Normalizers,
    array,
    mtp_parameters,
    read_scores,
)
from ava_jax.kernel.fused import Plan, token_sums
from ava_jax.kernel.passes import Operands
from ava_jax.losses.mtp import (
    confidence_regularizer,
    effective_mtp_weight,
    layer_norm,
)
from ava_jax.reduce import as_float, safe_divide, weighted_mean
from ava_jax.token_terms import HeadObjective, TokenInputs, token_inputs
from ava_jax.tokens import Tokens, stack_ahead


def usable_heads(num_heads: int, tokens: Tokens) -> int:
    """Heads that look past the end of every row are skipped."""
    return min(num_heads, tokens.targets.shape[1] - 1)


def head_inputs(tokens: Tokens, num_heads: int) -> TokenInputs:
    """The token inputs of heads 1…K, stacked on a leading axis."""
    stacked = stack_ahead(tokens, num_heads)
    index = jnp.arange(num_heads, dtype=jnp.int32)[:, None, None]
    head = jnp.broadcast_to(index, stacked.targets.shape)
    return token_inputs(stacked, None, {"head": head})


def head_denominators(normalizers: Normalizers, num_heads: int) -> Float[Array, "K"]:
    """The weight that each head's mean divides by."""
    if normalizers.heads.shape[0] < num_heads:
        raise ValueError(
            f"normalizers are for {normalizers.heads.shape[0]} heads, but {num_heads} "
            "are given: set num_future_tokens to the number of heads"
        )
    return normalizers.heads[:num_heads]


def without_masked(
    hidden: Float[Array, "*n D"], weights: Float[Array, "*n"]
) -> Float[Array, "*n D"]:
    """Zeroes the hidden states of tokens that do not count, whatever they hold."""
    return jnp.where((weights != 0)[..., None], hidden, jnp.zeros_like(hidden))


def parallel_head_means(
    config: UnifiedLossConfig,
    inputs: LossInputs,
    tokens: Tokens,
    normalizers: Normalizers,
    plan: Plan,
) -> Float[Array, "K"]:
    """Means of K heads with matrices of their own; no head's logits exist whole."""
    count = usable_heads(config.num_future_tokens, tokens)
    if count < 1:
        return jnp.zeros((0,), normalizers.tokens.dtype)
    heads = head_inputs(tokens, count)
    params = mtp_parameters(inputs)
    hidden = without_masked(
        array(inputs, "hidden_states"), jnp.max(as_float(heads.weights != 0), 0)
    )
    normed = layer_norm(hidden, params["norm"]["scale"], params["norm"]["bias"])
    objective = HeadObjective(config, 1, 0.0)

    def mean(head):
        kernel, bias, of_head, denominator = head
        block = jax.tree.map(lambda x: x[None], of_head)
        block = dataclasses.replace(
            block, extra={"head": jnp.zeros_like(block.targets)}
        )
        operands = Operands(
            sources=(normed[None],),
            inputs=(block,),
            active=(block.weights != 0,),
            rows=None,
            shared=None,
            kernel=kernel,
            bias=bias,
        )
        coefficient = {"heads": safe_divide(jnp.ones((1,)), denominator)}
        return token_sums((objective,), operands, coefficient, plan)[0]

    kernels = params["heads"]["kernel"][:count], params["heads"]["bias"][:count]
    denominators = head_denominators(normalizers, count)
    return jax.lax.map(mean, (*kernels, heads, denominators))


def sequential_group(
    config: UnifiedLossConfig, inputs: LossInputs, tokens: Tokens, plan: Plan
) -> tuple[HeadObjective, Array, TokenInputs] | None:
    """The fused pass's group of the depths that share the main head's matrix."""
    count = usable_heads(config.num_future_tokens, tokens)
    if count < 1:
        return None
    heads = head_inputs(tokens, count)
    hidden = array(inputs, "mtp_hidden_states")[:count]
    return HeadObjective(config, count, 0.0), hidden, heads


@flax.struct.dataclass
class AdaptiveParts:
    """The parts of the adaptive loss besides its primary cross-entropy.

    Attributes:
      additional: the heads' mean loss times the effective weight.
      confidence_reg: the weighted regulariser.
      confidence: the mean confidence; 0 without scores.
      effective_weight: the heads' weight.
    """

    additional: Float[Array, ""]
    confidence_reg: Float[Array, ""]
    confidence: Float[Array, ""]
    effective_weight: Float[Array, ""]


def adaptive_parts(
    config: UnifiedLossConfig,
    weight: Float[Array, ""],
    inputs: LossInputs,
    tokens: Tokens,
    normalizers: Normalizers,
    plan: Plan,
) -> AdaptiveParts:
    """The adaptive heads' loss, scaled by the gate's confidence, and its regulariser.

    Over micro-batches the confidence that scales the heads is each one's own.
    """
    zero = jnp.zeros((), normalizers.tokens.dtype)
    given = inputs.get("confidence_scores")
    confidence = regularizer = zero
    scale = None
    if given is not None:
        scores = read_scores(given, tokens, normalizers)
        confidence = scores.share_of_mean(scores.values)
        regularizer = config.confidence_reg_strength * scores.share_of_mean(
            confidence_regularizer(scores.values)
        )
        if config.use_confidence_weighting:
            scale = weighted_mean(scores.values, scores.weights)
    heads = inputs.get("additional_logits")
    if heads is None:
        return AdaptiveParts(zero, regularizer, confidence, zero)
    active = inputs.get("mtp_active", True)
    effective = effective_mtp_weight(
        weight, scale, active=active, stop_gradient=config.stop_confidence_gradient
    )
    mean = _given_heads_mean(config, heads, tokens, normalizers, plan)
    additional = jnp.where(active, mean * effective, zero)
    share = safe_divide(jnp.sum(tokens.weights), normalizers.tokens)
    return AdaptiveParts(additional, regularizer, confidence, effective * share)


def _given_heads_mean(config, heads, tokens, normalizers, plan: Plan):
    count = usable_heads(len(heads), tokens)
    if count < 1:
        return jnp.zeros((), normalizers.tokens.dtype)
    stacked = head_inputs(tokens, count)
    if isinstance(heads, list | tuple):
        sources = tuple(logits[None] for logits in heads[:count])
        inputs = tuple(
            jax.tree.map(lambda x, j=j: x[j : j + 1], stacked) for j in range(count)
        )
    else:
        sources, inputs = (heads[:count],), (stacked,)
    objective = HeadObjective(config, count, config.label_smoothing)
    active = tuple(of_head.weights != 0 for of_head in inputs)
    operands = Operands(sources, inputs, active, rows=None, shared=None)
    coefficients = {
        "heads": safe_divide(
            jnp.full((count,), 1 / count), head_denominators(normalizers, count)
        )
    }
    return token_sums((objective,) * len(sources), operands, coefficients, plan)[0]
