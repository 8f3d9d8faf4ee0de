"""The files of a sheet: Markdown, CSV, JSON, a page and a picture, and an index of all sheets."""

from __future__ import annotations

import base64
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any
from urllib.parse import quote

from markupsafe import Markup

from btrain.durable import make_folder, real, write_files
from btrain.errors import UserError
from btrain.pages import tables
from btrain.pages.html import render
from btrain.pages.pictures import NO_MATPLOTLIB, is_available
from btrain.pages.tables import NONE, Cell, comma_separated, plain
from btrain.paper.plan import chosen, plans_in
from btrain.paper.sheets import pictures
from btrain.paper.sheets.arithmetic import interval, spread
from btrain.paper.sheets.sheet import FLOPS, MEASURED, SUMMARY, Line, Sheet, make_sheet
from btrain.paper.sheets.table import (
    CLAIMS,
    GAP,
    PAPER,
    attack_words,
    claim_text,
    grid_table,
    grids,
    head_and_rows,
    legend,
    machines,
    paper,
    status,
)
from btrain.runs.json_fields import dumped
from btrain.runs.read import Run, Runs
from btrain.terminal import say, show

_MARKS = {"holds": ("passed", "✓ "), "fails": ("suspicious", "✗ ")}
"""verdict -> class and mark on the page"""


def show_sheets(
    folder: Path,
    out: Path,
    targets: Sequence[str] | None,
    read: Callable[[Path], Run] | None = None,
) -> list[Path]:
    """Write the sheets of a folder of plans, and show their tables; return the files.

    Raises:
        UserError: as `write_sheets`.
    """
    written = write_sheets(folder, out, targets, read)
    for path in written:
        if path.suffix == ".md":
            show(tables.aligned(path.read_text(encoding="utf-8")))
    if not is_available():
        show(NO_MATPLOTLIB)
    say(f"{len(written)} files in {out}; to look at: {out / 'index.html'}")
    return written


def write_sheets(
    folder: Path,
    out: Path,
    targets: Sequence[str] | None = None,
    read: Callable[[Path], Run] | None = None,
) -> list[Path]:
    """Write the files of every plan, and `index.html` with a line for each.

    They are `<target>.md`, `.csv`, `.json`, `.html`, `.png` and `.svg`, a pure function of the
    plans and the run folders: the same files give the same bytes. All are made before the first is
    written, and none takes its place before all are on the disk. Without matplotlib the pictures
    are missing, and the pages say so.

    Args:
        folder: holds the plans, and the runs that they name.
        out: is made where there is none.
        targets: these alone; None for all.
        read: makes a run of its folder; None reads each folder once, also if targets share it.

    Raises:
        UserError: there is no plan, or none of a target's name, or it is damaged, or `out` is the
            plans' own folder or cannot be written.
    """
    plans = plans_in(folder)
    wanted = list(chosen(plans, targets, folder))
    if real(out) == real(folder):
        raise UserError(f"out={out} holds the plans, whose files the report's would replace.")
    read = read or Runs().read
    sheets = {target: make_sheet(plan, folder, read) for target, plan in plans.items()}
    contents: dict[str, bytes] = {}
    for target in wanted:
        contents |= sheet_files(sheets[target])
    linked = [
        (sheet, f"{target}.html" in contents or (out / f"{target}.html").is_file())
        for target, sheet in sheets.items()
    ]
    contents["index.html"] = index_page(linked).encode()
    make_folder(out, within=folder if folder in out.parents else None)
    write_files({out / name: content for name, content in contents.items()})
    for target in wanted:  # of an earlier report, of which it would now tell a lie
        for kind in ("png", "svg"):
            if f"{target}.{kind}" not in contents:
                (out / f"{target}.{kind}").unlink(missing_ok=True)
    return [out / name for name in contents]


def sheet_files(sheet: Sheet) -> dict[str, bytes]:
    """Return the files of one sheet by their names."""
    target = sheet.plan.target
    drawn = pictures.draw(sheet) if is_available() else {}
    found = {f"{target}.{kind}": content for kind, content in drawn.items()}
    missing = "No picture: nothing is finished yet." if is_available() else NO_MATPLOTLIB
    shown = markdown(sheet, f"{target}.png") if drawn else f"{markdown(sheet)}\n{missing}\n"
    found |= {
        f"{target}.md": shown.encode(),
        f"{target}.csv": as_csv(sheet).encode(),
        f"{target}.json": as_json(sheet).encode(),
        f"{target}.html": sheet_page(sheet, drawn.get("svg"), missing).encode(),
    }
    return {name: found[name] for name in sorted(found)}


