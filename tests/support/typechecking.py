"""Annotations checked by jaxtyping and beartype, once per function and kind of call.

A check takes longer than many a traced operation. What it finds depends on shapes,
dtypes and static values alone, so a call like an earlier one is not checked again.
Constructors are not checked: JAX rebuilds records with placeholders in place of arrays.
"""

import collections
import functools
from collections.abc import Hashable
from types import CodeType
from typing import Any

import beartype
import jax
import jaxtyping

# Taken before `install` replaces the name.
_with_check = functools.partial(jaxtyping.jaxtyped, typechecker=beartype.beartype)
# By code: a function inside another one is a new object whenever that one is called.
_seen: dict[CodeType, set[int]] = collections.defaultdict(set)


def install(package: str) -> None:
    """Has all functions of the package checked; to be called before its import."""
    # The import hook decorates every function and class with what has this name.
    jaxtyping.jaxtyped = lambda typechecker: checked
    jaxtyping.install_import_hook(package, "beartype.beartype")


def checked(function: Any) -> Any:
    """Decorates a function, whose calls are then checked; classes stay as they are."""
    is_annotated = bool(getattr(function, "__annotations__", None))
    if isinstance(function, type) or not is_annotated:
        return function
    seen = _seen[function.__code__]
    with_check = functools.cache(lambda: _with_check(function))

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if jaxtyping.config.jaxtyping_disable:
            return function(*args, **kwargs)
        kind = _kind_of(args, kwargs, function.__closure__ or ())
        if kind in seen:
            return function(*args, **kwargs)
        out = with_check()(*args, **kwargs)
        if kind is not None:
            seen.add(kind)
        return out

    return call


def _kind_of(args: tuple, kwargs: dict[str, Any], closure: tuple) -> int | None:
    """Returns a hash of all that a check can depend on; None if something has none."""
    free = [cell.cell_contents for cell in closure]
    leaves, structure = jax.tree_util.tree_flatten((args, kwargs, free))
    is_wide = jax.config.read("jax_enable_x64")
    try:
        return hash((is_wide, structure, *map(_kind_of_leaf, leaves)))
    except TypeError:
        return None


def _kind_of_leaf(leaf: Any) -> Hashable:
    aval = getattr(leaf, "aval", None)  # of an array or a tracer
    if aval is not None:
        return aval.shape, aval.dtype
    kind = type(leaf)
    if hasattr(leaf, "dtype") and hasattr(leaf, "shape"):
        return kind, leaf.shape, leaf.dtype
    # Objects that only equal themselves are of one kind.
    is_value = kind.__eq__ is not object.__eq__
    return kind, leaf if is_value else getattr(leaf, "__code__", None)
