"""HTML pages that need nothing but themselves, from templates of Jinja2.

A string that a template shows is escaped unless it is `Markup`, which only btrain's own code and
templates make, so that a class name or a file name can never become an element.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from btrain.errors import printable

_LONGEST = 1000  # characters of one string; a page stays readable whatever its input


def render(room: str, template: str, **values: Any) -> Markup:
    """Return what a template of a room (`btrain.report`), or of this one, makes of values."""
    return Markup(_environment(room).get_template(template).render(values))


def readable(value: Any) -> Any:
    """Return a string without what no one can read, cut when it is very long; others as they are.

    Templates do this to all that they show, ahead of escaping it.
    """
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    shown = value if len(value) <= _LONGEST else value[:_LONGEST] + "…"
    return printable(shown, kept="\t\n\u00a0", instead="\ufffd")


def number(value: float, form: str = ".2f") -> Markup:
    """Return a rounded number that carries all its digits for whoever reads the page by program."""
    return Markup('<data value="{}">{}</data>').format(repr(value), format(value, form))


@cache
def _environment(room: str) -> Environment:
    return Environment(
        loader=ChoiceLoader([PackageLoader(room), PackageLoader("btrain.pages")]),
        autoescape=True,
        finalize=readable,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
