"""The API reference: an entry for every public name, and none for what is gone."""

import functools
import inspect
import re
from types import ModuleType

from support.pages import DOCS

import ava_jax
from ava_jax import heads, losses, metrics, terms

PAGES = sorted((DOCS / "api").rglob("*.md"))
ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)
ENTRIES = [entry for page in PAGES for entry in ENTRY.findall(page.read_text())]


def object_of(entry: str) -> object:
    return functools.reduce(getattr, entry.split(".")[1:], ava_jax)


def public_names(module: ModuleType) -> dict[str, object]:
    """The names that a module offers: of `metrics`, those that it defines itself."""
    return {
        f"{module.__name__}.{name}": value
        for name, value in vars(module).items()
        if not name.startswith("_")
        and not inspect.ismodule(value)
        and (module is not metrics or value.__module__ == module.__name__)
    }


PUBLIC = {
    name: value
    for module in (ava_jax, losses, terms, heads, metrics)
    for name, value in public_names(module).items()
}


def test_every_public_name_has_its_place() -> None:
    """What two modules offer is described once, in either."""
    described = {id(object_of(entry)) for entry in ENTRIES}
    missing = [name for name, value in PUBLIC.items() if id(value) not in described]
    assert len(PUBLIC) > 100
    assert missing == []


def test_the_reference_names_only_what_is_public() -> None:
    assert sorted(set(ENTRIES) - set(PUBLIC)) == []


def test_nothing_is_described_twice() -> None:
    assert len({id(object_of(entry)) for entry in ENTRIES}) == len(ENTRIES)


def test_every_entry_has_something_to_show() -> None:
    """The site leaves out what has no docstring."""
    described = {entry: object_of(entry) for entry in ENTRIES}
    silent = [
        entry
        for entry, value in described.items()
        if (inspect.isclass(value) or inspect.isfunction(value)) and not value.__doc__
    ]
    assert silent == []


def test_pages_are_listed_in_the_overview() -> None:
    overview = (DOCS / "api/index.md").read_text()
    names = [str(page.relative_to(DOCS / "api")) for page in PAGES]
    assert [n for n in names if n != "index.md" and f"({n})" not in overview] == []
