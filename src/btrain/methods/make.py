"""From a configuration to what is done with a batch, and what is remembered for the next."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache, partial

import torch
from torch import Tensor, nn

from btrain.allocation import METRICS
from btrain.attacks.fast_paths import FastPaths, make_fast_paths
from btrain.attacks.views import augmix
from btrain.data import Batch, Data
from btrain.defenses import DEFENSES, Defense
from btrain.methods.augmix import AugMixMethod, augmix_step
from btrain.methods.base import Memory, Step
from btrain.methods.bullettrain import train_step
from btrain.methods.free import free_step
from btrain.methods.generation import Method
from btrain.methods.mma import MMAMethod, mma_step
from btrain.methods.pool import pooled_step
from btrain.methods.statistics import StepStats, stacked
from btrain.processes.world import ALONE, World
from btrain.settings import (
    AllocatorName,
    AttackMode,
    BTConfig,
    Config,
    DefenseConfig,
    DefenseName,
    OnNonfinite,
    Precision,
    RivalConfig,
    RivalName,
    Start,
)


def make_steps(config: Config, device: torch.device, world: World = ALONE) -> Callable[[int], Step]:
    """What is done with a batch, by epoch from 0: the first epochs may differ.

    In `bt.warmup_epochs` every example gets N_B steps, in
    `attack.epsilon_warmup_epochs` every length of the attack is a share of what it will be.
    """

    paths = make_fast_paths(config.train, device)

    @lru_cache(maxsize=1)
    def step(plain: bool, share: float) -> Step:
        return make_step(config, device, warm_up=plain, share=share, world=world, paths=paths)

    def of_epoch(epoch: int) -> Step:
        return step(epoch < config.bt.warmup_epochs, config.attack.share(epoch))

    return of_epoch


def make_step(
    config: Config,
    device: torch.device,
    *,
    warm_up: bool = False,
    share: float = 1.0,
    world: World = ALONE,
    paths: FastPaths | None = None,
) -> Step:
    """What is done with a batch: Algorithm 2's open choices, from the configuration.

    `warm_up` gives every example N_B steps, whatever the allocator; `share` is of ε and of the step
    sizes. `paths` are the configuration's, where several steps share them.
    """
    paths = paths or make_fast_paths(config.train, device)
    step = _make_step(config, device, warm_up=warm_up, share=share, world=world, paths=paths)
    return in_parallel(in_view(step, paths.view), world)


def in_parallel(step: Step, world: World) -> Step:
    """The same step by all processes together, with the statistics of the whole batch."""
    if world.size == 1:
        return step

    def together(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        memory: Memory,
        generator: torch.Generator,
    ) -> StepStats:
        stats = step(world.wrapped(model), optimizer, batch, memory, generator)
        world.average_statistics(model)
        return StepStats._make(world.sum(stacked(stats)))

    return together


def in_view(step: Step, view: Callable[[nn.Module], nn.Module]) -> Step:
    """The same step with the network as `view` shows it."""

    def viewed(
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        batch: Batch,
        memory: Memory,
        generator: torch.Generator,
    ) -> StepStats:
        return step(view(model), optimizer, batch, memory, generator)

    return viewed


def _make_step(
    config: Config,
    device: torch.device,
    *,
    warm_up: bool,
    share: float,
    world: World,
    paths: FastPaths,
) -> Step:
    if config.rival.name is RivalName.free:
        assert config.rival.replays is not None
        return partial(_free, replays=config.rival.replays, epsilon=config.attack.epsilon)
    if config.rival.name is RivalName.mma:
        return partial(_mma, method=_mma_method(config))
    allocator = "uniform" if warm_up else config.bt.name.value
    update: Callable[..., tuple[Tensor, StepStats]]
    if config.defense.name is DefenseName.augmix:
        update = partial(augmix_step, method=augmix_method(config, device, allocator, world))
    else:
        method = attack_method(config, device, allocator, share, world)
        method = replace(method, pgd=paths.pgd, multiple=paths.multiple)
        update = partial(train_step, method=method)
        if config.bt.pool > 1:
            update = partial(pooled_step, method=method, batch_size=config.train.batch_size)
    return partial(_follow, update=update)


def _follow(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    memory: Memory,
    generator: torch.Generator,
    *,
    update: Callable[..., tuple[Tensor, StepStats]],
) -> StepStats:
    """A step of Algorithm 2 or AugMix, which remembers F_R."""
    memory["robust_fraction"], stats = update(
        model, optimizer, batch.x, batch.labels, memory["robust_fraction"], generator
    )
    return stats


def _free(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    memory: Memory,
    generator: torch.Generator,
    *,
    replays: int,
    epsilon: float,
) -> StepStats:
    """A step of Free, which remembers the perturbation."""
    del generator
    x, labels, _ = batch
    delta = memory["delta"][: len(x)]
    memory["delta"][: len(x)], stats = free_step(
        model, optimizer, x, labels, delta, replays=replays, epsilon=epsilon
    )
    return stats


def _mma(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batch: Batch,
    memory: Memory,
    generator: torch.Generator,
    *,
    method: MMAMethod,
) -> StepStats:
    """A step of MMA, which remembers every example's margin."""
    x, labels, indices = batch
    memory["margin"][indices], stats = mma_step(
        model, optimizer, x, labels, memory["margin"][indices], generator, method=method
    )
    return stats


