"""The loss's keyword arguments: what they are, and the errors when they do not fit."""

import difflib
from collections.abc import Mapping, Sequence
from typing import TypedDict

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Integer, Shaped

from ava_jax.config import UnifiedLossConfig
from ava_jax.reduce import as_float, weighted_mean
from ava_jax.tokens import Tokens, ahead, read_tokens, whole_windows


class LossInputs(TypedDict, total=False):
    """Keyword arguments of a loss call; `targets` and one source of logits are needed.

    targets: ids [B, S]; position t holds the token that position t predicts.
    logits: [B, S, V]; the logits door.
    hidden_states: [B, S, D]; with `lm_head`, the fused door.
    lm_head: [D, V]; the product is taken in the wider of the two dtypes, and
      accumulated in float32.
    lm_head_bias: [V].
    attention_mask: [B, S], bool, int or float (a per-token weight).
    segment_ids: [B, S]; packed rows, 0 is padding.
    mtp_params: `{"norm": {"scale", "bias"}, "heads": {"kernel", "bias"}}` for
      `mtp_type="deepseek"`, as `MTPHeads.init` makes it: [D], [D], [K, D, V], [K, V].
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
    extra_inputs: arrays [B, S, ...] for the extra terms, by name.
    """

    targets: Integer[Array, "B S"]
    logits: Float[Array, "B S V"] | None
    hidden_states: Float[Array, "B S D"] | None
    lm_head: Float[Array, "D V"] | None
    lm_head_bias: Float[Array, "V"] | None
    attention_mask: Shaped[Array, "B S"] | None
    segment_ids: Integer[Array, "B S"] | None
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
    extra_inputs: Mapping[str, Array] | None


@flax.struct.dataclass
class Normalizers:
    """The denominators of every mean, over all the tokens of an optimizer step.

    Attributes:
      tokens: `Σ w`.
      heads: `Σ w` of the pairs that each head predicts, [K].
      windows: number of n-gram windows.
      rows: number of rows.
      active_rows: number of rows with a token that counts.
    """

    tokens: Float[Array, ""]
    heads: Float[Array, "K"]
    windows: Float[Array, ""]
    rows: Float[Array, ""]
    active_rows: Float[Array, ""]


def array(inputs: LossInputs, name: str) -> Array:
    """Returns an argument that the checks have found present."""
    value = inputs.get(name)
    if value is None:
        raise ValueError(f"{name} is required")
    return value


def mtp_parameters(inputs: LossInputs) -> Mapping[str, Mapping[str, Array]]:
    """Returns the parallel heads' parameters, which the checks have found present."""
    params = inputs.get("mtp_params")
    if params is None:
        raise ValueError("mtp_params is required")
    return params


def check_names(inputs: Mapping[str, object]) -> None:
    """Raises TypeError on an unknown keyword argument, naming the nearest."""
    known = list(LossInputs.__annotations__)
    for name in inputs:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)[0]
            raise TypeError(f"unknown argument {name!r}; did you mean {near!r}?")
    if inputs.get("targets") is None:
        raise ValueError("targets is required: pass the ids to predict, [B, S]")


def check_inputs(config: UnifiedLossConfig, inputs: LossInputs) -> None:
    """Raises on arguments that are missing, contradict each other or do not fit."""
    check_names(inputs)
    _check_targets(inputs)
    _check_door(config, inputs)
    _check_vocabulary(config, inputs)
    _check_terms(config, inputs)


def _check_targets(inputs: LossInputs) -> None:
    targets = array(inputs, "targets")
    if targets.ndim != 2 or not jnp.issubdtype(targets.dtype, jnp.integer):
        raise ValueError(
            f"targets must be integers [B, S], got {targets.dtype} {targets.shape}"
        )
    for name in ("attention_mask", "segment_ids"):
        value = inputs.get(name)
        if value is not None and value.shape != targets.shape:
            raise ValueError(
                f"{name} must have the shape {targets.shape} of targets, "
                f"got {value.shape}"
            )
    segments = inputs.get("segment_ids")
    if segments is not None and not jnp.issubdtype(segments.dtype, jnp.integer):
        raise TypeError(f"segment_ids must be integers, got {segments.dtype}")
    for name, value in (inputs.get("extra_inputs") or {}).items():
        if value.shape[:2] != targets.shape:
            raise ValueError(
                f"extra_inputs[{name!r}] must start with the shape {targets.shape} of "
                f"targets, got {value.shape}"
            )


