"""Assembles one call of the unified loss: every term's share of the loss and of aux.

All entries are sums over the call's tokens divided by the step's denominators, so those
of micro-batches add up.
"""

import dataclasses
from typing import NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.batch_terms import Router, auxiliary_terms, updated_balance
from ava_jax.config import UnifiedLossConfig
from ava_jax.inputs import LossInputs, Normalizers, array, has_fused_door
from ava_jax.kernel.fused import Plan, token_sums
from ava_jax.kernel.passes import Operands
from ava_jax.kernel.sharding import Layout
from ava_jax.losses.repetition import (
    early_eos_targets,
    repeated_ngram_pairs,
    squared_runs,
)
from ava_jax.losses.router import RouterLoad
from ava_jax.mtp_terms import (
    AdaptiveParts,
    adaptive_parts,
    head_denominators,
    parallel_head_means,
    sequential_group,
    usable_heads,
)
from ava_jax.reduce import as_float, safe_divide, weighted_mean
from ava_jax.state import GradientBalanceState, LossState
from ava_jax.token_terms import (
    ExtraTerm,
    SharedInputs,
    TokenInputs,
    TokenObjective,
    charges_for,
    extra_weight,
    token_inputs,
)
from ava_jax.tokens import History, Tokens, read_history

Aux = dict[str, Array]
Scalar = Float[Array, ""]

RESERVED_NAMES: tuple[str, ...] = (
    "primary",
    "z_loss",
    "token_diversity",
    "unlikelihood",
    "ngram",
    "immediate",
    "eos",
    "nll",
    "accuracy",
    "entropy",
    "heads",
    "total_loss",
    "main_loss",
    "temperature",
    "perplexity",
)


@flax.struct.dataclass
class StepStats:
    """What micro-batches add up: their shares of `aux`, and what moves the state.

    Attributes:
      aux: the additive entries of `aux`.
      weight: `Σ w`; 0 means that the step changes nothing.
      load: the router's load, if balancing trains.
      extra: unweighted means of the extra terms.
    """

    aux: Aux
    weight: Scalar
    load: RouterLoad | None
    extra: dict[str, Scalar]


class Call(NamedTuple):
    """One call of the loss, read and checked."""

    config: UnifiedLossConfig
    extra_terms: tuple[ExtraTerm, ...]
    state: LossState
    inputs: LossInputs
    tokens: Tokens
    normalizers: Normalizers
    train: bool
    layout: Layout | None

    def weight(self, field: str) -> Scalar:
        """The weight field's value at this step."""
        return self.config.weight(field, self.state.step)

    @property
    def plan(self) -> Plan:
        """How the passes over the tokens go."""
        config, layout = self.config, self.layout
        batch, length = self.tokens.targets.shape
        width = config.vocab_size
        if layout is not None:
            batch, length, width = layout.local_shape(batch, length, width)
        hidden = self.inputs.get("hidden_states")
        return Plan(
            batch,
            length,
            width,
            4 if hidden is None else hidden.dtype.itemsize,
            config.chunk_size,
            config.block_size,
            config.implementation,
            layout,
        )


def adaptive_prefix(config: UnifiedLossConfig) -> str | None:
    """How the adaptive loss's entries of aux begin; None if it is off."""
    if config.primary_loss_type == "adaptive_mtp":
        return "main"
    if config.use_mtp and config.mtp_type == "adaptive":
        return "adaptive_mtp"
    return None


def assemble(call: Call) -> tuple[Scalar, StepStats]:
    """Computes the call's share of the loss, and its stats."""
    config, normalizers = call.config, call.normalizers
    weights = _token_weights(call)
    loss, sums = _token_sums(call, weights)
    heads = sums.pop("heads", None)
    means = {k: safe_divide(v, normalizers.tokens) for k, v in sums.items()}
    weighted = {k: weights[k] * means[k] for k in weights}
    constants = _target_penalties(call)
    aux = _token_aux(call, means, weighted | constants)
    loss += sum(constants.values(), start=jnp.zeros_like(loss))
    if config.use_mtp and config.mtp_type != "adaptive":
        loss += _add_mtp(call, heads, aux)
    prefix = adaptive_prefix(config)
    if prefix is not None:
        loss += _add_adaptive(call, prefix, weighted["primary"], aux)
    load, batch = _batch_terms(call)
    aux |= batch
    loss += sum(batch.values(), start=jnp.zeros_like(loss))
    aux["total_loss"] = loss
    extra = {term.name: means[term.name] for term in call.extra_terms}
    weight = jnp.sum(call.tokens.weights)
    return loss, StepStats(aux=aux, weight=weight, load=load, extra=extra)


