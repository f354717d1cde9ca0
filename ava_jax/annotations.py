"""Arguments held against their annotations, for errors that name the argument.

What an annotation says, `Float[Array, "B S"]`, is all that is checked here: whether an
argument is an array, its dtype, its number of axes, and that axes of one name have one
size.
"""

import functools
import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple, ParamSpec, TypeVar

import flax.core.meta
import jax.numpy as jnp
import numpy as np

from ava_jax.aliases import suggestion

P = ParamSpec("P")
Result = TypeVar("Result")

_KINDS = {
    "Float": (jnp.floating, "floating point"),
    "Integer": (jnp.integer, "integers"),
    "Int": (jnp.integer, "integers"),
    "Bool": (jnp.bool_, "bool"),
}


class _Form(NamedTuple):
    """What an annotation says of an array.

    Attributes:
      kind: jaxtyping's name of its dtypes.
      dims: its axes, as they are written.
      rank: how many there are; None if that varies.
      optional: whether None is allowed.
      numbers: whether a Python number is.
    """

    kind: str
    dims: str
    rank: int | None
    optional: bool
    numbers: bool


def with_checked_arrays(
    function: Callable[P, Result], *, sizes: bool = True
) -> Callable[P, Result]:
    """Decorates a public function: its arrays are held against their annotations.

    Args:
      function: the function.
      sizes: whether the sizes of axes are compared.

    Raises:
      TypeError: an argument is no array, or of another dtype.
      ValueError: it has another number of axes, or sizes that do not fit.
    """
    signature = inspect.signature(function)
    forms = _forms_of(typing.get_type_hints(function))

    @functools.wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> Result:
        for name in kwargs:
            if name not in signature.parameters:
                hint = suggestion(name, signature.parameters)
                raise TypeError(f"{function.__name__} has no argument {name!r}: {hint}")
        given = signature.bind_partial(*args, **kwargs).arguments
        known = [(n, forms[n], x) for n, x in given.items() if n in forms]
        for argument in known:
            _check(*argument)
        if sizes:
            _check_sizes(known)
        return function(*args, **kwargs)

    return call


def check_arguments(annotations: Mapping[str, Any], values: Mapping[str, Any]) -> None:
    """Raises as `with_checked_arrays` does, for arguments by name that are not None."""
    forms = _forms_of(annotations)
    for name, value in values.items():
        if value is not None and name in forms:
            _check(name, forms[name], value)


def check_array(name: str, value: Any) -> None:
    """Raises a TypeError unless it is an array, a tracer or a `ShapeDtypeStruct`."""
    if is_array(value):
        return
    kind = type(value).__name__
    if isinstance(value, flax.core.meta.AxisMetadata):
        advice = f"unbox it, flax.linen.meta.unbox({name})"
    elif isinstance(value, list | tuple | int | float):
        advice = f"pass jnp.asarray({name})"
    elif callable(value):
        advice = "call it, and pass what it returns"
    else:
        advice = "pass an array"
    raise TypeError(f"{name} must be an array, got {kind}: {advice}")


def is_array(value: Any) -> bool:
    """Says whether a value has the shape and the dtype of an array."""
    return isinstance(getattr(value, "dtype", None), np.dtype) and hasattr(
        value, "shape"
    )


def _forms_of(hints: Mapping[str, Any]) -> dict[str, _Form]:
    forms = ((name, _form_of(hint)) for name, hint in hints.items())
    return {name: form for name, form in forms if form and name != "return"}


@functools.cache
def _form_of(hint: Any) -> _Form | None:
    """Reads an annotation; None if it allows more than arrays, numbers and None."""
    choices = typing.get_args(hint) or (hint,)
    arrays = [x for x in choices if hasattr(x, "dim_str")]
    others = {x for x in choices if not hasattr(x, "dim_str")}
    if not arrays or not others <= {type(None), int, float}:
        return None
    dims = [x.dim_str.split() for x in arrays]
    varies = len({len(x) for x in dims}) > 1 or any(
        part.startswith(("*", "...")) for x in dims for part in x
    )
    names = {x.dtype.__name__ for x in arrays}
    kind = names.pop() if len(names) == 1 else "Shaped"
    is_number = bool(others & {int, float}) or not dims[0]
    rank = None if varies else len(dims[0])
    # Of several forms, the sizes are not compared.
    axes = arrays[0].dim_str if len({x.dim_str for x in arrays}) == 1 else "..."
    return _Form(kind, axes, rank, type(None) in others, is_number)


def _check(name: str, form: _Form, value: Any) -> None:
    is_number = type(value) in (int, float)
    if (value is None and form.optional) or (is_number and form.numbers):
        return
    if value is None:
        raise ValueError(f"{name} is required, {_dims(form)}, got None")
    check_array(name, value)
    array: Any = value
    dtype, shape = array.dtype, array.shape
    wanted, what = _KINDS.get(form.kind, (None, "real numbers"))
    is_real = jnp.issubdtype(dtype, np.bool_) or jnp.issubdtype(dtype, np.number)
    is_real &= not jnp.issubdtype(dtype, np.complexfloating)
    if not (is_real if wanted is None else jnp.issubdtype(dtype, wanted)):
        raise TypeError(f"{name} must be {what}, got {dtype} {shape}")
    if form.rank is not None and len(shape) != form.rank:
        raise ValueError(f"{name} must be {_dims(form)}, got {dtype} {shape}")


def _dims(form: _Form) -> str:
    return f"[{', '.join(form.dims.split())}]" if form.dims else "a scalar"


def _check_sizes(arguments: list[tuple[str, _Form, Any]]) -> None:
    """Raises where axes of one name have two sizes."""
    seen: dict[str, Any] = {}
    first: dict[str, str] = {}
    shapes: dict[str, tuple[int, ...]] = {}
    for name, form, value in arguments:
        if not is_array(value):
            continue
        shapes[name] = value.shape
        sizes = _sizes_of(form.dims, value.shape)
        for axis, size in sizes.items():
            known = seen.setdefault(axis, size)
            first.setdefault(axis, name)
            if known != size:
                wanted, like = _shape_of(form.dims, seen), first[axis]
                axes = ", ".join(form.dims.split())
                rule = f"be [{axes}] with {axis.strip('*')}={known}, as {like} is"
                if wanted is not None:
                    rule = f"have the shape {wanted}, to fit {like}"
                if wanted == shapes[like]:
                    rule = f"have the shape {wanted} of {like}"
                raise ValueError(f"{name} must {rule}, got {value.shape}")


def _shape_of(dims: str, seen: Mapping[str, Any]) -> tuple[int, ...] | None:
    """Returns the shape of named axes; None if one of them is not known."""
    sizes = [seen.get(axis) for axis in dims.split()]
    if any(size is None for size in sizes):
        return None
    parts: list[Any] = [n if isinstance(n, tuple) else (n,) for n in sizes]
    return tuple(n for part in parts for n in part)


def _sizes_of(dims: str, shape: tuple[int, ...]) -> dict[str, Any]:
    """Returns the sizes of the named axes; those that broadcast have none."""
    names = dims.split()
    many = [n for n, axis in enumerate(names) if axis.startswith(("*", "..."))]
    if many:
        before = many[0]
        after = len(names) - before - 1
        if len(shape) < before + after:
            return {}
        end = len(shape) - after
        sizes = [*shape[:before], shape[before:end], *shape[end:]]
    else:
        sizes = list(shape)
    pairs = zip(names, sizes, strict=True)
    return {a: n for a, n in pairs if a.strip("*").isidentifier() and "_" not in a}
