"""Tables for the terminal, as Markdown, as CSV and as HTML."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

from markupsafe import Markup

from btrain.errors import printable
from btrain.pages.html import render

NONE = "–"
"""A cell without a value."""


def text(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table for the terminal: the first column flush left, the others flush right.

    A row of one cell stands as it is.
    """
    lines = [[*map(printable, cells)] for cells in (head, *rows)]
    widths = _widths(lines)

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=len(cells) > 1)
        return "  ".join([str.ljust(*first), *(" " * (width - len(c)) + c for c, width in others)])

    return "\n".join(cells[0] if len(cells) == 1 else line(cells) for cells in lines)


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table whose columns are aligned in the source as well, its cells escaped."""
    return aligned(compact(head, rows))


def compact(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table for a file: a longer cell changes its own line alone."""
    lines = [f"| {' | '.join(map(plain, cells))} |" for cells in (head, *rows)]
    return "\n".join([lines[0], f"|{len(head) * '---|'}", *lines[1:]])


def aligned(document: str) -> str:
    """Return a Markdown document with the columns of its tables aligned, for the terminal."""
    shown: list[str] = []
    for is_table, lines in groupby(document.split("\n"), lambda line: line.startswith("|")):
        if not is_table:
            shown += lines
            continue
        head, _, *rows = (
            [cell.strip() for cell in re.split(r" \|(?= |$)", line[1:])[:-1]] for line in lines
        )
        widths = _widths([head, *rows])
        for cells in (head, *rows):
            shown.append(f"| {' | '.join(map(str.ljust, cells, widths))} |")
            if cells is head:
                shown.append(f"|{'|'.join('-' * (width + 2) for width in widths)}|")
    return "\n".join(shown)


def plain(words: str) -> str:
    """Return text that no Markdown takes for markup, on one printable line."""
    words = printable(" ".join(words.split()))
    for character in "\\|<>*`[]":
        words = words.replace(character, f"\\{character}")
    return words


def comma_separated(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a CSV file; None is an empty cell, and no text is a formula for a spreadsheet."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    for cells in rows:
        writer.writerow(["" if cell is None else _harmless(cell) for cell in cells])
    return file.getvalue()


@dataclass(frozen=True)
class Cell:
    """A cell of an HTML table.

    Attributes:
        small: words in small print under the text.
        style, kind, title: the attributes of the element, `kind` its class.
    """

    text: str
    small: str = ""
    style: str = ""
    kind: str = ""
    title: str = ""


def html(
    head: Sequence[str], rows: Iterable[Sequence[Cell | str]], kind: str, *, named: bool = True
) -> Markup:
    """Return a table that scrolls within itself where the screen is narrow.

    A row of one cell is a heading of those below it.

    Args:
        kind: the classes of the table.
        named: the first cell of a row is its name.
    """
    cells = [[c if isinstance(c, Cell) else Cell(c) for c in row] for row in rows]
    return render(__package__, "table.html", head=head, rows=cells, kind=kind, named=named)


def _widths(lines: Sequence[Sequence[str]]) -> list[int]:
    columns = zip(*(cells for cells in lines if len(cells) == len(lines[0])), strict=True)
    return [max(map(len, column)) for column in columns]


def _harmless(cell: Any) -> Any:
    """Return a text that a spreadsheet would take for a formula marked as text, and printable."""
    if not isinstance(cell, str):
        return cell
    shown = printable(cell)
    return f"'{shown}" if shown[:1] in ("=", "+", "@", "-") else shown
