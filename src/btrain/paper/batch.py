"""Figure 5: what a trained network makes of one batch, and the steps that the batch would get."""

from __future__ import annotations

import json
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
from btrain.build import load_data
from btrain.data.augmentation import to_unit
from btrain.durable import write_file
from btrain.errors import UserError
from btrain.exchange.from_run import load_run
from btrain.methods.bullettrain import eval_logits
from btrain.methods.make import make_bullettrain
from btrain.training.epochs import epoch_order
from btrain.untrusted import read_text

FILE = "allocation.json"
_NAMES = {BOUNDARY: "boundary", ROBUST: "robust", OUTLIER: "outlier"}
_N_R = 2  # the paper's
_ORACLE_STEPS = 10
_LARGEST = 64 << 20  # bytes of metrics.jsonl


def write_allocation(folder: Path) -> Path:
    """Writes `<folder>/allocation.json` of a finished run's first batch of epoch 1, unaugmented.

    `svar` and `steps` are lists of m numbers, `outcome` of m classes, which the oracle's attack
    found; the steps are those of eq. 6 with the run's last `robust_fraction`.

    Raises:
        UserError: the run cannot be read, or the file not be written.
    """
    config, model = load_run(folder)
    cpu = torch.device("cpu")
    data = load_data(config, cpu)
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
    content = {
        "svar": svar.tolist(),
        "outcome": [_NAMES[number] for number in true_classes(z, adv_logits, labels).tolist()],
        "steps": steps.tolist(),
        "robust_fraction": float(robust_fraction),
    }
    path = folder / FILE
    write_file(path, json.dumps(content).encode() + b"\n")
    return path


def _last_robust_fraction(path: Path) -> float:
    """F_R at the end of a run, from the last line of its log."""
    try:
        return float(json.loads(read_text(path, _LARGEST).splitlines()[-1])["robust_fraction"])
    except (OSError, ValueError, LookupError, TypeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: it does not end with an epoch.") from error
