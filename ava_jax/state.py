"""What the loss carries from step to step, and how to read or reset it.

Every part is a pytree of arrays whose dtypes and shapes never change, so a jitted step
compiles once. A part that the config leaves off is `None`. Diagnostics live in `aux`,
never here.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ava_jax.annotations import check_array
from ava_jax.losses.moe import BiasBalanceState, GradientBalanceState
from ava_jax.reduce import as_float
from ava_jax.terms.adaptive import AdaptiveMTPState
from ava_jax.terms.base import Term
from ava_jax.terms.temperature import LossHistory


@flax.struct.dataclass
class LossState:
    """All that the unified loss carries between optimizer steps.

    Attributes:
      step: optimizer steps taken; weight schedules are evaluated at it.
      temperature: of the next step; present for `primary_loss_type="deepseek"`.
      loss_history: present with the temperature.
      adaptive_mtp: present when an adaptive MTP loss is on.
      moe_balancing: present when `use_moe_balancing` is on.
      extra: the states of all other terms, by name.
    """

    step: Int[Array, ""]
    temperature: Float[Array, ""] | None = None
    loss_history: LossHistory | None = None
    adaptive_mtp: AdaptiveMTPState | None = None
    moe_balancing: GradientBalanceState | BiasBalanceState | None = None
    extra: dict[str, Any] = flax.struct.field(default_factory=dict)


def check_state(state: Any, like: Any = None) -> None:
    """Raises unless it is the state of a loss.

    Args:
      state: what was given for it.
      like: the shapes of the state of the loss that it is for, if it is for one.
    """
    if not isinstance(state, LossState):
        hint = "call it" if callable(state) else "pass loss_fn.init()"
        raise TypeError(
            f"state must be a LossState, got {type(state).__name__}: {hint}, or what "
            "the loss returned last"
        )
    if like is None:
        return
    # A loss of fewer terms may evaluate with the state of another one.
    has, needs = _parts_of(state), _parts_of(like)
    for name, shape in needs.items():
        if has.get(name) != shape:
            raise ValueError(
                f"state is that of another loss: this one needs {name} {shape}, got "
                f"{has.get(name, 'none')}; begin with loss_fn.init()"
            )


def _parts_of(state: LossState) -> dict[str, list[int]]:
    named = jax.tree.leaves_with_path(state)
    return {jax.tree_util.keystr(k)[1:]: [*jnp.shape(x)] for k, x in named}


def states_of(state: LossState, terms: Sequence[Term]) -> dict[str, Any]:
    """Returns each term's part of the state, by name; None where it has none."""
    parts: dict[str, Any] = {}
    for term in terms:
        if term.fields:
            parts[term.name] = {field: getattr(state, field) for field in term.fields}
        else:
            parts[term.name] = state.extra.get(term.name)
    return parts


def with_states(
    state: LossState, terms: Sequence[Term], parts: Mapping[str, Any]
) -> LossState:
    """Returns the state with the terms' parts in place."""
    fields: dict[str, Any] = {"extra": {}}
    for term in terms:
        part = parts[term.name]
        if term.fields:
            fields |= part
        elif part is not None:
            fields["extra"][term.name] = part
    return dataclasses.replace(state, **fields)


def statistics(state: LossState) -> dict[str, Any]:
    """Returns the state's numbers under readable names, for logging.

    Args:
      state: the loss state.

    Returns:
      `temperature`; `adaptive_mtp` with `avg_primary_loss`, `avg_additional_loss`,
      `avg_confidence_reg`, `avg_confidence` (means over the steps since the last reset)
      and `total_computations`; `moe_balancing` with `expert_counts`, `expert_scores`
      and `total_tokens`, or `bias`. Parts that are off are absent.

    Example:
      >>> import ava_jax
      >>> loss_fn = ava_jax.unified_loss(ava_jax.UnifiedLossConfig(vocab_size=8))
      >>> {k: float(v) for k, v in ava_jax.statistics(loss_fn.init()).items()}
      {'temperature': 1.0}
    """
    check_state(state)
    out: dict[str, Any] = {}
    if state.temperature is not None:
        out["temperature"] = state.temperature
    if state.adaptive_mtp is not None:
        out["adaptive_mtp"] = state.adaptive_mtp.statistics()
    if state.moe_balancing is not None:
        out["moe_balancing"] = state.moe_balancing.statistics()
    return out


def reset_statistics(state: LossState) -> LossState:
    """Returns the state with the running sums of the adaptive MTP loss at zero.

    Args:
      state: the loss state.

    Returns:
      The same state otherwise: temperature, expert balance and step are kept.

    Example:
      >>> import ava_jax
      >>> config = ava_jax.UnifiedLossConfig(
      ...     vocab_size=8, primary_loss_type="adaptive_mtp")
      >>> state = ava_jax.reset_statistics(ava_jax.unified_loss(config).init())
      >>> int(ava_jax.statistics(state)["adaptive_mtp"]["total_computations"])
      0
    """
    check_state(state)
    zeros = jax.tree.map(jnp.zeros_like, state.adaptive_mtp)
    return dataclasses.replace(state, adaptive_mtp=zeros)


def fold_temperature(lm_head: Any, state: LossState) -> Any:
    """Computes the head to decode and evaluate with, `lm_head / T`.

    A model whose main loss is the cross-entropy of z/T is `softmax(z/T)`: read at 1, it
    is another model. With T in the head, all that follows may forget about it.

    - A bias is part of the logits: fold it as well, `fold_temperature((kernel, bias),
      state)`.
    - With a soft-cap, the cap becomes cap/T: `cap·tanh(z/cap)/T` is
      `(cap/T)·tanh((z/T)/(cap/T))`.
    - A head that is the embedding must not be divided in the embedding's place: keep
      the result beside it, or fold T into the last norm's scale and bias instead.
    - Heads of multi-token prediction are trained at 1, and so is the main head under
      `use_focal_loss`: leave them as they are.

    Args:
      lm_head: [D, V], or a pytree of arrays that the logits are linear in.
      state: the loss state, after training.

    Returns:
      The same pytree, divided by `state.temperature` and in its dtypes; as it was if
      the state has no temperature.

    Raises:
      TypeError: `state` is no `LossState`, or an array holds no floating-point numbers.

    Example:
      >>> import dataclasses, jax.numpy as jnp, ava_jax
      >>> loss_fn = ava_jax.create_unified_loss(vocab_size=8)
      >>> state = dataclasses.replace(loss_fn.init(), temperature=jnp.asarray(0.5))
      >>> float(ava_jax.fold_temperature(jnp.ones((4, 8)), state)[0, 0])
      2.0
    """
    check_state(state)
    temperature = state.temperature
    if temperature is None:
        return lm_head

    for path, leaf in jax.tree.leaves_with_path(lm_head):
        if not isinstance(leaf, int | float):
            check_array("lm_head" + jax.tree_util.keystr(path), leaf)

    def fold(x: Any) -> Array:
        dtype = jnp.result_type(x)
        if not jnp.issubdtype(dtype, jnp.floating):
            raise TypeError(
                f"lm_head must hold floating-point numbers, got {dtype}: fold the "
                "temperature in before quantization"
            )
        return (as_float(jnp.asarray(x)) / temperature).astype(dtype)

    return jax.tree.map(fold, lm_head)
