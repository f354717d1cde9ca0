"""Combining several losses into one with learned weights."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from ava_jax.annotations import with_checked_arrays
from ava_jax.reduce import as_float


@with_checked_arrays
def weigh_losses(
    losses: Float[Array, "L"], log_weights: Float[Array, "L"]
) -> tuple[Float[Array, ""], Float[Array, "L"]]:
    """Computes the mean of the losses under softmax-normalized learned weights.

    `weights = exp(log_weights) / Σ exp(log_weights)`, `loss = Σ weights · losses`.
    Trained freely, the weights collapse onto the smallest loss;
    `homoscedastic_weighting` cannot collapse that way.

    Args:
      losses: `[L]`, the losses to combine.
      log_weights: `[L]`, the logarithms of the weights, trained parameters.

    Returns:
      The combined loss, a scalar, and the weights `[L]`, which sum to 1.

    Raises:
      ValueError: the two are not vectors of one length.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss, weights = losses.weigh_losses(
      ...     jnp.array([1.0, 3.0]), jnp.log(jnp.array([3.0, 1.0])))
      >>> round(float(loss), 4), [round(float(w), 4) for w in weights]
      (1.5, [0.75, 0.25])
    """
    weights = jax.nn.softmax(as_float(log_weights))
    return jnp.sum(weights * as_float(losses)), weights


@with_checked_arrays
def homoscedastic_weighting(
    losses: Float[Array, "L"], log_variances: Float[Array, "L"]
) -> Float[Array, ""]:
    """Computes the sum of the losses, each scaled by a learned uncertainty.

    `Σ exp(−s) · L + s / 2`, with `s = log σ²`. The second term penalizes a large
    variance, so that no weight vanishes: at the optimum `s = log 2L`.

    Args:
      losses: `[L]`, the losses to combine, positive.
      log_variances: `[L]`, `s`, trained parameters; initialize them with zeros.

    Returns:
      A scalar.

    Raises:
      ValueError: the two are not vectors of one length.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> loss = losses.homoscedastic_weighting(
      ...     jnp.array([1.0, 2.0]), jnp.array([0.0, 1.0]))
      >>> round(float(loss), 4)
      2.2358

    References:
      Kendall et al., Multi-Task Learning Using Uncertainty, 2018.
    """
    s = as_float(log_variances)
    return jnp.sum(jnp.exp(-s) * as_float(losses) + s / 2)
