"""Assembles one call of the loss from its terms.

All entries are sums over the call's tokens divided by the optimizer step's
denominators, so those of micro-batches add up.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.checks import main_arguments
from ava_jax.config import Settings
from ava_jax.inputs import LossInputs, Normalizers, array, width_of
from ava_jax.kernel.execute import Plan
from ava_jax.kernel.fused import token_sums
from ava_jax.kernel.passes import Columns, Operands, to_width
from ava_jax.kernel.sharding import Layout
from ava_jax.reduce import as_float, float_dtype, safe_divide
from ava_jax.terms.base import (
    Aux,
    BatchTerm,
    Call,
    Output,
    Scalar,
    Term,
    TokenTerm,
    arrays_like,
    output_of,
    scalar,
)
from ava_jax.terms.listing import MEASUREMENTS
from ava_jax.terms.mtp import SequentialHeads
from ava_jax.terms.objective import Group, Shared, TokenObjective, token_inputs
from ava_jax.tokens import Tokens


@flax.struct.dataclass
class StepStats:
    """What micro-batches add up: their shares of `aux`, and what moves the state.

    Attributes:
      aux: the additive entries of `aux`.
      weight: `Σ w`; 0 means that the step changes nothing.
      terms: what the terms' states are updated by, by name.
    """

    aux: Aux
    weight: Scalar
    terms: dict[str, Any]


def count_normalizers(
    terms: Sequence[Term], tokens: Tokens, inputs: LossInputs
) -> Normalizers:
    """Counts the denominators of a batch, and those that its terms divide by."""
    zero = jnp.zeros((), float_dtype())
    counted: dict[str, Array] = {}
    for term in terms:
        for field, value in term.counts(tokens, inputs).items():
            if field not in ("heads", "windows"):
                raise ValueError(
                    f"the term {term.name!r} must return from counts `heads` or "
                    f"`windows`, got {field!r}"
                )
            if field in counted and not value.ndim:
                raise ValueError(
                    f"two terms, {term.name!r} the second, count normalizers.{field}, "
                    "each in its own way: use one of them"
                )
            # Heads: the longer list starts with the shorter one.
            counted[field] = max(value, counted.get(field, value), key=jnp.size)
    return Normalizers(
        tokens=jnp.sum(tokens.weights),
        heads=counted.get("heads", jnp.zeros((0,), float_dtype())),
        windows=counted.get("windows", zero),
        rows=as_float(tokens.targets.shape[0]),
        active_rows=jnp.sum(as_float(jnp.any(tokens.active, 1))),
        routed=jnp.sum(as_float(tokens.routed)),
    )


def plan_of(
    settings: Settings, layout: Layout | None, inputs: LossInputs, tokens: Tokens
) -> Plan:
    """Returns how the passes over the tokens of a call go."""
    batch, length = tokens.targets.shape
    width = settings.vocab_size
    if layout is not None:
        batch, length, width = layout.local_shape(batch, length, width)
    hidden = inputs.get("hidden_states")
    return Plan(
        batch,
        length,
        width,
        4 if hidden is None else hidden.dtype.itemsize,
        settings.chunk_size,
        settings.block_size,
        settings.implementation,
        layout,
        settings.precision,
        inputs.get("teacher_lm_head") is not None,
    )


def assemble(terms: Sequence[Term], call: Call) -> tuple[Scalar, StepStats]:
    """Computes the call's share of the loss, and its stats."""
    per_token = safe_divide(as_float(1), call.normalizers.tokens)
    total, sums = _passes(terms, call)
    means = {k: per_token * value for k, value in sums.items() if not value.ndim}
    for term in terms:
        if isinstance(term, TokenTerm):
            means[term.name] = safe_divide(sums[term.name], _denominator(term, call))
    outputs = {term.name: _finish(term, call, means, sums) for term in terms}
    total += sum((o.outside for o in outputs.values()), start=jnp.zeros_like(total))
    tokens = call.tokens
    aux = {name: means[name] for name in MEASUREMENTS}
    aux["num_tokens"] = jnp.sum(tokens.active, dtype=jnp.int32)
    aux["num_invalid_targets"] = jnp.sum(tokens.invalid, dtype=jnp.int32)
    aux["num_invalid_weights"] = jnp.sum(tokens.no_weight, dtype=jnp.int32)
    for output in outputs.values():
        aux |= output.aux
    aux |= _parts(terms, outputs) | {"total_loss": total}
    statistics = {
        name: output.statistics
        for name, output in outputs.items()
        if call.states[name] is not None
    }
    weight = jnp.sum(tokens.weights)
    return total, StepStats(aux=aux, weight=weight, terms=statistics)


def _denominator(term: TokenTerm, call: Call) -> Scalar:
    return scalar(term, "denominator", term.denominator(call.normalizers))


