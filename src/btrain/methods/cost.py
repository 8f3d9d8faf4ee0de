"""What training costs: the FLOPs of a network, and the log's three speedups.

A unit is one forward pass of one example: an attack step takes two, a training pass three.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from btrain.allocation import theoretical_speedup
from btrain.attacks.pgd import evaluation_mode
from btrain.methods.make import make_defense, plain_defense
from btrain.settings import AllocatorName, AttackMode, Config, DefenseName, RivalName

PAPER_FRACTIONS = (0.28, 0.54, 0.18)
"""F_B, F_R, F_O of the paper's TRADES + BT with N_R = 2 (Table 2)."""


def forward_flops(model: nn.Module, shape: tuple[int, int, int], device: torch.device) -> int:
    """Floating-point operations of one image's forward pass, by torch's counter.

    A multiply-add counts as two. `shape` is (C, H, W).
    """
    with evaluation_mode(model), torch.no_grad(), FlopCounterMode(display=False) as counter:
        model(torch.zeros(1, *shape, device=device))
    return int(counter.get_total_flops())


def expected_units(config: Config, fractions: tuple[float, float, float]) -> float | None:
    """Units an example of a training step with these F_B, F_R, F_O; None for Free and MMA.

    What `units_per_example` of a log will be where its fractions are these, but for batches whose
    single perturbed example takes another one along.
    """
    bt, defense = config.bt, config.defense
    if config.rival.name in (RivalName.free, RivalName.mma):
        return None
    plain = bt.name is AllocatorName.uniform
    shares = (1.0, 0.0, 0.0) if plain else fractions
    if defense.name is DefenseName.augmix:
        return 3 + 6 * shares[0] if defense.jsd else 3
    budget = (bt.n_b, bt.n_r, bt.n_o)
    steps = sum(share * n for share, n in zip(shares, budget, strict=True))
    attacked = sum(share for share, n in zip(shares, budget, strict=True) if n)
    loss = make_defense(defense)
    shared = bt.share_clean_forward or (
        config.attack.mode is AttackMode.train and loss.inner_reads_clean
    )
    scores = 1 if (loss.inner_reads_clean or not plain) and not shared else 0
    training = 3 + 3 * (1 if bt.forward_unperturbed else attacked)
    training = training if loss.outer_reads_clean else 3
    oracle = 2 * bt.oracle_steps + 1 if bt.name is AllocatorName.oracle else 0
    penalty = 8 if config.rival.grad_align_weight else 0
    return 2 * steps + scores + training + oracle + penalty


def lean_units(config: Config) -> float:
    """Units an example of the plain defense with these settings costs, without wasted work."""
    units = expected_units(plain_defense(config), (1, 0, 0))
    assert units is not None
    return units


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
