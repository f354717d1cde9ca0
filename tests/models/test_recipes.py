"""The pages' recipes that need the models' packages."""

from pathlib import Path

import pytest
import test_docs
from model_checks import REASON, TUNIX_WARNINGS

RECIPES = [
    (page, name)
    for page in test_docs.PAGES
    for name in test_docs.sections(page)
    if test_docs.models_of(page, name)
]


@TUNIX_WARNINGS
@pytest.mark.parametrize(("page", "name"), RECIPES, ids=[name for _, name in RECIPES])
def test_recipe_runs(page: Path, name: str) -> None:
    for package in test_docs.models_of(page, name):
        pytest.importorskip(package, reason=REASON)
    test_docs.test_snippets_run(page, name)


def test_every_model_has_a_recipe() -> None:
    named = {model for recipe in RECIPES for model in test_docs.models_of(*recipe)}
    assert named == {"penzai", "transformers", "tunix"}
