"""How the perturbed examples of a batch come about: scores, step counts, the attack.

Algorithm 2, lines 11 to 13, part by part; `step` puts them together.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain.allocation import (
    BOUNDARY,
    Allocation,
    by_class,
    gaussian,
    predicted,
    step_sizes,
    true_classes,
    uniform,
)
from btrain.attacks.pgd import early_exit_pgd, prefix_pgd
from btrain.attacks.shadow import attacked, bare
from btrain.defenses import Defense
from btrain.processes.world import ALONE, World


@dataclass(frozen=True)
class Method:
    """What a run chooses once: the defense, the allocation and the attack's constants.

    Attributes:
        budget: N_O, N_R, N_B, (3,) int64 on the device.
        n_b: N_B again, on the host.
        patience, mean_steps: of the allocators `early_exit` and `gaussian`.
        fractions: F_B, F_R, F_O of the allocator `random`; None for those of BulletTrain's rule.
        oracle_steps, oracle_step_size: of the attack that tells the allocator `oracle` the truth.
        grad_align_weight: λ of GradAlign's regulariser; 0 for none.
        probe: what the start's noise is multiplied by where the first gradient is taken; None for
            a gradient at the start itself. See `methods.probe_factor`.
        world: the processes that a batch is dealt out to.
        pgd: `prefix_pgd`, or what does the same faster.
        multiple: what the size of a group that takes a step is rounded up to.
    """

    defense: Defense
    allocator: str
    metric: Callable[[Tensor, Tensor], Tensor]
    budget: Tensor
    n_b: int
    step_size_b: float
    patience: int
    mean_steps: float
    fractions: tuple[float, float, float] | None
    oracle_steps: int
    oracle_step_size: float
    epsilon: float
    start: str
    start_std: float
    attack_in_train_mode: bool
    gamma: float
    momentum: float
    share_clean_forward: bool
    forward_unperturbed: bool
    grad_align_weight: float
    probe: float | None = None
    world: World = ALONE
    pgd: Callable[..., Tensor] = prefix_pgd
    multiple: int = 1

    def first_offset(self, noise: Tensor) -> Tensor | None:
        """How far from the images the first gradient is taken; None for at the start itself."""
        return None if self.probe is None else self.probe * noise


def clean_forward(model: nn.Module, x: Tensor, method: Method) -> tuple[Tensor | None, Tensor]:
    """Clean logits for the loss, if they are shared, and z for allocation and attack.

    z is in the mode of the attack, for a KL between two modes would be large without any; or with
    the shared forward in train mode. Where nobody reads it, it is (m, 0). It keeps no graph.
    """
    if method.share_clean_forward or (
        method.attack_in_train_mode and method.defense.inner_reads_clean
    ):
        clean_logits = model(x)
        return clean_logits, clean_logits.detach()
    if method.defense.inner_reads_clean or method.allocator != "uniform":
        return None, eval_logits(model, x)
    return None, x.new_empty(len(x), 0)


def eval_logits(model: nn.Module, x: Tensor) -> Tensor:
    """Logits (m, K) in eval mode, without a graph."""
    with attacked(model) as network, torch.no_grad():
        logits: Tensor = network(x)
    return logits


def score_of(z: Tensor, labels: Tensor, method: Method) -> Tensor:
    """The run's metric, NaN where no logits were computed. (m, K), (m,) -> (m,)"""
    return method.metric(z, labels) if z.shape[1] else z.new_full((len(z),), math.nan)


def allocate(
    score: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    method: Method,
    generator: torch.Generator,
) -> Allocation:
    """Classes and steps of a batch by the run's allocator; for `oracle` see `true_allocation`.

    (m,), (m,), () -> (m,)
    """
    if method.allocator == "uniform":
        return uniform(labels, method.budget)
    if method.allocator == "gaussian":
        return gaussian(score, robust_fraction, n_b=method.n_b, mean_steps=method.mean_steps)
    return predicted(
        method.allocator, score, robust_fraction, method.budget, generator, method.fractions
    )


def true_allocation(
    model: nn.Module, x: Tensor, labels: Tensor, z: Tensor, noise: Tensor, method: Method
) -> Allocation:
    """What the allocator `oracle` decides by an attack of its own. (m, C, H, W) -> (m,)"""
    n, world, whole = method.oracle_steps, method.world, len(x)
    own = world.share(whole)
    x, noise = x[own], noise[own]
    sizes = torch.full((len(x),), method.oracle_step_size, device=x.device)
    x_adv = attack(model, x, labels[own], z[own], sizes, [len(x)] * n, noise, method)
    adv_logits = world.gathered(eval_logits(model, x_adv), whole)
    classes = true_classes(z, adv_logits, labels)
    return by_class(classes, method.budget)._replace(overhead=n)


def perturb(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    z: Tensor,
    allocation: Allocation,
    active: Sequence[int],
    noise: Tensor,
    method: Method,
) -> tuple[Tensor, Allocation, int]:
    """The attack on the allocated batch, in descending order of steps.

    Returns:
        Adversarial examples like x, the allocation with the steps really taken, and how many images
        the attack sent through the network.
    """
    n_b, step = method.n_b, method.step_size_b
    sizes = step_sizes(allocation.steps, n_b=n_b, epsilon=method.epsilon, step_size_b=step)
    if method.allocator != "early_exit":
        x_adv = attack(model, x, labels, z, sizes, active, noise, method)
        return x_adv, allocation, sum(active)
    with attacked(model) as network:
        x_adv, taken, forwarded = early_exit_pgd(
            network,
            x,
            labels,
            z,
            steps=allocation.steps,
            active=active,
            exits=allocation.classes == BOUNDARY,
            patience=method.patience,
            step_size=sizes,
            inner_loss=method.defense.inner_loss,
            epsilon=method.epsilon,
            noise=noise,
            probe=method.first_offset(noise),
        )
    return x_adv, allocation._replace(steps=taken), forwarded


def attack(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    z: Tensor,
    sizes: Tensor,
    active: Sequence[int],
    noise: Tensor,
    method: Method,
) -> Tensor:
    """The run's attack on a batch in descending order of steps, with the step sizes (m,)."""
    with nullcontext(bare(model)) if method.attack_in_train_mode else attacked(model) as network:
        return method.pgd(
            network,
            x,
            labels,
            z,
            active=active,
            step_size=sizes,
            inner_loss=method.defense.inner_loss,
            epsilon=method.epsilon,
            noise=noise,
            probe=method.first_offset(noise),
        )


def start_noise(x: Tensor, method: Method, generator: torch.Generator) -> Tensor:
    """What the attack adds to x before its first step, like x; a uniform start stays in the box."""
    noise = torch.zeros_like(x)
    if method.start == "clean":
        return noise
    if method.start == "uniform":
        noise.uniform_(-method.epsilon, method.epsilon, generator=generator)
        return (x + noise).clamp_(0, 1).sub_(x)
    return noise.normal_(0, method.start_std, generator=generator)
