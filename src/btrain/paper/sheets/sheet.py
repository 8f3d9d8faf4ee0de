"""A table or figure of the paper as its runs have it: a pure function of a plan and its folders."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from btrain.evaluation.result import Result
from btrain.paper.plan import Claim, Plan, Row
from btrain.paper.sheets import bounded, cost, notes, sparse
from btrain.paper.sheets.arithmetic import (
    UNDECIDED,
    Paired,
    Scores,
    Values,
    flops_speedup,
    measured_speedup,
    paired,
    pairs,
    same_images,
    spread,
    verdict,
)
from btrain.runs.read import FINISHED, Run, read_run
from btrain.settings.evaluation import PRESETS

SUMMARY = ("clean_acc", "robust_acc", "f_b", "f_r", "f_o", "theoretical_speedup", "train_seconds")
FLOPS, MEASURED = "speedup_flops", "speedup_measured"


@dataclass(frozen=True)
class Line:
    """A row with its runs.

    Attributes:
        runs: by seed.
        baseline: the name of the row that it is compared with, or None.
        values: metric -> seed -> value; percent, ratios, seconds.
        refused: why times were not divided: other machine, machine unknown, other load (not as many
            runs at a time), other images; or None.
        test: against the baseline, on the same test examples.
        notes: phrases that are this row's own.
    """

    row: Row
    runs: dict[int, Run]
    baseline: str | None
    values: dict[str, Values]
    refused: str | None
    test: Paired | None
    notes: list[str]

    @property
    def finished(self) -> int:
        """Return the number of seeds whose run is finished."""
        return sum(run.state == FINISHED for run in self.runs.values())

    @property
    def on_the_papers_data(self) -> bool:
        """Return whether its runs have the data set of the paper's row, as far as they tell."""
        theirs = self.row.original.get("dataset")
        ours = {run.config.get("dataset.name") for run in self.runs.values()} - {None}
        return ours <= {theirs}


@dataclass(frozen=True)
class Verdict:
    """A claim with its differences by seed.

    Of networks that hardly learnt, the baseline's or all that the claim is about, it is undecided:
    their orderings are noise, and often their differences exactly 0.
    """

    claim: Claim
    differences: Values
    verdict: str


@dataclass(frozen=True)
class Sheet:
    """A plan with its numbers.

    Attributes:
        robust: the metric that stands for robust accuracy: `robust_acc` (PGD as at the end of a
            run), `corruptions`, or in heat maps the evaluation's attack.
        notes: phrases that hold for all rows that have begun.
    """

    plan: Plan
    robust: str
    lines: list[Line]
    notes: list[str]
    verdicts: list[Verdict]

    @property
    def pgd_steps(self) -> int | None:
        """Return the steps of the PGD at the end of every run; None where they differ."""
        runs = (run for line in self.lines for run in line.runs.values() if run.config)
        steps = {run.config.get("eval.steps") for run in runs}
        return steps.pop() if len(steps) == 1 else None

    @property
    def attacks(self) -> list[str]:
        """Return the attacks with columns of their own: those evaluated, and those the paper tells
        of.

        PGD-20 needs none where the runs end with it anyway.
        """
        told = (metric for line in self.lines for metric in line.row.paper)
        found = dict.fromkeys([*self.plan.attacks, *(key for key in told if key in PRESETS)])
        same = "pgd20" if self.pgd_steps == 20 and self.robust == "robust_acc" else None
        return [attack for attack in found if attack not in (self.robust, same)]


def make_sheet(plan: Plan, folder: Path, read: Callable[[Path], Run] = read_run) -> Sheet:
    """Return the plan's numbers from the runs under `folder`; `read` makes a run of its folder."""
    runs = {
        row.name: {seed: read(folder / path) for seed, path in sorted(row.runs.items())}
        for row in plan.rows
    }
    robust = _robust(plan)
    scale = {row.name: notes.unlike(runs[row.name].values(), row.original) for row in plan.rows}
    begun = [row.name for row in plan.rows if any(run.config for run in runs[row.name].values())]
    common = notes.shared([scale[name] for name in begun])
    attacks = dict.fromkeys([*plan.attacks, *(["corruptions"] if robust == "corruptions" else [])])
    lines = []
    for row in plan.rows:
        own = [phrase for phrase in scale[row.name] if phrase not in common]
        own += notes.states(runs[row.name], row) + notes.evaluations(runs[row.name], plan, row)
        lines.append(_line(plan, row, runs, list(attacks), robust, own))
    by_name = {line.row.name: line for line in lines}
    verdicts = [_verdict(claim, by_name) for claim in plan.claims]
    return Sheet(plan, robust, lines, [*common, *plan.chosen], verdicts)


def _robust(plan: Plan) -> str:
    """Return `corruptions` where paper or claims tell of them; in heat maps an attack's PGD."""
    told = [*(row.paper for row in plan.rows), *([claim.metric] for claim in plan.claims)]
    if any("corruptions" in metrics for metrics in told):
        return "corruptions"
    return plan.attacks[0] if plan.kind == "heatmaps" and plan.attacks else "robust_acc"


