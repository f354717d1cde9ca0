"""Refusing forward-mode differentiation where a gradient is written by hand.

JAX cannot derive the forward mode from a hand-written reverse mode, and its own message
does not say what can be done.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive
from jax.interpreters import ad, batching, mlir

Result = TypeVar("Result")

_MESSAGE = (
    "forward-mode differentiation (jax.jvp, jax.linearize, jax.jacfwd, jax.hessian) of "
    'a gradient that is written by hand: pass implementation="reference", which JAX '
    "can differentiate in any mode, or use reverse mode twice, such as "
    "jax.grad(lambda x: jnp.vdot(jax.grad(f)(x), v))(x)"
)


def reverse_only(function: Callable[..., Result], *operands: Any) -> Result:
    """Calls a function with a hand-written gradient.

    Args:
      function: such as one of `jax.custom_vjp`.
      *operands: pytrees of arrays.

    Raises:
      TypeError: `jax.jvp`, `jax.linearize`, `jax.jacfwd` or `jax.hessian` asks for the
        derivative; while it is evaluated or, inside `jax.jit`, lowered.
    """
    with named_errors():
        return function(*jax.tree.map(_mark, operands))


@contextlib.contextmanager
def named_errors() -> Iterator[None]:
    """Replaces JAX's error, which it raises first where the tangents are mapped."""
    try:
        yield
    except TypeError as error:
        if "to a custom_vjp function" in str(error):
            raise TypeError(_MESSAGE) from error
        raise


def _mark(x: jax.Array) -> jax.Array:
    return _marked(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


@jax.custom_jvp
def _marked(x: jax.Array) -> jax.Array:
    """Returns the array, whose tangent cannot be evaluated."""
    return x


@_marked.defjvp
def _tangent(primals: tuple[jax.Array], tangents: tuple[jax.Array]) -> Any:
    # In reverse mode the tangent is never evaluated, only transposed.
    return _marked(primals[0]), _refused.bind(tangents[0])


def _refuse(*_: Any, **__: Any) -> Any:
    raise TypeError(_MESSAGE)


_refused = Primitive("forward_mode")
_refused.def_impl(_refuse)
_refused.def_abstract_eval(lambda x: x)
ad.deflinear2(_refused, lambda cotangent, _: [cotangent])
batching.defvectorized(_refused)
mlir.register_lowering(_refused, _refuse)
