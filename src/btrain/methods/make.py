"""The way from a configuration to the method of a run."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import fields, replace
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from btrain import allocation, own
from btrain.allocation import FAR, METRICS, Allocator, Guard
from btrain.attacks.attack import (
    Attack,
    AttackInParts,
    Start,
    at_the_image,
    nearby,
    within_the_ball,
)
from btrain.attacks.balls import BALLS, Ball, NoisyBall
from btrain.attacks.fast_paths import FastPaths
from btrain.attacks.kept import Kept
from btrain.attacks.views import augmix
from btrain.data import Split
from btrain.defenses import DEFENSES, Defense
from btrain.methods import gradalign
from btrain.methods.accumulated import AccumulatedBulletTrain
from btrain.methods.augmix import AugMix
from btrain.methods.base import Method
from btrain.methods.bullettrain import BulletTrain
from btrain.methods.dealt import DealtBulletTrain
from btrain.methods.free import Free
from btrain.methods.mma import MMA
from btrain.methods.own_parts import checked_ball, checked_defense, with_own_steps
from btrain.methods.pool import Pool
from btrain.methods.verified import Verified, Weight, at_random, nearest_right
from btrain.processes.world import ALONE, World
from btrain.settings import (
    AllocatorName,
    AttackConfig,
    AttackMode,
    BTConfig,
    Config,
    DefenseConfig,
    Precision,
    RivalConfig,
    Score,
    Store,
)
from btrain.settings import Start as StartName
from btrain.settings.checks import gibibytes
from btrain.settings.method import (
    AugMixDefenseConfig,
    BulletTrainConfig,
    EarlyExitConfig,
    FreeConfig,
    GaussianConfig,
    GradAlignConfig,
    MartConfig,
    MMAConfig,
    NFGSMConfig,
    OracleConfig,
    OwnAllocatorConfig,
    OwnAttackConfig,
    OwnDefenseConfig,
    PGDConfig,
    RandomConfig,
    TradesConfig,
    UniformConfig,
    VerifiedConfig,
)
from btrain.settings.names import DefenseName, MixDynamic, MixForm

Known = Mapping[str, Any]
"""The facts of the data for own parts: `classes`, the number K, and `shape`, (C, H, W)."""

NOTHING: Known = {}


class MethodOf(Protocol):
    """The method of an epoch, from 0, which may be one that repairs."""

    def __call__(self, epoch: int, repairs: bool = False) -> Method: ...


def make_methods(
    config: Config,
    device: torch.device,
    *,
    paths: FastPaths | None = None,
    known: Known = NOTHING,
    world: World = ALONE,
    held_out: Split | None = None,
) -> MethodOf:
    """Return what gives the method of each epoch.

    In `bt.warmup_epochs` every example gets N_B steps; in `attack.epsilon_warmup_epochs` every
    length of the attack is a share of what it will be; an epoch that repairs has
    `recipe.repair_steps` more steps.

    Args:
        held_out: images that no batch is drawn from, for a weight by feedback.
    """

    @lru_cache(maxsize=1)
    def made(plain: bool, cold: bool, share: float, repairs: bool) -> Method:
        return make_method(
            with_more_steps(config) if repairs else config, device, plain=plain, cold=cold,
            share=share, paths=paths, known=known, world=world, held_out=held_out,
        )  # fmt: skip

    def of_epoch(epoch: int, repairs: bool = False) -> Method:
        cold = epoch == 0 and config.bt.score is Score.last
        return made(epoch < config.bt.plain_epochs, cold, config.attack.share(epoch), repairs)

    return of_epoch


def with_more_steps(config: Config) -> Config:
    """Return the settings of an epoch that repairs: N_B is more, and the way as long as before."""
    bt = config.bt
    n_b = bt.n_b + config.recipe.repair_steps
    more = replace(bt, n_b=n_b, step_size_b=bt.step_size_b * bt.n_b / n_b)
    return replace(config, bt=more)


def make_method(
    config: Config,
    device: torch.device,
    *,
    plain: bool = False,
    cold: bool = False,
    share: float = 1.0,
    paths: FastPaths | None = None,
    known: Known = NOTHING,
    world: World = ALONE,
    held_out: Split | None = None,
) -> Method:
    """Return what a configuration does with a batch.

    Args:
        plain: whether every example gets N_B steps, whatever the allocator.
        cold: whether no example has been visited, so that no last visit can score it.
        share: of ε and of the step sizes.
        paths: ways to see and attack the network; None for the plain ones.
        held_out: images that no batch is drawn from, for a weight by feedback.
    """
    match config.rival:
        case FreeConfig() as rival:
            ball = make_ball(config.attack, share, known)
            return Free(rival.replays, ball, config.train.batch_size)
        case MMAConfig() as rival:
            return MMA(
                norm=config.attack.norm,
                max_margin=rival.max_margin,
                first_margin=rival.first_margin,
                steps=config.attack.steps,
                bisections=rival.bisections,
                clean_weight=rival.clean_weight,
            )
    if isinstance(config.defense, AugMixDefenseConfig):
        return make_augmix(config, device, plain=plain, known=known, world=world)
    if isinstance(config.defense, VerifiedConfig):
        return make_verified(
            config, config.defense, paths=paths, known=known, world=world, held_out=held_out
        )
    method = make_bullettrain(
        config, device, plain=plain, cold=cold, share=share, paths=paths, known=known, world=world
    )
    if config.bt.pool > 1:
        return Pool(method, config.train.batch_size, world)
    return method


def make_bullettrain(
    config: Config,
    device: torch.device,
    *,
    plain: bool = False,
    cold: bool = False,
    share: float = 1.0,
    paths: FastPaths | None = None,
    known: Known = NOTHING,
    world: World = ALONE,
) -> BulletTrain:
    """Return Algorithm 2 with the configuration's defense, attack and allocator."""
    bt, defense = config.bt, make_defense(config.defense, known)
    method = BulletTrain(
        defense=defense,
        attack=make_attack(config, share, paths, known, defense),
        allocator=make_allocator(bt, device, plain=plain, share=share, known=known),
        metric=METRICS[bt.metric.value],
        gamma=bt.gamma,
        momentum=bt.momentum,
        scoring=Score.fresh if bt.score is Score.last and (cold or plain) else bt.score,
        forward_unperturbed=bt.forward_unperturbed,
        kept=make_store(config.attack),
        robust_share=bt.robust_share if isinstance(bt, BulletTrainConfig) else 1.0,
        guard=make_guard(bt),
        scores_kept=config.train.skip > 0 or bt.score is Score.last,
        skips=config.train.skip > 0,
    )
    if isinstance(config.rival, GradAlignConfig):
        weight, epsilon = config.rival.grad_align_weight, share * config.attack.epsilon
        added = gradalign.regulariser(weight, epsilon)
        method = replace(method, regulariser=(added, gradalign.UNITS))
    parts, size = config.train.accumulate, config.train.batch_size
    if parts > 1:
        most = -(-size // (parts * world.size))
        attack = AttackInParts(**_settings(method.attack), most=most)
        settings = _settings(replace(method, attack=attack))
        return AccumulatedBulletTrain(**settings, world=world, batch_size=size, parts=parts)
    return method if world.size == 1 else DealtBulletTrain(**_settings(method), world=world)


def _settings(made: Attack | BulletTrain) -> dict[str, Any]:
    """Return what a class with more settings takes over."""
    return {item.name: getattr(made, item.name) for item in fields(made)}


def make_verified(
    config: Config,
    defense: VerifiedConfig,
    *,
    paths: FastPaths | None = None,
    known: Known = NOTHING,
    world: World = ALONE,
    held_out: Split | None = None,
) -> Verified:
    """Return training by bounds; `bt=` says who is bounded where not everybody is."""
    bullettrain = type(config.bt) is BulletTrainConfig

    @lru_cache(maxsize=1)
    def attack(share: float) -> Attack:
        return make_attack(config, share, paths, known)

    return Verified(
        engine=defense.engine,
        epsilon=config.attack.epsilon,
        ramp=defense.ramp,
        epochs=config.train.epochs,
        choose=nearest_right(METRICS[config.bt.metric.value]) if bullettrain else at_random,
        k=defense.k,
        per_batch=defense.per_batch,
        convex=defense.form is MixForm.convex,
        alpha=defense.alpha,
        weight=Weight(defense.weight_first, defense.weight_last, defense.weight_until),
        box=defense.box,
        attack=attack if defense.attacks else None,
        plain_on_attacked=defense.plain_on_attacked,
        regulariser=defense.shi_regulariser,
        memory_limit=gibibytes(defense.memory),
        feedback=defense.dynamic is MixDynamic.feedback,
        held_out=held_out,
        world=world,
    )


def make_augmix(
    config: Config,
    device: torch.device,
    *,
    plain: bool = False,
    known: Known = NOTHING,
    world: World = ALONE,
) -> AugMix:
    """Return AugMix with the configuration's views and allocator."""
    bt, defense, views = config.bt, config.defense, config.attack.augmix
    assert isinstance(defense, AugMixDefenseConfig)
    assert views is not None

    def make_views(images: Tensor, generator: torch.Generator, rows: Tensor | None) -> Tensor:
        return augmix(
            images,
            rows=rows,
            generator=generator,
            severity=views.severity,
            width=views.width,
            depth=views.depth,
            all_ops=views.all_ops,
        )

    return AugMix(
        make_views=make_views,
        allocator=make_allocator(bt, device, plain=plain, known=known),
        metric=METRICS[bt.metric.value],
        jsd=defense.jsd,
        jsd_weight=defense.jsd_weight,
        gamma=bt.gamma,
        momentum=bt.momentum,
        world=world,
    )


def make_defense(defense: DefenseConfig, known: Known = NOTHING) -> Defense:
    """Return the losses of an adversarial defense.

    Raises:
        UserError: a defense of the user's is not what it must be.
    """
    match defense:
        case OwnDefenseConfig():
            made = own.call("defense", defense.factory, defense.settings, **known)
            return checked_defense(made, defense.factory, known)
        case VerifiedConfig():
            return DEFENSES["pgd"]()
        case TradesConfig() | MartConfig():
            return DEFENSES[defense.name.value](beta=defense.beta)
    return DEFENSES[defense.name.value]()


def make_attack(
    config: Config,
    share: float,
    paths: FastPaths | None,
    known: Known = NOTHING,
    defense: Defense | None = None,
) -> Attack:
    """Return the attack at a share of its lengths, on the inner loss of the defense."""
    attack, bt = config.attack, config.bt
    defense = defense or make_defense(config.defense, known)
    probe, kept = probe_factor(config, defense, share, known), attack.start is StartName.kept
    ball = make_ball(attack, share, known)
    start = make_start(attack, probe if kept and probe else 1.0)
    if isinstance(config.rival, NFGSMConfig):
        ball, start = NoisyBall(ball.epsilon, config.rival.noise), within_the_ball
    made = Attack(
        ball=ball,
        inner_loss=defense.inner_loss,
        n_b=bt.n_b,
        step_size_b=share * bt.step_size_b,
        start=start,
        way=1.0 if kept else FAR,
        train_mode=attack.mode is AttackMode.train,
        probe=None if kept else probe,
    )
    return made if paths is None else replace(made, pgd=paths.pgd, multiple=paths.multiple)


def make_start(attack: AttackConfig, longer: float = 1.0) -> Start:
    """Return where the attack starts, near the image so many times as far off as asked.

    With kept starts that is where an example's first attack does.
    """
    near = nearby(longer * attack.start_std)
    return {
        StartName.clean: at_the_image,
        StartName.uniform: within_the_ball,
        StartName.normal: near,
        StartName.kept: near,
    }[attack.start]


def make_store(attack: AttackConfig) -> Kept | None:
    """Return what keeps the starts of the attack; None where they are not kept."""
    if attack.start is not StartName.kept:
        return None
    return Kept(torch.int8 if attack.store is Store.int8 else torch.bfloat16)


def make_guard(bt: BTConfig) -> Guard | None:
    """Return what changes while most examples are outliers; None for no guard."""
    if not isinstance(bt, BulletTrainConfig) or bt.guard == 1:
        return None
    return Guard(bt.guard, bt.guard_steps)


def make_ball(attack: AttackConfig, share: float = 1.0, known: Known = NOTHING) -> Ball:
    """Return the threat model, with a share of its radius.

    Raises:
        UserError: a ball of the user's is not what it must be.
    """
    epsilon = share * attack.epsilon
    if isinstance(attack, OwnAttackConfig):
        made = own.call("attack", attack.factory, attack.settings, epsilon=epsilon, **known)
        return checked_ball(made, attack.factory, known)
    return BALLS[attack.norm](epsilon)


def make_allocator(
    bt: BTConfig,
    device: torch.device,
    *,
    plain: bool = False,
    share: float = 1.0,
    known: Known = NOTHING,
) -> Allocator:
    """Return who is attacked for how long; everybody for N_B steps if `plain`.

    Raises:
        UserError: an allocator of the user's is not what it must be.
    """
    if plain or isinstance(bt, UniformConfig):
        return allocation.Uniform(bt.n_b)
    match bt:
        case GaussianConfig():
            return allocation.Gaussian(bt.n_b, bt.mean_steps)
        case OwnAllocatorConfig():
            made = own.call("bt", bt.factory, bt.settings, n_b=bt.n_b, **known)
            return with_own_steps(made, bt.factory)
    assert isinstance(bt, BulletTrainConfig)
    budget = torch.tensor([bt.n_o, bt.n_r, bt.n_b], device=device)
    steps = (bt.n_b, bt.n_r, bt.n_o)
    match bt:
        case EarlyExitConfig():
            return allocation.EarlyExit(budget, steps, bt.patience)
        case RandomConfig():
            fractions = None if bt.fractions is None else _three(bt.fractions)
            return allocation.Random(budget, steps, fractions)
        case OracleConfig():
            size = share * bt.oracle_step_size
            return allocation.Oracle(budget, steps, bt.oracle_steps, size)
    return allocation.BulletTrain(budget, steps)


def _three(fractions: list[float]) -> tuple[float, float, float]:
    boundary, robust, outlier = fractions
    return boundary, robust, outlier


_PROBE = 0.3  # ε


def probe_factor(
    config: Config, defense: Defense, share: float = 1.0, known: Known = NOTHING
) -> float | None:
    """Return how much further than the start the first gradient is taken in bf16, for a KL.

    Next to x, where TRADES starts (noise of 0.001), the two sides of the divergence differ by less
    than bf16 resolves, and the gradient is one of rounding errors. It is linear in the noise, whose
    length therefore does not matter: 0.3·ε gives float32's attack strength at no cost. None for
    attacks that do not need it.
    """
    attack = config.attack
    if (
        config.train.precision is Precision.float32
        or not defense.inner_reads_clean
        or attack.start not in (StartName.normal, StartName.kept)
        or not 0 < attack.start_std < _PROBE * share * attack.epsilon
    ):
        return None
    length = _PROBE * share * attack.epsilon / attack.start_std
    if attack.norm == "l2":  # the length of the noise is its deviation times √d
        length /= math.sqrt(math.prod(known.get("shape", (1,))))
    return float(length)


def plain_defense(config: Config) -> Config:
    """Return the same training with the attack's own number of steps for everybody."""
    attack, bt, defense = config.attack, config.bt, config.defense
    if isinstance(defense, VerifiedConfig):  # adversarial training is what it is compared with
        defense = PGDConfig(DefenseName.pgd)
    common = {item.name: getattr(bt.unkept(), item.name) for item in fields(BTConfig)}
    common |= {"name": AllocatorName.uniform, "pool": 1}
    if not isinstance(config.defense, AugMixDefenseConfig):
        common |= {"n_b": attack.steps, "step_size_b": attack.step_size}
    uniform = UniformConfig(**common)
    return replace(
        config,
        bt=uniform,
        rival=RivalConfig(),
        defense=defense,
        attack=attack.unkept(),
        train=replace(config.train, skip=0.0),
    )