def markdown(sheet: Sheet, picture: str | None = None) -> str:
    """Return a Markdown file: the table with what must be known beside it.

    Args:
        picture: the name of a file to show under the table.
    """
    plan = sheet.plan
    parts = [f"# {plain(plan.title)}", f"Profile {plain(plan.profile)}: {status(sheet)}."]
    parts += [plain(plan.note)] if plan.note else []
    if sheet.notes:
        parts.append(f"**All rows:** {plain(', '.join(sheet.notes))}.")
    if plan.kind == "heatmaps":
        for grid in grids(sheet):
            title = f"Robust accuracy (%, {attack_words(sheet)}) with {grid.zero} = 0"
            parts += [title, tables.compact(*grid_table(grid))]
        parts += [_list(map(plain, row_notes(sheet)))] if row_notes(sheet) else []
    else:
        head, rows = head_and_rows(sheet)
        notes = [", ".join(line.notes) for line in sheet.lines]
        if any(notes):
            head = [*head, "notes"]
            rows = [[*row, note] for row, note in zip(rows, notes, strict=True)]
        parts.append(tables.compact(head, rows))
    parts += [plain(" ".join(legend(sheet)))]
    if found := machines(sheet):
        parts.append(f"Trained on: {plain('; '.join(found))}.")
    if sheet.verdicts:
        claims = [
            f"**{plain(v.verdict)}** – {plain(v.claim.text)} ({plain(claim_text(sheet, v))})"
            for v in sheet.verdicts
        ]
        parts.append(f"## Claims\n\n{plain(CLAIMS)}\n\n{_list(claims)}")
    if picture is not None:
        parts.append(f"![{plain(plan.title)}]({quote(picture)})")
    return "\n\n".join(parts) + "\n"


def row_notes(sheet: Sheet, most: int = 20) -> list[str]:
    """Return rows with notes of their own, for a sheet that shows no row by itself."""
    noted = [f"{line.row.label}: {', '.join(line.notes)}" for line in sheet.lines if line.notes]
    more = [f"{len(noted) - most} more rows with notes, in the CSV"] if len(noted) > most else []
    return noted[:most] + more


