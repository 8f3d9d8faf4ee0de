"""The groups that say how the network is made robust: attack, defense, rival, allocation.

Each option of a group has settings of its own, and says itself what it does not go with.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

from btrain.errors import UserError
from btrain.settings.checks import MISSING, at_least, no_null, pixels, positive, require, typed
from btrain.settings.names import (
    ANY,
    ENGINES,
    AllocatorName,
    AttackMode,
    AttackName,
    DefenseName,
    Metric,
    MixDynamic,
    MixForm,
    RivalName,
    Score,
    Start,
    Store,
)


@dataclass(frozen=True)
class Choice:
    """One thing that was chosen, as it stands among the others.

    Attributes:
        written: how a user writes it.
        kinds: the words by which others may refuse it.
        refuses: kinds that it does not go with, and why.
        unread: settings that nothing reads beside it, and that nobody shall therefore type.
    """

    written: str
    kinds: frozenset[str] = frozenset()
    refuses: Mapping[str, str] = field(default_factory=dict)
    unread: frozenset[str] = frozenset()


# ---------------------------------------------------------------------------------------- attack


@dataclass
class AugMixConfig:
    width: int = MISSING
    depth: int = MISSING
    severity: float = MISSING
    all_ops: bool = MISSING

    def __post_init__(self) -> None:
        at_least(1, "attack.augmix.width", self.width)
        require(
            self.depth == -1 or self.depth >= 1, "attack.augmix.depth", "-1 or positive", self.depth
        )
        in_range = 0.1 <= self.severity <= 10
        require(in_range, "attack.augmix.severity", "in [0.1, 10]", self.severity)


@dataclass
class AttackConfig:
    """The settings of an attack in an L∞ ball, which all attacks have."""

    name: AttackName = MISSING
    steps: int = MISSING
    epsilon: Any = MISSING
    step_size: Any = MISSING
    start: Start = MISSING
    start_std: Any = MISSING
    store: Store = Store.int8
    checkpoint_store: bool = True
    epsilon_warmup_epochs: int = 0
    mode: AttackMode = MISSING
    augmix: AugMixConfig | None = None

    norm: ClassVar[str] = "linf"
    kinds: ClassVar[frozenset[str]] = frozenset()

    def __post_init__(self) -> None:
        at_least(1, "attack.steps", self.steps)
        self.epsilon = pixels("attack.epsilon", self.epsilon, self.norm)
        self.step_size = pixels("attack.step_size", self.step_size, self.norm, most=2)
        self.start_std = pixels("attack.start_std", self.start_std, self.norm, least=True)
        at_least(0, "attack.epsilon_warmup_epochs", self.epsilon_warmup_epochs)

    def share(self, epoch: int) -> float:
        """Return ε and step sizes of an epoch, from 0, as a share of what they will be."""
        return min(1.0, (epoch + 1) / (self.epsilon_warmup_epochs + 1))

    def unkept(self) -> AttackConfig:
        """Return the same attack from a start of its own, for work that keeps none."""
        return replace(self, start=Start.normal) if self.start is Start.kept else self

    def choices(self) -> list[Choice]:
        views = self.augmix is not None
        found = [
            Choice(
                f"attack={self.name.name}",
                self.kinds | ({"augmix_attack"} if views else {"gradient_attack"}),
                {"attacking": "the attack augmix belongs to the defense augmix"} if views else {},
            )
        ]
        if self.mode is AttackMode.train:
            why = "the groups of a batch would each see their own BatchNorm statistics (bt=uniform)"
            found.append(Choice("attack.mode=train", frozenset({"train_mode"}), {"chooses": why}))
        if self.start is not Start.kept:
            unread = frozenset({"attack.store", "attack.checkpoint_store"})
            found.append(Choice(f"attack.start={self.start.name}", unread=unread))
        at_image = self.start in (Start.normal, Start.kept) and self.start_std == 0
        if at_image or self.start is Start.clean:
            written = "attack.start_std=0" if at_image else "attack.start=clean"
            found.append(Choice(written, frozenset({"clean_start"})))
        if self.start is Start.kept:
            coarse = {} if self.store is Store.bf16 else _TOO_COARSE
            found.append(Choice("attack.start=kept", frozenset({"kept"}), _NO_KEPT | coarse))
        if self.epsilon_warmup_epochs:
            written = f"attack.epsilon_warmup_epochs={self.epsilon_warmup_epochs}"
            found.append(Choice(written, frozenset({"epsilon_warmup"})))
        return found


_NO_KEPT = {
    "augmix": "there is no attack",
    "rival": "a rival has a start of its own",
    "verified": "most of its images are not attacked",
    "pool": "the pool is attacked ahead of the weights that its batches leave",
    "attacks_by_itself": "its own attack is to find what one from the image finds",
}
_TOO_COARSE = dict.fromkeys(
    ("l2", "own_ball"), "a pixel moves by less than 1/127 of ε there (attack.store=bf16)"
)


@dataclass
class L2AttackConfig(AttackConfig):
    """An attack in an L2 ball."""

    norm: ClassVar[str] = "l2"
    kinds: ClassVar[frozenset[str]] = frozenset({"l2"})


@dataclass
class OwnAttackConfig(AttackConfig):
    """An attack in a ball of the user's."""

    factory: str = MISSING
    settings: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__post_init__()
        no_null("attack.factory", self.factory)

    norm: ClassVar[str] = "own"
    kinds: ClassVar[frozenset[str]] = frozenset({"own_ball"})


