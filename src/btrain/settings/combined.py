"""The groups together, and what in one does not go with what in another."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import permutations
from pathlib import Path

from btrain.errors import UserError
from btrain.settings.checks import MISSING, pixels, seed_in_range
from btrain.settings.method import (
    AttackConfig,
    BTConfig,
    Choice,
    DefenseConfig,
    MMAConfig,
    OracleConfig,
    RivalConfig,
    VerifiedConfig,
)
from btrain.settings.names import MixDynamic
from btrain.settings.run import (
    DatasetConfig,
    EvalConfig,
    LoggerConfig,
    ModelConfig,
    RecipeConfig,
    RunConfig,
    TrainConfig,
)
from btrain.settings.sparsity import SparsityConfig


@dataclass
class Config:
    """The settings that decide a run."""

    dataset: DatasetConfig = MISSING
    model: ModelConfig = MISSING
    attack: AttackConfig = MISSING
    defense: DefenseConfig = MISSING
    bt: BTConfig = MISSING
    rival: RivalConfig = MISSING
    sparsity: SparsityConfig = MISSING
    recipe: RecipeConfig = MISSING
    logger: LoggerConfig = MISSING
    train: TrainConfig = MISSING
    eval: EvalConfig = MISSING
    run: RunConfig = MISSING
    seed: int = MISSING
    device: str = MISSING

    def __post_init__(self) -> None:
        seed_in_range("seed", self.seed)
        self._check_combinations()

    def _check_combinations(self) -> None:
        for one, other in permutations(self.choices(), 2):
            for kind in sorted(other.kinds & one.refuses.keys()):
                raise UserError(
                    f"{one.written} does not go with {other.written}: {one.refuses[kind]}."
                )
        self._check_lengths()

    def choices(self) -> list[Choice]:
        """Return what was chosen, each with what it is and what it does not go with."""
        groups = (
            *(self.rival, self.defense, self.attack, self.bt, self.sparsity),
            *(self.recipe, self.train),
        )
        return [choice for group in groups for choice in group.choices()]

    def chosen(self, kind: str) -> str | None:
        """Return a choice of this kind as it is written, or None where none was made."""
        return next((c.written for c in self.choices() if kind in c.kinds), None)

    def _check_lengths(self) -> None:
        """Raise UserError where numbers of two groups do not go together."""
        rival, attack, bt = self.rival, self.attack, self.bt
        bt.check_order()
        lengths = [
            ("bt.step_size_b", bt.step_size_b, 2),
            ("eval.epsilon", self.eval.epsilon, 1),
            ("eval.step_size", self.eval.step_size, 2),
        ]
        if isinstance(bt, OracleConfig):
            lengths.append(("bt.oracle_step_size", bt.oracle_step_size, 2))
        if isinstance(rival, MMAConfig):
            lengths.append(("rival.max_margin", rival.max_margin, 1))
        for key, length, most in lengths:
            pixels(key, length, attack.norm, most=most)
        if attack.augmix is not None and (attack.steps != 2 or bt.n_b != 1):
            raise UserError(
                "defense=augmix makes two views of an image or none: attack.steps must be 2 and "
                f"bt.n_b 1, not {attack.steps} and {bt.n_b}."
            )
        bounded = self.defense.per_batch if isinstance(self.defense, VerifiedConfig) else None
        if bounded is not None and bounded > self.train.batch_size:
            raise UserError(
                f"defense.per_batch must be at most train.batch_size = {self.train.batch_size}, "
                f"not {bounded}."
            )
        more = self.recipe.repair_steps
        if more and bt.n_b == 0:
            raise UserError(f"recipe.repair_steps={more} has no attack to repair with bt.n_b=0.")
        defense = self.defense
        listens = isinstance(defense, VerifiedConfig) and defense.dynamic is MixDynamic.feedback
        if listens and not self.dataset.val_examples:
            raise UserError(
                "defense.dynamic=feedback measures on held-out images; set dataset.val_examples."
            )
        if rival.mode is None:
            return
        if bt.n_b != attack.steps:
            raise UserError(
                f"bt.n_b has no meaning with rival={rival.name.name}; set attack.steps."
            )
        if attack.mode is not rival.mode:
            raise UserError(f"attack.mode must be {rival.mode.name} with rival={rival.name.name}.")

    @property
    def run_dir(self) -> Path:
        """Return the run folder; `btrain.settings.compose` has named it where the user did not."""
        assert self.run.dir is not None
        return Path(self.run.dir)