def has_fused_door(inputs: LossInputs) -> bool:
    """Says whether the main logits come from `hidden_states` and `lm_head`."""
    given = inputs.get("logits"), inputs.get("primary_logits")
    return inputs.get("lm_head") is not None and all(x is None for x in given)


def _check_door(config: UnifiedLossConfig, inputs: LossInputs) -> None:
    logits, head = inputs.get("logits"), inputs.get("lm_head")
    sequential = config.use_mtp and config.mtp_type == "sequential"
    adaptive = config.primary_loss_type == "adaptive_mtp"
    primary = inputs.get("primary_logits") if adaptive else None
    if logits is not None and head is not None and not sequential:
        raise ValueError(
            "pass either logits or hidden_states with lm_head, not both: the loss "
            "would not know which to train"
        )
    if logits is None and primary is None and head is None:
        raise ValueError(
            "no logits: pass logits [B, S, V], or hidden_states [B, S, D] and "
            "lm_head [D, V]"
        )
    if has_fused_door(inputs) and inputs.get("hidden_states") is None:
        raise ValueError("lm_head needs hidden_states [B, S, D]")
    if inputs.get("lm_head_bias") is not None and head is None:
        raise ValueError("lm_head_bias needs lm_head [D, V]")


def _check_float(name: str, value: Array, start: tuple[int, ...], rank: int) -> None:
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {value.dtype}")
    if value.ndim != rank or value.shape[: len(start)] != start:
        wanted = ", ".join(map(str, start))
        raise ValueError(
            f"{name} must have {rank} axes and start with ({wanted}), got {value.shape}"
        )


def _check_vocabulary(config: UnifiedLossConfig, inputs: LossInputs) -> None:
    shape = array(inputs, "targets").shape
    over_vocabulary = {}
    for name in ("logits", "primary_logits"):
        if (value := inputs.get(name)) is not None:
            _check_float(name, value, shape, 3)
            over_vocabulary[name] = value
    for j, value in enumerate(heads_of(inputs.get("additional_logits"))):
        _check_float(f"additional_logits[{j}]", value, shape, 3)
        over_vocabulary[f"additional_logits[{j}]"] = value
    hidden, head = inputs.get("hidden_states"), inputs.get("lm_head")
    if hidden is not None:
        _check_float("hidden_states", hidden, shape, 3)
        if config.hidden_size is not None and hidden.shape[-1] != config.hidden_size:
            raise ValueError(
                f"hidden_states must have hidden_size={config.hidden_size} as its "
                f"last axis, got {hidden.shape}"
            )
    if head is not None:
        _check_float("lm_head", head, (), 2)
        over_vocabulary["lm_head"] = head
        _check_width("hidden_states", hidden, head)
        _check_width("mtp_hidden_states", inputs.get("mtp_hidden_states"), head)
        bias = inputs.get("lm_head_bias")
        if bias is not None:
            _check_float("lm_head_bias", bias, (head.shape[1],), 1)
    for name, value in over_vocabulary.items():
        if value.shape[-1] < config.vocab_size:
            raise ValueError(
                f"the last axis of {name} is {value.shape[-1]}, smaller than "
                f"vocab_size={config.vocab_size}"
            )


def _check_width(name: str, hidden: Array | None, head: Array) -> None:
    if hidden is not None and hidden.shape[-1] != head.shape[0]:
        raise ValueError(
            f"lm_head must be [D, V] with D={hidden.shape[-1]}, the width of {name}, "
            f"got {head.shape}"
        )


def heads_of(logits: Float[Array, "K B S V"] | Sequence[Array] | None) -> list[Array]:
    """Lists the heads of `additional_logits`."""
    return [] if logits is None else [logits[j] for j in range(len(logits))]


def _need(inputs: LossInputs, term: str, *names: str) -> None:
    if any(inputs.get(name) is None for name in names):
        raise ValueError(f"{term} needs {' and '.join(names)}")


