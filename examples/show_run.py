"""Turns a run's folder into one page that a browser opens without a network.

    python examples/show_run.py runs/demo
    python examples/show_run.py runs/demo --out report.html

It works at any time, also while the run goes on. Exit code 1: the folder is no run, or
the page cannot be written; stderr says why.
"""

import argparse
import base64
import hashlib
import sys
from collections.abc import Sequence
from pathlib import Path

from markup import Html, element, section
from sections import (
    SCHEDULES,
    TERMS,
    curves,
    experts,
    head_of_page,
    heads,
    heldout_table,
    samples,
    terms_table,
)
from trainer.errors import TrainingError
from trainer.report.run_files import RunFiles, read_run

FOLDER = Path(__file__).parent


def make_page(run: RunFiles) -> str:
    """Returns the page: one file, with its style and its script inside."""
    style = (FOLDER / "show_run.css").read_text()
    script = (FOLDER / "show_run.js").read_text()
    body = element(
        "body",
        head_of_page(run),
        *_content(run),
        element("script", Html(script)),
    )
    page = element("html", _head(run, style, script), body, lang="en")
    return f"<!DOCTYPE html>\n{page}\n"


def _head(run: RunFiles, style: str, script: str) -> Html:
    # Nothing but these two may run or load, whatever the files of a run hold.
    policy = (
        f"default-src 'none'; style-src '{_digest(style)}'; "
        f"script-src '{_digest(script)}'"
    )
    return element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", f"{run.name} · training run"),
        element("style", Html(style)),
    )


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"sha256-{base64.b64encode(digest).decode()}"


def _content(run: RunFiles) -> list[Html]:
    """The table of contents and the sections."""
    parts = {
        "terms": ("Loss terms", [curves(run, TERMS), terms_table(run)]),
        "schedules": ("Temperature, learning rate, gradient", [curves(run, SCHEDULES)]),
    }
    if run.experts:
        parts["experts"] = ("Load of the experts", [experts(run)])
    parts |= {
        "heads": ("Accuracy by head", [heads(run)]),
        "heldout": ("Held-out metrics", [heldout_table(run)]),
        "samples": ("Samples", [samples(run)]),
    }
    links = (
        element("li", element("a", title, href=f"#{name}"))
        for name, (title, _) in parts.items()
    )
    contents = element("nav", element("ul", *links), aria_label="contents")
    body = (section(name, title, *pieces) for name, (title, pieces) in parts.items())
    return [contents, element("main", *body)]


def main(arguments: Sequence[str]) -> int:
    """Runs the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        prog="show_run.py", description="Turn a run's folder into one HTML page."
    )
    parser.add_argument("run", type=Path, help="folder of the run")
    parser.add_argument("--out", type=Path, help="the page; default RUN/report.html")
    given = parser.parse_args(arguments)
    out = given.out or given.run / "report.html"
    try:
        page = make_page(read_run(given.run))
        _write(out, page)
    except (TrainingError, ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"Written: {out}")
    return 0


def _write(path: Path, page: str) -> None:
    try:
        # Text of a run may hold half a character, which UTF-8 cannot write.
        path.write_bytes(page.encode("utf-8", "replace"))
    except OSError as error:
        raise TrainingError(f"cannot write {path}: {error.strerror}") from error


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
