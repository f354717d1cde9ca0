"""Hooks of the site: files of the repository and notebooks become pages of it.

Pages link to source files, results and notebooks by relative paths, which a forge
follows. The site has a page for each file that is linked to, a copy of each image and
table, and links to those. In every page, the code of a public name leads to its place
in the API reference.
"""

import functools
import json
import posixpath
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).resolve().parents[2]
# Files of the root that have a page of their own.
PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "index.md",
    "SECURITY.md": "security.md",
}
INCLUDED = ("CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md")
COPIED = {".png", ".json"}
LANGUAGES = {".py": "python", ".css": "css", ".html": "html", ".js": "js"}
LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<target>[^)\s#:]+)(?P<anchor>#[^)\s]*)?\)")
ENTRY = re.compile(r"^::: (\S+)$", re.MULTILINE)
# Elements in which code stays as it is, or else code that may be a public name.
CODE = re.compile(
    r"<(?P<element>a|h[1-6]|pre|autoref)\b.*?</(?P=element)>|<code>(?P<name>[\w.]+)</code>",
    re.DOTALL,
)
CELL = re.compile(r"<td\b.*?</td>", re.DOTALL)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds pages for notebooks, files of the root, and files that pages link to."""
    for notebook in sorted((ROOT / "docs/notebooks").glob("*.ipynb")):
        text = page_of_notebook(notebook)
        uri = f"notebooks/{notebook.stem}.md"
        files.append(File.generated(config, uri, content=text))
    for name in INCLUDED:
        text = (ROOT / name).read_text()
        files.append(File.generated(config, PAGES[name], content=text))
    linked = {
        path
        for file in files.documentation_pages()
        for _, path in repository_links(file.content_string, file.src_uri)
        if place_of(path).startswith("source/")
    }
    for path in sorted(linked):
        files.append(file_of(path, config))
    return files


def on_page_markdown(markdown: str, page: Page, **_: object) -> str:
    """Leads links to files of the repository to their places in the site."""
    uri = page.file.src_uri
    for match, path in reversed(list(repository_links(markdown, uri))):
        name = public_names().get(match["text"].strip("`"))
        if name and path.startswith("ava_jax/"):
            link = f"[{match['text']}][{name}]"
        else:
            target = posixpath.relpath(place_of(path), posixpath.dirname(uri) or ".")
            link = f"[{match['text']}]({target}{match['anchor'] or ''})"
        markdown = markdown[: match.start()] + link + markdown[match.end() :]
    return markdown


def on_page_content(html: str, page: Page, **_: object) -> str:
    """Links code that is a public name, and lets tables break lines within names."""
    if page.file.src_uri.startswith("source/"):
        return html
    names = public_names(bare=page.file.src_uri.startswith("api/"))

    def link(match: re.Match[str]) -> str:
        name = names.get(match["name"] or "")
        if not name:
            return match[0]
        return f'<autoref identifier="{name}" optional>{match[0]}</autoref>'

    return CELL.sub(breakable, CODE.sub(link, html))


def breakable(cell: re.Match[str]) -> str:
    """Allows a line to end after the underscores and full stops of a cell's code."""
    names = re.compile(r"(?<=<code>)[^<]+")
    return names.sub(lambda m: re.sub(r"([_.])(?=\w)", r"\1<wbr>", m[0]), cell[0])


@functools.cache
def public_names(bare: bool = False) -> dict[str, str]:
    """Returns the entries of the reference by the ways to write them.

    `ava_jax.` may be left out. A name without a module has to be the package's own, and
    have an underscore or a capital; else it could be any word, or another's class.

    Args:
      bare: takes classes of all modules without their module, as docstrings do.
    """
    names: dict[str, str] = {}
    for page in sorted((ROOT / "docs/api").rglob("*.md")):
        for entry in ENTRY.findall(page.read_text()):
            module, _, name = entry.rpartition(".")
            names |= {entry: entry}
            if module != "ava_jax":
                names |= {entry.removeprefix("ava_jax."): entry}
            is_class = re.search("[A-Z]", name) is not None
            if (bare and is_class) or (
                module == "ava_jax" and (is_class or "_" in name)
            ):
                names.setdefault(name, entry)
    return names


def repository_links(markdown: str, uri: str) -> Iterator[tuple[re.Match[str], str]]:
    """Yields the links of a page of the site, with their paths in the repository."""
    home = next((n for n in INCLUDED if PAGES[n] == uri), f"docs/{uri}")
    for match in LINK.finditer(markdown):
        target = posixpath.join(posixpath.dirname(home), match["target"])
        path = posixpath.normpath(target)
        if (ROOT / path).exists():  # else it is of another site, or no link but code
            yield match, path


def place_of(path: str) -> str:
    """Returns the place in the site of a file or folder of the repository."""
    if path in PAGES:
        return PAGES[path]
    if path.startswith("docs/"):
        return path.removeprefix("docs/").replace(".ipynb", ".md")
    if (ROOT / path).is_dir():
        return f"source/{path}/index.md"
    return f"source/{path}" if Path(path).suffix in COPIED else f"source/{path}.md"


def file_of(path: str, config: MkDocsConfig) -> File:
    """Returns a page of a file or folder of the repository, or a copy of it."""
    source, place = ROOT / path, place_of(path)
    hidden = InclusionLevel.NOT_IN_NAV
    if source.suffix in COPIED:
        return File.generated(config, place, abs_src_path=str(source))
    if source.is_dir():
        names = sorted(entry.name for entry in source.iterdir())
        body = "\n".join(f"- `{n}`" for n in names if n != "__pycache__")
    else:
        language = LANGUAGES.get(source.suffix, "text")
        body = f"``````{language}\n{source.read_text()}\n``````"
    head = f"---\ntitle: {path}\nsearch:\n  exclude: true\nhide: [toc]\n---\n"
    text = f"{head}\n# {path}\n\n{body}\n"
    return File.generated(config, place, content=text, inclusion=hidden)


def page_of_notebook(path: Path) -> str:
    """Returns a notebook's cells and their outputs as Markdown."""
    parts = []
    for cell in json.loads(path.read_text())["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
        else:
            parts.append(f"```python\n{source}\n```")
            parts.extend(map(output_of, cell["outputs"]))
    parts.append(f'<a href="{path.name}" download>Download this notebook</a>')
    return "\n\n".join(parts)


def output_of(output: dict[str, Any]) -> str:
    """Returns what a cell has printed or drawn as Markdown."""
    if output["output_type"] == "stream":
        text = "".join(output["text"])
    elif "image/png" in output["data"]:
        return f"![output](data:image/png;base64,{output['data']['image/png'].strip()})"
    else:
        text = "".join(output["data"]["text/plain"])
    return f"``` {{ .text .output }}\n{text.rstrip()}\n```"