def _check_terms(config: UnifiedLossConfig, inputs: LossInputs) -> None:
    if config.use_mtp:
        _check_mtp(config, inputs)
    if config.use_moe_balancing:
        names = ("gate_logits", "expert_indices")
        _need(inputs, "use_moe_balancing", *names)
    if config.use_auxiliary_loss:
        _need(inputs, "use_auxiliary_loss", "gate_logits", "expert_indices")
    if config.use_diversity_loss:
        _need(inputs, "use_diversity_loss", "expert_outputs")
    if config.use_contrastive_loss:
        kind = f"contrastive_type={config.contrastive_type!r}"
        needs = {"simctg": ("hidden_states",), "infonce": ("embeddings",)}
        _need(
            inputs, kind, *needs.get(config.contrastive_type, ("embeddings", "labels"))
        )
    scores = inputs.get("confidence_scores")
    if scores is not None:
        shape = array(inputs, "targets").shape
        allowed = (shape[:1], (shape[0], 1), shape, (*shape, 1))
        if scores.shape not in allowed:
            raise ValueError(
                f"confidence_scores must have one of the shapes {allowed}, "
                f"got {scores.shape}"
            )


def _check_mtp(config: UnifiedLossConfig, inputs: LossInputs) -> None:
    batch, length = array(inputs, "targets").shape
    if config.mtp_type == "deepseek":
        _need(inputs, 'mtp_type="deepseek"', "hidden_states", "mtp_params")
        kernel = mtp_parameters(inputs)["heads"]["kernel"]
        wanted = (config.num_future_tokens, config.hidden_size)
        if kernel.shape[:2] != wanted or kernel.shape[2] < config.vocab_size:
            raise ValueError(
                'mtp_params["heads"]["kernel"] must be [num_future_tokens, hidden_size,'
                f" vocab_size] = {(*wanted, config.vocab_size)}, got {kernel.shape}"
            )
    elif config.mtp_type == "sequential":
        _need(inputs, 'mtp_type="sequential"', "mtp_hidden_states", "lm_head")
        start = (config.num_future_tokens, batch, length)
        _check_float("mtp_hidden_states", array(inputs, "mtp_hidden_states"), start, 4)
    else:
        _need(inputs, 'mtp_type="adaptive"', "additional_logits")


def tokens_of(config: UnifiedLossConfig, inputs: LossInputs) -> Tokens:
    """Reads the targets, their weights and segments."""
    return read_tokens(
        array(inputs, "targets"),
        inputs.get("attention_mask"),
        inputs.get("segment_ids"),
        vocab_size=config.vocab_size,
        ignore_index=config.ignore_index,
        pad_token_id=config.pad_token_id,
        eos_token_id=config.eos_token_id,
    )


def measure(config: UnifiedLossConfig, tokens: Tokens, num_heads: int) -> Normalizers:
    """Measures the denominators of a batch."""
    heads = [jnp.sum(ahead(tokens, j).weights) for j in range(1, num_heads + 1)]
    return Normalizers(
        tokens=jnp.sum(tokens.weights),
        heads=jnp.stack(heads),
        windows=jnp.sum(as_float(whole_windows(tokens, config.ngram_size))),
        rows=as_float(tokens.targets.shape[0]),
        active_rows=jnp.sum(as_float(jnp.any(tokens.active, 1))),
    )


@flax.struct.dataclass
class Scores:
    """Confidence scores and what counts of them.

    A score per row counts where the row has a token that counts; a score per token has
    the token's weight.

    Attributes:
      values: the scores; 1 where they do not count.
      weights: their weights.
      normalizer: `Σ weights` over the optimizer step.
    """

    values: Float[Array, "*n"]
    weights: Float[Array, "*n"]
    normalizer: Float[Array, ""]

    def share_of_mean(self, values: Float[Array, "*n"]) -> Float[Array, ""]:
        """This batch's share of the step's mean of one value per score."""
        return weighted_mean(values, self.weights, self.normalizer)


def read_scores(
    scores: Float[Array, "B ..."], tokens: Tokens, normalizers: Normalizers
) -> Scores:
    """Weighs confidence scores."""
    shape = tokens.targets.shape
    per_row = scores.shape in (shape[:1], (shape[0], 1))
    weights = as_float(jnp.any(tokens.active, 1)) if per_row else tokens.weights
    given = as_float(scores).reshape(weights.shape)
    return Scores(
        values=jnp.where(weights != 0, given, jnp.ones_like(given)),
        weights=weights,
        normalizer=normalizers.active_rows if per_row else normalizers.tokens,
    )
