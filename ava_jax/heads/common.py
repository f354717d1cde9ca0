"""Helpers of the head modules: checks of options, masks, norms, dtypes."""

from collections.abc import Sequence

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float, Num

from ava_jax.annotations import check_arguments, check_array
from ava_jax.arrays import as_weights
from ava_jax.losses.mtp import layer_norm
from ava_jax.reduce import as_float, float_dtype

Mask = Num[Array, "B S"] | Bool[Array, "B S"]


def require(is_good: bool, name: str, value: object, allowed: str) -> None:
    """Raises a ValueError with the option, the allowed values and the given one."""
    if not is_good:
        raise ValueError(f"{name} must be {allowed}, got {value!r}")


def require_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Raises a ValueError unless the value is one of the choices."""
    require(value in choices, name, value, "one of " + ", ".join(map(repr, choices)))


def require_shape(name: str, array: Array, shape: tuple[int, ...]) -> None:
    """Raises a ValueError unless the array has exactly that shape."""
    if array.shape != shape:
        raise ValueError(f"{name} must have shape {shape}, got {array.shape}")


def require_hidden_states(array: Array) -> None:
    """Raises unless it is an array of three axes and of floating point."""
    check_arguments({"hidden_states": Float[Array, "B S D"]}, {"hidden_states": array})


def compute_dtype(
    dtype: DTypeLike | None, hidden_states: Float[Array, "B S D"]
) -> jnp.dtype:
    """Returns the dtype of a module's layers: the given one, or that of the input."""
    return jnp.dtype(hidden_states.dtype if dtype is None else dtype)


def exact_gelu(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Computes x·Φ(x), with Φ the normal distribution function; not the tanh form."""
    return jax.nn.gelu(x, approximate=False)


class LayerNorm(nn.Module):
    """`(x − mean)/√(variance + 1e-5) · scale + bias`, in the arithmetic dtype."""

    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        bias = self.param("bias", nn.initializers.zeros, shape, self.param_dtype)
        return layer_norm(as_float(x), scale, bias)


class RMSNorm(nn.Module):
    """`x/√(mean x² + ε) · scale`, in the arithmetic dtype."""

    epsilon: float
    param_dtype: DTypeLike

    @nn.compact
    def __call__(self, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        shape = x.shape[-1:]
        scale = self.param("scale", nn.initializers.ones, shape, self.param_dtype)
        x = as_float(x)
        mean_square = jnp.mean(jnp.square(x), axis=-1, keepdims=True)
        return x * jax.lax.rsqrt(mean_square + self.epsilon) * as_float(scale)


def token_weights(
    hidden_states: Float[Array, "B S D"], attention_mask: Mask | None
) -> Float[Array, "B S"]:
    """Returns the mask as arithmetic floats, or ones if there is none."""
    if attention_mask is None:
        return jnp.ones(hidden_states.shape[:2], float_dtype())
    check_array("attention_mask", attention_mask)
    require_shape("attention_mask", attention_mask, hidden_states.shape[:2])
    return as_weights("attention_mask", attention_mask)


def zero_masked(
    x: Float[Array, "B S D"], unmasked: Bool[Array, "B S"]
) -> Float[Array, "B S D"]:
    """Zeroes masked positions, so that their NaN cannot reach a value or a gradient."""
    return jnp.where(unmasked[..., None], x, jnp.zeros_like(x))