ATTACKS: dict[AttackName, type[AttackConfig]] = {
    AttackName.linf_pgd: AttackConfig,
    AttackName.madry: AttackConfig,
    AttackName.augmix: AttackConfig,
    AttackName.l2_pgd: L2AttackConfig,
    AttackName.own: OwnAttackConfig,
}


# --------------------------------------------------------------------------------------- defense


@dataclass
class DefenseConfig:
    """The name that every defense has."""

    name: DefenseName = MISSING

    kinds: ClassVar[frozenset[str]] = frozenset({"attacking", "not_pgd"})
    refuses: ClassVar[Mapping[str, str]] = {}

    def choices(self) -> list[Choice]:
        return [Choice(f"defense={self.name.name}", self.kinds, self.refuses)]


@dataclass
class TradesConfig(DefenseConfig):
    beta: float = MISSING

    refuses: ClassVar[Mapping[str, str]] = {
        "clean_start": "at the clean image its KL divergence has no gradient"
    }

    def __post_init__(self) -> None:
        at_least(0, "defense.beta", self.beta)


@dataclass
class MartConfig(DefenseConfig):
    beta: float = MISSING

    def __post_init__(self) -> None:
        at_least(0, "defense.beta", self.beta)


@dataclass
class PGDConfig(DefenseConfig):
    kinds: ClassVar[frozenset[str]] = frozenset({"attacking", "one_pass"})


@dataclass
class AugMixDefenseConfig(DefenseConfig):
    jsd: bool = MISSING
    jsd_weight: float = MISSING

    kinds: ClassVar[frozenset[str]] = frozenset({"augmix", "one_pass", "not_pgd"})
    refuses: ClassVar[Mapping[str, str]] = {
        "gradient_attack": "the attack augmix belongs to the defense augmix",
        "train_mode": "it makes views and no attack",
        "epsilon_warmup": "it makes views and no attack",
    }

    def __post_init__(self) -> None:
        at_least(0, "defense.jsd_weight", self.jsd_weight)

    def choices(self) -> list[Choice]:
        found = super().choices()
        if not self.jsd:
            why = "it makes one view of every image (bt=uniform)"
            found.append(Choice("defense.jsd=false", frozenset(), {"chooses": why}))
        return found


@dataclass
class OwnDefenseConfig(DefenseConfig):
    factory: str = MISSING
    settings: dict[str, Any] = field(default_factory=dict)

    kinds: ClassVar[frozenset[str]] = DefenseConfig.kinds | {"own_defense"}

    def __post_init__(self) -> None:
        no_null("defense.factory", self.factory)