def _list(items: Iterable[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def metrics(sheet: Sheet) -> list[str]:
    """Return the names of a row's numbers, in the order in which files list them."""
    found = dict.fromkeys([*SUMMARY, FLOPS, MEASURED])
    for line in sheet.lines:
        found |= dict.fromkeys(line.values)
    return list(found)


def as_csv(sheet: Sheet) -> str:
    """Return a CSV file: of each number mean, standard deviation, seeds, and the paper's."""
    keys = metrics(sheet)
    head = ["name", "label", "experiment", "swept", "seeds_finished", "seeds_expected", "baseline"]
    for key in keys:
        head += [key, f"{key}_sd", f"{key}_n", f"{key}_paper", f"{key}_minus_paper"]
    head += ["p_against_baseline", "z_against_baseline", "measured_refused", "notes"]
    rows = []
    for line in sheet.lines:
        row = line.row
        swept = " ".join(f"{key}={value}" for key, value in row.swept.items())
        cells: list[Any] = [row.name, row.label, row.experiment, swept, line.finished]
        cells += [len(line.runs), line.baseline]
        for key in keys:
            cells += _numbers(line, key).values()
        test = (line.test.p, line.test.z) if line.test else (None, None)
        cells += [*map(_short, test), line.refused, "; ".join([*sheet.notes, *line.notes])]
        rows.append(cells)
    return comma_separated(head, rows)


def _numbers(line: Line, key: str) -> dict[str, float | int | None]:
    found, theirs = spread(line.values.get(key, {})), paper(line, key)
    gap = None
    if found is not None and theirs is not None and line.on_the_papers_data:
        gap = found.mean - theirs
    return {
        "mean": _short(found.mean if found else None),
        "sd": _short(found.sd if found else None),
        "n": found.n if found else 0,
        "paper": theirs,
        "difference": _short(gap),
    }


def _short(value: float | None) -> float | None:
    """Round to seven digits: more than any of it means, and files stay small."""
    return None if value is None else float(f"{value:.7g}")


def as_json(sheet: Sheet) -> str:
    """Return a JSON file of everything, by seed as well; a line a row."""
    plan = sheet.plan
    head = {
        "target": plan.target,
        "kind": plan.kind,
        "title": plan.title,
        "note": plan.note,
        "profile": plan.profile,
        "status": status(sheet),
        "robust": sheet.robust,
        "notes": sheet.notes,
        "machines": machines(sheet),
    }
    few = ("clean_acc", sheet.robust, "train_seconds") if plan.kind == "heatmaps" else None
    blocks = {"rows": [_row(line, few) for line in sheet.lines], "claims": _claims(sheet)}
    parts = [f" {dumped(key)}: {dumped(value)}" for key, value in head.items()]
    for key, items in blocks.items():
        inside = "".join(f"\n  {dumped(item)}," for item in items).rstrip(",")
        parts.append(f" {dumped(key)}: [{inside}\n ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _row(line: Line, few: tuple[str, ...] | None) -> dict[str, Any]:
    """Return a row; of hundreds the few numbers that matter, all the others being in the CSV."""
    row, test = line.row, line.test
    return {
        "name": row.name,
        "label": row.label,
        "experiment": row.experiment,
        "swept": row.swept,
        "states": {seed: run.state for seed, run in line.runs.items()},
        "baseline": line.baseline,
        "numbers": {
            key: {**_numbers(line, key), "seeds": {s: _short(v) for s, v in values.items()}}
            for key, values in line.values.items()
            if (values or paper(line, key) is not None) and (few is None or key in few)
        },
        "test": test and {"difference": _short(test.difference), "z": _short(test.z),
                          "p": _short(test.p),
                          "seeds": test.seeds,
                          "differing": test.differing},
        "measured_refused": line.refused,
        "notes": line.notes,
    }  # fmt: skip


def _claims(sheet: Sheet) -> list[dict[str, Any]]:
    found = []
    for verdict in sheet.verdicts:
        claim, mean = verdict.claim, spread(verdict.differences)
        ends = interval(verdict.differences)
        found.append(
            {
                "text": claim.text,
                "metric": claim.metric,
                "row": claim.row,
                "than": claim.than,
                "at_least": claim.at_least,
                "at_most": claim.at_most,
                "seeds": {s: _short(d) for s, d in verdict.differences.items()},
                "mean": _short(mean.mean) if mean else None,
                "interval95": [_short(end) for end in ends] if ends else None,
                "verdict": verdict.verdict,
            }
        )
    return found


def sheet_page(sheet: Sheet, picture: bytes | None, missing: str) -> str:
    """Return the page of one target.

    Args:
        picture: an SVG of our own making.
        missing: why there is no picture, if there is none.
    """
    plan, gridded = sheet.plan, sheet.plan.kind == "heatmaps"
    kinds = ["md", "csv", "json", *(["png", "svg"] if picture is not None else [])]
    encoded = base64.b64encode(picture or b"").decode("ascii")
    return render(
        "btrain.paper",
        "sheet.html",
        title=f"{plan.target}: {plan.title}",
        plan=plan,
        status=status(sheet),
        notes=sheet.notes,
        picture=picture and Markup(f"data:image/svg+xml;base64,{encoded}"),
        missing=missing,
        attack=attack_words(sheet),
        grids=[
            (grid.zero, tables.html(*grid_table(grid), "lines narrow"))
            for grid in (grids(sheet) if gridded else ())
        ],
        row_notes=row_notes(sheet) if gridded else (),
        table=None if gridded else _html_table(sheet),
        legend=legend(sheet),
        machines=machines(sheet),
        claims=CLAIMS,
        verdicts=[(verdict, claim_text(sheet, verdict)) for verdict in sheet.verdicts],
        marks=_MARKS,
        files=[f"{plan.target}.{kind}" for kind in kinds],
    )


def _html_table(sheet: Sheet) -> Markup:
    """Return the table, the paper's numbers in small print under ours."""
    head, rows = head_and_rows(sheet)
    shown = []
    for line, (label, *cells) in zip(sheet.lines, rows, strict=True):
        columns: list[list[str]] = []
        for title, cell in zip(head[1:], cells, strict=True):
            if title in (PAPER, GAP):
                columns[-1].append(cell)
            else:
                columns.append([cell])
        shown.append([Cell(label, ", ".join(line.notes)), *(_cell(*column) for column in columns)])
    return tables.html([title for title in head if title not in (PAPER, GAP)], shown, "lines sheet")


def _cell(ours: str, theirs: str = NONE, gap: str = NONE) -> Cell:
    """Return our number, and under it the paper's with the difference."""
    if theirs == NONE:
        return Cell(ours)
    return Cell(ours, f"paper {theirs}" if gap == NONE else f"paper {theirs} ({gap})")


def index_page(sheets: Sequence[tuple[Sheet, bool]]) -> str:
    """Return the list of all targets, a line of status each; the flag tells which have a page."""
    rows = []
    for sheet, linked in sheets:
        plan = sheet.plan
        link = Markup('<a href="{0}.html">{0}</a>').format(plan.target)
        name = link if linked else plan.target
        rows.append([Cell(name), Cell(plan.title, status(sheet)), Cell(plan.profile)])
    table = tables.html(["target", "title and state", "profile"], rows, "lines sheet wrapping")
    title = "The paper's tables and figures"
    return render("btrain.paper", "index.html", title=title, table=table)
