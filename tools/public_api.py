"""Prints the public API, one line per name: what `tests/public_api.txt` holds.

python -m tools.public_api > tests/public_api.txt
"""

import ast
import dataclasses
import inspect
import types
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import flax.linen as nn

import ava_jax

MODULES = (ava_jax, ava_jax.losses, ava_jax.terms, ava_jax.heads, ava_jax.metrics)
MISSING = inspect.Parameter.empty
# Linen gives these to every module.
OF_LINEN = frozenset({"parent", "name", "setup"})


class Shown:
    """A default as the API shows it: classes and functions by name."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __repr__(self) -> str:
        return getattr(self.value, "__name__", None) or repr(self.value)


def public_names(module: types.ModuleType) -> list[str]:
    """Returns what the module re-exports (`import x as x`) or defines itself."""
    names = ["__version__"] if hasattr(module, "__version__") else []
    for node in ast.parse(Path(str(module.__file__)).read_text()).body:
        if isinstance(node, ast.ImportFrom):
            names += [each.name for each in node.names if each.asname == each.name]
        elif isinstance(node, ast.FunctionDef | ast.ClassDef) and node.name[0] != "_":
            names.append(node.name)
    return sorted(names)


def signature(function: Any) -> str:
    """Returns the parameters with their defaults, without annotations."""
    described = inspect.signature(function)
    parameters = [
        each.replace(
            annotation=MISSING,
            default=MISSING if each.default is MISSING else Shown(each.default),
        )
        for each in described.parameters.values()
    ]
    return str(inspect.Signature(parameters))


def is_shown(cls: type, name: str) -> bool:
    """Returns whether a member is meant for callers."""
    if nn.Module in cls.__mro__ and name in OF_LINEN:
        return False
    return name[0] != "_" or name == "__call__"


def is_ours(owner: Any) -> bool:
    return owner.__module__.partition(".")[0] == ava_jax.__name__


def own_classes(cls: type, public: set[type]) -> list[type]:
    """Returns the class and its bases that have no public name, bases first."""
    above = public.intersection(cls.__mro__[1:])
    others = {base for known in above for base in known.__mro__}
    return [base for base in cls.__mro__ if is_ours(base) and base not in others][::-1]


def default_of(cls: type, name: str) -> object:
    """Returns an attribute's default, or `MISSING`."""
    for field in dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ():
        if field.name == name and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    if tuple in cls.__mro__:  # a NamedTuple
        return vars(cls)["_field_defaults"].get(name, MISSING)
    return getattr(cls, name, MISSING)


def attributes(cls: type, public: set[type]) -> Iterator[str]:
    """Yields the annotated attributes, in order, with their defaults."""
    names = dict.fromkeys(
        name
        for base in own_classes(cls, public)
        for name in inspect.get_annotations(base)
        if is_shown(cls, name)
    )
    for name in names:
        default = default_of(cls, name)
        yield f".{name}" + ("" if default is MISSING else f" = {Shown(default)!r}")


def methods(cls: type) -> Iterator[str]:
    """Yields properties and methods, each at the class that has it first."""
    inherited = {
        name for base in cls.__mro__[1:] if is_ours(base) for name in vars(base)
    }
    for name, member in vars(cls).items():
        if not is_shown(cls, name) or name in inherited:
            continue
        if isinstance(member, property):
            yield f".{name} (property)"
        elif isinstance(member, types.FunctionType) and is_ours(member):
            yield f".{name}{signature(member)}"


def lines_of(name: str, value: Any, public: set[type]) -> Iterator[str]:
    """Yields the lines of one public name."""
    if isinstance(value, type):
        yield name
        yield from (name + each for each in attributes(value, public))
        yield from (name + each for each in methods(value))
    elif isinstance(value, frozenset):
        yield from (f"{name}: {entry!r}" for entry in sorted(value))
    else:
        yield name + (signature(value) if callable(value) else "")


def public_api() -> list[str]:
    """Returns all lines; a second name of an object has one that says so."""
    named = {
        f"{module.__name__}.{name}": getattr(module, name)
        for module in MODULES
        for name in public_names(module)
    }
    public = {value for value in named.values() if isinstance(value, type)}
    first: dict[int, str] = {}
    lines: list[str] = []
    for name, value in named.items():
        if first.setdefault(id(value), name) != name:
            lines.append(f"{name} is {first[id(value)]}")
        else:
            lines += lines_of(name, value, public)
    return lines


if __name__ == "__main__":
    print("\n".join(public_api()))
