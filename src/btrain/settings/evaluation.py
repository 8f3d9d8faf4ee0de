"""The settings of `btrain eval`, checked; no torch here, so that mistakes answer at once."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from btrain.errors import UserError
from btrain.settings.checks import at_least, seed_in_range
from btrain.settings.method import ENGINES

LOSSES = ("ce", "kl", "cw", "dlr")
PRECISIONS = ("float32", "bf16")


@dataclass(frozen=True)
class PgdSettings:
    """PGD's settings but for ε; a step size of None is the data set's, 3/31·ε or ε/10."""

    steps: int
    restarts: int = 1
    loss: str = "ce"
    step_size: float | None = None
    last_iterate: bool = False

    @property
    def name(self) -> str:
        """Of settings that are no preset, for their files: `pgd50x5-cw`."""
        size = "" if self.step_size is None else f"-step{self.step_size:.4g}"
        last = "-last" if self.last_iterate else ""
        return f"pgd{self.steps}x{self.restarts}-{self.loss}{size}{last}"


PRESETS = {
    "pgd20": PgdSettings(20, last_iterate=True),  # as published with TRADES
    "pgd100x10": PgdSettings(100, restarts=10),
    "pgd1000x5": PgdSettings(1000, restarts=5),
}
CUSTOM = PgdSettings(20)
AUTOATTACKS = {"autoattack": "standard", "autoattack_rand": "rand"}

CHAIN = ("pgd20", "pgd100x10", "pgd1000x5", "autoattack")
"""The attacks of `attack=all`, the strongest last; each begins with what the one before left."""
INTERVAL_ATTACKS = ("interval", "interval50")
ATTACKS = (
    "clean", *PRESETS, *AUTOATTACKS, *INTERVAL_ATTACKS, "corruptions", "custom", "all",
)  # fmt: skip


@dataclass(frozen=True)
class EvalSettings:
    """One `btrain eval`.

    Attributes:
        attacks: names of `ATTACKS`; "all" stands alone.
        pgd: settings that change the PGD attacks among them.
        config: overrides of the run's `dataset` and `model`, key by key as they were typed.
        epsilon, seed: None for the run's.
        batch_size: examples in memory at once.
        verify: engines of `btrain.verify.bounds`, several of them joined by +, or any.
    """

    checkpoint: str
    attacks: tuple[str, ...] = ("pgd20",)
    pgd: Mapping[str, Any] = field(default_factory=dict)
    extra_corruptions: bool = False
    corruptions_root: str | None = None
    config: Mapping[str, str] = field(default_factory=dict)
    epsilon: float | None = None
    seed: int | None = None
    device: str = "auto"
    batch_size: int = 500
    precision: str = "float32"
    sanity: bool = True
    report: bool = False
    out: str | None = None
    verify: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        _check_attacks(self.attacks)
        self._check_bounds()
        _check_range("epsilon", self.epsilon, 0, 1, " ([0, 1] pixel units, like 8/255)")
        _check_range("attack.step_size", self.pgd.get("step_size"), 0, 2, "")
        for key in ("steps", "restarts"):
            at_least(1, f"attack.{key}", self.pgd.get(key))
        at_least(1, "eval.batch_size", self.batch_size)
        _one_of("attack.loss", self.pgd.get("loss", "ce"), LOSSES)
        _one_of("precision", self.precision, PRECISIONS)
        seed_in_range("seed", self.seed)
        if self.pgd and not any(name in PRESETS or name == "custom" for name in self.attacks):
            raise UserError(
                f"attack.{next(iter(self.pgd))} is a setting of PGD; it does not go with "
                f"attack={','.join(self.attacks)}."
            )
        self._check_distinct()
        with_corruptions = {"corruptions", "all"} & set(self.attacks)
        if self.extra_corruptions and not with_corruptions:
            raise UserError("attack.extra_corruptions goes with attack=corruptions or all.")
        if "corruptions" in self.attacks and self.corruptions_root is None:
            raise UserError(
                "attack=corruptions needs dataset.corruptions_root, the folder that holds "
                "gaussian_noise.npy and the others."
            )

    def _check_bounds(self) -> None:
        for engine in self.verify:
            for name in engine.split("+"):
                _one_of("verify", name, (*ENGINES, "any"))
        if len(set(self.verify)) < len(self.verify):
            raise UserError(f"verify={','.join(self.verify)} must name each engine once.")
        bounded = self.verify or [name for name in self.attacks if name in INTERVAL_ATTACKS]
        if bounded and self.precision != "float32":
            raise UserError(
                f"precision={self.precision} does not go with bounds ({bounded[0]}): they hold for "
                "float32."
            )

    def pgd_attack(self, name: str) -> tuple[str, PgdSettings]:
        """A preset as the user has it, and what it is called then; a preset keeps its name."""
        settings = replace(PRESETS.get(name, CUSTOM), **self.pgd)
        names = [preset for preset, its in PRESETS.items() if its == settings]
        return (names[0] if names else settings.name), settings

    def _check_distinct(self) -> None:
        """Changed presets may come to one and the same attack."""
        seen: dict[str, str] = {}
        for attack in self.attacks:
            name = self.pgd_attack(attack)[0] if attack in (*PRESETS, "custom") else attack
            if name in seen:
                changes = " ".join(f"attack.{key}={value}" for key, value in self.pgd.items())
                raise UserError(
                    f"{seen[name]} and {attack} are one and the same attack with {changes}; "
                    "please leave one out."
                )
            seen[name] = attack


def _check_attacks(names: tuple[str, ...]) -> None:
    for name in names:
        _one_of("attack", name, ATTACKS)
    if "all" in names and len(names) > 1:
        raise UserError("attack=all stands alone; it includes the others.")
    if len(set(names)) < len(names) or not names:
        raise UserError(f"attack={','.join(names)} must name each attack once.")


def _one_of(key: str, value: str, options: tuple[str, ...]) -> None:
    from difflib import get_close_matches

    if value not in options:
        close = get_close_matches(value, options, n=1)
        meant = f" Did you mean {close[0]}?" if close else ""
        raise UserError(f"{key}={value} is no option; there are: {', '.join(options)}.{meant}")


def _check_range(key: str, value: float | None, low: float, high: float, why: str) -> None:
    if value is not None and not low < value <= high:
        raise UserError(f"{key} must be greater than {low} and at most {high}{why}, not {value:g}.")
