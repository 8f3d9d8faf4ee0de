"""The table, JSON file and plot that `btrain bench` shows and writes."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from btrain import __version__
from btrain.durable import make_folder, real, write_file
from btrain.errors import UserError
from btrain.pages import pictures
from btrain.pages.tables import NONE, markdown
from btrain.runs.provenance import processor

Row = dict[str, Any]
_INK, _GREY = "#222222", "#888888"
_HEAD = (
    "defense", "model", "batch", "precision", "layout", "method", "ms/batch", "± quartiles",
    "units", "vs lean", "bound", "vs official", "MB", "selection", "copies", "kernels", "of peak",
)  # fmt: skip


def hardware(device: torch.device) -> dict[str, Any]:
    """Return the machine: processor or GPU, and how many threads torch uses."""
    found: dict[str, Any] = {
        "device": device.type,
        "processor": processor(),
        "threads": torch.get_num_threads(),
        "clock": "CUDA events" if device.type == "cuda" else "process CPU time",
    }
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        found["gpu"] = properties.name
        found["gpu_memory_mb"] = properties.total_memory // 2**20
    return found


def versions() -> dict[str, str | None]:
    """Return the versions of what the numbers depend on."""
    return {
        "btrain": __version__,
        "torch": str(torch.__version__),
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def table(rows: Sequence[Row], details: Sequence[Row]) -> str:
    """Return the results as a Markdown table."""
    lines = []
    for row, detail in zip(rows, details, strict=True):
        cells = (
            row["defense"],
            row["model"],
            row["batch_size"],
            row["precision"],
            _layout(row),
            row["method"],
            f"{1000 * row['seconds_per_batch']:.1f}",
            f"{1000 * row['seconds_spread']:.1f}",
            f"{row['units_per_example']:.2f}",
            f"{row['speedup_vs_lean']:.2f}",
            f"{row['flop_bound']:.2f}",
            _number(detail["speedup_vs_official"], ".2f"),
            f"{row['peak_memory_mb']:.0f}",
            f"{100 * row['selection_share']:.1f} %",
            f"{detail['host_copies']:g}",
            _number(detail["kernels"], ".0f"),
            f"{100 * detail['flop_utilisation']:.0f} %",
        )
        lines.append([*map(str, cells)])
    return markdown(_HEAD, lines)


def _layout(row: Row) -> str:
    """Return the layout of the weights, and what else makes a lane another."""
    layout = "channels_last" if row["channels_last"] else "plain"
    layout += ", compiled" if row["compiled"] else ""
    return layout + (", CUDA graphs" if row["cuda_graphs"] else "")


def _number(value: float | None, form: str) -> str:
    return NONE if value is None else format(value, form)


def check_places(out: str | None, plot: str | None) -> None:
    """Make sure, ahead of the measurement, that its results can be written.

    Raises:
        UserError: a folder cannot be made or written, what is to be replaced is no file, both are
            the same, or there is no way to draw.
    """
    for key, name in (("bench.out", out), ("bench.plot", plot)):
        if name is not None:
            folder = Path(name).parent
            make_folder(folder, f"the folder of {key}")
            if Path(name).is_dir() or name.endswith("/"):
                raise UserError(f"{key}={name} is a folder; please name a file.")
            if Path(name).exists() and not Path(name).is_file():
                raise UserError(f"{key}={name} is no ordinary file; please name another.")
            if not os.access(folder, os.W_OK):
                raise UserError(f"{key}={name} cannot be written (Permission denied).")
    if plot is not None:
        if out is not None and real(out) == real(plot):
            raise UserError(f"bench.out and bench.plot are the same file, {plot}.")
        if Path(plot).suffix.lower() not in (".png", ".svg"):
            raise UserError(f"bench.plot={plot} must end in .png or .svg.")
        if not pictures.is_available():
            raise UserError('bench.plot needs the extra: pip install "btrain[report]".')


def write(path: Path, text: str) -> None:
    """Write a file, or the one that a link names, whole or not at all.

    Raises:
        UserError: it cannot be written.
    """
    make_folder(path.parent)
    write_file(real(path), text.encode())


def write_json(path: Path, content: dict[str, Any]) -> None:
    """Write the results."""
    write(path, json.dumps(content, indent=1) + "\n")


def plot(path: Path, rows: Sequence[Row], details: Sequence[Row]) -> None:
    """Draw BulletTrain's speedup against batch size and against F_B, beside the bound.

    Raises:
        UserError: the file cannot be written.
    """
    lines: dict[str, list[tuple[int, float, float, float]]] = {}
    for row, detail in zip(rows, details, strict=True):
        if row["method"] == "bullettrain":
            name = f"{row['defense']} {row['model']} {row['precision']}, {_layout(row)}"
            point = row["batch_size"], detail["fractions"][0], row["speedup_vs_lean"]
            lines.setdefault(name, []).append((*point, row["flop_bound"]))
    with pictures.look(_INK, _GREY, _GREY, {}):
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 4), layout="constrained")
        axes = figure.subplots(1, 2, sharey=True)
        for name, points in lines.items():
            for axis, column in zip(axes, (0, 1), strict=True):
                ordered = sorted(points, key=lambda point: point[column])
                xs = [point[column] for point in ordered]
                (line,) = axis.plot(xs, [point[2] for point in ordered], "o-", label=name)
                axis.plot(xs, [point[3] for point in ordered], ":", color=line.get_color())
        axes[0].set(xlabel="batch size", ylabel="times as fast as the plain defense", xscale="log")
        sizes = sorted({row["batch_size"] for row in rows})
        axes[0].set_xticks(sizes, [str(size) for size in sizes])
        axes[0].minorticks_off()
        axes[1].set(xlabel="F_B (dotted: bound by FLOPs)")
        axes[0].legend(fontsize="small")
        picture = pictures.drawn(figure, path.suffix[1:].lower())
    write_file(real(path), picture)
