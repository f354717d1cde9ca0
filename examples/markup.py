"""HTML and SVG from Python: a string is text, and escaped, unless it is `Html`."""

import html
from collections.abc import Iterable, Sequence

VOID = ("meta",)


class Html(str):
    """Finished markup."""

    __slots__ = ()


def element(name: str, /, *children: str, **attributes: str | float) -> Html:
    """Makes one element.

    Args:
      name: of the tag.
      *children: text, which is escaped, or `Html`.
      **attributes: `aria_label` becomes `aria-label`, and `class_` `class`.

    Example:
      >>> element("p", "a < ", element("b", "c"), class_="x")
      '<p class="x">a &lt; <b>c</b></p>'
    """
    opening = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_value(value))}"'
        for key, value in attributes.items()
    )
    if name in VOID:
        return Html(f"<{opening}>")
    return Html(f"<{opening}>{join(children)}</{name}>")


def join(children: Iterable[str]) -> Html:
    """Puts pieces side by side; text among them is escaped."""
    return Html(
        "".join(
            piece if isinstance(piece, Html) else html.escape(piece)
            for piece in children
        )
    )


def section(name: str, title: str, *content: Html) -> Html:
    """A part of the page that its table of contents leads to."""
    heading = element("h2", title, id=f"{name}-title")
    return element(
        "section", heading, *content, id=name, aria_labelledby=f"{name}-title"
    )


def not_yet(text: str) -> Html:
    """Says what is missing, and when it will be there."""
    return element("p", f"Not yet: {text}", class_="missing")


def table(caption: str, columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Html:
    """A table whose first column names its rows."""
    head = element("tr", *(element("th", name, scope="col") for name in columns))
    body = [
        element(
            "tr",
            element("th", row[0], scope="row"),
            *(element("td", cell) for cell in row[1:]),
        )
        for row in rows
    ]
    return element(
        "div",
        element(
            "table",
            element("caption", caption),
            element("thead", head),
            element("tbody", *body),
        ),
        class_="scroll",
    )


def figure(title: str, chart: Html, below: Html, notes: Sequence[str] = ()) -> Html:
    """A chart with its title and what explains it."""
    caption = [element("h3", title)]
    if notes:
        caption.append(element("p", "; ".join(notes), class_="note"))
    return element("figure", element("figcaption", *caption), chart, below)


def _value(value: str | float) -> str:
    return value if isinstance(value, str) else f"{round(value, 2):g}"
