"""The arguments of `btrain report`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from btrain.errors import UserError
from btrain.settings import hints, words

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

_FLAGS = ("--watch", "--merge-seeds")
_OPTIONS = ("target", "out", "report.watch")


@dataclass(frozen=True)
class Arguments:
    """The request of a `btrain report`.

    Attributes:
        targets: of a folder of plans; None for all.
        out: the folder of the sheets; None for `report` in that of the plans.
    """

    folders: list[Path]
    merge_seeds: bool
    watch: bool
    targets: list[str] | None
    out: Path | None

    @property
    def are_of_plans(self) -> bool:
        """True where an option was given that only a folder of plans has."""
        return self.watch or self.targets is not None or self.out is not None

    def folder_of_plans(self) -> Path:
        """Return the only folder.

        Raises:
            UserError: there are several, or an option was given that goes with runs.
        """
        if len(self.folders) > 1 and (self.out or self.targets is not None):
            option = "out=" if self.out else "target="
            raise UserError(
                f"report {option} goes with one folder of the plans that btrain paper writes, not "
                "with runs; their table is shown here: please leave it out."
            )
        if len(self.folders) > 1:
            raise UserError(
                f"report takes one folder of plans at a time, not also {self.folders[1]}."
            )
        if self.merge_seeds:
            raise UserError("report --merge-seeds is for run folders, not for a folder of plans.")
        return self.folders[0]


def parse(args: Sequence[str]) -> Arguments:
    """Return the request of a command line.

    Raises:
        UserError: an argument is wrong, or no folder is named.
    """
    for flag in args:
        if flag.startswith("-") and flag not in _FLAGS:
            raise UserError(f"report has no option {flag}; see btrain report --help.")
    if split := hints.several_words(args):
        raise UserError(split)
    for argument in args:
        key = argument.partition("=")[0]
        is_folder = Path(argument).expanduser().exists()
        if "=" in argument and not is_folder and key not in _OPTIONS:
            meant = hints.meant(key, _OPTIONS)
            hint = f"Did you mean {meant}?" if meant else "btrain report --help lists them."
            raise UserError(f"{argument} is neither a folder nor an option of report. {hint}")
    pairs = [argument for argument in args if argument.startswith(tuple(f"{o}=" for o in _OPTIONS))]
    given = dict(words.parse(pairs, paths=["out"]))
    watch = given.get("report.watch", "false")
    if watch not in ("true", "false"):
        raise UserError(f"report.watch is true or false, not {watch}.")
    folders = [Path(a).expanduser() for a in args if a not in (*_FLAGS, *pairs)]
    if not folders:
        raise UserError("report needs at least one run folder; see btrain report --help.")
    return Arguments(
        folders=folders,
        merge_seeds="--merge-seeds" in args,
        watch="--watch" in args or watch == "true",
        targets=words.names(given["target"]) if "target" in given else None,
        out=Path(given["out"]).expanduser() if "out" in given else None,
    )
