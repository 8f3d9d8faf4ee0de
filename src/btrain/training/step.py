"""One batch of Algorithm 2: the same code for the plain defense and for BulletTrain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from btrain.allocation import (
    Allocation,
    by_class,
    gaussian,
    predicted,
    step_sizes,
    true_classes,
    uniform,
    update_robust_fraction,
)
from btrain.attacks import by_steps, evaluation_mode, prefix_pgd
from btrain.defenses import Defense
from btrain.training.statistics import StepStats, step_stats


@dataclass(frozen=True)
class Method:
    """What a run chooses once: the defense, the allocation and the attack's constants.

    Attributes:
        budget: N_O, N_R, N_B, (3,) int64 on the device.
        n_b: N_B again, on the host.
        mean_steps: of the allocator `gaussian`.
        oracle_steps, oracle_step_size: of the attack that tells the allocator `oracle` the truth.
    """

    defense: Defense
    allocator: str
    metric: Callable[[Tensor, Tensor], Tensor]
    budget: Tensor
    n_b: int
    step_size_b: float
    mean_steps: float
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


def train_step(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    x: Tensor,
    labels: Tensor,
    robust_fraction: Tensor,
    generator: torch.Generator,
    *,
    method: Method,
) -> tuple[Tensor, StepStats]:
    """Lines 11 to 16 of Algorithm 2: updates the weights, returns the new F_R and the statistics.

    From line 13 on the batch is in the order of descending step count; the sort copies the m step
    counts to the host, the only copy of a step.
    """
    clean_logits, z = clean_forward(model, x, method)  # line 11
    noise = start_noise(x, method, generator)
    allocation = allocate(model, x, labels, z, robust_fraction, noise, method, generator)  # line 12
    order, active = by_steps(allocation.steps)
    x, labels, z, noise = x[order], labels[order], z[order], noise[order]
    allocation = allocation.ordered(order)
    sizes = step_sizes(
        allocation.steps, n_b=method.n_b, epsilon=method.epsilon, step_size_b=method.step_size_b
    )
    x_adv = attack(model, x, labels, z, sizes, active, noise, method)  # line 13

    if method.defense.outer_reads_clean:  # line 14
        clean_logits = model(x) if clean_logits is None else clean_logits[order]
        perturbed = len(x) if method.forward_unperturbed else sum(active[:1])
        adv_logits = forward_prefix(model, x_adv, perturbed, clean_logits)
    else:
        clean_logits, adv_logits = z, model(x_adv)
    robust_fraction = update_robust_fraction(  # line 15
        robust_fraction, adv_logits, labels, momentum=method.momentum, gamma=method.gamma
    )
    loss = method.defense.outer_loss(clean_logits, adv_logits, labels)  # line 16
    descend(optimizer, loss)
    score = method.metric(z, labels) if z.shape[1] else None
    stats = step_stats(allocation, loss, z, score, clean_logits, adv_logits, labels)
    return robust_fraction, stats


def descend(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    """One update of the weights."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


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
    with evaluation_mode(model), torch.no_grad():
        logits: Tensor = model(x)
    return logits


def allocate(
    model: nn.Module,
    x: Tensor,
    labels: Tensor,
    z: Tensor,
    robust_fraction: Tensor,
    noise: Tensor,
    method: Method,
    generator: torch.Generator,
) -> Allocation:
    """Classes and steps of the batch by the run's allocator; only `oracle` attacks for them."""
    if method.allocator == "uniform":
        return uniform(labels, method.budget)
    if method.allocator == "oracle":
        n = method.oracle_steps
        sizes = torch.full((len(x),), method.oracle_step_size, device=x.device)
        x_adv = attack(model, x, labels, z, sizes, [len(x)] * n, noise, method)
        classes = true_classes(z, eval_logits(model, x_adv), labels)
        return by_class(classes, method.budget)._replace(overhead=n)
    score = method.metric(z, labels)
    if method.allocator == "gaussian":
        return gaussian(score, robust_fraction, n_b=method.n_b, mean_steps=method.mean_steps)
    return predicted(method.allocator, score, robust_fraction, method.budget, generator)


ALLOCATORS = ("bullettrain", "uniform", "oracle", "gaussian", "random")


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
    with nullcontext() if method.attack_in_train_mode else evaluation_mode(model):
        return prefix_pgd(
            model,
            x,
            labels,
            z,
            active=active,
            step_size=sizes,
            inner_loss=method.defense.inner_loss,
            epsilon=method.epsilon,
            noise=noise,
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


def forward_prefix(model: nn.Module, x_adv: Tensor, perturbed: int, clean_logits: Tensor) -> Tensor:
    """Logits (m, K) of the first `perturbed` examples; the others keep their clean logits.

    A single example takes an unperturbed one along, for BatchNorm cannot normalise it alone.
    """
    if perturbed == 0:
        return clean_logits
    rows = min(max(perturbed, 2), len(x_adv))
    return torch.cat([model(x_adv[:rows]), clean_logits[rows:]])
