"""From a folder of plans to a folder of sheets."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from btrain.durable import make_folder, write_file
from btrain.errors import UserError
from btrain.paper.sheets import drawing, page, pictures, text
from btrain.paper.sheets.plans import chosen, plans_in
from btrain.paper.sheets.sheet import Sheet, make_sheet
from btrain.runs.read import Run, Runs


def write_sheets(
    folder: Path,
    out: Path,
    targets: Sequence[str] | None = None,
    read: Callable[[Path], Run] | None = None,
) -> list[Path]:
    """Writes for every plan `<target>.md`, `.csv`, `.json`, `.html`, `.png` and `.svg`, and
    `index.html` with a line for each.

    A pure function of the plans and the run folders: the same files give the same bytes. All are
    made before the first is written, and none takes its place before all are on the disk. Without
    matplotlib the pictures are missing, and the pages say so.

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
    if out.resolve() == folder.resolve():
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
    contents["index.html"] = page.index_page(linked).encode()
    _replace_all(out, contents)
    for target in wanted:  # of an earlier report, of which it would now tell a lie
        for kind in ("png", "svg"):
            if f"{target}.{kind}" not in contents:
                (out / f"{target}.{kind}").unlink(missing_ok=True)
    return [out / name for name in contents]


def sheet_files(sheet: Sheet) -> dict[str, bytes]:
    """The files of one sheet by their names."""
    target = sheet.plan.target
    drawn = pictures.draw(sheet) if drawing.is_available() else {}
    found = {f"{target}.{kind}": content for kind, content in drawn.items()}
    missing = (
        "No picture: nothing is finished yet." if drawing.is_available() else drawing.NO_MATPLOTLIB
    )
    markdown = text.markdown(sheet, f"{target}.png" if drawn else None)
    if not drawn:
        markdown += f"\n{missing}\n"
    found |= {
        f"{target}.md": markdown.encode(),
        f"{target}.csv": text.comma_separated(sheet).encode(),
        f"{target}.json": text.as_json(sheet).encode(),
        f"{target}.html": page.sheet_page(sheet, drawn.get("svg"), missing).encode(),
    }
    return {name: found[name] for name in sorted(found)}


def _replace_all(out: Path, contents: dict[str, bytes]) -> None:
    """Writes all under other names, then renames them.

    Raises:
        UserError: one cannot be written; then those of before are still there.
    """
    make_folder(out)
    staged = {out / name: out / f".{name}.{os.getpid()}.new" for name in contents}
    try:
        for path, temporary in staged.items():
            write_file(temporary, contents[path.name])
        for path, temporary in staged.items():
            temporary.replace(path)
    except OSError as error:
        raise UserError(f"{out} cannot be written ({error.strerror}).") from error
    finally:
        for temporary in staged.values():
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
