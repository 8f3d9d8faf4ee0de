"""The cost of a table's or figure's runs, from their settings alone: nothing is trained.

A unit is one forward pass of one image; see `btrain.methods.cost`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch

from btrain import own
from btrain.build import make_model
from btrain.data.splits import Size, size_of
from btrain.errors import UserError
from btrain.methods.cost import PAPER_FRACTIONS, forward_flops
from btrain.methods.make import make_methods
from btrain.paper.job import Job, asked, config_of
from btrain.paper.plan import Plan, Row
from btrain.settings import Config, DatasetConfig, ModelConfig, OwnModelConfig
from btrain.settings.evaluation import AUTOATTACKS, PRESETS, EvalSettings
from btrain.settings.sparsity import ChannelStaticConfig
from btrain.terminal import counted, plural
from btrain.training.foresee import reckon
from btrain.training.scores import watched_images

_CORRUPTIONS = 15 * 5
_UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
# Of an image that stands all: 100 and 9·100 steps of APGD, 9·100 of FAB, 5,000 queries of Square.
_AUTOATTACK = 2 * 1000 + 3 * 900 + 5000


@dataclass(frozen=True)
class Cost:
    """The cost of one run.

    Attributes:
        settings: the size of the run, for people.
        training: FLOPs; None where they are not known here.
        evaluation: FLOPs at most, were no example to fall early; None likewise.
        why: the reason that one of them is not known; None if both are.
    """

    settings: str
    training: float | None
    evaluation: float | None
    why: str | None = None


def cost(job: Job, row: Row, look: Callable[[DatasetConfig], Size] = size_of) -> Cost:
    """Return the cost of each run of a row.

    F_B, F_R and F_O are those that the paper prints for the row, else those of N_R = 2. With
    train.skip each epoch leaves out as many images as it may.

    Args:
        look: finds the size of the data.
    """
    config = config_of(job, row.experiment, row.swept)
    own.allow_parts(config)
    try:
        data = look(config.dataset)
        known = {"classes": data.classes, "shape": data.shape}
        methods = make_methods(config, torch.device("cpu"), known=known)
        work = reckon(config, methods, data.train, _fractions(row), known)
        unit = _forward_flops(config.model, data)
    except UserError as error:
        return Cost(_settings(config, None), None, None, str(error).removesuffix("."))
    watched = config.train.epochs * watched_images(config)
    passes = (2 * config.eval.steps + 2) * (data.test + watched)
    for attacks in job.profile.evaluations(job.target, row.name):
        wanted = asked(attacks)
        n = int(wanted.config.get("dataset.test_examples", data.test))
        passes += n * sum(_attack_units(wanted, attack) for attack in wanted.attacks)
    training = why = None
    if None in work.units:
        why = f"only trying tells what {row.name} takes, by btrain plan with its settings"
    else:
        sparsity = config.sparsity
        share = sparsity.macs_share if isinstance(sparsity, ChannelStaticConfig) else 1.0
        training = work.total(0) * share * unit
    return Cost(_settings(config, work.images), training, passes * unit, why)


def _fractions(row: Row) -> tuple[float, float, float]:
    """Return the F_B, F_R, F_O that the paper tells of a row, or the usual ones."""
    told = (row.paper.get(key) for key in ("f_b", "f_r", "f_o"))
    boundary, robust, outlier = (
        share if share is not None else usual
        for share, usual in zip(told, PAPER_FRACTIONS, strict=True)
    )
    return boundary, robust, outlier


def _settings(config: Config, images: Sequence[int] | None) -> str:
    """Return the size of a run for people, with the images of each epoch where they are known."""
    width = getattr(config.model, "width", None)
    model = config.model.name if width is None else f"{config.model.name} of width {width}"
    many = "? images"
    if images is not None:
        fewer = f"{min(images):,} to " if min(images) < max(images) else ""
        many = f"{fewer}{max(images):,} {plural(max(images), 'image')}"
    epochs = counted(config.train.epochs, "epoch")
    return f"{model}, {epochs} of {many}, batches of {config.train.batch_size}"


def _attack_units(wanted: EvalSettings, attack: str) -> int:
    """Return the units an image of an evaluation, at most, but for what is bounded."""
    if attack in (*PRESETS, "custom"):
        _, pgd = wanted.pgd_attack(attack)
        return 1 + pgd.restarts * (2 * pgd.steps + 1)
    return 1 + {"corruptions": _CORRUPTIONS}.get(attack, _AUTOATTACK * (attack in AUTOATTACKS))


def _forward_flops(model: ModelConfig, data: Size) -> int:
    """Return the FLOPs of one image, by torch's counter, on a network without memory of its own."""
    meta = torch.device("meta")
    theirs = f"model.factory={model.factory}" if isinstance(model, OwnModelConfig) else None
    with nullcontext() if theirs is None else own.explained(theirs):
        with meta:
            network = make_model(model, data.classes, data.shape)
        return forward_flops(network, data.shape, meta)


def listing(jobs: Iterable[tuple[Job, Plan]]) -> str:
    """Return the rows of each target with the cost of one run, and the target's sum over seeds.

    Runs that targets share are counted in each of them.
    """
    seen: dict[str, Size] = {}  # for the rows of a target have the same data

    def look(dataset: DatasetConfig) -> Size:
        if (key := repr(dataset)) not in seen:
            seen[key] = size_of(dataset)
        return seen[key]

    lines = []
    for job, plan in jobs:
        rows = [row for row in plan.rows if job.wanted([row.experiment])]
        lines += [f"{plan.target}, profile {plan.profile}: {plan.title}"]
        costs = [(row, cost(job, row, look)) for row in rows]
        for row, found in costs:
            lines.append(
                f"  {row.name}: {found.settings}; {counted(len(row.runs), 'seed')} of "
                f"{_work(found.training)} to train, {_work(found.evaluation)} to evaluate"
            )
        lines.append(f"  all: {_total(job, costs)}")
    return "\n".join(lines)


def _total(job: Job, costs: list[tuple[Row, Cost]]) -> str:
    """Return the line on all rows: known costs, their time, and why others are unknown."""
    known = [
        len(row.runs) * (found.training + found.evaluation)
        for row, found in costs
        if found.training is not None and found.evaluation is not None
    ]
    why = "; ".join(dict.fromkeys(found.why for _, found in costs if found.why is not None))
    if not known:
        return f"unknown: {why}" if costs else "no row"
    unknown = len(costs) - len(known)
    words = _work(sum(known))
    if unknown:
        words += f" without {counted(unknown, 'row')} of unknown cost ({why})"
    if job.profile.tflops is not None:
        minutes = sum(known) / (job.profile.tflops * 1e12) / 60
        words += (
            f"; {minutes:,.0f} min at {job.profile.tflops:g} TFLOP/s: estimated from counted FLOPs "
            "at an assumed rate, not measured"
        )
    return words


def _work(flops: float | None) -> str:
    """Return FLOPs with three digits, in the unit that suits them."""
    if flops is None:
        return "unknown"
    size, name = next((unit for unit in _UNITS if flops >= unit[0]), _UNITS[-1])
    return f"{flops / size:.3g} {name}"