@dataclass
class VerifiedConfig(DefenseConfig):
    """Training by bounds: who is bounded, in which box, by which engine, mixed with what."""

    engine: str = MISSING
    k: int | None = MISSING
    per_batch: int | None = MISSING
    form: MixForm = MISSING
    alpha: float = MISSING
    weight_first: float = MISSING
    weight_last: float = MISSING
    weight_until: float = MISSING
    ramp: float = MISSING
    box: float = MISSING
    plain_on_attacked: bool = MISSING
    shi_init: bool = MISSING
    shi_regulariser: float = MISSING
    dynamic: MixDynamic = MixDynamic.schedule
    memory: float = 2.0

    kinds: ClassVar[frozenset[str]] = frozenset({"verified", "own_step", "one_pass", "not_pgd"})
    refuses: ClassVar[Mapping[str, str]] = {
        "l2": "its bounds are for an L∞ ball",
        "own_ball": "its bounds are for an L∞ ball",
        "rival": "it has a loss of its own",
        "own_step": "it has a loss of its own",
        "epsilon_warmup": "its box grows by defense.ramp",
        "train_mode": "its attack is in eval mode",
        "pool": "it bounds the images of one batch",
        "early_exit": "only bt=random and bt=bullettrain choose who is bounded",
        "attacks_by_itself": "only bt=random and bt=bullettrain choose who is bounded",
        "other_choice": "only bt=random and bt=bullettrain choose who is bounded",
    }

    def __post_init__(self) -> None:
        for engine in self.engine.split("+"):
            if engine == ANY:
                raise UserError(
                    f"defense.engine={self.engine}: {ANY} is for verify= alone; please join "
                    "engines by +, like ibp+symbolic."
                )
            rule = f"of {', '.join(ENGINES)}, or several joined by +"
            require(engine in ENGINES, "defense.engine", rule, engine)
        at_least(1, "defense.k", self.k)
        at_least(1, "defense.per_batch", self.per_batch)
        only_one = self.k is None or self.per_batch is None
        require(only_one, "defense.per_batch", f"null with defense.k={self.k}", self.per_batch)
        require(0 <= self.alpha <= 1, "defense.alpha", "in [0, 1]", self.alpha)
        positive("defense.weight_first", self.weight_first)
        positive("defense.weight_last", self.weight_last)
        for name in ("weight_until", "box"):
            share = getattr(self, name)
            require(0 < share <= 1, f"defense.{name}", "in (0, 1]", share)
        require(0 <= self.ramp <= 1, "defense.ramp", "in [0, 1]", self.ramp)
        at_least(0, "defense.shi_regulariser", self.shi_regulariser)
        positive("defense.memory", self.memory)

    @property
    def attacks(self) -> bool:
        """Return whether images are attacked."""
        return self.box < 1 or self.plain_on_attacked

    def choices(self) -> list[Choice]:
        found = super().choices()
        if self.k is None and self.per_batch is None:
            why = "it bounds all images (bt=uniform)"
            found.append(Choice("defense.per_batch=null", frozenset(), {"chooses": why}))
        else:
            few = "k" if self.per_batch is None else "per_batch"
            why = "bt=random or bt=bullettrain choose the few that it bounds (null bounds all)"
            written = f"defense.{few}={getattr(self, few)}"
            found.append(Choice(written, frozenset(), {"alike": why}))
        return found

    def hints(self, held_out: int) -> list[str]:
        """Return sentences for whoever might expect something else of settings that go together.

        Args:
            held_out: the number of held-out images.
        """
        found = []
        by_name = _BY_NAME.get(self.name, self.engine)
        if self.engine != by_name:
            found.append(
                f"defense={self.name.name} is trained by defense.engine={self.engine} here, not by "
                f"{by_name}, as its name says."
            )
        if self.form is MixForm.bernoulli and self.weight_last < self.weight_first:
            found.append(
                f"The weight falls, from defense.weight_first={self.weight_first:g} to "
                f"defense.weight_last={self.weight_last:g}."
            )
        if self.name is DefenseName.sabr and self.box == 1:
            found.append(
                "defense.box=1 bounds the whole box and attacks nothing: that is defense=ibp "
                f"defense.alpha={self.alpha:g}, not SABR."
            )
        if self.dynamic is MixDynamic.feedback and held_out < FEEDBACK_IMAGES:
            found.append(
                f"defense.dynamic=feedback measures on {held_out} held-out images, all there are "
                f"(dataset.val_examples), not on {FEEDBACK_IMAGES}."
            )
        return found

    def unread(self, bt: BTConfig) -> dict[str, str]:
        """Return the settings that nothing reads here, each with the choice that leaves it unread.

        Both as a user writes them.
        """
        defense, form = f"defense={self.name.name}", f"defense.form={self.form.name}"
        unread = [*_NEVER_READ, *(() if self.attacks else ("bt.n_b", "bt.step_size_b"))]
        found = dict.fromkeys(unread, defense)
        if type(bt) is not BulletTrainConfig:
            found["bt.metric"] = f"bt={bt.name.name}"
        if self.ramp == 0:
            found["defense.shi_regulariser"] = "defense.ramp=0, for it is added while ε grows"
        if self.form is MixForm.convex:
            found |= dict.fromkeys(_WEIGHTS, form)
        if self.dynamic is MixDynamic.feedback:
            fixed = _WEIGHTS if self.form is MixForm.bernoulli else ("defense.alpha",)
            found |= dict.fromkeys(fixed, "defense.dynamic=feedback")
        return found


