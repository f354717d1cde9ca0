"""Distillation from a teacher, without the logits of either model."""

import functools
from collections.abc import Sequence
from typing import cast

import jax.numpy as jnp
from jax.lax import PrecisionLike, stop_gradient
from jax.sharding import Mesh
from jaxtyping import Array, Float, Integer, Num, Shaped

from ava_jax.annotations import with_checked_arrays
from ava_jax.arrays import as_ids
from ava_jax.assemble import extra_arrays, plan_of
from ava_jax.checks import check_inputs
from ava_jax.config import Settings
from ava_jax.inputs import LossInputs, read_arrays, tokens_of
from ava_jax.kernel.fused import token_sums
from ava_jax.kernel.platforms import Implementation
from ava_jax.kernel.sharding import Layout, make_layout, run_whole
from ava_jax.log_probs import check_logits, given, pass_settings, token_operands
from ava_jax.losses.arguments import check_known, check_range
from ava_jax.reduce import as_float, safe_divide
from ava_jax.terms.distillation import Distillation, TopKDistillation
from ava_jax.terms.objective import Shared, TokenObjective, token_inputs


@functools.partial(with_checked_arrays, sizes=False)
def distillation_loss(
    *,
    logits: Float[Array, "B S V"] | None = None,
    hidden_states: Float[Array, "B S D"] | None = None,
    lm_head: Float[Array, "D V"] | None = None,
    lm_head_bias: Float[Array, "V"] | None = None,
    teacher_logits: Float[Array, "B S W"] | None = None,
    teacher_hidden_states: Float[Array, "B S E"] | None = None,
    teacher_lm_head: Float[Array, "E W"] | None = None,
    teacher_lm_head_bias: Float[Array, "W"] | None = None,
    teacher_ids: Integer[Array, "B S K"] | None = None,
    teacher_log_probs: Float[Array, "B S K"] | None = None,
    attention_mask: Shaped[Array, "B S"] | None = None,
    beta: float = 0.0,
    temperature: float = 1.0,
    tail: bool | None = None,
    num_tokens: Num[Array, ""] | float | None = None,
    vocab_size: int | None = None,
    logit_soft_cap: float | None = None,
    teacher_logit_soft_cap: float | None = None,
    chunk_size: int | None = None,
    block_size: int | None = None,
    implementation: Implementation | None = None,
    precision: PrecisionLike = None,
    mesh: Mesh | None = None,
    batch_axes: str | Sequence[str] = (),
    sequence_axis: str | None = None,
    vocab_axis: str | None = None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Computes the divergence of a student's distribution from a teacher's.

    The mean over the unmasked tokens of `T²·D`, with p the student's distribution
    `softmax(z/T)`, q the teacher's and `D = KL(q‖p)` for β = 0, `KL(p‖q)` for β = 1 and
    `β·KL(q‖m) + (1−β)·KL(p‖m)`, `m = (1−β)·p + β·q`, between them. The teacher has no
    gradient. From hidden states of both, the logits of neither exist whole: 6·N·D·V
    flops with the gradient, and 2·N·E·V for the teacher of width E.

    Args:
      logits: the student's, [B, S, V]; or else the two that follow.
      hidden_states: the student's, [B, S, D].
      lm_head: the student's projection, [D, V].
      lm_head_bias: [V].
      teacher_logits: [B, S, W], W of V and padding of its own; or else the teacher's
        hidden states and projection, or its top k.
      teacher_hidden_states: [B, S, E].
      teacher_lm_head: [E, W].
      teacher_lm_head_bias: [W].
      teacher_ids: the teacher's k most probable ids, distinct, [B, S, k]; those outside
        the vocabulary are left out and counted. See `losses.top_k_divergence`.
      teacher_log_probs: their log-probabilities at T, [B, S, k].
      attention_mask: [B, S], bool, int or float (a per-token weight).
      beta: β in [0, 1]; 0 with the top k.
      temperature: T > 0, of both.
      tail: with the top k, whether all others are one class; True if None.
      num_tokens: the denominator, `Σ w` of all micro-batches; of this call's if None.
      vocab_size: V, if there are more columns, which are padding.
      logit_soft_cap: of the student's logits.
      teacher_logit_soft_cap: of the teacher's.
      chunk_size: tokens of a row whose logits are made at a time; None chooses.
      block_size: tokens of a row whose logits are reduced at a time; None chooses.
      implementation: of the kernel; None follows the platform.
      precision: of the products with both projections.
      mesh: the mesh that the arrays are sharded over.
      batch_axes: its axes that share the rows.
      sequence_axis: its axis that shares each row's tokens.
      vocab_axis: its axis that shares the vocabulary.

    Returns:
      The loss, a scalar; and `divergence`, the mean of D, `num_tokens`, the number of
      unmasked tokens, and with the top k `num_invalid_ids`.

    Raises:
      TypeError: an array has the wrong dtype.
      ValueError: an array is missing, unread or does not fit, or a number is out of its
        range.

    Example:
      >>> import jax.numpy as jnp, ava_jax
      >>> loss, aux = ava_jax.distillation_loss(
      ...     hidden_states=jnp.ones((1, 2, 4)), lm_head=jnp.zeros((4, 8)),
      ...     teacher_hidden_states=jnp.ones((1, 2, 6)),
      ...     teacher_lm_head=jnp.eye(6, 8), temperature=2.0)
      >>> round(float(loss), 4), round(float(aux["divergence"]), 4)
      (0.0778, 0.0195)

    References:
      Hinton et al., Distilling the Knowledge in a Neural Network, 2015; Agarwal et al.,
      On-Policy Distillation of Language Models, 2024 (β).
    """
    source = hidden_states if logits is None else logits
    widest = lm_head if logits is None else logits
    if source is None:
        raise ValueError(
            "no logits: pass logits [B, S, V], or hidden_states [B, S, D] and "
            "lm_head [D, V]"
        )
    settings = pass_settings(
        widest,
        vocab_size,
        logit_soft_cap=logit_soft_cap,
        chunk_size=chunk_size,
        block_size=block_size,
        implementation=implementation,
        precision=precision,
    )
    extra = given(
        teacher_logits=teacher_logits,
        teacher_hidden_states=teacher_hidden_states,
        teacher_ids=teacher_ids,
        teacher_log_probs=teacher_log_probs,
    )
    inputs: LossInputs = {
        "targets": jnp.zeros(source.shape[:2], jnp.int32),
        "logits": logits,
        "hidden_states": hidden_states,
        "lm_head": lm_head,
        "lm_head_bias": lm_head_bias,
        "attention_mask": attention_mask,
        "teacher_lm_head": teacher_lm_head,
        "teacher_lm_head_bias": teacher_lm_head_bias,
        "extra_inputs": extra,
    }
    soft_cap = teacher_logit_soft_cap
    check_logits(inputs, {})
    term = _term(extra, settings.vocab_size, beta, temperature, tail, soft_cap)
    check_inputs(settings, (term,), inputs)
    layout = make_layout(mesh, batch_axes, sequence_axis, vocab_axis)
    count = None if num_tokens is None else as_float(num_tokens)
    arrays = read_arrays(cast(LossInputs, given(**inputs)))
    return run_whole(_compute, (settings, layout, term), arrays, count)


def _term(
    extra: dict[str, Array],
    vocab_size: int,
    beta: float,
    temperature: float,
    tail: bool | None,
    soft_cap: float | None,
) -> Distillation | TopKDistillation:
    """Returns the term for the arrays of the teacher that are given."""
    check_known("temperature", temperature)
    check_known("beta", beta)
    check_range("temperature", temperature, 0, inclusive=False)
    top_k = [name for name in TopKDistillation.requires_extra if name in extra]
    if not top_k:
        if tail is not None:
            raise ValueError(
                "tail is for teacher_ids and teacher_log_probs: leave it out"
            )
        return Distillation(beta, temperature, soft_cap)
    if beta != 0 or soft_cap is not None:
        raise ValueError(
            "of a teacher's top k, KL(q‖p) alone can be computed: leave out beta and "
            f"teacher_logit_soft_cap, got {beta} and {soft_cap}"
        )
    return TopKDistillation(vocab_size, tail is not False, temperature)


def _compute(
    settings: Settings,
    layout: Layout | None,
    term: Distillation | TopKDistillation,
    inputs: LossInputs,
    num_tokens: Float[Array, ""] | None,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    tokens = tokens_of(settings, inputs)
    objective = TokenObjective(
        (term,), settings.vocab_size, settings.logit_soft_cap, measures=False
    )
    block = token_inputs(tokens, extra=extra_arrays((term,), inputs))
    shared = Shared(None, {}, {term.name: term.whole(inputs)})
    operands = token_operands(inputs, block, tokens, shared, rows={})
    count = jnp.sum(tokens.weights) if num_tokens is None else num_tokens
    coefficients = {term.name: safe_divide(as_float(1), count)}
    plan = plan_of(settings, layout, inputs, tokens)
    loss, _ = token_sums((objective,), operands, coefficients, plan)
    aux = {
        "divergence": stop_gradient(loss) / term.logits_temperature**2,
        "num_tokens": jnp.sum(tokens.active, dtype=jnp.int32),
    }
    if isinstance(term, TopKDistillation):
        ids = as_ids((inputs.get("extra_inputs") or {})["teacher_ids"])
        is_wrong = (ids < 0) | (ids >= settings.vocab_size)
        is_wrong &= tokens.active[..., None]
        aux["num_invalid_ids"] = jnp.sum(is_wrong, dtype=jnp.int32)
    return loss, aux
