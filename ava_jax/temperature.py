"""The adaptive temperature: a ring of recent losses decides where it moves."""

import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.config import UnifiedLossConfig
from ava_jax.reduce import as_float, float_dtype, safe_divide
from ava_jax.state import LossHistory


def init_history(config: UnifiedLossConfig) -> LossHistory:
    """Returns an empty ring."""
    return LossHistory(
        losses=jnp.zeros((config.temperature_history,), float_dtype()),
        index=jnp.zeros((), jnp.int32),
        size=jnp.zeros((), jnp.int32),
    )


def updated_temperature(
    config: UnifiedLossConfig,
    temperature: Float[Array, ""],
    history: LossHistory,
    main_loss: Float[Array, ""],
) -> tuple[Float[Array, ""], LossHistory]:
    """Stores the step's main loss and moves the temperature by its recent spread.

    With `cv = std/mean` of the stored losses (unbiased std), the temperature rises by
    the rate above the heat threshold and falls by it below the cool threshold.
    """
    if not config.adaptive_temperature:
        return temperature, history
    capacity = config.temperature_history
    size = jnp.minimum(history.size + 1, capacity)
    losses = history.losses.at[history.index].set(main_loss)
    index = (history.index + 1) % capacity
    spread, mean = _spread(losses, size)
    rate = config.temperature_rate
    up = jnp.where(spread > config.temperature_heat_threshold, rate, 0.0)
    down = jnp.where(spread < config.temperature_cool_threshold, rate, 0.0)
    moved = jnp.clip(
        temperature + up - down, config.min_temperature, config.max_temperature
    )
    known = (size >= config.temperature_min_history) & (mean > 0)
    return (
        jnp.where(known, moved, temperature),
        LossHistory(losses=losses, index=index, size=size),
    )


def _spread(losses: Float[Array, "R"], size: Array) -> tuple[Array, Array]:
    """The coefficient of variation and the mean of the filled entries."""
    filled = jnp.arange(losses.shape[0], dtype=size.dtype) < size
    count = as_float(size)
    mean = jnp.sum(jnp.where(filled, losses, 0.0)) / count
    squares = jnp.where(filled, (losses - mean) ** 2, 0.0)
    deviation = jnp.sqrt(safe_divide(jnp.sum(squares), count - 1))
    return safe_divide(deviation, mean), mean