_BY_NAME = {
    DefenseName.ibp: "ibp",
    DefenseName.crown_ibp: "crown_ibp",
    DefenseName.mtl_ibp: "ibp",
}
"""The engine of a defense that is named after it."""
_NEVER_READ = (
    *("bt.gamma", "bt.momentum", "bt.n_r", "bt.n_o", "bt.fractions", "bt.warmup_epochs"),
)
_WEIGHTS = ("defense.weight_first", "defense.weight_last", "defense.weight_until")


FEEDBACK_IMAGES = 200
"""The most held-out images that the mix of training by bounds follows."""

DEFENSES: dict[DefenseName, type[DefenseConfig]] = {
    DefenseName.trades: TradesConfig,
    DefenseName.mart: MartConfig,
    DefenseName.pgd: PGDConfig,
    DefenseName.augmix: AugMixDefenseConfig,
    **dict.fromkeys(
        (
            DefenseName.mixtrain,
            DefenseName.verified,
            DefenseName.ibp,
            DefenseName.crown_ibp,
            DefenseName.mtl_ibp,
            DefenseName.sabr,
        ),
        VerifiedConfig,
    ),
    DefenseName.own: OwnDefenseConfig,
}


# ----------------------------------------------------------------------------------------- rival

_ALIKE = {"chooses": "a rival treats all examples alike (bt=uniform)"}
_ATTACKS = {"augmix": "it needs an adversarial defense"}
_OWN_LOSS = {"not_pgd": "it needs defense=pgd"}
_NOT_GRADUALLY = {"epsilon_warmup": "it is run as published"}
_OWN_ATTACK = frozenset({"attack.start", "attack.start_std", "attack.step_size"})


@dataclass
class RivalConfig:
    """The settings of no rival, which all rivals have."""

    name: RivalName = RivalName.none

    kinds: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[Mapping[str, str]] = {}
    unread: ClassVar[frozenset[str]] = frozenset()
    mode: ClassVar[AttackMode | None] = None
    """The only mode of the attack that it goes with; None for any."""

    def choices(self) -> list[Choice]:
        if not self.kinds:
            return []
        return [Choice(f"rival={self.name.name}", self.kinds, self.refuses, self.unread)]


@dataclass
class FastConfig(RivalConfig):
    kinds: ClassVar[frozenset[str]] = frozenset({"rival"})
    refuses: ClassVar[Mapping[str, str]] = _ALIKE | _ATTACKS


@dataclass
class NFGSMConfig(FastConfig):
    noise: float = MISSING

    refuses: ClassVar[Mapping[str, str]] = (
        _ALIKE
        | _ATTACKS
        | {
            "l2": "its noise and its step are those of an L∞ ball",
            "own_ball": "its noise and its step are those of an L∞ ball",
        }
    )
    unread: ClassVar[frozenset[str]] = frozenset({"attack.start", "attack.start_std"})

    def __post_init__(self) -> None:
        require(0 <= self.noise <= 100, "rival.noise", "in [0, 100]", self.noise)


