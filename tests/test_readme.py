"""The README: short, and saying what the pages say."""

import re

import pytest
from support.pages import DOCS, ROOT, rows_of, split

pytestmark = pytest.mark.every_platform

README = ROOT / "README.md"
PACKAGES = (
    "",
    "ava_jax",
    "MaxText",
    "tokamax",
    "EasyDeL",
    "Levanter",
    "tunix",
    "Liger",
    "optax",
)
TIMES = "\u00d7"


def plain(text: str) -> str:
    return text.replace(TIMES, "x")


PERFORMANCE = plain(split(DOCS / "performance.md")[0])
# By a row of the README, the row of the page and its two cells.
ROWS = {
    "v5p, Llama-3-8B's shape": "| v5p, 16384x4096x128256 |",
    "v5e, 16384x1024x50304": "| v5e, 16384x1024x50304 |",
    "v6e, 8192x2560x151936": "| v6e, 8192x2560x151936 |",
    "v5p, from logits": "| v5p, from logits 16384x128256",
}


def test_it_is_short():
    assert len(README.read_text().splitlines()) <= 110


def test_its_comparison_is_that_of_the_page():
    rows = rows_of(README, *PACKAGES)
    assert rows == rows_of(DOCS / "comparison.md", *PACKAGES)
    assert len(rows) > 10
    assert all(cell for row in rows for cell in row)


def test_versions_and_date_are_those_of_the_page():
    page = split(DOCS / "comparison.md")
    text = re.sub(r"\s+", " ", split(README)[0])
    read = re.search(r"Read in the sources of (.*?) on (\d{4}-\d\d-\d\d)\.", text)
    assert read is not None
    assert f"on {read[2]}" in page[0]
    versions = re.findall(r"([\w-]+) (\d+(?:\.\d+)+)", read[1])
    headings = [heading for heading in page[1] if re.search(r" \d", heading)]
    assert len(versions) == len(headings) == len(PACKAGES) - 2
    for (name, version), heading in zip(versions, headings, strict=True):
        assert heading.startswith(f"{name.removesuffix('-Kernel')} {version}")


@pytest.mark.parametrize("name", ROWS)
def test_its_numbers_are_those_of_the_page(name: str):
    columns = "", "plain: time, memory", "every term on"
    row = next(
        row for row in rows_of(README, *columns) if plain(row[0]).startswith(name)
    )
    line = next(x for x in PERFORMANCE.splitlines() if x.startswith(ROWS[name]))
    without_goals = re.sub(r" \[[\d.]+\]", "", line)
    cells = [cell.strip() for cell in without_goals.strip("|").split("|")]
    assert [cell.removesuffix(" of the logits") for cell in row[1:]] == cells[-2:]


def test_its_numbers_of_maxtext_are_those_of_the_page():
    columns = "loss", "estimated ms a step", "GiB of temporaries a chip"
    page = {row[0]: row[1:] for row in rows_of(DOCS / "performance.md", *columns)}
    numbers = {
        name: [float(cell.split()[0].replace(",", "")) for cell in cells]
        for name, cells in page.items()
    }
    own = numbers["MaxText's own"]
    table = rows_of(README, "", "plain: time, memory", "every term on")
    row = next(row for row in table if row[0].startswith("MaxText"))
    for cell, name in zip(row[1:], ("ours, plain", "ours, everything"), strict=True):
        time, memory = (a / b for a, b in zip(numbers[name], own, strict=True))
        assert cell == f"{time:.2f}, {memory:.2f}"


@pytest.mark.parametrize(
    ("said", "row"),
    [
        ("0.98 of the bytes", "| 16384x4096x128256, to naive | 46.5 (31.4) GiB"),
        (
            "0.77 of the naive time",
            "| fused cross-entropy and gradient, 2048x512x32768",
        ),
        ("0.18 of its memory", "| fused cross-entropy and gradient, 2048x512x32768"),
    ],
)
def test_its_sentences_say_what_the_page_says(said: str, row: str):
    assert said in re.sub(r"\s+", " ", split(README)[0])
    lines = [line for line in PERFORMANCE.splitlines() if line.startswith(row)]
    assert any(f" {said.split()[0]} " in line for line in lines)
