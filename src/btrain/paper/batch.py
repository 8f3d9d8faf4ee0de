"""Figure 5: the scores of one batch, the outcomes of its attack, and the steps it would get."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from btrain.allocation import (
    BOUNDARY,
    OUTLIER,
    ROBUST,
    by_score,
    signed_prediction_variance,
    true_classes,
)
from btrain.data.augmentation import to_unit
from btrain.data.splits import load_configured
from btrain.durable import write_file
from btrain.errors import UserError
from btrain.exchange.from_run import load_run
from btrain.methods.bullettrain import eval_logits
from btrain.methods.make import make_bullettrain
from btrain.paper.plan import ALLOCATION
from btrain.runs.json_fields import is_number
from btrain.training.epochs import epoch_order
from btrain.untrusted import read_text

_NAMES = {BOUNDARY: "boundary", ROBUST: "robust", OUTLIER: "outlier"}
_N_R = 2  # the paper's
_ORACLE_STEPS = 10
_LARGEST = 4 << 20  # bytes
_LARGEST_LOG = 64 << 20


@dataclass(frozen=True)
class Batch:
    """The content of `allocation.json`: m numbers each, the outcome being a class's name.

    Attributes:
        svar: signed prediction variances.
        outcome: the classes, as the oracle's attack found them.
        steps: those of eq. 6 with the run's last F_R, `robust_fraction`.
    """

    svar: list[float]
    outcome: list[str]
    steps: list[int]
    robust_fraction: float


def write_allocation(folder: Path) -> Path:
    """Write `<folder>/allocation.json` of a finished run's first batch of epoch 1, unaugmented.

    Raises:
        UserError: the run cannot be read, or the file not be written.
    """
    config, model = load_run(folder)
    cpu = torch.device("cpu")
    data = load_configured(config.dataset, cpu)
    first = epoch_order(len(data.train), config.seed, 0)[: config.train.batch_size]
    x, labels = to_unit(data.train.images[first]), data.train.labels[first]
    robust_fraction = torch.tensor(_last_robust_fraction(folder / "metrics.jsonl"))
    method = make_bullettrain(config, cpu)
    z = eval_logits(model, x)
    noise = method.attack.noise(x, torch.Generator().manual_seed(config.seed))
    size = float(method.attack.sizes(torch.tensor([_ORACLE_STEPS])))
    adv_logits = method.attacked_logits(model, x, labels, z, noise, _ORACLE_STEPS, size)
    svar = signed_prediction_variance(z, labels)
    steps = by_score(svar, robust_fraction, torch.tensor([0, _N_R, config.attack.steps])).steps
    batch = Batch(
        svar=svar.tolist(),
        outcome=[_NAMES[number] for number in true_classes(z, adv_logits, labels).tolist()],
        steps=steps.tolist(),
        robust_fraction=float(robust_fraction),
    )
    path = folder / ALLOCATION
    write_file(path, json.dumps(asdict(batch)).encode() + b"\n")
    return path


def read_batch(folder: Path) -> Batch | None:
    """Return what a run's `allocation.json` holds, or None where there is no sound one."""
    try:
        batch = Batch(**json.loads(read_text(folder / ALLOCATION, _LARGEST)))
        sound = (
            len(batch.svar) == len(batch.outcome) == len(batch.steps) > 0
            and all(map(is_number, (*batch.svar, *batch.steps)))
            and {*batch.outcome} <= {*_NAMES.values()}
        )
    except (OSError, ValueError, TypeError, RecursionError):
        return None
    return batch if sound else None


def _last_robust_fraction(path: Path) -> float:
    """Return F_R at the end of a run, from the last line of its log."""
    try:
        return float(json.loads(read_text(path, _LARGEST_LOG).splitlines()[-1])["robust_fraction"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: it does not end with an epoch.") from error
