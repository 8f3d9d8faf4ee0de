"""The weights that a mask may take, how many each layer keeps, and masks with exactly so many."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from fnmatch import fnmatchcase

import torch
from torch import Tensor, nn

from btrain.attacks.pgd import evaluation_mode
from btrain.errors import UserError

Masks = dict[str, Tensor]
"""By the name of a layer, 1 where a weight is kept and 0 elsewhere, shaped and typed like it."""

Layers = Mapping[str, Tensor]
"""Weights by the name of their layer."""

_MASKED = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.Linear)


def layers(
    model: nn.Module, exclude: Sequence[str] = (), *, frozen: bool = False
) -> dict[str, nn.Parameter]:
    """Return the weights of convolutions and linear layers, biases and norms aside.

    Args:
        exclude: names of layers that stay dense; `block1.*` is a pattern.
        frozen: whether weights that are not trained count, too.

    Raises:
        UserError: there are none, one is computed from other parameters, or an excluded name is
            that of no layer.
    """
    found: dict[str, nn.Parameter] = {}
    for name, module in model.named_modules():
        if isinstance(module, _MASKED):
            weight = dict(module.named_parameters(recurse=False)).get("weight")
            if weight is None:
                raise UserError(
                    f"sparsity: the weight of {name or 'this network'} is computed from other "
                    "parameters (by weight norm, for example), so no mask can hold it at 0."
                )
            new = not any(weight is other for other in found.values())
            if new and (frozen or weight.requires_grad):
                found[name] = weight
    for pattern in exclude:
        if not any(fnmatchcase(name, pattern) for name in found):
            known = ", ".join(found)
            raise UserError(
                f"sparsity.exclude: {pattern} is no convolution or linear layer of this network; "
                f"it has {known}."
            )
    kept = {
        name: weight
        for name, weight in found.items()
        if not any(fnmatchcase(name, pattern) for pattern in exclude)
    }
    if not kept:
        raise UserError("sparsity: this network has no layer that a mask could thin out.")
    return kept


def positions(
    model: nn.Module, shape: tuple[int, int, int], device: torch.device
) -> dict[str, int]:
    """Return in how many places of an image's forward pass each layer's weights are used.

    A weight costs one multiply-add in each: those of a convolution as often as it has outputs in a
    channel. `shape` is (C, H, W).
    """
    used = dict.fromkeys(layers(model, frozen=True), 0)

    def count(name: str) -> Callable[[nn.Module, object, Tensor], None]:
        def counted(module: nn.Module, inputs: object, output: Tensor) -> None:
            del inputs
            weight = module.weight
            assert isinstance(weight, Tensor)
            used[name] += output.numel() // len(weight)

        return counted

    names = {id(weight): name for name, weight in layers(model, frozen=True).items()}
    hooks = [
        module.register_forward_hook(count(names[id(module.weight)]))
        for module in model.modules()
        if isinstance(module, _MASKED)
    ]
    try:
        with evaluation_mode(model), torch.no_grad():
            model(torch.zeros(1, *shape, device=device))
    finally:
        for hook in hooks:
            hook.remove()
    return used


# ------------------------------------------------------------------------------------ densities


def uniform(shapes: Sequence[torch.Size], density: float) -> list[float]:
    """Return the same density for every layer."""
    return [density] * len(shapes)


def er(shapes: Sequence[torch.Size], density: float) -> list[float]:
    """Return Erdős–Rényi densities, in proportion to (out + in)/(out · in) (Mocanu et al. 2018)."""
    return _in_proportion([(s[0] + s[1]) / (s[0] * s[1]) for s in shapes], shapes, density)


def erk(shapes: Sequence[torch.Size], density: float) -> list[float]:
    """Return densities in proportion to the sum of all dimensions over their product (RigL)."""
    return _in_proportion([sum(s) / math.prod(s) for s in shapes], shapes, density)


def _in_proportion(
    raw: Sequence[float], shapes: Sequence[torch.Size], density: float
) -> list[float]:
    """Return ε · raw with the total density; layers beyond 1 are dense, and ε is solved again."""
    sizes = [math.prod(shape) for shape in shapes]
    dense: set[int] = set()
    while True:
        left = density * sum(sizes) - sum(sizes[i] for i in dense)
        weighed = sum(raw[i] * sizes[i] for i in range(len(raw)) if i not in dense)
        epsilon = left / weighed if weighed else 0.0
        over = {i for i in range(len(raw)) if i not in dense and epsilon * raw[i] > 1}
        if not over:
            return [1.0 if i in dense else epsilon * raw[i] for i in range(len(raw))]
        dense |= {max(over, key=raw.__getitem__)}


def igq(shapes: Sequence[torch.Size], density: float) -> list[float]:
    """Return ideal-gas densities 1/(F·n + 1) of layers with n weights, F by bisection."""
    sizes = [math.prod(shape) for shape in shapes]
    total = density * sum(sizes)

    def kept(f: float) -> float:
        return sum(n / (f * n + 1) for n in sizes)

    low, high = 0.0, 1.0
    while kept(high) > total:
        high *= 2
    for _ in range(200):
        middle = (low + high) / 2
        low, high = (middle, high) if kept(middle) > total else (low, middle)
    return [1 / (high * n + 1) for n in sizes]


DENSITIES = {"uniform": uniform, "er": er, "erk": erk, "igq": igq}


def total_kept(sizes: Sequence[int], density: float) -> int:
    """Return how many weights of layers of these sizes stay.

    Raises:
        UserError: so few that not every layer could keep one.
    """
    kept = round(density * sum(sizes))
    if kept < len(sizes):
        raise UserError(
            f"sparsity.density={density:g} keeps {kept} of {sum(sizes)} weights, fewer than there "
            f"are layers ({len(sizes)})."
        )
    return kept


def quotas(densities: Sequence[float], sizes: Sequence[int], total: int) -> list[int]:
    """Return how many weights each layer keeps: whole numbers that add up to `total`.

    Each is its density's, rounded by largest remainders, and at least 1.
    """
    wanted = [share * size for share, size in zip(densities, sizes, strict=True)]
    kept = [min(max(int(want), 1), size) for want, size in zip(wanted, sizes, strict=True)]
    while (missing := total - sum(kept)) != 0:
        step = 1 if missing > 0 else -1
        free = [i for i, size in enumerate(sizes) if (kept[i] < size if step > 0 else kept[i] > 1)]
        free.sort(key=lambda i: step * (kept[i] - wanted[i]))
        for i in free[: abs(missing)]:
            kept[i] += step
    return kept


# ---------------------------------------------------------------------------------------- masks


def random_masks(weights: Layers, kept: Sequence[int], generator: torch.Generator) -> Masks:
    """Return masks with so many weights in each layer, drawn at random."""
    return {
        name: top(noise_like(weight, generator), count)
        for (name, weight), count in zip(weights.items(), kept, strict=True)
    }


def noise_like(weight: Tensor, generator: torch.Generator) -> Tensor:
    """Return numbers from [0, 1) like a weight; drawn on the CPU, for all devices the same."""
    drawn = torch.rand(weight.shape, generator=generator)
    return torch.empty_like(weight, requires_grad=False).copy_(drawn)


def top(scores: Tensor, count: int) -> Tensor:
    """Return a mask of the `count` highest scores, of their shape, type and layout."""
    flat = torch.zeros(scores.numel(), dtype=scores.dtype, device=scores.device)
    flat[scores.flatten().topk(count, sorted=False).indices] = 1
    return torch.empty_like(scores).copy_(flat.view(scores.shape))


def top_of_all(scores: Layers, count: int) -> tuple[Masks, list[str]]:
    """Return masks of the `count` highest scores of all layers, and the layers that had none.

    Such a layer keeps its highest one, in place of the lowest of the others that can spare one.
    """
    flat = torch.cat([score.flatten() for score in scores.values()])
    chosen = top(flat, count)
    parts = torch.split(chosen, [score.numel() for score in scores.values()])
    emptied = [name for name, part in zip(scores, parts, strict=True) if not part.any()]
    for name, score in scores.items():
        if name in emptied:
            parts[list(scores).index(name)][score.flatten().argmax()] = 1
    for _ in emptied:
        spare = torch.cat([part * (part.sum() > 1) for part in parts]) > 0
        lowest = torch.where(spare, flat, torch.inf).argmin()
        chosen[lowest] = 0
    shaped = zip(scores.items(), parts, strict=True)
    masks = {
        name: torch.empty_like(score).copy_(part.view(score.shape))
        for (name, score), part in shaped
    }
    return masks, emptied


def regrown(weight: Tensor, mask: Tensor, growth: Tensor, *, drop: int, grow: int) -> Tensor:
    """Return the mask of a layer after it lost its smallest weights and grew others.

    What was dropped may grow again at once, and then keeps its weight.

    Args:
        growth: what inactive weights are chosen by, the highest first.
        drop: of the active weights, those of the smallest magnitude.
        grow: of the inactive weights.
    """
    kept, inactive = mask.flatten() > 0, -torch.inf
    size = torch.where(kept, weight.detach().flatten().abs(), torch.inf)
    kept[size.topk(drop, largest=False).indices] = False
    candidates = torch.where(kept, inactive, growth.flatten())
    kept[candidates.topk(grow).indices] = True
    return torch.empty_like(mask).copy_(kept.view(mask.shape))


def distance(one: Tensor, other: Tensor) -> float:
    """Return the share of entries in which two masks differ."""
    return float((one != other).float().mean())
