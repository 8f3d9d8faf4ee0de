"""What the terminal shows at the end of an evaluation."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from btrain.evaluation.result import Result
from btrain.evaluation.sanity import Sanity

_COLUMNS = ("attack", "accuracy %", "95 % interval", "n", "ε", "seconds")


def describe(
    results: Sequence[Result], sanity: Sanity | None, folder: Path, page: Path | None
) -> str:
    """The table of the attacks, that of the corruptions, the checks, and where the files are."""
    rows = [_row(result) for result in results]
    widths = [max(map(len, column)) for column in zip(_COLUMNS, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first, *others = zip(cells, widths, strict=True)
        return "  ".join([first[0].ljust(first[1]), *(c.rjust(w) for c, w in others)])

    parts = ["\n".join(map(line, [_COLUMNS, *rows]))]
    parts += [_corruptions(result) for result in results if "table" in result.settings]
    if sanity is not None:
        parts.append(_sanity(sanity))
    notes = dict.fromkeys(str(r.settings["note"]) for r in results if r.settings.get("note"))
    parts.append("\n".join([*notes, f"Written to {folder}{f', page {page}' if page else ''}."]))
    return "\n\n".join(parts)


def _row(result: Result) -> list[str]:
    low, high = result.ci95
    epsilon, norm = result.settings.get("epsilon"), result.settings.get("norm", "linf")
    radius = "–" if epsilon is None else f"{epsilon:.4g}"
    return [
        result.attack,
        f"{result.accuracy:.2f}",
        f"{low:.2f} to {high:.2f}",
        str(len(result.labels)),
        radius if norm == "linf" else f"{norm} {radius}",
        f"{result.seconds:.1f}",
    ]


def _corruptions(result: Result) -> str:
    lines = [f"{'severity':<18}" + "".join(f"{severity:>8}" for severity in range(1, 6))]
    lines += [_severities(*row) for row in result.settings["table"].items()]
    if extra := result.settings.get("extra_table"):
        lines.append("extra, no part of the means:")
        lines += [_severities(*row) for row in extra.items()]
    lines.append(f"mean accuracy {result.accuracy:.2f} %, mCE {result.settings['mce']:.2f} %")
    return "\n".join(lines)


def _severities(name: str, accuracies: Sequence[float]) -> str:
    return f"{name:<18}" + "".join(f"{accuracy:8.2f}" for accuracy in accuracies)


def _sanity(sanity: Sanity) -> str:
    width = max(len(check.name) for check in sanity.checks)
    lines = [
        f"{check.verdict:<10}  {check.name:<{width}}  {check.detail}" for check in sanity.checks
    ]
    return "\n".join([f"Sanity checks on {sanity.n} test images:", *lines])