def _line(
    plan: Plan,
    row: Row,
    runs: Mapping[str, dict[int, Run]],
    attacks: list[str],
    robust: str,
    own: list[str],
) -> Line:
    ours = runs[row.name]
    baseline = baseline_of(plan, row)
    theirs = runs[baseline] if baseline is not None else {}
    claimed = [claim.metric for claim in plan.claims if row.name in (claim.row, claim.than)]
    metrics = [m for m in dict.fromkeys([*SUMMARY, *claimed]) if m not in (FLOPS, MEASURED)]
    values = {metric: _values(ours, metric) for metric in dict.fromkeys([*metrics, *attacks])}
    if plan.kind == "sparse":  # by each run's own probe, for its networks take little time
        values |= sparse.values(ours, theirs)
        values[MEASURED], refused = _values(ours, MEASURED), None
    else:
        values[MEASURED], refused = measured_speedup(ours, theirs)
    values[FLOPS] = flops_speedup(ours, theirs) if theirs else _values(ours, FLOPS)
    if plan.kind in bounded.KINDS:
        values |= bounded.values(ours, values[MEASURED], values)
    elif plan.kind == cost.KIND:
        values |= cost.values(ours, values[MEASURED])
    if refused is not None and values[MEASURED]:
        without = ", ".join(str(seed) for seed in ours if seed not in values[MEASURED])
        own = [*own, f"times of seed {without} not compared: {refused}"]
    test = None
    if baseline not in (None, row.name):
        test = _test(ours, theirs, "corruptions" if robust == "corruptions" else "pgd20")
    return Line(row, ours, baseline, values, refused, test, own)


def baseline_of(plan: Plan, row: Row) -> str | None:
    """Return the plan's baseline; for a row of other data the first row of these data."""
    chosen = next((r for r in plan.rows if r.name == plan.baseline), None)
    if chosen is None:
        return None
    data = row.original.get("dataset")
    if chosen.original.get("dataset") == data:
        return chosen.name
    return next(r.name for r in plan.rows if r.original.get("dataset") == data)


def _values(runs: Mapping[int, Run], metric: str) -> Values:
    """Return a summary's number, or the accuracy under an attack, of the seeds that have it."""
    found = {}
    for seed, run in runs.items():
        value = run.number(metric) if metric in run.summary else run.evaluated(metric)
        if value is not None:
            found[seed] = value
    return found


def _test(ours: Mapping[int, Run], theirs: Mapping[int, Run], attack: str) -> Paired | None:
    """Return the paired test on per-example correctness; None where the test examples differ."""
    scores: tuple[dict[int, Scores], dict[int, Scores]] = ({}, {})
    examples = set()
    for seed, *pair in pairs(ours, theirs):
        results = [_result(run, attack) for run in pair]
        for found, result in zip(scores, results, strict=True):
            if None not in results and result is not None:
                found[seed] = result.scores
                examples.add((result.labels.tobytes(), str(result.settings.get("data_sha256"))))
    return paired(*scores) if len(examples) == 1 else None


def _result(run: Run, attack: str) -> Result | None:
    found = run.evaluation(attack)
    return None if found is None else Result.read(found[0], attack)


def _verdict(claim: Claim, lines: Mapping[str, Line]) -> Verdict:
    def values(name: str) -> Values:
        return lines[name].values.get(claim.metric, {}) if name in lines else {}

    differences = values(claim.row)
    if claim.than is not None:
        than = values(claim.than)
        differences = {s: value - than[s] for s, value in differences.items() if s in than}
    if not differences:
        return Verdict(claim, {}, f"{UNDECIDED} ({_why_none(claim, lines)})")
    found = verdict(differences, at_least=claim.at_least, at_most=claim.at_most)
    named = [lines[name] for name in (claim.row, claim.than) if name is not None and name in lines]
    base = [lines[line.baseline] for line in named[:1] if line.baseline is not None]
    if all(map(_at_chance, named)) or any(map(_at_chance, base)):
        found = f"{UNDECIDED} (not trained: clean accuracy near chance)"
    return Verdict(claim, differences, found)


def _why_none(claim: Claim, lines: Mapping[str, Line]) -> str:
    """Return why a claim has no difference: the first that a row lacks, or the seeds."""
    names = [name for name in (claim.row, claim.than) if name is not None]
    for name in names:
        if name not in lines:
            return f"no row {name}"
        line = lines[name]
        if not line.finished:
            return f"no finished run of {name}"
        if not line.values.get(claim.metric):
            return _why_no_value(claim.metric, line, lines)
    return "no common seed"


def _why_no_value(metric: str, line: Line, lines: Mapping[str, Line]) -> str:
    """Return why a row with finished runs has no number."""
    if metric not in (FLOPS, MEASURED):
        return f"{metric} not evaluated"
    if line.baseline is None:
        return "no baseline" if metric == MEASURED else "not counted"
    if metric == MEASURED and line.refused is not None:
        return line.refused
    base = lines[line.baseline]
    if not base.finished:
        return "no finished run of the baseline"
    both = pairs(line.runs, base.runs)
    if not both:
        return "no seed in common with the baseline"
    if not all(same_images(a, b) for _, a, b in both):
        return "other images"
    return "not measured" if metric == MEASURED else "not counted"


def _at_chance(line: Line) -> bool:
    """Return whether networks decide nothing, being less than twice as good as guessing."""
    clean = spread(line.values["clean_acc"])
    classes = [n for run in line.runs.values() if (n := run.classes) is not None]
    return clean is not None and bool(classes) and clean.mean < 2 * 100 / min(classes)
