"""The settings of `btrain bench`, as dataclasses that check their values."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from btrain.errors import UserError
from btrain.settings import MISSING, DefenseName, Precision
from btrain.settings.checks import at_least, require


class Contender(Enum):
    official = "official"
    lean = "lean"
    bullettrain = "bullettrain"
    pooled = "pooled"
    masked = "masked"


@dataclass
class BenchConfig:
    defenses: list[DefenseName] = MISSING
    models: list[str] = MISSING
    batch_sizes: list[int] = MISSING
    precisions: list[Precision] = MISSING
    channels_last: list[bool] = MISSING
    compiled: list[bool] = MISSING
    cuda_graphs: list[bool] = MISSING
    methods: list[Contender] = MISSING
    fractions: dict[str, list[float]] = MISSING
    boundary_fractions: list[float] | None = None
    checkpoint: str | None = None
    trust_code: bool = False
    repetitions: int = MISSING
    seconds: float | None = None
    out: str | None = None
    plot: str | None = None

    def __post_init__(self) -> None:
        lists = ("defenses", "models", "batch_sizes", "precisions", "channels_last", "compiled")
        for key in (*lists, "cuda_graphs", "methods"):
            if not getattr(self, key):
                raise UserError(f"bench.{key} must name at least one.")
        for key in ("compiled", "cuda_graphs"):
            if False not in getattr(self, key):
                raise UserError(f"bench.{key} must name false: what does without is measured, too.")
        if Contender.lean not in self.methods:
            raise UserError("bench.methods must name lean: speedups are ratios to it.")
        if self.checkpoint == "":
            raise UserError("bench.checkpoint is empty; please name a run folder, or null.")
        if self.plot is not None and Contender.bullettrain not in self.methods:
            raise UserError("bench.methods must name bullettrain: bench.plot draws nothing else.")
        for size in self.batch_sizes:
            at_least(4, "bench.batch_sizes", size)
        at_least(1, "bench.repetitions", self.repetitions)
        at_least(0, "bench.seconds", self.seconds)
        for defense, fractions in self.fractions.items():
            self._check_fractions(defense, fractions)
        if self.boundary_fractions == []:
            raise UserError("bench.boundary_fractions must name at least one, or be null.")
        for share in self.boundary_fractions or []:
            require(0 <= share < 1, "bench.boundary_fractions", "in [0, 1)", share)

    @staticmethod
    def _check_fractions(defense: str, fractions: list[float]) -> None:
        shares = len(fractions) == 3 and min(fractions) >= 0
        if not shares or abs(sum(fractions) - 1) > 1e-6:
            raise UserError(
                f"bench.fractions.{defense} must be F_B, F_R and F_O, which add up to 1, "
                f"not {fractions}."
            )


@dataclass
class BenchRun:
    """The content of `configs/bench.yaml`."""

    bench: BenchConfig = MISSING
