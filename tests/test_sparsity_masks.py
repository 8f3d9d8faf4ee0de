"""Masks, scores and schedules of sparsity against formulas of their own."""

from __future__ import annotations

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

from btrain import models
from btrain.controllers.sparsity.make import Length, interval
from btrain.controllers.sparsity.masks import (
    DENSITIES,
    layers,
    positions,
    quotas,
    random_masks,
    regrown,
    top_of_all,
    total_kept,
)
from btrain.controllers.sparsity.schedule import (
    PUBLISHED,
    drop_rate,
    mask_updates,
    switches,
)
from btrain.controllers.sparsity.scores import grasp, in_rounds, magnitude, snip, synflow
from btrain.errors import UserError
from btrain.settings.names import IntervalUnit

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def resnet18() -> nn.Module:
    """The paper's network: 11.16 million weights, 555 million multiply-adds at 32×32."""
    return models.build("preact_resnet18", width=64, depth=None, classes=10, shape=(3, 32, 32))


def kept_by(rule: str, network: nn.Module, density: float) -> tuple[list[int], list[int]]:
    """Return how many weights each layer keeps, and how many it has."""
    weights = list(layers(network).values())
    sizes = [w.numel() for w in weights]
    shares = DENSITIES[rule]([w.shape for w in weights], density)
    return quotas(shares, sizes, total_kept(sizes, density)), sizes


@pytest.mark.parametrize("rule", DENSITIES)
@pytest.mark.parametrize("density", [0.5, 0.2, 0.1, 0.013])
def test_layers_keep_exactly_the_density_in_total(
    resnet18: nn.Module, rule: str, density: float
) -> None:
    kept, sizes = kept_by(rule, resnet18, density)
    assert sum(kept) == round(density * sum(sizes))
    assert all(1 <= count <= size for count, size in zip(kept, sizes, strict=True))


@pytest.mark.parametrize(
    ("rule", "density", "share"),
    [
        *[("uniform", 0.2, 0.200), ("erk", 0.2, 0.508), ("igq", 0.2, 0.516)],
        *[("igq", 0.1, 0.357), ("erk", 0.1, 0.248), ("igq", 0.05, 0.226), ("erk", 0.05, 0.125)],
    ],
)
def test_shares_of_the_multiply_adds(
    resnet18: nn.Module, rule: str, density: float, share: float
) -> None:
    """Those that were counted for this network by hand."""
    used = positions(resnet18, (3, 32, 32), CPU)
    sizes = {name: weight.numel() for name, weight in layers(resnet18).items()}
    dense = sum(used[name] * size for name, size in sizes.items())
    assert dense == pytest.approx(555.4e6, rel=1e-3)
    assert sum(sizes.values()) == pytest.approx(11.16e6, rel=1e-3)
    kept, _ = kept_by(rule, resnet18, density)
    left = sum(used[name] * count for name, count in zip(sizes, kept, strict=True))
    assert left / dense == pytest.approx(share, abs=6e-4)


def test_ideal_gas_densities(resnet18: nn.Module) -> None:
    """1/d − 1 is in proportion to the number of weights."""
    kept, sizes = kept_by("igq", resnet18, 0.2)
    factors = [(n / k - 1) / n for k, n in zip(kept, sizes, strict=True) if n > 10_000]
    assert factors == pytest.approx([factors[0]] * len(factors), rel=5e-3)


def test_erdos_renyi_kernel_by_its_own_rule() -> None:
    """No layer is full here, so densities are in proportion to Σ dimensions / Π dimensions."""
    shapes = [torch.Size(s) for s in ((32, 16, 3, 3), (64, 32, 3, 3), (100, 1024), (50, 100))]
    found = DENSITIES["erk"](shapes, 0.05)
    ratios = [d / (sum(s) / math.prod(s)) for d, s in zip(found, shapes, strict=True)]
    assert ratios == pytest.approx([ratios[0]] * 4)
    assert max(found) < 1


def test_a_density_below_one_weight_a_layer_is_refused() -> None:
    with pytest.raises(UserError, match=r"sparsity\.density=0\.0001 keeps 1 of 10000 weights"):
        total_kept([5000, 5000], 1e-4)


def test_a_weight_that_is_computed_from_others_is_refused() -> None:
    normed = nn.utils.parametrizations.weight_norm(nn.Conv2d(1, 2, 3))
    with pytest.raises(UserError, match=r"the weight of 1\.conv is computed from other parameters"):
        layers(nn.Sequential(nn.Linear(2, 2), nn.ModuleDict({"conv": normed})))