def _token_weights(call: Call) -> dict[str, Scalar]:
    """The weight of each token term that is on, by the name of its sum."""
    config = call.config
    fields = {
        "z_loss": "z_loss_weight" if config.is_on("z_loss_weight") else None,
        "token_diversity": "ngram_penalty_weight" if config.use_ngram_penalty else None,
        "unlikelihood": (
            "unlikelihood_weight" if config.is_on("unlikelihood_weight") else None
        ),
    }
    if config.penalty_source == "predictions":
        fields |= _repetition_fields(config)
    weights = {k: call.weight(field) for k, field in fields.items() if field}
    for term in call.extra_terms:
        weights[term.name] = extra_weight(term, call.state.step)
    return {"primary": as_float(1.0)} | weights


def _repetition_fields(config: UnifiedLossConfig) -> dict[str, str]:
    fields = {}
    if config.use_ngram_penalty:
        fields["ngram"] = "ngram_penalty_weight"
    if config.use_immediate_repetition_penalty:
        fields["immediate"] = "immediate_repetition_weight"
    if config.eos_token_id is not None and config.is_on("eos_penalty_weight"):
        fields["eos"] = "eos_penalty_weight"
    return fields


def _token_sums(
    call: Call, weights: dict[str, Scalar]
) -> tuple[Scalar, dict[str, Array]]:
    """Runs the vocabulary pass: the weighted mean terms' total, and all the sums."""
    config, inputs, tokens = call.config, call.inputs, call.tokens
    charges = charges_for(config, tokens)
    block = token_inputs(tokens, charges, dict(inputs.get("extra_inputs") or {}))
    deepseek = config.primary_loss_type == "deepseek"
    history = read_history(tokens) if config.is_on("unlikelihood_weight") else None
    shared = SharedInputs(
        temperature=call.state.temperature if deepseek else None,
        extra=call.state.extra,
    )
    coefficients = {
        k: safe_divide(weight, call.normalizers.tokens) for k, weight in weights.items()
    }
    objectives, operands = _main_pass(call, block, history, shared)
    heads = None
    if config.use_mtp and config.mtp_type == "sequential":
        heads = sequential_group(config, inputs, tokens, call.plan)
    if heads is not None and operands.kernel is not None:
        # Depths that share the matrix go through the same pass.
        objectives, operands = _with_heads(objectives, operands, heads)
        coefficients, heads = coefficients | _head_coefficients(call), None
    total, sums = token_sums(objectives, operands, coefficients, call.plan)
    if heads is None:
        return total, sums
    of_heads, more = _sequential_pass(call, heads)
    return total + of_heads, sums | more


def _main_pass(
    call: Call, block: TokenInputs, history: History | None, shared: SharedInputs
) -> tuple[tuple[TokenObjective, ...], Operands]:
    """The main tokens' part of the pass, from either door."""
    config, inputs, terms = call.config, call.inputs, call.extra_terms
    whole = TokenObjective(config, True, True, terms)
    block = jax.tree.map(lambda x: x[None], block)
    active = call.tokens.active[None]
    if has_fused_door(inputs):
        hidden = array(inputs, "hidden_states")
        kernel, bias = array(inputs, "lm_head"), inputs.get("lm_head_bias")
        return (whole,), Operands(
            (hidden[None],), (block,), (active,), history, shared, kernel, bias
        )
    logits, primary = inputs.get("logits"), inputs.get("primary_logits")
    if config.primary_loss_type != "adaptive_mtp" or primary is None or logits is None:
        source = array(inputs, "primary_logits" if logits is None else "logits")
        return (whole,), Operands((source[None],), (block,), (active,), history, shared)
    # The adaptive loss has main logits of its own.
    main = TokenObjective(config, main=True, others=False)
    others = TokenObjective(config, False, True, terms)
    sources = (primary[None], logits[None])
    return (main, others), Operands(
        sources, (block, block), (active, active), history, shared
    )


def _with_heads(objectives, operands: Operands, heads):
    objective, hidden, inputs = heads
    return (*objectives, objective), dataclasses.replace(
        operands,
        sources=(*operands.sources, hidden),
        inputs=(*operands.inputs, inputs),
        active=(*operands.active, inputs.weights != 0),
    )


def _sequential_pass(call: Call, heads) -> tuple[Scalar, dict[str, Array]]:
    """The depths' own pass, where the main logits are given."""
    objective, hidden, inputs = heads
    kernel = array(call.inputs, "lm_head")
    bias = call.inputs.get("lm_head_bias")
    active = (inputs.weights != 0,)
    operands = Operands((hidden,), (inputs,), active, None, None, kernel, bias)
    return token_sums((objective,), operands, _head_coefficients(call), call.plan)


def _head_coefficients(call: Call) -> dict[str, Float[Array, "K"]]:
    count = usable_heads(call.config.num_future_tokens, call.tokens)
    denominators = head_denominators(call.normalizers, count)
    return {"heads": safe_divide(call.weight("mtp_weight") / count, denominators)}


