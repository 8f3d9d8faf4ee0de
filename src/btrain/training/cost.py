"""What training costs: the FLOPs of a network, and the log's three speedups.

A unit is one forward pass of one example: an attack step takes two, a training pass three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from btrain.allocation import theoretical_speedup
from btrain.attacks import evaluation_mode
from btrain.schema import AttackMode, Config, DefenseName, RivalName
from btrain.training.methods import make_defense

PAPER_FRACTIONS = (0.28, 0.54, 0.18)
"""F_B, F_R, F_O of the paper's TRADES + BT with N_R = 2 (Table 2)."""


def forward_flops(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> int:
    """Floating-point operations of one image's forward pass, by torch's counter.

    A multiply-add counts as two. `shape` is (C, H, W).
    """
    with evaluation_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device=device))
    return int(counter.get_total_flops())


def lean_units(config: Config) -> float:
    """Units an example of the plain defense with these settings costs, without wasted work."""
    if config.defense.name is DefenseName.augmix:
        return 9 if config.defense.jsd else 3
    defense = make_defense(config.defense)
    shared = config.bt.share_clean_forward or config.attack.mode is AttackMode.train
    target = 1 if defense.inner_reads_clean and not shared else 0
    training = 6 if defense.outer_reads_clean else 3
    return 2 * config.attack.steps + target + training


def official_units(config: Config) -> float | None:
    """Units an example of TRADES' published step structure costs; None for other defenses.

    It forwards the clean images again in every attack step, and twice in the loss.
    """
    return 3 * config.attack.steps + 9 if config.defense.name is DefenseName.trades else None


def speedups(config: Config, means: dict[str, Any]) -> dict[str, float | None]:
    """The log's three speedups for an epoch's averages; None where a number has no meaning.

    `theoretical_speedup` is eq. 7, whose sum over the classes is the mean number of steps, also
    where that varies within a class. The other two compare units: with the plain defense of the
    same settings, and with the published TRADES code. Eq. 7 knows nothing of GradAlign's penalty,
    and none of the three describes Free or MMA, nor a run that ended before its first batch.
    """
    steps, units = means["attack_steps_mean"], means["units_per_example"]
    if units is None or config.rival.name in (RivalName.free, RivalName.mma):
        return dict.fromkeys(("theoretical_speedup", "speedup_flops", "speedup_official"))
    official = official_units(config)
    eq7 = theoretical_speedup(
        fractions=(1, 0, 0), steps=(steps, 0, 0), baseline_steps=config.attack.steps
    )
    return {
        "theoretical_speedup": None if config.rival.name is RivalName.gradalign else eq7,
        "speedup_flops": lean_units(config) / units,
        "speedup_official": None if official is None else official / units,
    }
