"""Cross-entropy at a temperature that follows the spread of the recent main losses."""

import dataclasses
from typing import Any

import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from ava_jax.kernel.stats import TokenStats
from ava_jax.reduce import as_float, float_dtype, safe_divide
from ava_jax.terms.base import Aux, Scalar, Step, TokenInputs, TokenTerm
from ava_jax.terms.likelihood import CrossEntropy, FocalLoss


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


@dataclasses.dataclass(frozen=True)
class AdaptiveTemperature:
    """Where the temperature starts, and how it moves.

    With `cv = std/mean` of the stored losses (unbiased std), it rises by the rate above
    the heat threshold and falls by it below the cool threshold.

    Attributes:
      initial: the temperature of the first step.
      is_adaptive: whether it moves.
      low: its lower bound.
      high: its upper bound.
      rate: by how much it moves in a step.
      heat_threshold: cv above which it rises.
      cool_threshold: cv below which it falls.
      history: how many losses are kept.
      min_history: how many must be known before it moves.
    """

    initial: float = 1.0
    is_adaptive: bool = True
    low: float = 0.5
    high: float = 2.0
    rate: float = 0.01
    heat_threshold: float = 0.1
    cool_threshold: float = 0.05
    history: int = 100
    min_history: int = 10

    def init(self) -> dict[str, Any]:
        """Returns the first temperature and an empty ring."""
        ring = LossHistory(
            losses=jnp.zeros((self.history,), float_dtype()),
            index=jnp.zeros((), jnp.int32),
            size=jnp.zeros((), jnp.int32),
        )
        temperature = jnp.full((), self.initial, float_dtype())
        return {"temperature": temperature, "loss_history": ring}

    def update(self, state: dict[str, Any], main_loss: Scalar) -> dict[str, Any]:
        """Stores the step's main loss and moves the temperature."""
        if not self.is_adaptive:
            return state
        ring, temperature = state["loss_history"], state["temperature"]
        size = jnp.minimum(ring.size + 1, self.history)
        losses = ring.losses.at[ring.index].set(main_loss)
        index = (ring.index + 1) % self.history
        spread, mean = _spread(losses, size)
        up = jnp.where(spread > self.heat_threshold, self.rate, 0.0)
        down = jnp.where(spread < self.cool_threshold, self.rate, 0.0)
        moved = jnp.clip(temperature + up - down, self.low, self.high)
        known = (size >= self.min_history) & (mean > 0)
        return {
            "temperature": jnp.where(known, moved, temperature),
            "loss_history": LossHistory(losses=losses, index=index, size=size),
        }


def _spread(losses: Float[Array, "R"], size: Array) -> tuple[Array, Array]:
    """Returns the coefficient of variation and the mean of the filled entries."""
    filled = jnp.arange(losses.shape[0], dtype=size.dtype) < size
    count = as_float(size)
    mean = jnp.sum(jnp.where(filled, losses, 0.0)) / count
    squares = jnp.where(filled, (losses - mean) ** 2, 0.0)
    deviation = jnp.sqrt(safe_divide(jnp.sum(squares), count - 1))
    return safe_divide(deviation, mean), mean


class _Tempered(TokenTerm):
    """A main loss that carries the temperature."""

    adaptive: AdaptiveTemperature
    fields = ("temperature", "loss_history")

    def temperature(self, state: dict[str, Any]) -> Scalar:
        return state["temperature"]

    def init(self) -> dict[str, Any]:
        return self.adaptive.init()

    def update(self, state: dict[str, Any], statistics: Any, step: Step):
        return self.adaptive.update(state, step.main_loss)

    def report(self, state: dict[str, Any], statistics: Any) -> Aux:
        return {"temperature": state["temperature"]}


@dataclasses.dataclass(frozen=True)
class TemperedCrossEntropy(_Tempered, CrossEntropy):
    """`CrossEntropy` of z/T (DeepSeek style).

    What it trains is the model `softmax(z/T)`. `aux["tempered_nll"]` is the likelihood
    of that model, at the temperature that the step's loss has; see `fold_temperature`.

    Attributes:
      adaptive: how T moves.
    """

    adaptive: AdaptiveTemperature = AdaptiveTemperature()
    keys = ("temperature",)
    measured = ("tempered_nll",)

    def measurements(self, stats: TokenStats, inputs: TokenInputs) -> Aux:
        return {"tempered_nll": stats.tempered_nll}


@dataclasses.dataclass(frozen=True)
class TemperedFocalLoss(_Tempered, FocalLoss):
    """`FocalLoss`, which looks at T = 1, beside a temperature that still moves.

    Attributes:
      adaptive: how T moves.
    """

    adaptive: AdaptiveTemperature = AdaptiveTemperature()
    keys = ("focal_loss", "temperature")
