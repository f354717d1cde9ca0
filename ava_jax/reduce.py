"""Weighted sums, safe quotients and the arithmetic dtype.

The package passes sums and weights around, not means: a mean is computed once, at the
end, with a denominator that the caller may supply. This makes micro-batches, shards and
padding exact.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Num, Shaped


def float_dtype() -> jnp.dtype:
    """Returns the dtype of all statistics: float32, or float64 under x64."""
    return jnp.dtype(jax.dtypes.canonicalize_dtype(float))


def as_float(x: Shaped[Array, "..."] | float | int) -> Float[Array, "..."]:
    """Converts any array or number to the arithmetic dtype, strongly typed."""
    return jnp.asarray(x).astype(float_dtype())


def wider(one: jnp.dtype, other: jnp.dtype) -> jnp.dtype:
    """Returns the wider of two floating-point dtypes, under strict promotion too.

    JAX promotes no float of 8 bits or fewer by itself: it counts as bfloat16, which
    holds the values of each, unless both are the same.
    """
    if one == other:
        return one
    short = [jnp.bfloat16 if x.itemsize < 2 else x for x in (one, other)]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.promote_types(*short)


def along_axis(
    x: Shaped[Array, "W"], ndim: int, axis: int = -1
) -> Shaped[Array, "..."]:
    """Returns a row with as many axes as what it is added to, along one of them."""
    return jnp.expand_dims(x, [n for n in range(ndim) if n != axis % ndim])


def as_arrays(tree: Any) -> Any:
    """Converts the NumPy arrays of a pytree to JAX's; other leaves stay."""

    def convert(x: Any) -> Any:
        return jnp.asarray(x) if isinstance(x, np.ndarray | np.generic) else x

    return jax.tree.map(convert, tree)


def float_zeros(shapes: Any) -> Any:
    """Returns zeros of the arithmetic dtype for a pytree of anything with a shape."""
    return jax.tree.map(lambda x: jnp.zeros(x.shape, float_dtype()), shapes)


def safe_divide(
    numerator: Num[Array, "*#n"], denominator: Num[Array, "*#n"]
) -> Float[Array, "*n"]:
    """Computes the quotient; 0 with a zero gradient where the denominator is 0."""
    numerator, denominator = as_float(numerator), as_float(denominator)
    empty = denominator == 0
    quotient = numerator / jnp.where(empty, jnp.ones_like(denominator), denominator)
    return jnp.where(empty, jnp.zeros_like(quotient), quotient)


def centered(x: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Subtracts the mean over the last axis; exactly 0 where all numbers are equal.

    The mean is that of the differences from the first number: a rounded mean of equal
    numbers may be another number.
    """
    x = as_float(x)
    distance = x - x[..., :1]
    return distance - jnp.mean(distance, axis=-1, keepdims=True)


def weighted_sum(
    values: Float[Array, "*n"], weights: Float[Array, "*n"]
) -> Float[Array, ""]:
    """Computes `Σ weights · values`; values of weight 0 are left out, even NaN."""
    kept = jnp.where(weights != 0, values, jnp.zeros_like(values))
    return jnp.sum(weights * kept)


def weighted_mean(
    values: Float[Array, "*n"],
    weights: Float[Array, "*n"],
    denominator: Float[Array, ""] | None = None,
) -> Float[Array, ""]:
    """Computes `Σ w·v / denominator`; the denominator is `Σ w` unless given."""
    total = jnp.sum(weights) if denominator is None else denominator
    return safe_divide(weighted_sum(values, weights), total)
