"""The pages: snippets run, tables agree with the code, links lead on."""

import ast
import dataclasses
import functools
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from support.pages import (
    DOCS,
    PAGES,
    ROOT,
    codes,
    models_of,
    rows_of,
    run_section,
    sections,
    split,
)

import ava_jax
from ava_jax import heads, losses, metrics

LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s]+)\)")
ALL_FIELDS = {f.name: f.default for f in dataclasses.fields(ava_jax.UnifiedLossConfig)}

# Snippets ------------------------------------------------------------------------

SECTIONS = [
    pytest.param(page, name, id=f"{page.stem}: {name}")
    for page in PAGES
    for name in sections(page)
    if not models_of(page, name)  # tests/models runs the others
]


@pytest.fixture
def at_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A folder to write to, and the promotion that Adam needs."""
    monkeypatch.chdir(tmp_path)
    with jax.numpy_dtype_promotion("standard"):
        yield


@pytest.mark.usefixtures("at_home")
@pytest.mark.parametrize(("page", "name"), SECTIONS)
def test_snippets_run(page: Path, name: str) -> None:
    run_section(page, name)


def test_every_guide_section_has_a_snippet_or_a_table() -> None:
    text, headings, _ = split(DOCS / "guide.md")
    assert len(headings) > 20
    bare = [
        heading
        for heading in headings[1:]
        if heading not in sections(DOCS / "guide.md")
        and "|" not in text.split(heading + "\n", 1)[1].split("\n## ", 1)[0]
    ]
    assert bare == ["Best practices"]


# Tables --------------------------------------------------------------------------


def default_of(cell: str) -> object:
    return dataclasses.MISSING if cell == "required" else ast.literal_eval(cell)


def test_guide_lists_every_config_field_with_its_default() -> None:
    rows = rows_of(DOCS / "guide.md", "field", "default", "meaning")
    listed = {
        codes(name)[0]: default_of(default.strip("`")) for name, default, _ in rows
    }
    assert len(listed) == len(rows), "a field is listed twice"
    assert listed == ALL_FIELDS
    assert all(len(meaning) > 5 for *_, meaning in rows)


B, S, D, V, K, E = 2, 8, 4, 11, 2, 3
COMMON = {
    "vocab_size": V,
    "hidden_size": D,
    "num_future_tokens": K,
    "eos_token_id": 0,
    "z_loss_weight": 1e-4,
    "unlikelihood_weight": 0.1,
    "contrastive_token_weight": 0.1,
    "use_focal_loss": True,
    "num_experts": E,
    "use_moe_balancing": True,
    "use_auxiliary_loss": True,
    "use_diversity_loss": True,
    "use_contrastive_loss": True,
}
EVERYTHING = (
    {"use_mtp": True},
    {"use_mtp": True, "mtp_type": "adaptive"},
    {"primary_loss_type": "adaptive_mtp"},
    {"use_focal_loss": False},
)


def all_inputs() -> dict[str, Any]:
    module = heads.MTPHeads(num_heads=K, vocab_size=V)
    hidden = jnp.zeros((B, S, D))
    params = jax.eval_shape(module.init, jax.random.key(0), hidden)["params"]
    return {
        "targets": jnp.zeros((B, S), int),
        "logits": jnp.zeros((B, S, V)),
        "hidden_states": hidden,
        "mtp_params": jax.tree.map(lambda x: jnp.zeros(x.shape), params),
        "additional_logits": jnp.zeros((K, B, S, V)),
        "confidence_scores": jnp.zeros((B, 1)),
        "gate_logits": jnp.zeros((B, S, E)),
        "expert_indices": jnp.zeros((B, S, 1), int),
        "expert_outputs": jnp.zeros((E, B, S, D)),
        "embeddings": jnp.zeros((B, D)),
    }


@functools.cache
def all_aux_keys() -> frozenset[str]:
    """The keys of losses that together have everything on."""
    keys: set[str] = set()
    for options in EVERYTHING:
        loss_fn = ava_jax.create_unified_loss(COMMON | options)
        _, aux, _ = jax.eval_shape(
            lambda inputs, loss_fn=loss_fn: loss_fn(
                loss_fn.init(), **loss_fn.select(inputs)
            ),
            all_inputs(),
        )
        keys |= set(aux)
    return frozenset(keys)


def test_guide_lists_every_aux_key() -> None:
    rows = rows_of(DOCS / "guide.md", "key", "present", "meaning")
    listed = [key for name, *_ in rows for key in codes(name)]
    assert sorted(listed) == sorted(all_aux_keys())


TERM_COLUMNS = ("term", "formula", "config", "aux", "function", "source")


def test_terms_name_only_what_exists() -> None:
    rows = rows_of(DOCS / "terms.md", *TERM_COLUMNS)
    fields = {name for row in rows for name in codes(row[2])}
    keys = {name for row in rows for name in codes(row[3])}
    assert fields - set(ALL_FIELDS) == set()
    assert keys - all_aux_keys() == set()
    for row in rows:
        for link in LINK.finditer(row[4]):
            assert_defined_in(codes(link["text"])[0], DOCS / link["target"])


def assert_defined_in(name: str, path: Path) -> None:
    """Fails unless `ava_jax.<name>` exists and the file defines it."""
    owner: Any = ava_jax
    for attribute in name.split("."):
        owner = getattr(owner, attribute)
    source: Any = inspect.unwrap(getattr(owner, "fget", owner))
    assert Path(inspect.getfile(source)).resolve() == path.resolve(), name


def names_of_metrics() -> set[str]:
    """What `ava_jax.metrics` defines or re-exports for callers."""
    own = {
        name
        for name, value in vars(metrics).items()
        if getattr(value, "__module__", "") == metrics.__name__ and name[0] != "_"
    }
    return own | {"max_violation"}


def test_terms_find_everything() -> None:
    page = DOCS / "terms.md"
    named = set(codes(split(page)[0]))
    public = {f"losses.{n}" for n in dir(losses) if callable(getattr(losses, n))}
    public |= {f"heads.{n}" for n in heads.__dict__ if n[0].isupper()}
    public |= {f"metrics.{n}" for n in names_of_metrics()}
    wanted = set(ALL_FIELDS) | all_aux_keys() | public
    assert wanted - named == set()


# Links ---------------------------------------------------------------------------

LINKING = (
    *PAGES,
    *(ROOT / f"{name}.md" for name in ("CHANGELOG", "CONTRIBUTING", "SECURITY")),
    *sorted((DOCS / "api").rglob("*.md")),
)


def slug(heading: str) -> str:
    """GitHub's anchor of a heading."""
    plain = re.sub(r"[^\w\- ]", "", heading.lower())
    return plain.replace(" ", "-")