@dataclass
class YopoConfig(FastConfig):
    pass


@dataclass
class GradAlignConfig(RivalConfig):
    grad_align_weight: float = MISSING

    kinds: ClassVar[frozenset[str]] = frozenset({"rival", "own_step", "one_process"})
    refuses: ClassVar[Mapping[str, str]] = (
        _ALIKE
        | _ATTACKS
        | {
            "l2": "it aligns the gradients of an L∞ ball",
            "own_ball": "it aligns the gradients of an L∞ ball",
        }
    )

    def __post_init__(self) -> None:
        at_least(0, "rival.grad_align_weight", self.grad_align_weight)


@dataclass
class FreeConfig(RivalConfig):
    replays: int = MISSING

    kinds: ClassVar[frozenset[str]] = frozenset({"rival", "own_step", "one_process"})
    refuses: ClassVar[Mapping[str, str]] = _ALIKE | _OWN_LOSS | _NOT_GRADUALLY
    unread: ClassVar[frozenset[str]] = _OWN_ATTACK
    mode: ClassVar[AttackMode | None] = AttackMode.train

    def __post_init__(self) -> None:
        at_least(1, "rival.replays", self.replays)


@dataclass
class MMAConfig(RivalConfig):
    max_margin: Any = MISSING
    first_margin: Any = MISSING
    bisections: int = MISSING
    clean_weight: float = MISSING

    kinds: ClassVar[frozenset[str]] = frozenset({"rival", "own_step", "one_process"})
    refuses: ClassVar[Mapping[str, str]] = (
        _ALIKE
        | _OWN_LOSS
        | _NOT_GRADUALLY
        | {"own_ball": "its attack has a radius of its own for each example"}
    )
    unread: ClassVar[frozenset[str]] = _OWN_ATTACK
    mode: ClassVar[AttackMode | None] = AttackMode.eval

    def __post_init__(self) -> None:
        at_least(1, "rival.bisections", self.bisections)
        self.first_margin = pixels("rival.first_margin", self.first_margin, "l2")
        self.max_margin = pixels("rival.max_margin", self.max_margin, "l2")
        require(
            self.max_margin >= self.first_margin and math.isfinite(self.max_margin),
            "rival.max_margin",
            f"finite and at least rival.first_margin = {self.first_margin:g}",
            self.max_margin,
        )
        require(0 <= self.clean_weight <= 1, "rival.clean_weight", "in [0, 1]", self.clean_weight)


RIVALS: dict[RivalName, type[RivalConfig]] = {
    RivalName.none: RivalConfig,
    RivalName.fast: FastConfig,
    RivalName.nfgsm: NFGSMConfig,
    RivalName.yopo: YopoConfig,
    RivalName.gradalign: GradAlignConfig,
    RivalName.free: FreeConfig,
    RivalName.mma: MMAConfig,
}


# ------------------------------------------------------------------------------------ allocation


