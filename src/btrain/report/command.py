"""`btrain report`: its arguments, and what it does with them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from btrain.errors import UserError

if TYPE_CHECKING:
    from btrain.runs.read import Run

HELP = """\
usage: btrain report [--merge-seeds] RUN [RUN …]
       btrain report FOLDER [target=NAME,…] [out=DIR]
       btrain report --watch FOLDER [target=NAME,…]

RUN is a run folder, or a folder of run folders; the first run is the baseline.
--merge-seeds makes one row of the runs that differ in their seed: mean ± deviation.

FOLDER holds the plans of the paper's tables and figures, as btrain paper writes them. For each
target it leaves Markdown, CSV, JSON, a page and a picture in FOLDER/report, or in out=DIR, and
shows the tables here. Nothing is trained.
--watch, or report.watch=true, follows the runs in the terminal until none is left.
"""


def run(args: Sequence[str]) -> None:
    """Compares runs, writes the sheets of a folder of plans, or watches it.

    Raises:
        UserError: an argument is wrong, or there is nothing to report.
    """
    if {"-h", "--help"} & set(args):
        print(HELP, end="")
        return
    flags, options, paths = _sorted(args)
    if not paths:
        raise UserError("report needs at least one run folder; see btrain report --help.")
    watching = "--watch" in flags or options.get("report.watch") == "true"
    targets = [t for t in options["target"].split(",") if t] if "target" in options else None
    if watching or options.keys() & {"target", "out"} or _holds_plans(paths):
        if len(paths) > 1:
            raise UserError(f"report takes one folder of plans at a time, not also {paths[1]}.")
        if "--merge-seeds" in flags:
            raise UserError("report --merge-seeds is for run folders, not for a folder of plans.")
        if watching:
            from btrain.paper.sheets.watch import watch

            watch(paths[0], targets)
            return
        write(paths[0], Path(options.get("out") or paths[0] / "report"), targets)
        return
    from btrain.report.compare import compare

    print(compare(paths, merge_seeds="--merge-seeds" in flags))


def _sorted(args: Sequence[str]) -> tuple[set[str], dict[str, str], list[Path]]:
    """Flags, options by their key, and folders."""
    flags: set[str] = set()
    options: dict[str, str] = {}
    paths: list[Path] = []
    for argument in args:
        key, equals, value = argument.partition("=")
        if argument in ("--watch", "--merge-seeds"):
            flags.add(argument)
        elif argument.startswith("-"):
            raise UserError(f"report has no option {argument}; see btrain report --help.")
        elif equals and key in ("target", "out", "report.watch"):
            if not value:
                raise UserError(f"{key} needs a value.")
            if key == "report.watch" and value not in ("true", "false"):
                raise UserError(f"report.watch is true or false, not {value}.")
            options[key] = value
        else:
            paths.append(Path(argument).expanduser())
    return flags, options, paths


def _holds_plans(paths: Sequence[Path]) -> bool:
    from btrain.paper.sheets.plans import damaged, plans_in

    return any((plans := plans_in(path)) or damaged(plans, path) for path in paths)


def write(
    folder: Path,
    out: Path,
    targets: Sequence[str] | None,
    read: Callable[[Path], Run] | None = None,
) -> list[Path]:
    """Writes the sheets of a folder of plans and shows their tables; returns the files.

    Raises:
        UserError: as `write_sheets`.
    """
    from btrain.paper.sheets.drawing import NO_MATPLOTLIB, is_available
    from btrain.paper.sheets.files import write_sheets

    written = write_sheets(folder, out, targets, read)
    for path in written:
        if path.suffix == ".md":
            print(path.read_text(encoding="utf-8"))
    if not is_available():
        print(NO_MATPLOTLIB)
    print(f"{len(written)} files in {out}; to look at: {out / 'index.html'}")
    return written
