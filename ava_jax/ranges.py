"""The ranges of numbers and schedules, checked as far as their values are known."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Num

Number = Num[Array, ""] | float | int


def check_range(
    name: str,
    value: Number | None,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    *,
    inclusive: bool = True,
    through: bool = False,
) -> None:
    """Raises unless a number is finite and within its range; None is not given.

    A traced number passes if it is a real scalar: its value is not known yet.

    Args:
      name: what it is, for the error.
      value: the number.
      low: the lower end.
      high: the upper end.
      inclusive: whether the lower end is allowed.
      through: whether the upper end is allowed.
    """
    if value is None:
        return
    if not _is_real_scalar(value):
        raise TypeError(f"{name} must be a number, got {_shown(value)}")
    if isinstance(value, Tracer) or not _is_here(value):
        return
    known = float(value)
    above = known >= low if inclusive else known > low
    below = known <= high if through else known < high
    if above and below and math.isfinite(known):
        return
    opening = "[" if inclusive and low > -math.inf else "("
    closing = "]" if through else ")"
    raise ValueError(
        f"{name} must be in {opening}{low:g}, {high:g}{closing}, got {known:g}"
    )


def check_weight(name: str, weight: Any, low: float = -math.inf) -> None:
    """Raises unless a weight is a number, or a schedule that returns one.

    A schedule is traced for its shape and dtype, and called at step 0 for its value.
    What it returns later is checked by `ava_jax.checked`.

    Args:
      name: what it is, for the error.
      weight: a number, or a function of the step.
      low: the smallest value allowed.
    """
    if not callable(weight):
        check_range(name, weight, low)
        return
    try:
        value = jax.eval_shape(weight, jax.ShapeDtypeStruct((), jnp.int32))
    except jax.errors.ConcretizationTypeError as error:
        raise TypeError(
            f"{name} is a schedule that needs the step's value, which is traced: use "
            "jnp.where in place of `if`, or a schedule of optax"
        ) from error
    if not _is_real_scalar(value):
        raise TypeError(
            f"{name} is a schedule that must return a number, got {_shown(value)}"
        )
    with jax.ensure_compile_time_eval():
        first: Any = weight(np.int32(0))
    check_range(f"{name}, a schedule, at step 0", first, low)


def _is_here(value: Any) -> bool:
    """Whether a number's value can be read in this process."""
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def _is_real_scalar(value: Any) -> bool:
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, int | float):
        return True
    dtype = getattr(value, "dtype", None)
    if dtype is None or getattr(value, "shape", None) != ():
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _shown(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {value.shape}"
    return f"{value!r} ({type(value).__name__})"