def test_random_masks_keep_their_quotas_and_depend_on_the_seed_alone(small_cnn: nn.Module) -> None:
    weights = layers(small_cnn)
    numbers = [7, 20, 300, 41]
    one, again, other = (
        random_masks(weights, numbers, torch.Generator().manual_seed(seed)) for seed in (1, 1, 2)
    )
    assert [int(mask.sum()) for mask in one.values()] == numbers
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_magnitude_is_what_torch_prunes(preact: nn.Module, layout: torch.memory_format) -> None:
    network = copy.deepcopy(preact)  # torch prunes no other layout
    weights = layers(preact.to(memory_format=layout))
    kept = round(0.3 * sum(w.numel() for w in weights.values()))
    masks, emptied = top_of_all(magnitude(weights), kept)
    parts = [(network.get_submodule(name), "weight") for name in weights]
    away = sum(w.numel() for w in weights.values()) - kept
    prune.global_unstructured(parts, pruning_method=prune.L1Unstructured, amount=away)
    assert not emptied
    for name, mask in masks.items():
        assert torch.equal(mask, network.get_submodule(name).get_buffer("weight_mask"))
        assert mask.is_contiguous(memory_format=layout) or mask.dim() != 4


def test_a_layer_that_would_be_emptied_keeps_its_best_weight() -> None:
    scores = {"strong": torch.arange(10.0) + 10, "weak": torch.tensor([1.0, 3.0, 2.0])}
    masks, emptied = top_of_all(scores, 4)
    assert emptied == ["weak"]
    assert masks["weak"].tolist() == [0, 1, 0]
    assert masks["strong"].nonzero().flatten().tolist() == [7, 8, 9]


def toy() -> tuple[nn.Sequential, Tensor, Tensor]:
    torch.manual_seed(1)
    network = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 3, bias=False)).double()
    return network, torch.randn(16, 5, dtype=torch.float64), torch.randint(3, (16,))


def test_snip_is_weight_times_gradient() -> None:
    network, x, labels = toy()
    scores = snip(network, (), [(x[:8], labels[:8]), (x[8:], labels[8:])])
    (2 * F.cross_entropy(network(x), labels)).backward()  # the sum of the halves' means
    raw = [(p.weight * p.weight.grad).abs() for p in (network[0], network[2])]  # type: ignore[operator,union-attr]
    total = sum(r.sum() for r in raw)
    for found, expected in zip(scores.values(), raw, strict=True):
        torch.testing.assert_close(found, (expected / total).detach())
    assert network[0].weight.grad is not None  # the copy's gradients are not this one's


def test_grasp_is_weight_times_hessian_times_gradient() -> None:
    network, x, labels = toy()
    shapes = [network[0].weight.shape, network[2].weight.shape]
    sizes = [math.prod(shape) for shape in shapes]

    def loss(flat: Tensor) -> Tensor:
        first, second = (p.view(s) for p, s in zip(flat.split(sizes), shapes, strict=True))
        hidden = torch.tanh(F.linear(x, first, network[0].bias))
        return F.cross_entropy(F.linear(hidden, second) / 200, labels)

    flat = torch.cat([network[0].weight.flatten(), network[2].weight.flatten()]).detach()
    hessian = torch.autograd.functional.hessian(loss, flat)
    gradient = torch.autograd.functional.jacobian(loss, flat)
    raw = flat * (hessian @ gradient)
    found = torch.cat([s.flatten() for s in grasp(network, (), [(x, labels)]).values()])
    torch.testing.assert_close(found, raw / (raw.sum().abs() + 1e-10))


def test_synflow_gives_every_layer_the_same_sum() -> None:
    """What flows in flows out (Tanaka et al., theorem 2); biases would be sources of their own."""
    network = nn.Sequential(
        nn.Conv2d(2, 4, 3, bias=False), nn.ReLU(), nn.Conv2d(4, 3, 3, bias=False), nn.ReLU(),
        nn.Flatten(), nn.Linear(12, 5, bias=False),
    )  # fmt: skip
    before = [p.clone() for p in network.parameters()]
    scores = synflow(network, (), (2, 6, 6))
    sums = [float(score.sum()) for score in scores.values()]
    assert sums == pytest.approx([sums[0]] * 3, rel=1e-6)
    assert all(torch.equal(a, b) for a, b in zip(before, network.parameters(), strict=True))


def test_synflow_in_rounds_keeps_every_layer_where_one_shot_does_not(small_cnn: nn.Module) -> None:
    size = sum(w.numel() for w in layers(small_cnn).values())

    def score(masks: object) -> dict[str, Tensor]:
        return synflow(small_cnn, (), (1, 8, 8), masks)  # type: ignore[arg-type]

    masks, emptied = in_rounds(score, 60, size, 50)
    assert not emptied
    assert sum(int(mask.sum()) for mask in masks.values()) == 60


