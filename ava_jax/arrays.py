"""Reading arrays that users give: integers of any width, and weights of tokens.

Ids are compared in int32 whatever their dtype: `ids < 256` in uint8 would be false for
all of them. NumPy arrays of 64 bits are read before JAX cuts them to 32.
"""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Float, Int, Integer, Shaped

from ava_jax.reduce import as_float

# In place of ids that 32 bits cannot hold: no vocabulary has it, and no ignore_index.
NO_ID = -(2**31)
_LARGEST = 2**31 - 1
Given = Array | np.ndarray


def as_ids(ids: Integer[Given, "*n"] | int) -> Int[Array, "*n"]:
    """Returns ids as int32; those that do not fit become `NO_ID`, which is no class."""
    if not isinstance(ids, jax.Array):
        ids = np.asarray(ids)
        if ids.dtype.itemsize == 8:
            fits = (ids >= NO_ID) & (ids <= _LARGEST)
            return jnp.asarray(np.where(fits, ids, NO_ID).astype(np.int32))
        ids = jnp.asarray(ids)
    if ids.dtype.itemsize < 4 or ids.dtype == jnp.int32:
        return ids.astype(jnp.int32)
    fits = ids <= jnp.asarray(_LARGEST, ids.dtype)
    if jnp.issubdtype(ids.dtype, jnp.signedinteger):
        fits &= ids >= jnp.asarray(NO_ID, ids.dtype)
    return jnp.where(fits, jnp.where(fits, ids, 0).astype(jnp.int32), NO_ID)


def as_labels(name: str, labels: Integer[Given, "*n"]) -> Int[Array, "*n"]:
    """Returns integers that are only compared with each other; no two of them merge.

    Args:
      name: the argument, for the error.
      labels: integers of any dtype.

    Returns:
      int32; int64 of 64-bit integers whose values are not known while tracing.

    Raises:
      ValueError: 32 bits cannot hold a known value of 64 bits.
    """
    if labels.dtype.itemsize < 8:
        return jnp.asarray(labels).astype(jnp.int32)
    if (known := _known(labels)) is None:
        return jnp.asarray(labels).astype(jnp.int64)
    wrong = (known < NO_ID) | (known > _LARGEST)
    if np.any(wrong):
        raise ValueError(
            f"{name} must fit 32 bits, got {known[wrong].flat[0]}: number them anew, "
            "such as by np.unique(..., return_inverse=True)"
        )
    return jnp.asarray(known.astype(np.int32))


def check_weights(**weights: Shaped[Array, "*n"] | None) -> None:
    """Raises on a known weight that is negative, NaN or infinite.

    Args:
      **weights: bool, int or float arrays by the argument's name; None is not given.
    """
    for name, value in weights.items():
        if value is None or value.dtype.kind in "bu":
            continue
        if (known := _known(value)) is None:
            continue
        wide = known.astype(float)
        wrong = ~((wide >= 0) & (wide < np.inf))
        if np.any(wrong):
            place = tuple(int(i) for i in np.argwhere(wrong)[0])
            raise ValueError(
                f"{name} must hold weights of at least 0, got {wide[place]:g} at "
                f"{list(place)}: of an additive mask, whose 0 keeps a token, pass "
                "mask == 0"
            )


def as_weights(name: str, weights: Shaped[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns weights as floats; 0 in place of what is none, where it is not known.

    Raises:
      ValueError: a known weight is negative, NaN or infinite.
    """
    check_weights(**{name: weights})
    return usable_weights(weights)


def usable_weights(weights: Shaped[Array, "*n"]) -> Float[Array, "*n"]:
    """Returns weights as floats; 0 in place of negative, NaN and infinite ones."""
    given = as_float(weights)
    if weights.dtype.kind in "bu":
        return given
    return jnp.where((given >= 0) & (given < jnp.inf), given, jnp.zeros_like(given))


def read_named(inputs: Mapping[str, Any], ids: tuple[str, ...]) -> dict[str, Any]:
    """Returns arguments as JAX's arrays, with no integer of 64 bits cut short.

    Args:
      inputs: arguments by name: arrays, pytrees of them, numbers and None.
      ids: the names of those that are ids.

    Raises:
      ValueError: an integer that is no id does not fit 32 bits.
    """

    def read(name: str, value: Any) -> Any:
        if not isinstance(value, Given):
            return value
        if value.dtype.kind not in "iu" or value.dtype.itemsize < 8:
            return jnp.asarray(value)
        return as_ids(value) if name in ids else as_labels(name, value)

    return {
        name: jax.tree.map_with_path(
            lambda path, x, name=name: read(name + jax.tree_util.keystr(path), x), value
        )
        for name, value in inputs.items()
    }


def _known(x: Any) -> np.ndarray | None:
    """Returns an array's values; None while tracing, and if other hosts have some."""
    if isinstance(x, Tracer) or not getattr(x, "is_fully_addressable", True):
        return None
    return np.asarray(x) if hasattr(x, "__array__") else None
