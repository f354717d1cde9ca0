"""A run's page: one HTML file, with its style, its scripts and its figures inside."""

import base64
import functools
import hashlib
from pathlib import Path

import jinja2
import plotly.io
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from trainer.report.page.content import facts, sections, written
from trainer.report.run_files import RunFiles, is_telling

FOLDER = Path(__file__).parent


def make_page(run: RunFiles) -> str:
    """Returns the page; what comes from the files of the run is text in it."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(FOLDER),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    # Of several encoders, this one can write half a character.
    to_json = functools.partial(plotly.io.to_json, engine="json")
    environment.filters |= {"figure_json": to_json, "written": written}
    scripts = [get_plotlyjs(), (FOLDER / "page.js").read_text()]
    parameters = run.parameters()
    return environment.get_template("page.html").render(
        run=run,
        done=run.records[-1]["step"] if run.records else 0,
        facts=facts(run),
        telling=[p for p in parameters if is_telling(p)],
        others=[p for p in parameters if not is_telling(p)],
        sections=sections(run),
        policy=_policy(scripts),
        style=Markup((FOLDER / "page.css").read_text()),
        scripts=[Markup(script) for script in scripts],
    )


def _policy(scripts: list[str]) -> str:
    """Lets nothing be loaded, and nothing run but the page's own scripts.

    Plotly styles what it draws, and makes an image of each heat map.
    """
    return (
        "default-src 'none'; base-uri 'none'; form-action 'none'; "
        "style-src 'unsafe-inline'; img-src data:; "
        f"script-src {' '.join(map(_digest, scripts))}"
    )


def _digest(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
