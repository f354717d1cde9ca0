"""A wrapper of the loss that raises on bad inputs."""

from collections.abc import Callable
from typing import Any, Unpack

import jax.numpy as jnp
from jax.experimental import checkify
from jaxtyping import Array, Bool, Float

from ava_jax.arrays import as_ids
from ava_jax.checks import check_inputs
from ava_jax.config import weight_at
from ava_jax.inputs import (
    LossInputs,
    Normalizers,
    array,
    heads_of,
    read_arrays,
    tokens_of,
)
from ava_jax.reduce import as_float
from ava_jax.state import LossState
from ava_jax.terms.adaptive import confidences
from ava_jax.terms.base import Aux, is_own
from ava_jax.terms.router import RouterTerm
from ava_jax.tokens import Tokens, ahead, stack_ahead
from ava_jax.unified import UnifiedLoss

LossCall = Callable[..., tuple[Float[Array, ""], Aux, LossState]]


def checked(loss_fn: UnifiedLoss) -> LossCall:
    """Wraps a loss so that a bad input raises, with its position and its value.

    It checks that `attention_mask` and `router_mask` hold weights. At unmasked
    positions it checks targets against the vocabulary, expert indices against the
    number of experts, confidence scores against [0, 1], and logits (or hidden states
    and `lm_head`) and router logits for NaN and infinities. A logit of −inf is valid, a
    masked vocabulary entry, unless it is the target's. Schedules may not return a
    weight that is negative or not finite.

    Outside jit it raises immediately. Inside jit, transform the step with
    `jax.experimental.checkify.checkify` and call `throw()` on the error it returns.

    Args:
      loss_fn: from `unified_loss`.

    Returns:
      A function with the arguments and results of the loss.

    Raises:
      jax.experimental.checkify.JaxRuntimeError: at run time, on a bad value.

    Example:
      >>> import jax.numpy as jnp, ava_jax
      >>> loss_fn = ava_jax.create_unified_loss({"vocab_size": 8})
      >>> try:
      ...     ava_jax.checked(loss_fn)(loss_fn.init(), logits=jnp.zeros((1, 4, 8)),
      ...                              targets=jnp.array([[1, 2, 9, 4]]))
      ... except ValueError as error:
      ...     print(str(error).split(" (")[0])
      target 9 at [0, 2] is outside the vocabulary of 8 ids
    """

    if not isinstance(loss_fn, UnifiedLoss):
        raise TypeError(
            f"loss_fn must be a UnifiedLoss, got {type(loss_fn).__name__}: pass what "
            "create_unified_loss, unified_loss or compose returned"
        )

    def call(
        state: LossState,
        *,
        train: bool = True,
        normalizers: Normalizers | None = None,
        **inputs: Unpack[LossInputs],
    ) -> tuple[Float[Array, ""], Aux, LossState]:
        check_inputs(loss_fn.settings, loss_fn.terms, inputs)
        _check_weights(loss_fn, state)
        _check_values(loss_fn, inputs)
        return loss_fn(state, train=train, normalizers=normalizers, **inputs)

    return call


def _check_weights(loss_fn: UnifiedLoss, state: LossState) -> None:
    """Checks what schedules return at this step; built-in terms take no negatives."""
    for term in loss_fn.terms:
        for field in ("weight", "rate"):
            if not callable(getattr(term, field, None)):
                continue
            schedule: Any = getattr(term, field)
            value = weight_at(schedule, state.step)
            fine = jnp.isfinite(value) & (is_own(term) | (value >= 0))
            name = f"the {field} of the term {term.name!r}"
            _check(name, fine, value, "is negative or not finite")


def _check_values(loss_fn: UnifiedLoss, inputs: LossInputs) -> None:
    vocab_size = loss_fn.settings.vocab_size
    inputs = read_arrays(inputs)
    tokens = tokens_of(loss_fn.settings, inputs)
    outside = f"is outside the vocabulary of {vocab_size} ids"
    _check("target", ~tokens.invalid, array(inputs, "targets"), outside)
    for name in ("attention_mask", "router_mask"):
        if (mask := inputs.get(name)) is not None:
            wide = as_float(mask)
            is_weight = (wide >= 0) & (wide < jnp.inf)
            _check(name, is_weight, wide, "is no weight: it has to be at least 0")
    for name in ("logits", "primary_logits"):
        if (logits := inputs.get(name)) is not None:
            _check_logits(name, logits[..., :vocab_size], tokens)
    if (hidden := inputs.get("hidden_states")) is not None:
        fine = jnp.isfinite(hidden) | ~tokens.active[..., None]
        _check("hidden_states", fine, hidden, "is not finite")
    if (head := inputs.get("lm_head")) is not None:
        _check("lm_head", jnp.isfinite(head), head, "is not finite")
    _check_heads(loss_fn, inputs, tokens)
    _check_router(loss_fn, inputs, tokens)


def _check_heads(loss_fn: UnifiedLoss, inputs: LossInputs, tokens: Tokens) -> None:
    vocab_size = loss_fn.settings.vocab_size
    for j, logits in enumerate(heads_of(inputs.get("additional_logits"))):
        name, own = f"additional_logits[{j}]", ahead(tokens, j + 1)
        _check_logits(name, logits[..., :vocab_size], own)
    adaptive = any("adaptive_mtp" in term.fields for term in loss_fn.terms)
    if adaptive and (scores := inputs.get("confidence_scores")) is not None:
        values = confidences(scores, tokens).values
        fine = (values >= 0) & (values <= 1)
        _check("confidence score", fine, values, "is not in [0, 1]")
    if (depths := inputs.get("mtp_hidden_states")) is not None:
        unmasked = stack_ahead(tokens, depths.shape[0]).active
        fine = jnp.isfinite(depths) | ~unmasked[..., None]
        _check("mtp_hidden_states", fine, depths, "is not finite")


def _check_router(loss_fn: UnifiedLoss, inputs: LossInputs, tokens: Tokens) -> None:
    term = next((t for t in loss_fn.terms if isinstance(t, RouterTerm)), None)
    if term is None:
        return
    gates, chosen = term.read(inputs)
    masked = ~tokens.routed.reshape(-1)[:, None]
    chosen = as_ids(chosen)
    _check("gate_logits", jnp.isfinite(gates) | masked, gates, "is not finite")
    is_expert = (chosen >= 0) & (chosen < term.num_experts)
    outside = f"is not one of the {term.num_experts} experts"
    _check("expert index", is_expert | masked, chosen, outside)


def _check_logits(name: str, logits: Float[Array, "B S V"], tokens: Tokens) -> None:
    ids = jnp.arange(logits.shape[-1], dtype=jnp.int32)
    masked = (logits == -jnp.inf) & (ids != tokens.targets[..., None])
    fine = jnp.isfinite(logits) | masked | ~tokens.active[..., None]
    _check(name, fine, logits, "is not finite")


def _check(name: str, fine: Bool[Array, "..."], values: Array, problem: str) -> None:
    if not fine.size:
        return
    first = jnp.argmin(fine.reshape(-1))
    position = jnp.unravel_index(first, fine.shape)
    slots = ", ".join(f"{{i{axis}}}" for axis in range(fine.ndim))
    at = f" at [{slots}]" if fine.ndim else ""
    message = f"{name} {{value}}{at} {problem}"
    shown = {f"i{axis}": index for axis, index in enumerate(position)}
    shown["value"] = values.reshape(-1)[first]
    checkify.check(jnp.all(fine), message, debug=False, **shown)
