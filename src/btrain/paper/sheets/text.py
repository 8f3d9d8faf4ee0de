"""A sheet as Markdown, CSV and JSON."""

from __future__ import annotations

import csv
import io
import json
from typing import Any
from urllib.parse import quote

from btrain.paper.sheets import heat
from btrain.paper.sheets.arithmetic import interval, spread
from btrain.paper.sheets.sheet import FLOPS, MEASURED, SUMMARY, Line, Sheet
from btrain.paper.sheets.table import (
    CLAIMS,
    claim_text,
    head_and_rows,
    legend,
    machines,
    paper,
    status,
)


def markdown(sheet: Sheet, picture: str | None = None) -> str:
    """The table with what must be known beside it.

    Args:
        picture: the name of a file to show under the table.
    """
    plan = sheet.plan
    parts = [f"# {_plain(plan.title)}", f"Profile {_plain(plan.profile)}: {status(sheet)}."]
    parts += [_plain(plan.note)] if plan.note else []
    if sheet.notes:
        parts.append(f"**All rows:** {_plain(', '.join(sheet.notes))}.")
    if plan.kind == "heatmaps":
        parts += [heat.markdown(grid, heat.attack_words(sheet)) for grid in heat.grids(sheet)]
        parts += [_list([f"{_plain(n)}" for n in row_notes(sheet)])] if row_notes(sheet) else []
    else:
        head, rows = head_and_rows(sheet)
        notes = [", ".join(line.notes) for line in sheet.lines]
        if any(notes):
            head = [*head, "notes"]
            rows = [[*row, note] for row, note in zip(rows, notes, strict=True)]
        parts.append(_table(head, rows))
    parts += [_plain(" ".join(legend(sheet)))]
    if found := machines(sheet):
        parts.append(f"Trained on: {_plain('; '.join(found))}.")
    if sheet.verdicts:
        claims = [
            f"**{_plain(v.verdict)}** – {_plain(v.claim.text)} ({_plain(claim_text(sheet, v))})"
            for v in sheet.verdicts
        ]
        parts.append(f"## Claims\n\n{_plain(CLAIMS)}\n\n{_list(claims)}")
    if picture is not None:
        parts.append(f"![{_plain(plan.title)}]({quote(picture)})")
    return "\n\n".join(parts) + "\n"


def row_notes(sheet: Sheet, most: int = 20) -> list[str]:
    """Rows with notes of their own, for a sheet that shows no row by itself."""
    noted = [f"{line.row.label}: {', '.join(line.notes)}" for line in sheet.lines if line.notes]
    more = [f"{len(noted) - most} more rows with notes, in the CSV"] if len(noted) > most else []
    return noted[:most] + more


def _list(items: list[str]) -> str:
    return "\n".join(f"- {item}" for item in items)


def _plain(words: str) -> str:
    """Text that no table and no page takes for markup, on one line."""
    for character in "\\|<>*`[]":
        words = words.replace(character, f"\\{character}")
    return " ".join(words.split())


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = [[_plain(cell) for cell in line] for line in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    lines = [
        "| " + " | ".join(c.ljust(width) for c, width in zip(line, widths, strict=True)) + " |"
        for line in cells
    ]
    lines.insert(1, "|" + "|".join("-" * (width + 2) for width in widths) + "|")
    return "\n".join(lines)


def metrics(sheet: Sheet) -> list[str]:
    """Every number of a row, in the order in which files list them."""
    found = dict.fromkeys([*SUMMARY, FLOPS, MEASURED])
    for line in sheet.lines:
        found |= dict.fromkeys(line.values)
    return list(found)


def comma_separated(sheet: Sheet) -> str:
    """A line a row: of each number mean, standard deviation, seeds, and the paper's."""
    keys = metrics(sheet)
    head = ["name", "label", "experiment", "swept", "seeds_finished", "seeds_expected", "baseline"]
    for key in keys:
        head += [key, f"{key}_sd", f"{key}_n", f"{key}_paper", f"{key}_minus_paper"]
    head += ["p_against_baseline", "z_against_baseline", "measured_refused", "notes"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(head)
    for line in sheet.lines:
        row = line.row
        swept = " ".join(f"{key}={value}" for key, value in row.swept.items())
        cells: list[Any] = [row.name, row.label, row.experiment, swept, line.finished]
        cells += [len(line.runs), line.baseline]
        for key in keys:
            cells += list(_numbers(line, key).values())
        test = (line.test.p, line.test.z) if line.test else (None, None)
        cells += [*map(_short, test), line.refused, "; ".join([*sheet.notes, *line.notes])]
        writer.writerow(["" if cell is None else _harmless(cell) for cell in cells])
    return file.getvalue()


def _harmless(cell: Any) -> Any:
    """A text that a spreadsheet would take for a formula, marked as text."""
    return f"'{cell}" if isinstance(cell, str) and cell[:1] in ("=", "+", "@", "-") else cell


def _numbers(line: Line, key: str) -> dict[str, float | int | None]:
    found, theirs = spread(line.values.get(key, {})), paper(line, key)
    gap = None if found is None or theirs is None else found.mean - theirs
    return {
        "mean": _short(found.mean if found else None),
        "sd": _short(found.sd if found else None),
        "n": found.n if found else 0,
        "paper": theirs,
        "difference": _short(gap),
    }


def _short(value: float | None) -> float | None:
    """Seven digits: more than any of it means, and files stay small."""
    return None if value is None else float(f"{value:.7g}")


def as_json(sheet: Sheet) -> str:
    """Everything, by seed as well; a line a row."""
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
    parts = [f" {_dump(key)}: {_dump(value)}" for key, value in head.items()]
    for key, items in blocks.items():
        inside = "".join(f"\n  {_dump(item)}," for item in items).rstrip(",")
        parts.append(f" {_dump(key)}: [{inside}\n ]")
    return "{\n" + ",\n".join(parts) + "\n}\n"


def _dump(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _row(line: Line, few: tuple[str, ...] | None) -> dict[str, Any]:
    """A row; of hundreds the few numbers that matter, all the others being in the CSV."""
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
