"""The cost of training: the FLOPs of a network, and the log's three speedups.

A unit is one forward pass of one example: an attack step takes two, a training pass three.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from btrain.allocation import theoretical_speedup
from btrain.attacks.pgd import evaluation_mode
from btrain.methods.make import NOTHING, Known, make_method, plain_defense
from btrain.settings import Config
from btrain.settings.method import TradesConfig

PAPER_FRACTIONS = (0.28, 0.54, 0.18)
"""F_B, F_R, F_O of the paper's TRADES + BT with N_R = 2 (Table 2)."""


def forward_flops(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> int:
    """Return the floating-point operations of one image's forward pass, by torch's counter.

    A multiply-add counts as two. `shape` is (C, H, W).
    """
    with evaluation_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device=device))
    return int(counter.get_total_flops())


@dataclass(frozen=True)
class Costs:
    """The units with which those of a run are compared.

    Attributes:
        steps: N of the plain attack.
        lean: units an example of the plain defense with the same settings, without wasted work.
        official: units an example of TRADES' published step structure, which forwards the clean
            images again in every attack step, and twice in the loss; None for other defenses.
        eq7: whether eq. 7 describes the run.
        in_units: whether its units compare at all.
    """

    steps: int
    lean: float
    official: float | None
    eq7: bool
    in_units: bool

    @staticmethod
    def of(config: Config, known: Known = NOTHING) -> Costs:
        """Return those of a configuration; `known` is of the data, for the user's own parts."""
        device = torch.device("cpu")
        method = make_method(config, device, known=known)
        plain = make_method(plain_defense(config), device, known=known)
        lean = plain.expected_units((1, 0, 0))
        assert lean is not None
        trades = isinstance(config.defense, TradesConfig)
        official = 3 * config.attack.steps + 9 if trades else None
        return Costs(config.attack.steps, lean, official, method.eq7, method.in_units)


def speedups(costs: Costs, means: dict[str, Any]) -> dict[str, float | None]:
    """Return the log's three speedups for an epoch's averages; None where one has no meaning.

    `theoretical_speedup` is eq. 7, whose sum over the classes is the mean number of steps, also
    where that varies within a class. The other two compare units: with the plain defense of the
    same settings, and with the published TRADES code. Eq. 7 describes neither GradAlign's penalty
    nor kept starts, a share of the robust examples, a guard or examples left out; none of the three
    describes Free, MMA, training by bounds, or a run that ended before its first batch.
    """
    steps, units = means["attack_steps_mean"], means["units_per_example"]
    if units is None or not costs.in_units:
        return dict.fromkeys(("theoretical_speedup", "speedup_flops", "speedup_official"))
    eq7 = theoretical_speedup(fractions=(1, 0, 0), steps=(steps, 0, 0), baseline_steps=costs.steps)
    return {
        "theoretical_speedup": eq7 if costs.eq7 else None,
        "speedup_flops": costs.lean / units,
        "speedup_official": None if costs.official is None else costs.official / units,
    }
