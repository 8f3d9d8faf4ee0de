"""A sheet as one self-contained page, and the list of all sheets."""

from __future__ import annotations

import base64

from btrain.paper.sheets import heat
from btrain.paper.sheets.sheet import Sheet
from btrain.paper.sheets.table import (
    CLAIMS,
    GAP,
    NONE,
    PAPER,
    claim_text,
    head_and_rows,
    legend,
    machines,
    status,
)
from btrain.paper.sheets.text import row_notes
from btrain.report import html
from btrain.report.html import Markup, element

_CLASS_OF = {"holds": "passed", "fails": "suspicious"}
_MARK_OF = {"holds": "✓ ", "fails": "✗ "}


def sheet_page(sheet: Sheet, picture: bytes | None, missing: str | None) -> str:
    """The page of one target.

    Args:
        picture: an SVG of our own making.
        missing: why there is no picture, if there is none.
    """
    plan = sheet.plan
    title = f"{plan.target}: {plan.title}"
    return html.page(
        title,
        element("p", element("a", "all targets", href="index.html"), class_="soft"),
        element("h1", plan.title),
        element("p", f"{plan.target}, profile {plan.profile}: {status(sheet)}.", class_="soft"),
        element("p", plan.note) if plan.note else Markup(),
        _common(sheet),
        _picture(sheet, picture, missing),
        _grids(sheet) if plan.kind == "heatmaps" else _table(sheet),
        element("p", " ".join(legend(sheet)), class_="soft"),
        _trained_on(sheet),
        _claims(sheet),
        element(
            "footer",
            element("p", "The same numbers: ", *_links(plan.target, picture is not None), "."),
        ),
    )


def _common(sheet: Sheet) -> Markup:
    if not sheet.notes:
        return Markup()
    return element("p", f"All rows: {', '.join(sheet.notes)}.", class_="warning")


def _picture(sheet: Sheet, picture: bytes | None, missing: str | None) -> Markup:
    if picture is None:
        return element("p", missing or "No picture.", class_="absent")
    source = "data:image/svg+xml;base64," + base64.b64encode(picture).decode("ascii")
    description = f"{sheet.plan.title}; the numbers are in the table below"
    return element("figure", html.image(source, description), class_="drawing")


def _table(sheet: Sheet) -> Markup:
    """The table, the paper's numbers in small print under ours."""
    head, rows = head_and_rows(sheet)
    shown = []
    for line, (label, *cells) in zip(sheet.lines, rows, strict=True):
        note = ", ".join(line.notes)
        name = html.together(label, element("small", note)) if note else html.text(label)
        columns: list[list[str]] = []
        for title, cell in zip(head[1:], cells, strict=True):
            if title in (PAPER, GAP):
                columns[-1].append(cell)
            else:
                columns.append([cell])
        row = [element("th", name, scope="row"), *(_cell(*column) for column in columns)]
        shown.append(element("tr", *row))
    return html.table([t for t in head if t not in (PAPER, GAP)], shown, class_="lines sheet")


def _cell(ours: str, paper: str = NONE, gap: str = NONE) -> Markup:
    """Our number, and under it the paper's with the difference."""
    if paper == NONE:
        return element("td", ours)
    beside = f"paper {paper}" if gap == NONE else f"paper {paper} ({gap})"
    return element("td", ours, element("small", beside))


def _grids(sheet: Sheet) -> Markup:
    tables, attack = [], heat.attack_words(sheet)
    for grid in heat.grids(sheet):
        rows = []
        for y in grid.steps:
            cells = (grid.cells.get((x, y)) for x in grid.steps)
            shown = ("–" if cell is None else f"{cell:.1f}" for cell in cells)
            head = element("th", str(y), scope="row")
            rows.append(element("tr", head, *(element("td", cell) for cell in shown)))
        summary = f"robust accuracy (%, {attack}) with {grid.zero} = 0, in numbers"
        columns = [f"{grid.y} ↓ {grid.x} →", *map(str, grid.steps)]
        tables.append(
            element(
                "details",
                element("summary", summary),
                html.table(columns, rows, class_="lines narrow"),
            )
        )
    noted = element("ul", *(element("li", note) for note in row_notes(sheet)))
    return html.together(*tables, noted if row_notes(sheet) else "")


def _trained_on(sheet: Sheet) -> Markup:
    found = machines(sheet)
    return element("p", f"Trained on: {'; '.join(found)}.", class_="soft") if found else Markup()


def _claims(sheet: Sheet) -> Markup:
    if not sheet.verdicts:
        return Markup()
    items = [
        element(
            "li",
            element(
                "span",
                _MARK_OF.get(found.verdict, "") + found.verdict,
                class_=_CLASS_OF.get(found.verdict, "skipped"),
            ),
            element("span", found.claim.text),
            element("small", claim_text(sheet, found)),
        )
        for found in sheet.verdicts
    ]
    return html.together(
        element("h2", "Claims"),
        element("p", CLAIMS, class_="soft"),
        element("ul", *items, class_="checks"),
    )


def _links(target: str, with_picture: bool) -> list[Markup | str]:
    kinds = ["md", "csv", "json", *(["png", "svg"] if with_picture else [])]
    names = [f"{target}.{kind}" for kind in kinds]
    found: list[Markup | str] = []
    for name in names:
        found += [", "] if found else []
        found.append(element("a", name, href=name))
    return found


def index_page(sheets: list[tuple[Sheet, bool]]) -> str:
    """All targets, a line of status each; the flag tells which have a page."""
    rows = []
    for sheet, linked in sheets:
        plan = sheet.plan
        page = f"{plan.target}.html"
        name = element("a", plan.target, href=page) if linked else html.text(plan.target)
        rows.append(
            element(
                "tr",
                element("th", name, scope="row"),
                element("td", html.together(plan.title, element("small", status(sheet)))),
                element("td", plan.profile),
            )
        )
    return html.page(
        "The paper's tables and figures",
        element("h1", "The paper's tables and figures"),
        html.table(["target", "title and state", "profile"], rows, class_="lines sheet wrapping"),
    )
