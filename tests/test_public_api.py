"""The public API is what `tests/public_api.txt` lists, name by name."""

import dataclasses
import difflib
import types
from pathlib import Path

import pytest

import ava_jax
from tools import public_api

LISTING = Path(__file__).parent / "public_api.txt"
UPDATE = "python -m tools.public_api > tests/public_api.txt"


def listed() -> list[str]:
    return LISTING.read_text().splitlines()


def test_the_api_is_the_one_that_is_listed() -> None:
    difference = [
        line
        for line in difflib.unified_diff(listed(), public_api.public_api(), n=0)
        if line[0] in "+-" and line[:3] not in ("+++", "---")
    ]
    changes = "\n".join(difference)
    assert not difference, (
        f"the public API has changed:\n{changes}\nWhat users rely on keeps its names, "
        "parameters and defaults. If the change is meant, list it in CHANGELOG.md and "
        f"run: {UPDATE}"
    )


def test_every_name_of_the_package_is_listed() -> None:
    for module in (ava_jax, ava_jax.losses, ava_jax.terms, ava_jax.heads):
        found = {
            name
            for name, value in vars(module).items()
            if name[0] != "_" and not isinstance(value, types.ModuleType)
        }
        assert found - set(public_api.public_names(module)) == set()


def test_every_config_field_is_listed_with_its_default() -> None:
    for field in dataclasses.fields(ava_jax.UnifiedLossConfig):
        name = f"ava_jax.UnifiedLossConfig.{field.name}"
        has_default = field.default is not dataclasses.MISSING
        assert (f"{name} = {field.default!r}" if has_default else name) in listed()


def changed() -> set[str]:
    return set(public_api.public_api()) ^ set(listed())


def test_a_renamed_parameter_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    def renamed(chosen, refused, *, beta=0.1):
        return chosen, refused, beta

    monkeypatch.setattr(ava_jax.losses, "orpo_loss", renamed)
    name = "ava_jax.losses.orpo_loss"
    assert changed() == {
        f"{name}(chosen, rejected, *, beta=0.1)",
        f"{name}(chosen, refused, *, beta=0.1)",
    }


def test_a_changed_default_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ava_jax.terms.FocalLoss, "gamma", 3.0)
    name = "ava_jax.terms.FocalLoss.gamma"
    assert changed() == {f"{name} = 2.0", f"{name} = 3.0"}


def test_a_removed_method_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(ava_jax.UnifiedLoss, "select")
    assert changed() == {"ava_jax.UnifiedLoss.select(self, inputs)"}


def test_a_new_method_shows(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ava_jax.LossState, "size", property(len), raising=False)
    assert changed() == {"ava_jax.LossState.size (property)"}


def test_names_are_what_modules_define_or_reexport(tmp_path: Path) -> None:
    source = (
        "import os\nfrom a import b as b, c as _c, d\n"
        "def f(): ...\ndef _g(): ...\nclass C: ...\n"
    )
    module = types.ModuleType("module")
    module.__file__ = str(tmp_path / "module.py")
    Path(module.__file__).write_text(source)
    assert public_api.public_names(module) == ["C", "b", "f"]
