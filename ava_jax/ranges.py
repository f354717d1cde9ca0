"""The ranges of numbers and schedules, checked as far as their values are known."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.core import Tracer
from jaxtyping import Array, Num

Number = Num[Array, ""] | float | int

# Integers are compared in 32 bits.
_INT = 2**31
_COUNT = {"low": 1, "high": _INT, "whole": True}
_FROM_TWO = {"low": 2, "high": _INT, "whole": True}
_FROM_ZERO = {"low": 0, "high": _INT, "whole": True}
_NOT_NEGATIVE = {"low": 0}
_POSITIVE = {"low": 0, "inclusive": False}
_SHARE = {"low": 0, "high": 1}

# The fields of configs and terms, by name.
RANGES: dict[str, dict[str, Any]] = {
    **dict.fromkeys(("vocab_size", "history", "min_history"), _FROM_TWO),
    **dict.fromkeys(("temperature_history", "temperature_min_history"), _FROM_TWO),
    **dict.fromkeys(("hidden_size", "num_future_tokens", "num_heads"), _COUNT),
    **dict.fromkeys(("ngram_size", "ngram_max_matches", "max_matches"), _COUNT),
    **dict.fromkeys(("contrastive_token_window", "window"), _COUNT),
    **dict.fromkeys(("num_experts", "num_moe_layers", "num_layers"), _COUNT),
    **dict.fromkeys(("balancing_bins", "bins", "chunk_size", "block_size"), _COUNT),
    **dict.fromkeys(("min_sequence_length", "min_length"), _FROM_ZERO),
    **dict.fromkeys(("eos_token_id", "pad_token_id"), _FROM_ZERO),
    "ignore_index": {"low": 1 - _INT, "high": _INT, "whole": True},
    **dict.fromkeys(("initial_temperature", "initial"), _POSITIVE),
    **dict.fromkeys(("min_temperature", "low", "max_temperature", "high"), _POSITIVE),
    **dict.fromkeys(("contrastive_temperature", "temperature"), _POSITIVE),
    **dict.fromkeys(("logit_soft_cap", "teacher_logit_soft_cap"), _POSITIVE),
    "logits_temperature": _POSITIVE,
    **dict.fromkeys(("temperature_heat_threshold", "heat_threshold"), _NOT_NEGATIVE),
    **dict.fromkeys(("temperature_cool_threshold", "cool_threshold"), _NOT_NEGATIVE),
    **dict.fromkeys(("focal_gamma", "gamma", "temperature_rate"), _NOT_NEGATIVE),
    **dict.fromkeys(("contrastive_margin", "margin"), _NOT_NEGATIVE),
    "confidence_reg_strength": _NOT_NEGATIVE,
    **dict.fromkeys(("label_smoothing", "bias_momentum", "momentum"), _SHARE),
    "beta": {**_SHARE, "through": True},
}
# Numbers or schedules, not negative. The rate of a temperature is a number.
WEIGHTS = frozenset(
    (
        "weight",
        "rate",
        "z_loss_weight",
        "mtp_weight",
        "ngram_penalty_weight",
        "immediate_repetition_weight",
        "unlikelihood_weight",
        "contrastive_token_weight",
        "eos_penalty_weight",
        "gradient_balance_weight",
        "bias_update_rate",
        "load_balancing_weight",
        "router_z_weight",
        "diversity_weight",
        "contrastive_weight",
    )
)


def check_range(
    name: str,
    value: Number | None,
    low: float | int = -math.inf,
    high: float | int = math.inf,
    *,
    inclusive: bool = True,
    through: bool = False,
    whole: bool = False,
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
      whole: whether it has to be an integer.
    """
    if value is None:
        return
    if not is_real_scalar(value) or (whole and not _is_integer(value)):
        kind = "an int" if whole else "a number"
        raise TypeError(f"{name} must be {kind}, got {_shown(value)}")
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
        f"{name} must be in {opening}{low:g}, {high:g}{closing}, got {value}"
    )


def check_all(
    name: str,
    values: Any,
    low: float | int = -math.inf,
    high: float | int = math.inf,
) -> None:
    """Raises unless all numbers of an array are finite and in [low, high].

    A traced array passes.
    """
    if isinstance(values, Tracer) or not _is_here(values):
        return
    known = np.asarray(values, np.float64)
    wrong = ~(np.isfinite(known) & (known >= low) & (known <= high))
    if wrong.any():
        first = np.asarray(values)[wrong][0].item()
        check_range(name, first, low, high, through=high < math.inf)


def check_fields(owner: Any, prefix: str = "") -> None:
    """Checks the fields of a dataclass whose names `RANGES` lists, and of its fields.

    Args:
      owner: a config or a term.
      prefix: what errors begin with.
    """
    for field in dataclasses.fields(owner):
        value = getattr(owner, field.name)
        if dataclasses.is_dataclass(value):
            check_fields(value, f"{prefix}{field.name}.")
        elif field.name in WEIGHTS:
            check_weight(f"{prefix}{field.name}", value, 0)
        elif field.name in ("alpha", "focal_alpha"):
            check_all(f"{prefix}{field.name}", value, 0)
        elif field.name in RANGES:
            check_range(f"{prefix}{field.name}", value, **RANGES[field.name])


def check_weight(name: str, weight: Any, low: float | int = -math.inf) -> None:
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
    except TypeError as error:
        raise TypeError(
            f"{name} is a schedule that must return a number at every step: {error}"
        ) from error
    if not is_real_scalar(value):
        raise TypeError(
            f"{name} is a schedule that must return a number, got {_shown(value)}"
        )
    with jax.ensure_compile_time_eval():
        first: Any = weight(jnp.zeros((), jnp.int32))
    check_range(f"{name}, a schedule, at step 0", first, low)


def _is_here(value: Any) -> bool:
    """Whether a number's value can be read in this process."""
    return not isinstance(value, jax.Array) or value.is_fully_addressable


def is_real_scalar(value: Any) -> bool:
    """Whether it is a number, or an array of no axes that holds one; no bool."""
    if isinstance(value, bool | np.bool_):
        return False
    if isinstance(value, int | float):
        return True
    dtype = getattr(value, "dtype", None)
    if dtype is None or getattr(value, "shape", None) != ():
        return False
    return jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer)


def _is_integer(value: Any) -> bool:
    dtype = getattr(value, "dtype", None)
    return isinstance(value, int) or (
        dtype is not None and jnp.issubdtype(dtype, jnp.integer)
    )


def _shown(value: Any) -> str:
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return f"{value.dtype} {value.shape}"
    return f"{value!r} ({type(value).__name__})"
