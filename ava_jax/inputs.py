"""The keyword arguments of a loss call, and the denominators of its means."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import TypedDict, cast

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from ava_jax.arrays import read_named, usable_weights
from ava_jax.config import Settings
from ava_jax.tokens import Tokens, read_tokens


class LossInputs(TypedDict, total=False):
    """Keyword arguments of a loss call; `targets` and one source of logits are needed.

    targets: ids [B, S]; position t holds the token that position t predicts.
    logits: [B, S, V]; the logits path.
    hidden_states: [B, S, D]; with `lm_head`, the fused path.
    lm_head: [D, V]; the product is taken in the wider of the two dtypes, and
      accumulated in float32.
    lm_head_bias: [V].
    attention_mask: [B, S], bool, int or float (a per-token weight).
    segment_ids: [B, S]; packed rows, 0 is padding.
    router_mask: [B, S], 0 for tokens that no router sees; by default those are padding
      (`attention_mask` 0, segment 0, or by `pad_token_id`). A token whose target is
      ignored is routed.
    mtp_params: `{"norm": {"scale", "bias"}, "heads": {"kernel", "bias"}}` for
      `mtp_type="parallel"`, as `MTPHeads.init` makes it: [D], [D], [K, D, V], [K, V].
    mtp_hidden_states: [K, B, S, D] for `mtp_type="sequential"`, with `lm_head`.
    primary_logits: [B, S, V], the adaptive loss's own main logits.
    additional_logits: [K, B, S, V] or a list of [B, S, V], the adaptive heads.
    confidence_scores: [B], [B, 1], [B, S] or [B, S, 1], in [0, 1].
    mtp_active: whether the adaptive heads ran; a Python bool or a traced one.
    gate_logits: router logits [N, E], [B, S, E], or either with a leading layer axis.
    expert_indices: chosen experts, the same with k in place of E.
    expert_outputs: [E, N, D] or [E, B, S, D], or a list over experts.
    embeddings: [M, D] for the contrastive loss.
    labels: [M], their classes.
    teacher_lm_head: [D', V], the teacher's projection for distillation from its hidden
      states.
    teacher_lm_head_bias: [V].
    extra_inputs: arrays [B, S, ...] by name, for terms of your own, and for policy and
      distillation terms.
    """

    targets: Integer[Array, "B S"]
    logits: Float[Array, "B S V"] | None
    hidden_states: Float[Array, "B S D"] | None
    lm_head: Float[Array, "D V"] | None
    lm_head_bias: Float[Array, "V"] | None
    attention_mask: Shaped[Array, "B S"] | None
    segment_ids: Integer[Array, "B S"] | None
    router_mask: Shaped[Array, "B S"] | None
    mtp_params: Mapping[str, Mapping[str, Array]] | None
    mtp_hidden_states: Float[Array, "K B S D"] | None
    primary_logits: Float[Array, "B S V"] | None
    additional_logits: Float[Array, "K B S V"] | Sequence[Array] | None
    confidence_scores: Float[Array, "B ..."] | None
    mtp_active: bool | Bool[Array, ""]
    gate_logits: Float[Array, "..."] | None
    expert_indices: Integer[Array, "..."] | None
    expert_outputs: Float[Array, "E ..."] | Sequence[Array] | None
    embeddings: Float[Array, "M D"] | None
    labels: Integer[Array, "M"] | None
    teacher_lm_head: Float[Array, "E V"] | None
    teacher_lm_head_bias: Float[Array, "V"] | None
    extra_inputs: Mapping[str, Array] | None


@flax.struct.dataclass
class Normalizers:
    """The denominators of every mean, over all the tokens of an optimizer step.

    Attributes:
      tokens: `Σ w`.
      heads: `Σ w` of the pairs that each head predicts, [K]; [0] without heads.
      windows: number of n-gram windows, where a term divides by it; 0 otherwise.
      rows: number of rows.
      active_rows: number of rows with an unmasked token.
      routed: number of tokens that routers see.
    """

    tokens: Float[Array, ""]
    heads: Float[Array, "K"]
    windows: Float[Array, ""]
    rows: Float[Array, ""]
    active_rows: Float[Array, ""]
    routed: Float[Array, ""]


def array(inputs: LossInputs, name: str) -> Array:
    """Returns an argument that the checks have found present."""
    value = inputs.get(name)
    if value is None:
        raise ValueError(f"{name} is required")
    return value


def width_of(inputs: LossInputs) -> int:
    """Returns the number of columns of the main logits, padding included."""
    for name in ("logits", "primary_logits", "lm_head"):
        if (value := inputs.get(name)) is not None:
            return value.shape[-1]
    raise ValueError("no logits and no lm_head")


def mtp_parameters(inputs: LossInputs) -> Mapping[str, Mapping[str, Array]]:
    """Returns the parallel heads' parameters, which the checks have found present."""
    params = inputs.get("mtp_params")
    if params is None:
        raise ValueError("mtp_params is required")
    return params


def check_float(
    name: str,
    value: Array,
    start: tuple[int, ...],
    rank: int,
    *,
    vocab_size: int | None = None,
) -> None:
    """Raises unless an array is floating point and fits the targets' shape.

    Args:
      name: the argument.
      value: its value.
      start: what its shape starts with.
      rank: how many axes it has.
      vocab_size: V, if the last axis has to hold as many columns.
    """
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.ndim != rank or value.shape[: len(start)] != start:
        raise ValueError(
            f"{name} must have {rank} axes and start with {start}, as targets do, "
            f"got {value.shape}"
        )
    if vocab_size is not None and value.shape[-1] < vocab_size:
        raise ValueError(
            f"the last axis of {name} is {value.shape[-1]}, smaller than "
            f"vocab_size={vocab_size}"
        )


def heads_of(logits: Float[Array, "K B S V"] | Sequence[Array] | None) -> list[Array]:
    """Lists the heads of `additional_logits`."""
    return [] if logits is None else [logits[j] for j in range(len(logits))]


def tokens_of(settings: Settings, inputs: LossInputs) -> Tokens:
    """Reads the targets, their weights and segments, and which tokens are routed."""
    tokens = read_tokens(
        array(inputs, "targets"),
        inputs.get("attention_mask"),
        inputs.get("segment_ids"),
        vocab_size=settings.vocab_size,
        ignore_index=settings.ignore_index,
        pad_token_id=settings.pad_token_id,
        eos_token_id=settings.eos_token_id,
        mask_boundaries=settings.mask_boundaries,
    )
    if (mask := inputs.get("router_mask")) is None:
        return tokens
    return dataclasses.replace(tokens, routed=usable_weights(mask) != 0)


def read_arrays(inputs: LossInputs) -> LossInputs:
    """Returns the arguments with JAX arrays in place of NumPy's."""
    return cast(LossInputs, read_named(inputs, ids=("targets", "expert_indices")))
