"""Docstrings and annotations as the reference should show them.

Griffe knows `Examples:` for doctests and one name per entry; a shape of jaxtyping that
is a name, as in `Float[Array, "V"]`, is a forward reference to it.
"""

import dataclasses
import re

import griffe

_EXAMPLE = re.compile(r"^Example:$", re.MULTILINE)
_ENTRY = re.compile(
    r"^(?P<indent> +)(?P<names>\w+(?:,\s+\w+)+):(?P<text>.*(?:\n(?P=indent) +.*)*)",
    re.MULTILINE,
)
_REFERENCES = re.compile(r"^References:\n(?P<items>(?:  .*\n?)+)", re.MULTILINE)


class Docstrings(griffe.Extension):
    """Rewrites docstrings before they are parsed, and shapes before they are shown."""

    def on_object(self, *, obj: griffe.Object, **_: object) -> None:
        """Rewrites the docstring and the annotations of one object."""
        if obj.docstring:
            text = _EXAMPLE.sub("Examples:", obj.docstring.value)
            text = _ENTRY.sub(_one_by_one, text)
            obj.docstring.value = _REFERENCES.sub(_as_list, text)
        if isinstance(obj, griffe.Function):
            _quote_shapes([obj.returns, *(p.annotation for p in obj.parameters)])
        elif isinstance(obj, griffe.Attribute):
            _quote_shapes([obj.annotation])

    def on_class_members(self, *, cls: griffe.Class, **_: object) -> None:
        """Has Griffe make the constructor of a dataclass of Flax."""
        if _is_flax_dataclass(cls):
            name = griffe.ExprName("dataclasses.dataclass")
            cls.decorators = [griffe.Decorator(name, lineno=None, endlineno=None)]


def _is_flax_dataclass(cls: griffe.Class) -> bool:
    """Tells whether Flax gives the class its constructor."""
    decorators = {decorator.callable_path for decorator in cls.decorators}
    bases = {base.canonical_path for base in cls.bases if isinstance(base, griffe.Expr)}
    return "flax.struct.dataclass" in decorators or "flax.linen.Module" in bases


def _one_by_one(entry: re.Match[str]) -> str:
    names = re.split(r",\s+", entry["names"])
    return "\n".join(f"{entry['indent']}{name}:{entry['text']}" for name in names)


def _as_list(references: re.Match[str]) -> str:
    items = re.sub(r"(^|(?<=\.\n))  ", "- ", references["items"])
    return f"**References:**\n\n{items}"


def _quote_shapes(parts: list[object]) -> None:
    """Makes strings of what Griffe has parsed as expressions, at any depth."""
    for part in parts:
        if isinstance(part, list | tuple):
            _quote_shapes(list(part))
        elif isinstance(part, griffe.ExprSubscript) and _has_shape(part):
            array, shape = part.slice.elements
            text = str(shape).strip("'\"")
            part.slice.elements = [array, f'"{text}"']
        elif isinstance(part, griffe.Expr) and not isinstance(part, griffe.ExprName):
            _quote_shapes([getattr(part, f.name) for f in dataclasses.fields(part)])


def _has_shape(annotation: griffe.ExprSubscript) -> bool:
    """Tells `Float[Array, "B S"]` from `PyTree[Float]`."""
    inner = annotation.slice
    of_jaxtyping = annotation.canonical_path.startswith("jaxtyping.")
    return of_jaxtyping and isinstance(inner, griffe.ExprTuple)