@pytest.mark.parametrize("page", LINKING, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    text = split(page)[0]
    for match in LINK.finditer(text):
        target, _, anchor = match["target"].partition("#")
        if target.startswith(("http://", "https://", "mailto:")):
            continue
        file = (page.parent / target).resolve() if target else page
        assert file.exists(), f"{page.name}: {match['target']}"
        assert file.is_relative_to(ROOT), f"{page.name}: {match['target']}"
        if anchor:
            anchors = [slug(heading) for heading in split(file)[1]]
            assert anchor in anchors, f"{page.name}: {match['target']}"


def test_citations_name_the_same_version() -> None:
    versions = re.compile(r"^\W*version\W+([\d.]+)", re.MULTILINE)
    named = [
        versions.findall(file.read_text())
        for file in (ROOT / "CITATION.cff", DOCS / "citation.md")
    ]
    assert named[0] == named[1]
    assert len(named[0]) == 1


def test_a_snippet_that_fails_is_reported_with_its_page_and_line(
    tmp_path: Path,
) -> None:
    page = tmp_path / "page.md"
    page.write_text(
        "# T\n\n```python\nx = 1\n```\n\n## A\n\n```python\n\nassert x == 2\n```\n"
    )
    with pytest.raises(AssertionError) as caught:
        run_section(page, "A")
    last = caught.traceback[-1]
    assert (str(last.path), last.lineno + 1) == (str(page), 11)
