"""Errors of a loss call: arguments that are missing, unused or do not fit."""

from collections.abc import Iterable, Mapping, Sequence
from typing import cast, get_type_hints

import jax

from ava_jax.aliases import suggestion
from ava_jax.annotations import check_arguments, check_array
from ava_jax.arrays import check_weights
from ava_jax.config import Settings
from ava_jax.inputs import LossInputs, array, check_float
from ava_jax.terms.base import Term, TokenTerm
from ava_jax.terms.listing import built_in

_ALWAYS = ("targets", "attention_mask", "segment_ids")
_OF_TOKENS = ("attention_mask", "segment_ids", "router_mask")


def check_inputs(settings: Settings, terms: Sequence[Term], inputs: LossInputs) -> None:
    """Raises on arguments that are missing, that nothing reads or that do not fit."""
    given = [name for name, value in inputs.items() if value is not None]
    _check_names(inputs)
    _check_arrays(inputs)
    _check_targets(inputs)
    if settings.mask_boundaries and inputs.get("segment_ids") is None:
        raise ValueError("mask_boundaries needs segment_ids, [B, S]")
    main = main_arguments(terms, inputs)
    _check_main(settings, inputs)
    for term in terms:
        _check_extra(term, inputs)
        missing = [name for name in term.requires if name not in given]
        if missing:
            needed = " and ".join(term.requires)
            what = term.option or f"the term {term.name!r}"
            raise ValueError(f"{what} needs {needed}")
    _check_unused(terms, inputs, main)
    for term in terms:
        term.check(inputs, settings)


def _check_names(inputs: LossInputs) -> None:
    known = list(LossInputs.__annotations__)
    for name in inputs:
        if name not in known:
            raise TypeError(f"unknown argument {name!r}; {suggestion(name, known)}")
    if inputs.get("targets") is None:
        raise ValueError("targets is required: pass the ids to predict, [B, S]")


_ANNOTATIONS = get_type_hints(LossInputs)
_LISTS = ("additional_logits", "expert_outputs")


def _check_arrays(inputs: LossInputs) -> None:
    """Raises on what is no array, or has another dtype or rank than annotated."""
    check_arguments(_ANNOTATIONS, cast(dict, inputs))
    extra = inputs.get("extra_inputs")
    if extra is not None and not isinstance(extra, Mapping):
        raise TypeError(
            f"extra_inputs must be a dict of arrays by name, got {type(extra).__name__}"
        )
    for name, value in (extra or {}).items():
        if value is not None:
            check_array(f"extra_inputs[{name!r}]", value)
    for name in _LISTS:
        value = inputs.get(name)
        if isinstance(value, list | tuple):
            for j, one in enumerate(value):
                check_array(f"{name}[{j}]", one)
        elif value is not None:
            check_array(name, value)
    for path, leaf in jax.tree.leaves_with_path(inputs.get("mtp_params")):
        check_array("mtp_params" + jax.tree_util.keystr(path), leaf)


def _check_targets(inputs: LossInputs) -> None:
    targets = array(inputs, "targets")
    for name in _OF_TOKENS:
        value = inputs.get(name)
        if value is not None and value.shape != targets.shape:
            raise ValueError(
                f"{name} must have the shape {targets.shape} of targets, "
                f"got {value.shape}"
            )
    masks = ("attention_mask", "router_mask")
    check_weights(**{name: inputs.get(name) for name in masks})
    for name, value in (inputs.get("extra_inputs") or {}).items():
        if value.shape[:2] != targets.shape:
            raise ValueError(
                f"extra_inputs[{name!r}] must start with the shape {targets.shape} of "
                f"targets, got {value.shape}"
            )


def main_arguments(terms: Iterable[Term], inputs: LossInputs) -> tuple[str, ...]:
    """Returns the arguments that the main logits are made of.

    They are `logits`; or else what a token term takes in place of them, for all terms;
    or else `hidden_states` and `lm_head`, with its bias.

    Raises:
      ValueError: there are none, or not all of them.
    """
    if inputs.get("logits") is not None:
        return ("logits",)
    sources = {term.source for term in terms if isinstance(term, TokenTerm)}
    for source in sorted(sources):
        if inputs.get(source) is not None:
            return (source,)
    if inputs.get("lm_head") is None:
        raise ValueError(
            "no logits: pass logits [B, S, V], or hidden_states [B, S, D] and "
            "lm_head [D, V]"
        )
    if inputs.get("hidden_states") is None:
        raise ValueError("lm_head needs hidden_states [B, S, D]")
    return ("hidden_states", "lm_head", "lm_head_bias")


