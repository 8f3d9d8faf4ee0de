"""The pictures of the sheets: there for every kind, of the right numbers, the same each time."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from btrain.pages import tables
from btrain.paper.batch import read_batch
from btrain.paper.plan import Plan
from btrain.paper.sheets import pictures
from btrain.paper.sheets.files import sheet_files, write_sheets
from btrain.paper.sheets.sheet import make_sheet
from btrain.paper.sheets.table import attack_words, grid_table, grids
from sheets import begun, evaluated, finished, plan, row


def pictured(folder: Path, kind: str) -> Plan:
    """A plan of a kind with runs that have what it draws."""
    if kind == "heatmaps":
        rows = [row("base")]
        for zero, x, y in (("b", "r", "o"), ("r", "b", "o"), ("o", "b", "r")):
            for i in range(3):
                for j in range(3):
                    swept = {f"bt.n_{x}": str(i), f"bt.n_{y}": str(j)}
                    rows.append(row(f"no_{zero}-{i}{j}", swept=swept))
        for number, of in enumerate(rows[:-1]):  # the last cell is missing
            finished(folder / of.runs[0], robust=10.0 + 3 * number)
        return plan(rows, kind=kind, target=kind)
    if kind == "tradeoff":
        rows = [row("base", 2)]
        rows += [row(f"bt{value}", 2, swept={"bt.n_r": value}) for value in ("0", "2", "10")]
        for number, of in enumerate(rows):
            for path in of.runs.values():
                finished(folder / path, robust=50.0 + number, theoretical_speedup=3.0 - number / 2)
        return plan(rows, kind=kind, target=kind, axis="bt.n_r")
    if kind == "sparse":
        rows = [row("a", 2, paper={"robust_acc": 43.0}), row("b", 2, paper={"robust_acc": 46.0})]
        for number, of in enumerate(rows):
            for path in of.runs.values():
                begun(folder / path, epochs=6 + number)
                metrics = (folder / path / "metrics.jsonl").read_text()
                shutil.rmtree(folder / path)
                best = {"best_robust_acc": 49.0, "train_robust_acc": 70.0 - 9 * number}
                finished(folder / path, robust=45.0 + number, **best)
                (folder / path / "metrics.jsonl").write_text(metrics)
        return plan(rows, kind=kind, target=kind)
    if kind in ("verified", "front"):
        rows = [row("base", 2), *(row(f"ibp{i}", 2, label=f"IBP, α = {i}") for i in range(3))]
        for number, of in enumerate(rows):
            for path in of.runs.values():
                finished(folder / path, clean=90.0 - 3 * number, robust=70.0)
                evaluated(folder / path, "verified-ibp", [1] * number + [0] * (8 - number))
        return plan(rows, kind=kind, target=kind, attacks=["verified-ibp"])
    for seed in range(2):
        path = begun(folder / f"a-seed{seed}", epochs=5)
        batch = {
            "svar": [-0.02, 0.01, 0.05, 0.08],
            "outcome": ["outlier", "boundary", "boundary", "robust"],
            "steps": [0, 10, 10, 2],
            "robust_fraction": 0.3,
        }
        (path / "allocation.json").write_text(json.dumps(batch))
    return plan([row("a", 2)], kind=kind, target=kind, baseline=None)


@pytest.mark.parametrize(
    "kind",
    ["heatmaps", "tradeoff", "fractions", "scores", "allocation", "sparse", "verified", "front"],
)
def test_every_kind_has_its_picture(tmp_path: Path, kind: str) -> None:
    pictured(tmp_path, kind).write(tmp_path)
    write_sheets(tmp_path, tmp_path / "out")
    with Image.open(tmp_path / "out" / f"{kind}.png") as picture:
        assert picture.width >= 800
        assert len(picture.convert("RGB").getcolors(1 << 24) or []) > 50  # more than a blank page
    assert "<image" not in (tmp_path / "out" / f"{kind}.svg").read_text()  # nothing but lines
    for path in (tmp_path / "out").iterdir():
        assert path.stat().st_size < 300_000


def test_the_same_runs_give_the_same_bytes(tmp_path: Path) -> None:
    for kind in ("heatmaps", "tradeoff"):
        folder = tmp_path / kind
        pictured(folder, kind).write(folder)
        for out in ("first", "second"):
            write_sheets(folder, folder / out)
        for path in (folder / "first").iterdir():
            assert path.read_bytes() == (folder / "second" / path.name).read_bytes(), path.name


def test_heat_maps_hold_their_own_cells(tmp_path: Path) -> None:
    found = grids(make_sheet(pictured(tmp_path, "heatmaps"), tmp_path))
    assert [(grid.zero, grid.x, grid.y) for grid in found] == [
        ("N_B", "N_R", "N_O"), ("N_O", "N_B", "N_R"), ("N_R", "N_B", "N_O"),
    ]  # fmt: skip
    no_b, no_o, no_r = found
    assert no_b.cells == {(i, j): 13.0 + 3 * (3 * i + j) for i in range(3) for j in range(3)}
    assert no_r.cells[0, 0] == 10 + 3 * 10
    assert (2, 2) not in no_o.cells and len(no_o.cells) == 8
    shown = re.sub(" +", " ", tables.markdown(*grid_table(no_o)))
    assert "| 2 | 73.0 | 82.0 | – |" in shown


def test_heat_maps_name_the_attack_and_its_radius(tmp_path: Path) -> None:
    found = replace(pictured(tmp_path, "heatmaps"), attacks=["pgd100x10"])
    for index, of in enumerate(found.rows[:-1]):
        evaluated(tmp_path / of.runs[0], "pgd100x10", [1] * index + [0] * 30, epsilon=0.2)
    sheet = make_sheet(found, tmp_path)
    words = "PGD-100×10, ε = 0.2"
    assert attack_words(sheet) == words
    shown = sheet_files(sheet)
    for kind in ("md", "html"):
        assert shown[f"heatmaps.{kind}"].decode().count(f"%, {words}) with N_") == 3
    with pictures.styled():
        figure = pictures.heatmaps(sheet)
    assert figure is not None
    assert words in " ".join(figure.get_supxlabel().split())
    labels = [inside.get_xlabel() for axes in figure.axes for inside in axes.child_axes]
    assert labels == [f"robust accuracy (%), mean over seeds,\n{words}"]


def test_the_radius_of_a_runs_own_evaluation_is_in_its_settings(tmp_path: Path) -> None:
    for seed, epsilon in enumerate((0.3, 8 / 255)):
        finished(tmp_path / f"a-seed{seed}", config={"eval.epsilon": epsilon})
    sheet = make_sheet(plan([row("a", 2)], kind="heatmaps"), tmp_path)
    assert attack_words(sheet) == "PGD-20, ε = 0.03137 or 0.3"


@pytest.mark.parametrize("logged", [2, 1, 0])
def test_scores_are_drawn_by_batch_where_all_runs_logged_batches(
    tmp_path: Path, logged: int
) -> None:
    found = pictured(tmp_path, "scores")
    for seed in range(logged):
        path = tmp_path / f"a-seed{seed}" / "metrics.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        for line in lines:
            first = 60 * (line["epoch"] - 1) + 1
            rows = [[first, 0.01, 0.04 + seed, None], [first + 30, 0.02, 0.05 + seed, -0.01], "x"]
            line["scores"] = rows
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    with pictures.styled():
        figure = pictures.scores(make_sheet(found, tmp_path))
    assert figure is not None
    below, curves = figure.get_supxlabel(), figure.axes[0].get_lines()
    curve = {str(line.get_label()).split(" ")[0]: line.get_xydata().tolist() for line in curves}
    if logged == 2:
        assert "a point is one mini-batch" in below
        assert curve["robust"][:2] == [[1, pytest.approx(0.54)], [31, pytest.approx(0.55)]]
        assert [x for x, _ in curve["outlier"]] == [31, 91, 151, 211, 271]
    else:
        assert "the mean of an epoch, for the runs logged no" in " ".join(below.split())
        assert [x for x, _ in curve["robust"]] == [60, 120, 180, 240, 300]  # 6,000 images by 100
    assert figure.axes[0].get_xlabel() == "training iterations"


@pytest.mark.parametrize(
    "change", [{"svar": [0.1]}, {"outcome": ["x"] * 4}, {"steps": ["many"] * 4}, {"svar": None}]
)
def test_an_unsound_batch_is_not_drawn(tmp_path: Path, change: dict[str, object]) -> None:
    pictured(tmp_path, "allocation")
    path = tmp_path / "a-seed0" / "allocation.json"
    assert read_batch(path.parent) is not None
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    assert read_batch(path.parent) is None
