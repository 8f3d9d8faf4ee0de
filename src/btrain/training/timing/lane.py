"""The lane: a method at one precision and layout, ready to step again and again."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from btrain.allocation import BulletTrain as Rule
from btrain.allocation import classify
from btrain.attacks.fast_paths import FastPaths, make_fast_paths
from btrain.attacks.graphs import ReplayedPGD
from btrain.attacks.shadow import Shadowed
from btrain.data import Batch
from btrain.methods.augmix import AugMix
from btrain.methods.base import Memory, Method
from btrain.methods.bullettrain import BulletTrain
from btrain.methods.make import make_augmix, make_bullettrain, make_method, plain_defense
from btrain.methods.statistics import StepStats
from btrain.precision import to_channels_last
from btrain.settings import Config, CudaGraphs
from btrain.settings.bench import Contender
from btrain.settings.method import AugMixDefenseConfig, BulletTrainConfig, TradesConfig
from btrain.training.setup import make_optimizer
from btrain.training.timing.forced import Timed, deciding_logits, force
from btrain.training.timing.masked import Masked
from btrain.training.timing.official import Official
from btrain.training.update import train_batch

CLASSES = 10


@dataclass(frozen=True)
class Workload:
    """The batches that all lanes of a case step on, by repetition.

    Attributes:
        network: with the weights that every lane copies.
        images: of a repetition, (m, C, H, W).
        labels: of a repetition, (m,); None where the fractions are forced.
        fractions: F_B, F_R, F_O to force, or None.
        robust_fraction: F_R where nothing is forced.
    """

    network: nn.Module
    images: Callable[[int], Tensor]
    labels: Callable[[int], Tensor] | None
    fractions: Sequence[float] | None
    robust_fraction: float = 0.0


@dataclass
class Lane:
    """A method with a network of its own.

    The learning rate is 0: an update costs what it costs, and the weights stay, so that every
    repetition finds the same work.
    """

    config: Config
    contender: Contender
    workload: Workload
    device: torch.device
    model: nn.Module = field(init=False)
    optimizer: torch.optim.Optimizer = field(init=False)
    method: Method = field(init=False)
    chooser: Timed = field(init=False)
    generator: torch.Generator = field(init=False)
    memory: Memory = field(init=False, default_factory=dict)
    stats: list[StepStats] = field(init=False, default_factory=list)

    def __post_init__(self) -> None:
        # Its batches are visited once, and nothing is remembered from one to the next.
        self.config = replace(
            self.config,
            attack=self.config.attack.unkept(),
            bt=self.config.bt.unkept(),
            train=replace(self.config.train, skip=0.0),
        )
        self.model = copy.deepcopy(self.workload.network).to(self.device).train()
        if self.config.train.channels_last:
            self.model = to_channels_last(self.model)
        self.optimizer = make_optimizer(self.config.recipe, self.model)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        self._paths = make_fast_paths(self.config.train, self.device)
        self.method = _method(self.config, self.contender, self.device, self._paths)
        self.chooser = _chooser(self.config, self.device, self._paths)
        self.generator = torch.Generator(self.device).manual_seed(0)

    @property
    def inside(self) -> nn.Module:
        """Return the network as the step sees it."""
        return self._paths.view(self.model)

    def prepare(self, repetition: int) -> Batch:
        """Return a repetition's batch, with F_R and the classes in `memory`; not to be timed.

        A pool is the same batch several times.
        """
        x, work = self.workload.images(repetition), self.workload
        if work.fractions is not None:
            batch = force(self.inside, x, self.chooser, work.fractions, self.memory)
        else:
            assert work.labels is not None
            rows = torch.arange(len(x), device=self.device)
            batch = Batch(x, work.labels(repetition), rows)
            self.memory["robust_fraction"] = torch.tensor(work.robust_fraction, device=self.device)
        if self.contender is Contender.masked:
            logits = deciding_logits(self.inside, x, self.chooser)
            score = self.chooser.metric(logits, batch.labels)
            self.memory["classes"] = classify(score, self.memory["robust_fraction"])

        pool = self.config.bt.pool
        if pool == 1:
            return batch
        x, labels, indices = (torch.cat([part] * pool) for part in batch[:3])
        return Batch(x, labels, indices)

    def run(self, batch: Batch) -> None:
        """Take one training step."""
        stats = train_batch(
            self.inside, self.optimizer, self.method, batch, self.memory, self.generator,
            clip_norm=self.config.recipe.clip_norm,
        )  # fmt: skip
        self.optimizer.zero_grad(set_to_none=True)  # as in a run
        self.stats.append(stats)

    def rehearse(self, repetition: int) -> None:
        """Record the group sizes of a batch that is to be timed, if they are new.

        A run meets every size again and again, a few repetitions do not. With given fractions the
        sizes are always the same. The weights stay, so that the batch finds its sizes recorded.
        """
        if self.config.train.cuda_graphs is CudaGraphs.always and self.workload.fractions is None:
            self.run(self.prepare(repetition))
            self.stats.pop()

    @property
    def state_bytes(self) -> int:
        """Return the bytes of weights, buffers and momenta, of a shadow's own weights, and of what
        recorded steps keep; gradients come and go with a step.
        """
        tensors, inside = [*self.model.state_dict().values()], self.inside
        if isinstance(inside, Shadowed):
            tensors += [*inside.shadow.network.state_dict().values()]
        for state in self.optimizer.state.values():
            tensors += [value for value in state.values() if isinstance(value, Tensor)]
        # A shadow shares most of its own.
        once: dict[int, int] = {tensor.data_ptr(): tensor.nbytes for tensor in tensors}
        pgd = self._paths.pgd
        return sum(once.values()) + (pgd.memory_bytes if isinstance(pgd, ReplayedPGD) else 0)


def _method(config: Config, contender: Contender, device: torch.device, paths: FastPaths) -> Method:
    if contender in (Contender.lean, Contender.bullettrain, Contender.pooled):
        return make_method(config, device, paths=paths)
    plain = make_method(plain_defense(config), device)
    if contender is Contender.masked:
        assert isinstance(plain, BulletTrain | AugMix)
        return Masked(plain, _rule(config, device).budget)
    assert isinstance(plain, BulletTrain)
    assert isinstance(config.defense, TradesConfig)
    return Official(plain, config.defense.beta)


def _chooser(config: Config, device: torch.device, paths: FastPaths) -> Timed:
    """Return the lane's method with BulletTrain's rule, by which its batches are made."""
    if isinstance(config.defense, AugMixDefenseConfig):
        return replace(make_augmix(config, device), allocator=_rule(config, device))
    made = make_bullettrain(config, device, paths=paths)
    return replace(made, allocator=_rule(config, device))


def _rule(config: Config, device: torch.device) -> Rule:
    """Return BulletTrain's rule; of a plain defense only boundary examples take steps."""
    bt = config.bt
    n_r, n_o = (bt.n_r, bt.n_o) if isinstance(bt, BulletTrainConfig) else (0, 0)
    return Rule(torch.tensor([n_o, n_r, bt.n_b], device=device), (bt.n_b, n_r, n_o))
