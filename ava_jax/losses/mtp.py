"""Multi-token prediction: its parts besides the cross-entropies."""

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Float

from ava_jax.annotations import with_checked_arrays
from ava_jax.ranges import check_all, check_range
from ava_jax.reduce import along_axis, as_float

_MARGIN_FLOOR = 1e-7


@with_checked_arrays
def layer_norm(
    x: Float[Array, "*n D"], scale: Float[Array, "D"], bias: Float[Array, "D"]
) -> Float[Array, "*n D"]:
    """Computes layer normalization with epsilon 1e-5, as the parallel heads use it.

    `(x − mean(x)) / sqrt(var(x) + 1e-5) · scale + bias`.

    Args:
      x: hidden states [..., D].
      scale: [D].
      bias: [D].

    Returns:
      The normalized states in the dtype of `x`.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> x = losses.layer_norm(jnp.array([1.0, 3.0]), jnp.ones(2), jnp.zeros(2))
      >>> [round(float(v), 3) for v in x]
      [-1.0, 1.0]

    References:
      Ba et al., Layer Normalization, 2016.
    """
    wide = as_float(x)
    centred = wide - jnp.mean(wide, -1, keepdims=True)
    variance = jnp.mean(centred**2, -1, keepdims=True)
    normed = centred * lax.rsqrt(variance + 1e-5)
    scale, bias = (along_axis(as_float(p), x.ndim) for p in (scale, bias))
    return (normed * scale + bias).astype(x.dtype)


@with_checked_arrays
def confidence_regularizer(confidence: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Computes a regularizer that moves confidences away from 1/2, unreduced.

    `−log max(|2c − 1|, 1e-7)`.

    Args:
      confidence: c in [0, 1], [...].

    Returns:
      The value per score, [...].

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> round(float(losses.confidence_regularizer(jnp.array(0.75))), 4)
      0.6931
    """
    check_all("confidence", confidence, 0, 1)
    margin = jnp.abs(2 * as_float(confidence) - 1)
    return -jnp.log(jnp.maximum(margin, _MARGIN_FLOOR))


@with_checked_arrays
def effective_mtp_weight(
    weight: Float[Array, ""],
    mean_confidence: Float[Array, ""] | None = None,
    *,
    active: bool | Bool[Array, ""] = True,
    stop_gradient: bool = False,
) -> Float[Array, ""]:
    """Computes the weight of the adaptive heads: scaled by confidence, 0 if inactive.

    `weight · clip(mean confidence, 0, 1)` if active, else 0.

    Args:
      weight: the configured weight, a scalar.
      mean_confidence: a scalar; `None` leaves the weight unscaled.
      active: whether the heads ran; a Python bool or a traced one.
      stop_gradient: whether to stop the gradient through the confidence.

    Returns:
      A scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from ava_jax import losses
      >>> weight = losses.effective_mtp_weight(jnp.array(0.2), jnp.array(0.5))
      >>> round(float(weight), 4)
      0.1
    """
    check_range("weight", weight, 0)
    # A mean of ones may be rounded to a little more.
    check_range("mean_confidence", mean_confidence, 0, 1 + 1e-5, through=True)
    weight = as_float(weight)
    if mean_confidence is not None:
        scale = jnp.clip(as_float(mean_confidence), 0.0, 1.0)
        weight = weight * (lax.stop_gradient(scale) if stop_gradient else scale)
    return jnp.where(active, weight, jnp.zeros_like(weight))
