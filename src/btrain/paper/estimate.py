"""The cost of a table's or figure's runs, from their settings alone: nothing is trained.

A unit is one forward pass of one image; see `btrain.methods.cost`.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch

from btrain.build import make_model
from btrain.methods.cost import PAPER_FRACTIONS, expected_units, forward_flops
from btrain.paper.job import Job, asked, config_of
from btrain.paper.plan import Plan, Row
from btrain.settings import Config
from btrain.settings.evaluation import AUTOATTACKS, PRESETS, EvalSettings
from btrain.settings.run import CLASSES, IMAGES, SHAPES
from btrain.terminal import counted, plural
from btrain.training.epochs import fewest_images
from btrain.training.schedule import make_plan

_CORRUPTIONS = 15 * 5
_UNITS = ((1e18, "EFLOP"), (1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"))
# Of an image that stands all: 100 and 9·100 steps of APGD, 9·100 of FAB, 5,000 queries of Square.
_AUTOATTACK = 2 * 1000 + 3 * 900 + 5000


@dataclass(frozen=True)
class Cost:
    """The cost of one run.

    Attributes:
        settings: the size of the run, for people.
        training: FLOPs; None where the images or the method are not known here.
        evaluation: FLOPs at most, were no example to fall early; None likewise.
    """

    settings: str
    training: float | None
    evaluation: float | None


def cost(job: Job, row: Row) -> Cost:
    """Return the cost of each run of a row.

    Its fractions are those that the paper tells of it, or of N_R = 2; epochs leave out as many
    images as they may.
    """
    config = config_of(job, row.experiment, row.swept)
    data = config.dataset
    known = IMAGES.get(data.name)
    told = tuple(row.paper.get(key) for key in ("f_b", "f_r", "f_o"))
    boundary, robust, outlier = (
        share if share is not None else usual
        for share, usual in zip(told, PAPER_FRACTIONS, strict=True)
    )
    units = expected_units(config, (boundary, robust, outlier))
    images = data.train_examples or (known and known[0] - data.val_examples)
    tested = data.test_examples or (known and known[1])
    width = getattr(config.model, "width", None)
    model = config.model.name if width is None else f"{config.model.name} of width {width}"
    taken = [] if images is None else fewest_images(images, make_plan(config), outlier)
    fewer = f"{min(taken):,} to " if taken and min(taken) < max(taken) else ""
    settings = (
        f"{model}, {counted(config.train.epochs, 'epoch')} of {fewer}"
        f"{'?' if images is None else f'{images:,}'} {plural(images, 'image')}, "
        f"batches of {config.train.batch_size}"
    )
    if images is None or tested is None or data.name not in SHAPES:
        return Cost(settings, None, None)
    unit = _forward_flops(config)
    training = None if units is None else units * sum(taken) * unit
    own = 2 * config.eval.steps + 2
    passes = own * (tested + config.train.batch_size * config.train.epochs)
    for attacks in job.profile.evaluations(job.target, row.name):
        wanted = asked(attacks)
        n = int(wanted.config.get("dataset.test_examples", tested))
        passes += n * sum(_attack_units(wanted, attack) for attack in wanted.attacks)
    return Cost(settings, training, passes * unit)


def _attack_units(wanted: EvalSettings, attack: str) -> int:
    """Return the units an image of an evaluation, at most, but for what is bounded."""
    if attack in (*PRESETS, "custom"):
        _, pgd = wanted.pgd_attack(attack)
        return 1 + pgd.restarts * (2 * pgd.steps + 1)
    return 1 + {"corruptions": _CORRUPTIONS}.get(attack, _AUTOATTACK * (attack in AUTOATTACKS))


def _forward_flops(config: Config) -> int:
    """Return the FLOPs of one image, by torch's counter, on a network without memory of its own."""
    name = config.dataset.name
    meta = torch.device("meta")
    with meta:
        network = make_model(config.model, CLASSES[name], SHAPES[name])
    return forward_flops(network, SHAPES[name], meta)


def listing(jobs: Iterable[tuple[Job, Plan]]) -> str:
    """Return the rows of each target with the cost of one run, and the target's sum over seeds.

    Runs that targets share are counted in each of them.
    """
    lines = []
    for job, plan in jobs:
        rows = [row for row in plan.rows if job.wanted([row.experiment])]
        lines += [f"{plan.target}, profile {plan.profile}: {plan.title}"]
        costs = [(row, cost(job, row)) for row in rows]
        for row, found in costs:
            lines.append(
                f"  {row.name}: {found.settings}; {counted(len(row.runs), 'seed')} of "
                f"{_work(found.training)} to train, {_work(found.evaluation)} to evaluate"
            )
        lines.append(f"  {_total(job, costs)}")
    return "\n".join(lines)


def _total(job: Job, costs: list[tuple[Row, Cost]]) -> str:
    """Return the sum of the known costs, and how long a device of the profile would take."""
    known = [
        len(row.runs) * (found.training + found.evaluation)
        for row, found in costs
        if found.training is not None and found.evaluation is not None
    ]
    unknown = len(costs) - len(known)
    words = f"all: {_work(sum(known))}"
    words += (
        f" without {unknown} row{'s' if unknown > 1 else ''} of unknown cost" if unknown else ""
    )
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