@dataclass
class BTConfig:
    """The settings of all allocators; alone it is the plain defense, N_B steps for everybody."""

    name: AllocatorName = MISSING
    n_b: int = MISSING
    gamma: float = MISSING
    momentum: float = MISSING
    step_size_b: Any = MISSING
    metric: Metric = MISSING
    forward_unperturbed: bool = MISSING
    score: Score = Score.fresh
    share_clean_forward: bool | None = None
    pool: int = 1
    probe_every: int | None = None

    kinds: ClassVar[frozenset[str]] = frozenset()
    refuses: ClassVar[Mapping[str, str]] = {}

    def __post_init__(self) -> None:
        at_least(0, "bt.n_b", self.n_b)
        require(0 < self.gamma <= 1, "bt.gamma", "in (0, 1]", self.gamma)
        require(0 <= self.momentum < 1, "bt.momentum", "in [0, 1)", self.momentum)
        self.step_size_b = pixels("bt.step_size_b", self.step_size_b, "l2")
        if self.share_clean_forward is not None:  # the name of earlier versions
            meant = Score.shared if self.share_clean_forward else Score.fresh
            if self.score not in (Score.fresh, meant):
                raise UserError(
                    f"bt.share_clean_forward={typed(self.share_clean_forward)}, an older "
                    f"name of bt.score={meant.name}, contradicts bt.score={self.score.name}."
                )
            self.score, self.share_clean_forward = meant, None
        at_least(1, "bt.pool", self.pool)
        at_least(0, "bt.probe_every", self.probe_every)

    @property
    def plain_epochs(self) -> int:
        """Return how many first epochs give every example N_B steps."""
        return 0

    def choices(self) -> list[Choice]:
        found = [Choice(f"bt={self.name.name}", self.kinds, self.refuses)]
        if self.pool > 1:
            found.append(Choice(f"bt.pool={self.pool}", frozenset({"pool"}), _NO_POOL))
        if self.score is Score.shared:
            found.append(Choice("bt.score=shared", frozenset({"shared"}), _ONE_PASS))
        if self.score is Score.last:
            found.append(Choice("bt.score=last", frozenset(), _ONE_PASS | _NO_LAST))
        if self.forward_unperturbed:
            found.append(Choice("bt.forward_unperturbed=true", frozenset(), _ONE_PASS))
        return found

    def unkept(self) -> BTConfig:
        """Return the same for work that remembers nothing from batch to batch."""
        return replace(self, score=Score.fresh) if self.score is Score.last else self

    def check_order(self) -> None:
        """Raise UserError where the budgets do not go together; one budget always does."""


_NO_LAST = {
    "alike": "no example is told from another",
    "attacks_by_itself": "its own attack needs the logits of now",
    "other_choice": "it may read the logits of now",
    "own_defense": "its loss may have no clean pass",
    "pool": "the pool is scored at once",
    "parts": "the targets of a batch are computed in one pass",
}
_NO_POOL = {
    "rival": "a rival is run as published",
    "augmix": "there is no attack",
    "attacks_by_itself": "it attacks every batch by itself to know the classes",
    "train_mode": "the batches would share BatchNorm's statistics",
    "shared": "the loss needs the logits of newer weights",
}
WEIGHTED = {
    "own_step": "its loss counts every example once",
    "own_defense": "its loss is one number for the whole batch",
    "augmix": "its loss counts every example once",
    "pool": "its batches are weighed one by one",
}
_NO_GUARD = {
    "own_step": "it has a choice of its own",
    "augmix": "it makes views of boundary examples alone",
    "pool": "the batches of a pool are allocated at once",
}
_NEEDS_ATTACK = {"augmix": "it needs an attack"}
_VIEWS_NEAR_THE_BOUNDARY = {"augmix": "it makes views of boundary examples alone"}
_ONE_PASS = {"one_pass": "its loss has no clean pass beside the adversarial one"}


@dataclass
class UniformConfig(BTConfig):
    kinds: ClassVar[frozenset[str]] = frozenset({"alike"})


@dataclass
class ChoosingConfig(BTConfig):
    """An allocator that tells examples apart."""

    warmup_epochs: int = 0

    kinds: ClassVar[frozenset[str]] = frozenset({"chooses"})

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, "bt.warmup_epochs", self.warmup_epochs)

    @property
    def plain_epochs(self) -> int:
        return self.warmup_epochs


