"""HTML pages that need nothing but themselves: elements, and the frame of a page.

A string put into an element is escaped unless it is `Markup`, which only this package makes, so
that a class name or a file name can never become an element.
"""

from __future__ import annotations

import re
from html import escape
from importlib import resources

_LONGEST = 1000  # characters of one string; a page stays readable whatever its input
_UNREADABLE = re.compile(
    # control characters, lone surrogates (valid in JSON, in no file), reversals of direction
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\u202a-\u202e\u2066-\u2069]"
)
_VOID = {"br", "img", "meta"}
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"


class Markup(str):
    """HTML that stands as it is."""

    __slots__ = ()


def text(value: str) -> Markup:
    """A string as text: escaped, without what no one can read, and cut when it is very long."""
    shown = value if len(value) <= _LONGEST else value[:_LONGEST] + "…"
    return Markup(escape(_UNREADABLE.sub("\ufffd", shown)))


def element(name: str, /, *children: str, **attributes: str) -> Markup:
    """<name attributes>children</name>; `class_` stands for class, `_` in a name for a hyphen."""
    head = name + "".join(
        f' {key.rstrip("_").replace("_", "-")}="{text(value)}"' for key, value in attributes.items()
    )
    if name in _VOID:
        return Markup(f"<{head}>")
    return Markup(f"<{head}>{together(*children)}</{name}>")


def together(*children: str) -> Markup:
    """Children side by side, what is not `Markup` escaped."""
    return Markup("".join(c if isinstance(c, Markup) else text(c) for c in children))


def image(source: str, description: str) -> Markup:
    """A picture from a data URI of our own making, however long."""
    return Markup(f'<img src="{escape(source)}" alt="{text(description)}">')


def table(head: list[str], rows: list[Markup], *, class_: str) -> Markup:
    """A table that scrolls within itself where the screen is narrow."""
    titles = element("tr", *(element("th", title, scope="col") for title in head))
    content = element("thead", titles) + element("tbody", *rows)
    return element("div", element("table", Markup(content), class_=class_), class_="scroll")


def page(title: str, *sections: Markup) -> str:
    """A whole document with its style; it runs no script and may load nothing."""
    style = resources.files(__package__).joinpath("page.css").read_text(encoding="utf-8")
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=_POLICY),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("title", title),
        Markup(f"<style>\n{style}</style>"),
    )
    body = element("body", element("main", *sections))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