def _check_main(settings: Settings, inputs: LossInputs) -> None:
    shape, vocab_size = array(inputs, "targets").shape, settings.vocab_size
    for name in ("logits", "primary_logits"):
        if (logits := inputs.get(name)) is not None:
            check_float(name, logits, shape, 3, vocab_size=vocab_size)
    hidden, head = inputs.get("hidden_states"), inputs.get("lm_head")
    bias, size = inputs.get("lm_head_bias"), settings.hidden_size
    if hidden is not None:
        check_float("hidden_states", hidden, shape, 3)
        if size not in (None, hidden.shape[-1]):
            raise ValueError(
                f"hidden_states must have hidden_size={size} as its last axis, got "
                f"{hidden.shape}"
            )
    if head is None:
        if bias is not None:
            raise ValueError("lm_head_bias needs lm_head [D, V]")
        return
    check_float("lm_head", head, (), 2, vocab_size=vocab_size)
    for name in ("hidden_states", "mtp_hidden_states"):
        states = inputs.get(name)
        if states is not None and states.shape[-1] != head.shape[0]:
            raise ValueError(
                f"lm_head must be [D, V] with D={states.shape[-1]}, the width of "
                f"{name}, got {head.shape}"
            )
    if bias is not None and bias.shape != head.shape[1:]:
        raise ValueError(
            f"lm_head_bias must be [V] with V={head.shape[1]}, the width of lm_head, "
            f"got {bias.shape}"
        )


def read_arguments(terms: Sequence[Term], main: tuple[str, ...]) -> set[str]:
    """Returns the arguments that a loss reads.

    Args:
      terms: its terms.
      main: what the main logits are made of.
    """
    read = {*_ALWAYS, *main}.union(*((*t.requires, *t.accepts) for t in terms))
    if extra_entries(terms) != set():
        read.add("extra_inputs")
    return read


def only_read(terms: Sequence[Term], inputs: LossInputs) -> LossInputs:
    """Returns the arguments, and of `extra_inputs` the entries, that a loss reads."""
    read = read_arguments(terms, main_arguments(terms, inputs))
    kept = {name: value for name, value in inputs.items() if name in read}
    known, extra = extra_entries(terms), kept.get("extra_inputs")
    if known is not None and isinstance(extra, Mapping):
        kept["extra_inputs"] = {k: v for k, v in extra.items() if k in known}
    return cast(LossInputs, kept)


def extra_entries(terms: Iterable[Term]) -> set[str] | None:
    """Returns the entries of `extra_inputs` that terms read; None if it may be any."""
    known: set[str] = set()
    kinds = set(built_in())
    for term in terms:
        named = {*term.requires_extra, *(term.accepts_extra or ())}
        is_own = term.accepts_extra is None and type(term) not in kinds
        # A batch term asks for all of them as for any other argument.
        asks = "extra_inputs" in (*term.requires, *term.accepts)
        if is_own or (asks and not named):
            return None
        known |= named
    return known


def _check_extra(term: Term, inputs: LossInputs) -> None:
    """Raises unless the entries of `extra_inputs` are there that a term requires."""
    given = inputs.get("extra_inputs") or {}
    for name in term.requires_extra:
        if given.get(name) is None:
            raise ValueError(
                f"the term {term.name!r} needs extra_inputs[{name!r}], "
                f"[B, S, ...]; got {sorted(given)}"
            )


def _check_unread_extra(terms: Sequence[Term], inputs: LossInputs) -> None:
    """Raises on an entry of `extra_inputs` that no term reads."""
    known = extra_entries(terms)
    if not known:
        return
    for name in inputs.get("extra_inputs") or {}:
        if name not in known:
            raise ValueError(
                f"extra_inputs[{name!r}] is given, but no term reads it; they read "
                f"{', '.join(sorted(known))}: leave it out"
            )


def _check_unused(
    terms: Sequence[Term], inputs: LossInputs, main: tuple[str, ...]
) -> None:
    """Raises on an argument that nothing reads."""
    read, kinds = read_arguments(terms, main), set(built_in())
    _check_unread_extra(terms, inputs)
    for name in (name for name, value in inputs.items() if value is not None):
        if name in read:
            continue
        is_second = name in ("hidden_states", "lm_head_bias")
        if name == "lm_head" or (is_second and inputs.get("lm_head") is not None):
            raise ValueError(
                f"pass either {main[0]} or hidden_states with lm_head, not both: the "
                "loss would not know which to train"
            )
        users = {k.option for k in kinds if name in (*k.requires, *k.accepts)}
        what = " or ".join(sorted(users - {""})) or "terms of your own"
        if name == "hidden_states":
            what = f"lm_head, {what}"
        raise ValueError(
            f"{name} is given, but nothing in this loss reads it; it is for {what}: "
            "switch that on, or leave it out"
        )
