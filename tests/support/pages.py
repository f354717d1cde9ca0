"""The pages of the documentation: headings, tables and snippets.

Snippets above a page's first `##` heading are its start; each section runs in a fresh
namespace after the start, so a reader may copy the two together.
"""

import dataclasses
import functools
import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
PAGES = (ROOT / "README.md", *sorted(DOCS.glob("*.md")))
HEADING = re.compile(r"(#+) +(.+)")
CODE = re.compile(r"`([^`]+)`")
MODELS = re.compile(r"^from (maxtext|penzai|transformers|tunix)\b", re.MULTILINE)


@dataclasses.dataclass(frozen=True)
class Snippet:
    """One fenced block; `line` is the page's line of its first statement."""

    section: str
    line: int
    source: str


@functools.cache
def split(page: Path) -> tuple[str, tuple[str, ...], tuple[Snippet, ...]]:
    """A page's text without fenced blocks, its headings, and its Python blocks."""
    text, headings, snippets, block = [], [], [], []
    fence, start, section = None, 0, ""
    for number, line in enumerate(page.read_text().splitlines(), start=1):
        if line.startswith("```"):
            if fence == "python":
                snippets.append(Snippet(section, start, "\n".join(block)))
            fence = None if fence is not None else line[3:].strip()
            start, block = number + 1, []
        elif fence is not None:
            block.append(line)
        else:
            text.append(line)
            if match := HEADING.fullmatch(line):
                headings.append(match[2])
                section = match[2] if match[1] == "##" else section
    assert fence is None, f"{page.name}: a fence is not closed"
    return "\n".join(text), tuple(headings), tuple(snippets)


def sections(page: Path) -> dict[str, list[Snippet]]:
    """The snippets of each section, the page's start first."""
    snippets = split(page)[2]
    start = [s for s in snippets if not s.section]
    names = dict.fromkeys(s.section for s in snippets if s.section)
    return {n: start + [s for s in snippets if s.section == n] for n in names}


def rows_of(page: Path, *columns: str) -> list[list[str]]:
    """The cells of every table of the page that has exactly these columns."""
    rows, inside = [], False
    for line in split(page)[0].splitlines():
        cells = [cell.strip() for cell in line.strip().strip("|").split("|")]
        if not line.startswith("|"):
            inside = False
        elif cells == list(columns):
            inside = True
        elif inside and not set(line) <= set("|-: "):
            assert len(cells) == len(columns), f"{page.name}: {line}"
            rows.append(cells)
    assert rows, f"{page.name} has no table with the columns {columns}"
    return rows


def codes(cell: str) -> list[str]:
    return CODE.findall(cell)


def models_of(page: Path, name: str) -> list[str]:
    """The packages, of the models extra or MaxText, that a section imports."""
    return [m for s in sections(page)[name] for m in MODELS.findall(s.source)]


def run_section(page: Path, name: str) -> None:
    """Runs a section's snippets; an error names the page and its line."""
    namespace: dict[str, Any] = {"__name__": "snippet"}
    for snippet in sections(page)[name]:
        source = "\n" * (snippet.line - 1) + snippet.source
        exec(compile(source, str(page), "exec"), namespace)
