"""What all pictures of the sheets share: their look, and how they become files."""

from __future__ import annotations

import importlib.util
import io
import textwrap
from typing import TYPE_CHECKING, Any

from btrain.paper.sheets.notes import data_name, model_name
from btrain.paper.sheets.sheet import Sheet
from btrain.runs.json_fields import is_number

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe and Ito's colours, which colour-blind eyes tell apart; shapes and lines differ as well.
INK, SOFT, RULE = "#1b1e23", "#5b626d", "#d5d9df"
BLUE, VERMILLION, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#8a9099"
CLASSES = {
    "boundary": ("boundary", VERMILLION, "o", "-"),
    "robust": ("robust", BLUE, "s", "--"),
    "outlier": ("outlier", GREEN, "^", "-."),
}
"""class -> its name, colour, marker and line."""

_STYLE: dict[Any, Any] = {
    "svg.fonttype": "path",
    "text.parse_math": False,
    "font.family": ["DejaVu Sans"],  # comes with matplotlib
    "font.size": 10,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": GREY,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.titlesize": 10.5,
    "axes.titlelocation": "left",
    "axes.axisbelow": True,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
    "grid.color": RULE,
    "grid.linewidth": 0.6,
    "legend.frameon": False,
    "hatch.linewidth": 0.6,
    "hatch.color": GREY,
    "svg.hashsalt": "btrain",
}
_DPI = 144


NO_MATPLOTLIB = "There are no pictures: they need matplotlib (pip install 'btrain[report]')."


def is_available() -> bool:
    """Whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def styled() -> Any:
    """A context in which figures have the common look."""
    import matplotlib

    return matplotlib.rc_context(_STYLE)


def new(width: float, height: float, title: str, below: str) -> Figure:
    """An empty figure, inches, with its title above and its scale below in small print."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained", facecolor="white")
    wide = int(width * 9.2)
    figure.suptitle(textwrap.fill(title, wide), x=0.01, ha="left", fontsize=11.5, weight="bold")
    small = textwrap.fill(below, int(width * 14))
    figure.supxlabel(small, x=0.01, ha="left", fontsize=8.5, color=SOFT)
    return figure


def files(figure: Figure) -> dict[str, bytes]:
    """The figure as "png" and "svg"; the same figure gives the same bytes."""
    found = {}
    for kind, unsaid in (("png", ("Software",)), ("svg", ("Format", "Type", "Creator", "Date"))):
        file = io.BytesIO()
        figure.savefig(file, format=kind, dpi=_DPI, metadata=dict.fromkeys(unsaid))
        found[kind] = file.getvalue()
    return found


def scale_words(sheet: Sheet) -> str:
    """The size of what is drawn: data, training images, epochs and seeds."""
    runs = [run for line in sheet.lines for run in line.runs.values() if run.config]
    words = [", ".join(sorted({data_name(run.config) for run in runs}))]
    words.append(", ".join(sorted({model_name(run.config) for run in runs})))
    sizes = {run.config.get("dataset.train_examples") for run in runs}
    words.append(f"{_range(sizes)} training images" if sizes != {None} else "all training images")
    words.append(f"{_range({run.config.get('train.epochs') for run in runs})} epochs")
    return f"{', '.join(words)}, {seed_words(sheet)}"


def seed_words(sheet: Sheet) -> str:
    """How many seeds, and the profile."""
    seeds = {line.finished for line in sheet.lines if line.finished}
    return f"{_range(seeds)} seed{'' if seeds == {1} else 's'}; profile {sheet.plan.profile}"


def _range(values: set[Any]) -> str:
    numbers = sorted(value for value in values if is_number(value))
    if not numbers:
        return "?"
    ends = [f"{number:,}" for number in dict.fromkeys((numbers[0], numbers[-1]))]
    return " to ".join(ends)