def test_a_mask_update_drops_the_smallest_and_grows_the_steepest() -> None:
    weight = torch.tensor([[5.0, -1.0, 0.0, 3.0], [0.0, 2.0, 0.0, -4.0]])
    mask = (weight != 0).float()
    gradient = torch.tensor([[9.0, 0.5, 1.0, 9.0], [7.0, 0.1, 2.0, 9.0]])
    new = regrown(weight, mask, gradient, drop=2, grow=2)
    assert new.tolist() == [[1, 0, 0, 1], [1, 0, 1, 1]]
    again = regrown(weight, mask, torch.where(mask > 0, 10.0, gradient), drop=2, grow=2)
    assert torch.equal(again, mask)  # what is dropped may grow again at once


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_mask_updates_keep_the_number(layout: torch.memory_format) -> None:
    torch.manual_seed(0)
    weight = torch.randn(8, 6, 3, 3).contiguous(memory_format=layout)
    mask = torch.empty_like(weight).copy_(torch.rand(8, 6, 3, 3) < 0.3)
    gradient, kept = torch.rand(8, 6, 3, 3), int(mask.sum())
    drop = math.ceil(0.4 * kept)
    new = regrown(weight * mask, mask, gradient, drop=drop, grow=drop)
    assert int(new.sum()) == kept
    active = (weight * mask)[mask > 0].abs().sort().values
    gone = (weight * mask)[(mask > 0) & (new == 0)].abs()
    assert gone.max() <= active[drop - 1]
    come = gradient[(mask == 0) & (new > 0)]
    assert come.min() >= gradient[(mask == 0) & (new == 0)].max()
    assert new.is_contiguous(memory_format=layout)


# ------------------------------------------------------------------------------------ schedules


def published() -> list[int]:
    return mask_updates(PUBLISHED, early=900, late=1200, late_from=0.505)


def test_the_published_schedule_has_68_updates() -> None:
    steps = published()
    assert len(steps) == 68
    assert [b - a for a, b in zip([0, *steps], steps, strict=False)] == [900] * 39 + [1200] * 29
    epochs = [step // 352 for step in steps]
    assert epochs[38] <= 100 < epochs[39]


def test_the_drop_rate_falls_along_a_cosine() -> None:
    rates = [
        drop_rate(352 * epoch, PUBLISHED, first=0.5, last=0.005) for epoch in (0, 50, 100, 150, 199)
    ]
    assert rates == pytest.approx([0.5, 0.43, 0.25, 0.08, 0.005], abs=4e-3)
    assert drop_rate(PUBLISHED, PUBLISHED, first=0.5, last=0.005) == 0.005


@pytest.mark.parametrize(
    ("unit", "expected"),
    [(IntervalUnit.scaled, 6), (IntervalUnit.iterations, 900), (IntervalUnit.epochs, 10_800)],
)
def test_intervals_scale_with_the_run(unit: IntervalUnit, expected: int) -> None:
    assert interval(900, unit, Length(epochs=40, updates=12)) == expected
    assert interval(900, IntervalUnit.scaled, Length(200, 352)) == 900
    assert interval(0.001, unit, Length(1, 2)) == 1


@pytest.mark.parametrize(
    ("factor", "final"), [(-0.4, 0.0661), (-0.4 + 0.05, 0.0762), (0.05, 0.2286)]
)
def test_densities_that_flying_bird_plus_may_end_with(factor: float, final: float) -> None:
    """From 0.2 with the published schedule: always prune, always both, always grow."""
    density = 0.2
    for step in published():
        if step > PUBLISHED / 2:
            density *= 1 + factor * drop_rate(step, PUBLISHED, first=0.5, last=0.005)
    assert density == pytest.approx(final, abs=5e-5)


@pytest.mark.parametrize(
    ("gaps", "losses", "expected"),
    [
        ([1, 2, 1, 2, 1], [1, 1, 0, 1, 0], (True, True)),  # two of four, and equal counts as a rise
        ([1, 2, 1, 1, 1], [4, 3, 3, 2, 1], (False, False)),  # one of four
        ([1, 2, 3, 4, 5], [5, 4, 3, 2, 1], (True, False)),
        ([5, 4, 3, 2, 1], [1, 2, 3, 4, 5], (False, True)),
    ],
)
def test_two_of_four_changes_flip_a_switch(
    gaps: list[float], losses: list[float], expected: tuple[bool, bool]
) -> None:
    assert switches(gaps, losses, prune_share=0.5, grow_share=0.5) == expected