def _target_penalties(call: Call) -> dict[str, Scalar]:
    """The penalties computed from the target ids alone, weighted; no gradient."""
    config, tokens, normalizers = call.config, call.tokens, call.normalizers
    if config.penalty_source != "targets":
        return {}
    fields = _repetition_fields(config)
    values = {}
    if "ngram" in fields:
        pairs = repeated_ngram_pairs(tokens, config.ngram_size)
        values["ngram"] = safe_divide(pairs, normalizers.windows)
    if "immediate" in fields:
        values["immediate"] = safe_divide(squared_runs(tokens), normalizers.rows)
    if config.eos_token_id is not None and "eos" in fields:
        early = early_eos_targets(
            tokens, config.eos_token_id, config.min_sequence_length
        )
        values["eos"] = weighted_mean(early, tokens.weights, normalizers.tokens)
    return {k: call.weight(fields[k]) * v for k, v in values.items()}


def _token_aux(call: Call, means: dict[str, Array], weighted: dict[str, Array]) -> Aux:
    """The entries of aux that come from token terms."""
    tokens = call.tokens
    in_main = ("primary", "z_loss", "eos")
    aux = {
        "main_loss": sum(weighted[k] for k in in_main[1:] if k in weighted)
        + weighted["primary"],
        "nll": means["nll"],
        "accuracy": means["accuracy"],
        "entropy": means["entropy"],
        "num_tokens": jnp.sum(tokens.active, dtype=jnp.int32),
        "num_invalid_targets": jnp.sum(tokens.invalid, dtype=jnp.int32),
    }
    renamed = {
        "immediate": "immediate_repetition_penalty",
        "eos": "eos_penalty",
        "ngram": "ngram_repetition",
    }
    aux |= {renamed.get(k, k): v for k, v in weighted.items() if k != "primary"}
    if call.config.use_ngram_penalty:
        aux["ngram_penalty"] = aux["ngram_repetition"] + aux["token_diversity"]
    if call.config.use_focal_loss:
        aux["focal_loss"] = means["primary"]
    return aux


def _add_mtp(call: Call, heads: Float[Array, "K"] | None, aux: Aux) -> Scalar:
    """Reports the heads; returns what the loss still lacks of them."""
    weight = call.weight("mtp_weight")
    if call.config.mtp_type == "deepseek":
        means = parallel_head_means(
            call.config, call.inputs, call.tokens, call.normalizers, call.plan
        )
    elif heads is None:
        means = jnp.zeros((0,), weight.dtype)
    else:
        means = safe_divide(heads, head_denominators(call.normalizers, heads.shape[0]))
    loss = weight * jnp.sum(means) / max(means.shape[0], 1)
    aux["mtp_head_losses"], aux["mtp_loss"] = means, loss
    return loss if call.config.mtp_type == "deepseek" else jnp.zeros_like(loss)


def _add_adaptive(call: Call, prefix: str, primary: Scalar, aux: Aux) -> Scalar:
    """Reports the adaptive loss's parts; returns what the loss still lacks of them."""
    parts: AdaptiveParts = adaptive_parts(
        call.config,
        call.weight("mtp_weight"),
        call.inputs,
        call.tokens,
        call.normalizers,
        call.plan,
    )
    rest = parts.additional + parts.confidence_reg
    is_main = prefix == "main"
    aux[f"{prefix}_primary_loss"] = primary if is_main else jnp.zeros_like(primary)
    aux[f"{prefix}_additional_loss"] = parts.additional
    aux[f"{prefix}_confidence_reg"] = parts.confidence_reg
    aux[f"{prefix}_avg_confidence"] = parts.confidence
    aux[f"{prefix}_effective_mtp_weight"] = parts.effective_weight
    if is_main:
        aux["main_loss"] += rest
    else:
        aux["adaptive_mtp_loss"] = rest
    return rest


def _batch_terms(call: Call) -> tuple[RouterLoad | None, Aux]:
    """Terms that couple the batch, by this call's share of the step's tokens."""
    config, tokens = call.config, call.tokens
    share = safe_divide(jnp.sum(tokens.weights), call.normalizers.tokens)
    terms = auxiliary_terms(config, call.state.step, call.inputs, tokens)
    load = None
    balance = call.state.moe_balancing
    if balance is not None and call.train:
        router = Router(config, call.inputs, tokens)
        load = router.load()
        after = updated_balance(config, call.state.step, balance, load)
        if isinstance(after, GradientBalanceState):
            terms["moe_balancing_term"] = router.gradient_balance(
                after, call.weight("gradient_balance_weight")
            )
    return load, {k: share * v for k, v in terms.items()}
