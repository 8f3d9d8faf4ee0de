"""The losses of verified training: pure functions of bounds and logits.

They differ in which box is bounded and in what the bounds are mixed with:

| | box | loss |
|---|---|---|
| Wong & Kolter, MixTrain, IBP, CROWN-IBP | the whole ε-box | `worst_case` |
| SABR | `small_box` around an attacked image | `worst_case` |
| MTL-IBP | the whole ε-box | `mixed` of an attacked image's loss and `worst_case` |
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain.errors import UserError
from btrain.settings.checks import at_least, number
from btrain.verify.bounds import Box, Interval, box

_ENOUGH = 0.5
"""Shi et al.'s τ: a layer tighter or better balanced than that is not pressed further."""


def worst_case(margins: Tensor, labels: Tensor) -> Tensor:
    """Return the cross-entropy of the worst logits that bounds allow, example by example.

    An upper bound of the cross-entropy at every image of the box (Wong & Kolter, Theorem 2).

    Args:
        margins: upper bounds of all logits minus the labelled one, (m, K), 0 at the label.
        labels: (m,) int64.

    Returns:
        (m,)
    """
    return F.cross_entropy(margins, labels, reduction="none")


def mixed(attacked: Tensor, verified: Tensor, *, share: float) -> Tensor:
    """(1 - share)·attacked + share·verified, both (m,): MTL-IBP of De Palma et al., eq. 9.

    Raises:
        UserError: the share lies outside [0, 1].
    """
    if not 0 <= share <= 1:
        raise UserError(f"The verified loss's share must lie in [0, 1], not {share}.")
    return (1 - share) * attacked + share * verified


def small_box(x: Tensor, attacked: Tensor, *, epsilon: float, share: float) -> Box:
    """Return a box of radius share·ε around an attacked image, moved to lie within ε of x and [0,
    1].

    SABR of Müller et al., section 3: `share` 1 gives the whole box, 0 the attacked image alone.
    (m, C, H, W), (m, C, H, W) -> a box of each

    Raises:
        UserError: the share lies outside [0, 1], or ε below 0.
    """
    if not 0 <= share <= 1:
        raise UserError(f"The small box's share of ε must lie in [0, 1], not {share}.")
    epsilon = number("epsilon", epsilon)
    at_least(0, "epsilon", epsilon)
    room = (1 - share) * epsilon
    centre = torch.minimum(torch.maximum(attacked, x - room), x + room)
    return box(centre, share * epsilon)


@torch.no_grad()
def initialise(network: nn.Module, generator: torch.Generator | None = None) -> None:
    """Draw weights under which interval bounds neither grow nor shrink from layer to layer.

    Convolutions and linear layers from N(0, 2π/n²) with n inputs a unit, biases 0. Shi et al.,
    *Fast Certified Robust Training with Short Warmup*, section 3.2.

    Raises:
        UserError: a layer's weight is computed from other parameters, as weight norm's.
    """
    for name, layer in network.named_modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            if "weight" not in dict(layer.named_parameters(recurse=False)):
                raise UserError(
                    f"The weight of {name or 'this network'} is computed from other parameters, so "
                    "that Shi's initialisation (defense.shi_init) cannot draw it."
                )
            inputs = layer.weight[0].numel()
            layer.weight.normal_(0, math.sqrt(2 * math.pi) / inputs, generator=generator)
            if layer.bias is not None:
                layer.bias.zero_()


def regulariser(images: Box, before_relus: Sequence[Interval]) -> Tensor:
    """Shi et al.'s penalty on layers that are loose, or active or inactive all over, a scalar.

    For each layer: how much wider its intervals are than the images' (eq. 9), and how far the
    always active neurons outweigh the always inactive ones, or the reverse, in mean and in
    variance (eq. 10). The mean over layers, (); 0 once all lie within τ = 0.5.

    Args:
        before_relus: of all layers, from `bounds.before_relus`.
    """
    first = images.radius.mean()
    penalties = []
    for lower, upper in before_relus:
        centre, width = (upper + lower) / 2, (upper - lower) / 2
        active, inactive = lower > 0, upper < 0
        means = [(centre * kind).sum().abs() for kind in (active, inactive)]
        spread = (centre - centre.mean()) ** 2
        variances = [(spread * kind).sum() for kind in (active, inactive)]
        ratios = [first / width.mean().clamp(min=1e-12), _balance(*means), _balance(*variances)]
        penalties.append(sum(F.relu(_ENOUGH - ratio) for ratio in ratios) / _ENOUGH)
    return torch.stack([torch.as_tensor(p) for p in penalties]).mean()


def _balance(a: Tensor, b: Tensor) -> Tensor:
    """Return the smaller of two positive numbers over the larger; 1 where one is missing."""
    if a.item() == 0 or b.item() == 0:
        return a.new_ones(())
    return torch.minimum(a / b, b / a)
