"""The leave-one-out grids of Figure 2: robust accuracy over the steps of two classes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from btrain.paper.sheets.arithmetic import spread
from btrain.paper.sheets.sheet import Line, Sheet
from btrain.paper.sheets.table import metric_name
from btrain.runs.json_fields import is_number
from btrain.runs.read import FINISHED

CLASSES = {"bt.n_b": "N_B", "bt.n_o": "N_O", "bt.n_r": "N_R"}  # in the paper's order


@dataclass(frozen=True)
class Grid:
    """One class's steps are 0, the other two vary.

    Attributes:
        zero, x, y: N_B, N_R or N_O.
        steps: of either axis, rising.
        cells: (steps of x, steps of y) -> mean robust accuracy over seeds, percent.
    """

    zero: str
    x: str
    y: str
    steps: list[int]
    cells: dict[tuple[int, int], float]


def grids(sheet: Sheet) -> list[Grid]:
    """The three grids: of the class whose steps a row does not sweep, or sweeps to 0."""
    steps = sorted({n for line in sheet.lines for n in _swept(line).values()})
    return [_grid(sheet, zero, steps) for zero in CLASSES]


def _grid(sheet: Sheet, zero: str, steps: list[int]) -> Grid:
    x, y = (key for key in ("bt.n_b", "bt.n_r", "bt.n_o") if key != zero)
    cells = {}
    for line in sheet.lines:
        budget = _swept(line)
        found = spread(line.values[sheet.robust])
        if {x, y} <= budget.keys() and not budget.get(zero) and found is not None:
            cells[budget[x], budget[y]] = found.mean
    return Grid(CLASSES[zero], CLASSES[x], CLASSES[y], steps, cells)


def _swept(line: Line) -> dict[str, int]:
    """The steps of the classes that a row sweeps, by their keys."""
    swept = line.row.swept
    return {key: int(swept[key]) for key in CLASSES if swept.get(key, "").isdecimal()}


def attack_words(sheet: Sheet) -> str:
    """What the accuracy was measured under: "PGD-20, ε = 0.2"; ε of the evaluations or settings."""
    radii: set[float] = set()
    for run in (run for line in sheet.lines for run in line.runs.values()):
        if run.state == FINISHED:
            told: Any = run.config.get("eval.epsilon")
            if sheet.robust != "robust_acc":
                found = run.evaluation(sheet.robust)
                told = found and found[1].get("epsilon")
            radii |= {float(told)} if is_number(told) else set()
    name = metric_name(sheet, sheet.robust)
    values = " or ".join(f"{radius:.4g}" for radius in sorted(radii))
    return f"{name}, ε = {values}" if values else name


def markdown(grid: Grid, attack: str) -> str:
    """A grid as a table, the steps of y downwards; under an attack by its name."""
    lines = [
        f"Robust accuracy (%, {attack}) with {grid.zero} = 0",
        "",
        f"| {grid.y} ↓ {grid.x} → | {' | '.join(map(str, grid.steps))} |",
        "|---" * (len(grid.steps) + 1) + "|",
    ]
    for y in grid.steps:
        cells = (grid.cells.get((x, y)) for x in grid.steps)
        shown = " | ".join("–" if cell is None else f"{cell:.1f}" for cell in cells)
        lines.append(f"| {y} | {shown} |")
    return "\n".join(lines)