def _finish(term: Term, call: Call, means: Mapping[str, Scalar], sums) -> Output:
    if isinstance(term, TokenTerm):
        output = output_of(term, term.finish(call, means[term.name]))
        measured = {name: means[name] for name in term.measured}
        return output._replace(aux=output.aux | measured)
    if isinstance(term, SequentialHeads):
        return term.finish(call, sums.get(term.name))
    assert isinstance(term, BatchTerm)
    return output_of(term, term.finish(call))


def _parts(terms: Sequence[Term], outputs: Mapping[str, Output]) -> Aux:
    """Sums up the terms of each part of the loss."""
    parts = {"main_loss": jnp.zeros((), float_dtype())}
    for term in terms:
        if term.part is not None:
            loss = outputs[term.name].loss
            parts[term.part] = parts[term.part] + loss if term.part in parts else loss
    return parts


def _passes(
    terms: Sequence[Term], call: Call
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Runs the passes over the vocabulary: the terms' total, and all the sums."""
    token_terms = tuple(term for term in terms if isinstance(term, TokenTerm))
    groups = _main_groups(token_terms, call)
    for term in terms:
        if isinstance(term, SequentialHeads) and (group := term.group(call)):
            groups.append(group)
    batch = call.tokens.targets.shape[:1]
    rows = {
        t.name: arrays_like(t, "rows", t.rows(call.tokens), batch) for t in token_terms
    }
    shared = _shared(token_terms, call)
    total, sums = jnp.zeros((), float_dtype()), {}
    # Groups that share the matrix share the pass.
    for is_projected in (True, False):
        own = [group for group in groups if group.is_projected == is_projected]
        if own:
            value, more = _run(own, rows, shared, call)
            total, sums = total + value, sums | more
    return total, sums


def _main_groups(terms: tuple[TokenTerm, ...], call: Call) -> list[Group]:
    """Returns the main tokens, once for each array that terms take logits from."""
    inputs, settings = call.inputs, call.settings
    main = main_arguments(terms, inputs)[0]
    block = token_inputs(
        call.tokens,
        prepared={
            t.name: arrays_like(
                t, "prepare", t.prepare(call.tokens), call.tokens.targets.shape
            )
            for t in terms
        },
        extra=extra_arrays(terms, inputs),
    )
    block = jax.tree.map(lambda x: x[None], block)
    by_source: dict[str, list[TokenTerm]] = {main: []}
    for term in terms:
        is_given = inputs.get(term.source) is not None
        by_source.setdefault(term.source if is_given else main, []).append(term)
    return [
        Group(
            TokenObjective(
                tuple(own), settings.vocab_size, settings.logit_soft_cap, source == main
            ),
            array(inputs, source)[None],
            block,
            source == "hidden_states",
            {
                t.name: safe_divide(t.weight_at(call.step), _denominator(t, call))
                for t in own
            },
        )
        for source, own in by_source.items()
    ]


def extra_arrays(terms: Sequence[TokenTerm], inputs: LossInputs) -> dict[str, Any]:
    """Returns the extra inputs, those with a vocabulary axis marked as `Columns`."""
    marked = {name for term in terms for name in term.columns_extra}
    return {
        name: Columns(to_width(x, width_of(inputs))) if name in marked else x
        for name, x in (inputs.get("extra_inputs") or {}).items()
    }


def _shared(terms: tuple[TokenTerm, ...], call: Call) -> Shared:
    found = ((t, t.temperature(call.states[t.name])) for t in terms)
    known = (scalar(t, "temperature", T) for t, T in found if T is not None)
    temperature = next(known, None)
    states = {t.name: call.states[t.name] for t in terms if not t.fields}
    whole = {t.name: arrays_like(t, "whole", t.whole(call.inputs), ()) for t in terms}
    return Shared(temperature, states, whole)


def _run(
    groups: Sequence[Group],
    rows: dict[str, Any],
    shared: Shared,
    call: Call,
) -> tuple[Float[Array, ""], dict[str, Array]]:
    """Runs one pass over groups that all have logits, or all share the matrix."""
    is_projected = groups[0].is_projected
    head, bias = call.inputs.get("lm_head"), call.inputs.get("lm_head_bias")
    operands = Operands(
        sources=tuple(group.source for group in groups),
        inputs=tuple(group.inputs for group in groups),
        active=tuple(group.inputs.weights != 0 for group in groups),
        rows=rows,
        shared=shared,
        kernel=head if is_projected else None,
        bias=bias if is_projected else None,
    )
    objectives = tuple(group.objective for group in groups)
    coefficients: dict[str, Array] = {}
    for group in groups:
        coefficients |= group.coefficients
    return token_sums(objectives, operands, coefficients, call.plan)
