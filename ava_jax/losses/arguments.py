"""Checks that the losses of log-probabilities share."""

from collections.abc import Iterable, Mapping

import jax
import jax.numpy as jnp
from jax.core import Tracer
from jaxtyping import Array, Float, Shaped

from ava_jax.aliases import suggestion
from ava_jax.ranges import Number as Number
from ava_jax.ranges import check_range as check_range


def check_choice(name: str, value: str, choices: Iterable[str]) -> None:
    """Raises unless a value is one of the choices, and names the nearest of them."""
    known = list(choices)
    if value in known:
        return
    hint = suggestion(value, known)
    raise ValueError(f"unknown {name} {value!r}; {hint} There are {', '.join(known)}")


def check_floating(name: str, value: Float[Array, "..."]) -> None:
    """Raises unless an array holds floating-point numbers."""
    if not jnp.issubdtype(value.dtype, jnp.floating):
        raise TypeError(f"{name} must be floating point, got {value.dtype}")


def check_same_shape(
    like: str, shape: tuple[int, ...], **arrays: Shaped[Array, "..."] | None
) -> None:
    """Raises unless every given array has the shape of the one that `like` names."""
    for name, value in arrays.items():
        if value is not None and value.shape != shape:
            raise ValueError(
                f"{name} must have the shape {shape} of {like}, got {value.shape}"
            )


def check_known(name: str, value: Number) -> None:
    """Raises on a number that only the run of a program knows."""
    if isinstance(value, Tracer):
        raise TypeError(
            f"{name} must be a Python number, got the traced {jax.typeof(value)}: it "
            "is a constant of the program, so make it a static argument of jit "
            f"(static_argnames={name!r}) or close over its value"
        )


def check_read(
    kind: str, readers: Mapping[str, tuple[str, ...]], options: Mapping[str, object]
) -> None:
    """Raises on a given option that the kind does not read.

    Args:
      kind: the kind of loss.
      readers: the kinds that read an option, by name; all do where it is not listed.
      options: their values; None is not given.
    """
    for name, kinds in readers.items():
        if options.get(name) is not None and kind not in kinds:
            raise ValueError(
                f"{name} is given, but kind={kind!r} does not read it: leave it out, "
                f"or use a kind that does: {', '.join(kinds)}"
            )


def is_on(weight: Number) -> bool:
    """Whether a number may differ from 0; a traced one may."""
    return not isinstance(weight, int | float) or weight != 0