@dataclass
class BulletTrainConfig(ChoosingConfig):
    n_r: int = MISSING
    n_o: int = MISSING
    robust_share: float = 1.0
    guard: float = 1.0
    guard_steps: int = 0

    in_order: ClassVar[bool] = True
    """True if N_O ≤ N_R ≤ N_B must hold, false if any budgets may be given."""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, "bt.n_o", self.n_o)
        at_least(0, "bt.n_r", self.n_r)
        require(0 < self.robust_share <= 1, "bt.robust_share", "in (0, 1]", self.robust_share)
        require(0 <= self.guard <= 1, "bt.guard", "in [0, 1]", self.guard)
        at_least(0, "bt.guard_steps", self.guard_steps)

    def choices(self) -> list[Choice]:
        found = super().choices()
        for key, steps in (("bt.n_r", self.n_r), ("bt.n_o", self.n_o)):
            if steps:
                found.append(Choice(f"{key}={steps}", frozenset(), _VIEWS_NEAR_THE_BOUNDARY))
        if self.robust_share < 1:
            written = f"bt.robust_share={self.robust_share:g}"
            found.append(Choice(written, frozenset({"weighted"}), WEIGHTED))
        if self.guard < 1:
            found.append(Choice(f"bt.guard={self.guard:g}", frozenset(), _NO_GUARD))
        else:
            found.append(Choice("bt.guard=1", unread=frozenset({"bt.guard_steps"})))
        return found

    @property
    def guards_nothing(self) -> bool:
        """Return whether there is a guard that changes no example's steps."""
        return self.guard < 1 and self.robust_share == 1 and self.guard_steps <= self.n_o

    def unkept(self) -> BTConfig:
        return replace(self, guard=1.0, score=super().unkept().score)

    def check_order(self) -> None:
        """Raise UserError unless N_O ≤ N_R ≤ N_B, and guard and share go with them."""
        if self.in_order:
            require(self.n_o <= self.n_r, "bt.n_o", f"at most bt.n_r = {self.n_r}", self.n_o)
            if self.n_r > self.n_b:
                raise UserError(
                    f"bt.n_r must be at most bt.n_b = {self.n_b}, not {self.n_r}; set both: a "
                    "robust example gets no more steps than a boundary one."
                )
        if self.guard < 1:
            between = self.n_o <= self.guard_steps <= self.n_r
            rule = f"from bt.n_o = {self.n_o} to bt.n_r = {self.n_r}"
            require(between, "bt.guard_steps", rule, self.guard_steps)
        share = "1 where robust examples take no step (bt.n_r=0)"
        require(self.n_r > 0 or self.robust_share == 1, "bt.robust_share", share, self.robust_share)


@dataclass
class EarlyExitConfig(BulletTrainConfig):
    patience: int = MISSING

    kinds: ClassVar[frozenset[str]] = frozenset({"chooses", "early_exit"})
    refuses: ClassVar[Mapping[str, str]] = _NEEDS_ATTACK

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, "bt.patience", self.patience)


@dataclass
class RandomConfig(BulletTrainConfig):
    fractions: list[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.fractions is None:
            return
        shares = len(self.fractions) == 3 and min(self.fractions) >= 0
        require(
            shares and abs(sum(self.fractions) - 1) < 0.005,
            "bt.fractions",
            "F_B, F_R and F_O, which add up to 1",
            self.fractions,
        )


@dataclass
class GaussianConfig(ChoosingConfig):
    mean_steps: float = MISSING

    kinds: ClassVar[frozenset[str]] = frozenset({"chooses", "other_choice"})
    refuses: ClassVar[Mapping[str, str]] = _NEEDS_ATTACK

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(0, "bt.mean_steps", self.mean_steps)


@dataclass
class OracleConfig(BulletTrainConfig):
    oracle_steps: int = MISSING
    oracle_step_size: Any = MISSING

    kinds: ClassVar[frozenset[str]] = frozenset({"chooses", "attacks_by_itself"})
    refuses: ClassVar[Mapping[str, str]] = _NEEDS_ATTACK
    in_order: ClassVar[bool] = False  # with the true classes any are worth a study (Figure 2)

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least(1, "bt.oracle_steps", self.oracle_steps)
        self.oracle_step_size = pixels("bt.oracle_step_size", self.oracle_step_size, "l2")


@dataclass
class OwnAllocatorConfig(ChoosingConfig):
    factory: str = MISSING
    settings: dict[str, Any] = field(default_factory=dict)

    kinds: ClassVar[frozenset[str]] = frozenset({"chooses", "other_choice"})
    refuses: ClassVar[Mapping[str, str]] = _NEEDS_ATTACK

    def __post_init__(self) -> None:
        super().__post_init__()
        no_null("bt.factory", self.factory)


ALLOCATORS: dict[AllocatorName, type[BTConfig]] = {
    AllocatorName.uniform: UniformConfig,
    AllocatorName.bullettrain: BulletTrainConfig,
    AllocatorName.early_exit: EarlyExitConfig,
    AllocatorName.random: RandomConfig,
    AllocatorName.gaussian: GaussianConfig,
    AllocatorName.oracle: OracleConfig,
    AllocatorName.own: OwnAllocatorConfig,
}
