"""What the loss carries from step to step, and how to read or reset it.

Every part is a pytree of arrays whose dtypes and shapes never change, so a jitted step
compiles once. A part that the config leaves off is `None`. Diagnostics live in `aux`,
never here.
"""

import dataclasses
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ava_jax.reduce import safe_divide


@flax.struct.dataclass
class LossHistory:
    """The ring of recent main losses that steers the temperature.

    Attributes:
      losses: the last main losses, in ring order.
      index: where the next loss goes.
      size: how many entries of the ring are filled.
    """

    losses: Float[Array, "R"]
    index: Int[Array, ""]
    size: Int[Array, ""]


@flax.struct.dataclass
class AdaptiveMTPState:
    """Running sums of the adaptive MTP loss's parts, and how many steps they hold."""

    primary_loss: Float[Array, ""]
    additional_loss: Float[Array, ""]
    confidence_reg: Float[Array, ""]
    confidence: Float[Array, ""]
    count: Int[Array, ""]


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


@flax.struct.dataclass
class BiasBalanceState:
    """The routing bias per expert (`moe_balancing_type="bias"`)."""

    bias: Float[Array, "E"]


@flax.struct.dataclass
class LossState:
    """All that the unified loss carries between optimizer steps.

    Attributes:
      step: optimizer steps taken; weight schedules are evaluated at it.
      temperature: of the next step; present for `primary_loss_type="deepseek"`.
      loss_history: present with the temperature.
      adaptive_mtp: present when an adaptive MTP loss is on.
      moe_balancing: present when `use_moe_balancing` is on.
      extra: the states of the extra terms, by name.
    """

    step: Int[Array, ""]
    temperature: Float[Array, ""] | None = None
    loss_history: LossHistory | None = None
    adaptive_mtp: AdaptiveMTPState | None = None
    moe_balancing: GradientBalanceState | BiasBalanceState | None = None
    extra: dict[str, Any] = flax.struct.field(default_factory=dict)


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
    out: dict[str, Any] = {}
    if state.temperature is not None:
        out["temperature"] = state.temperature
    if (mtp := state.adaptive_mtp) is not None:
        out["adaptive_mtp"] = {
            "avg_primary_loss": safe_divide(mtp.primary_loss, mtp.count),
            "avg_additional_loss": safe_divide(mtp.additional_loss, mtp.count),
            "avg_confidence_reg": safe_divide(mtp.confidence_reg, mtp.count),
            "avg_confidence": safe_divide(mtp.confidence, mtp.count),
            "total_computations": mtp.count,
        }
    if isinstance(balance := state.moe_balancing, GradientBalanceState):
        out["moe_balancing"] = {
            "expert_counts": balance.counts,
            "expert_scores": balance.scores,
            "total_tokens": balance.tokens,
        }
    elif balance is not None:
        out["moe_balancing"] = {"bias": balance.bias}
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
    zeros = jax.tree.map(jnp.zeros_like, state.adaptive_mtp)
    return dataclasses.replace(state, adaptive_mtp=zeros)