def plain_defense(config: Config) -> Config:
    """The same training with the plain defense: the attack's own number of steps for everybody."""
    attack, bt = config.attack, config.bt
    bt = replace(bt, name=AllocatorName.uniform, fractions=None, pool=1)
    if config.defense.name is not DefenseName.augmix:
        bt = replace(bt, n_b=attack.steps, step_size_b=attack.step_size)
    return replace(config, bt=bt, rival=RivalConfig())


def make_memory(config: Config, data: Data, device: torch.device) -> Memory:
    """What the run's method remembers, before its first batch: F_R is 0 (Algorithm 2, line 8)."""
    memory = {"robust_fraction": torch.zeros((), device=device)}
    if config.train.on_nonfinite is OnNonfinite.skip:
        memory["skipped"] = torch.zeros((), dtype=torch.int64, device=device)
    if config.rival.name is RivalName.free:
        most = config.train.batch_size + 1  # a last batch of one example joins its neighbour
        memory["delta"] = torch.zeros(most, *data.shape, device=device)
    if config.rival.name is RivalName.mma:
        memory["margin"] = torch.zeros(len(data.train), device=device)
    return memory


def attack_method(
    config: Config,
    device: torch.device,
    allocator: str,
    share: float = 1.0,
    world: World = ALONE,
) -> Method:
    """The choices of the adversarial defenses; `share` is of ε and of the step sizes."""
    bt, attack = config.bt, config.attack
    return Method(
        defense=make_defense(config.defense),
        allocator=allocator,
        metric=METRICS[bt.metric.value],
        budget=torch.tensor([bt.n_o, bt.n_r, bt.n_b], device=device),
        n_b=bt.n_b,
        step_size_b=share * bt.step_size_b,
        patience=bt.patience,
        mean_steps=bt.mean_steps,
        fractions=_fractions(bt),
        oracle_steps=bt.oracle_steps,
        oracle_step_size=share * bt.oracle_step_size,
        epsilon=share * attack.epsilon,
        start=attack.start.value,
        start_std=attack.start_std,
        probe=probe_factor(config, share),
        attack_in_train_mode=attack.mode is AttackMode.train,
        gamma=bt.gamma,
        momentum=bt.momentum,
        share_clean_forward=bt.share_clean_forward,
        forward_unperturbed=bt.forward_unperturbed,
        grad_align_weight=config.rival.grad_align_weight or 0.0,
        world=world,
    )


_PROBE = 0.3  # ε


def probe_factor(config: Config, share: float = 1.0) -> float | None:
    """How much further than the start the first gradient is taken in bf16, for a KL divergence.

    Next to x, where TRADES starts (noise of 0.001), the two sides of the divergence differ by less
    than bf16 resolves, and the gradient is one of rounding errors. It is linear in the noise, whose
    length therefore does not matter: 0.3·ε gives float32's attack strength at no cost.
    """
    attack = config.attack
    if (
        config.train.precision is Precision.float32
        or not make_defense(config.defense).inner_reads_clean
        or attack.start is not Start.normal
        or not 0 < attack.start_std < _PROBE * share * attack.epsilon
    ):
        return None
    return _PROBE * share * attack.epsilon / attack.start_std


def make_defense(defense: DefenseConfig) -> Defense:
    """The losses of an adversarial defense."""
    settings = {} if defense.beta is None else {"beta": defense.beta}
    return DEFENSES[defense.name.value](**settings)


def _fractions(bt: BTConfig) -> tuple[float, float, float] | None:
    if bt.fractions is None:
        return None
    boundary, robust, outlier = bt.fractions
    return boundary, robust, outlier


def _mma_method(config: Config) -> MMAMethod:
    """The choices of MMA."""
    rival = config.rival
    assert rival.max_margin is not None
    assert rival.first_margin is not None
    assert rival.bisections is not None
    assert rival.clean_weight is not None
    return MMAMethod(
        max_margin=rival.max_margin,
        first_margin=rival.first_margin,
        steps=config.attack.steps,
        bisections=rival.bisections,
        clean_weight=rival.clean_weight,
    )


def augmix_method(
    config: Config, device: torch.device, allocator: str, world: World = ALONE
) -> AugMixMethod:
    """The choices of AugMix."""
    bt, defense, views = config.bt, config.defense, config.attack.augmix
    assert views is not None
    assert defense.jsd is not None
    assert defense.jsd_weight is not None

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

    return AugMixMethod(
        make_views=make_views,
        allocator=allocator,
        metric=METRICS[bt.metric.value],
        budget=torch.tensor([0, 0, 1], device=device),
        fractions=_fractions(bt),
        jsd=defense.jsd,
        jsd_weight=defense.jsd_weight,
        gamma=bt.gamma,
        momentum=bt.momentum,
        world=world,
    )
