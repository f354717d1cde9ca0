"""The pages' recipes that need the models' packages."""

from pathlib import Path

import pytest
from support.model_checks import REASON, TUNIX_WARNINGS
from support.pages import PAGES, models_of, run_section, sections

RECIPES = [
    (page, name)
    for page in PAGES
    for name in sections(page)
    if set(models_of(page, name)) - {"maxtext"}  # tests/maxtext runs that one
]


@TUNIX_WARNINGS
@pytest.mark.parametrize(("page", "name"), RECIPES, ids=[name for _, name in RECIPES])
def test_recipe_runs(page: Path, name: str) -> None:
    for package in models_of(page, name):
        pytest.importorskip(package, reason=REASON)
    run_section(page, name)


def test_every_model_has_a_recipe() -> None:
    named = {model for recipe in RECIPES for model in models_of(*recipe)}
    assert named == {"penzai", "transformers", "tunix"}
