"""Verified training and what is measured by it: losses, the interval attack, verified accuracy."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain.errors import UserError
from btrain.evaluation.api import robust_accuracy
from btrain.settings.names import ENGINES
from btrain.verify import accuracy, bounds, interval_attack, losses
from btrain.verify.graph import Graph, trace

SHAPE = (1, 4, 4)
EPSILON = 0.1


def images(count: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Noise around one image for each of three classes."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.rand(3, *SHAPE, generator=torch.Generator().manual_seed(9))
    labels = torch.arange(count) % 3
    noise = torch.randn(count, *SHAPE, generator=generator)
    return (centres[labels] + 0.25 * noise).clamp(0, 1), labels


def made() -> tuple[nn.Module, Graph]:
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Flatten(), nn.Linear(64, 10), nn.ReLU(),
        nn.Linear(10, 3),
    )  # fmt: skip
    return network, trace(network, SHAPE)


@pytest.fixture(scope="module")
def net() -> tuple[nn.Module, Graph]:
    """A network trained by symbolic bounds until some images are verified and some are broken."""
    network, graph = made()
    optimiser = torch.optim.Adam(network.parameters(), lr=5e-3)
    x, labels = images(60)
    for step in range(80):
        box = bounds.box(x, EPSILON * min(1, step / 40))
        margins = bounds.margins(graph, box, labels, engine="symbolic")
        optimiser.zero_grad()
        losses.worst_case(margins, labels).mean().backward()
        optimiser.step()
    return network, graph


def test_the_worst_case_loss_is_above_the_loss_of_every_point(
    net: tuple[nn.Module, Graph],
) -> None:
    network, graph = net
    x, labels = images(12, seed=1)
    with torch.no_grad():
        for engine in ENGINES:
            margins = bounds.margins(graph, bounds.box(x, EPSILON), labels, engine=engine)
            bound = losses.worst_case(margins, labels)
            for seed in range(50):
                generator = torch.Generator().manual_seed(seed)
                z = x + EPSILON * (2 * torch.rand(x.shape, generator=generator) - 1).sign()
                at_point = F.cross_entropy(network(z.clamp(0, 1)), labels, reduction="none")
                assert (at_point <= bound).all()
            exact = bounds.margins(graph, bounds.box(x, 0), labels, engine=engine)
            plain = F.cross_entropy(network(x), labels, reduction="none")
            assert torch.allclose(losses.worst_case(exact, labels), plain, atol=1e-3)


def test_training_by_bounds_verifies_images(net: tuple[nn.Module, Graph]) -> None:
    network, _ = net
    x, labels = images(60)
    (trained,) = accuracy.verify(network, x, labels, epsilon=EPSILON, engines=["symbolic"])
    untrained, _ = made()
    (before,) = accuracy.verify(untrained, x, labels, epsilon=EPSILON, engines=["symbolic"])
    assert before.accuracy < 0.5 < trained.accuracy < 1


def test_mixed_losses_by_hand() -> None:
    attacked, verified = torch.tensor([1.0, 2.0]), torch.tensor([5.0, 6.0])
    assert losses.mixed(attacked, verified, share=0.25).tolist() == [2.0, 3.0]
    assert torch.equal(losses.mixed(attacked, verified, share=0), attacked)
    assert torch.equal(losses.mixed(attacked, verified, share=1), verified)


@pytest.mark.parametrize("share", [0.0, 0.1, 1.0])
def test_small_boxes_lie_in_the_large_one(share: float) -> None:
    x, _ = images(20)
    generator = torch.Generator().manual_seed(0)
    attacked = (x + EPSILON * (2 * torch.rand(x.shape, generator=generator) - 1)).clamp(0, 1)
    small = losses.small_box(x, attacked, epsilon=EPSILON, share=share)
    large = bounds.box(x, EPSILON)
    assert (small.centre - small.radius >= large.centre - large.radius - 1e-6).all()
    assert (small.centre + small.radius <= large.centre + large.radius + 1e-6).all()
    inside = (x > EPSILON) & (x < 1 - EPSILON)
    assert torch.allclose(small.radius[inside], torch.tensor(share * EPSILON), atol=1e-6)
    if share == 0:
        assert torch.allclose(small.centre, attacked, atol=1e-6)
    if share == 1:
        assert torch.allclose(small.centre, large.centre, atol=1e-6)


@pytest.mark.parametrize("share", [-0.1, 1.5])
def test_shares_out_of_range(share: float) -> None:
    x = torch.rand(1, *SHAPE)
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        losses.mixed(x, x, share=share)
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        losses.small_box(x, x, epsilon=0.1, share=share)


def test_shis_weights_keep_intervals_as_wide_as_they_come() -> None:
    """After a linear layer with N(0, 2π/n²) an interval's expected width is twice the input's.

    E|w| = √(2/π)·√(2π)/n = 2/n, and the ReLU after it halves what lies around 0.
    """
    generator = torch.Generator().manual_seed(0)
    network = nn.Sequential(nn.Linear(400, 300), nn.ReLU(), nn.Conv2d(20, 64, 3))
    losses.initialise(network, generator)
    for layer, inputs in ((network[0], 400), (network[2], 180)):
        assert layer.weight.abs().sum(dim=tuple(range(1, layer.weight.dim()))).mean().item() == (
            pytest.approx(2, rel=0.02)
        )
        assert layer.weight.std().item() == pytest.approx(math.sqrt(2 * math.pi) / inputs, rel=0.02)
        assert not layer.bias.any()
    normed = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(UserError, match="The weight of 0 is computed from other parameters"):
        losses.initialise(normed)


def test_shis_regulariser_by_hand() -> None:
    """Widths 0.1 -> 0.8; one active neuron of centre 3, one inactive of centre -1, one between."""
    box = bounds.Box(torch.full((1, 4), 0.5), torch.full((1, 4), 0.1))
    centre, width = torch.tensor([[3.0, -1.0, 0.4]]), torch.full((1, 3), 0.8)
    (interval,) = [bounds.Interval(centre - width, centre + width)]
    mean = 2.4 / 3
    tightness = 0.5 - 0.1 / 0.8
    balance = 0.5 - 1 / 3
    variance = 0.5 - (1 + mean) ** 2 / (3 - mean) ** 2 if (1 + mean) < (3 - mean) else 0
    expected = (tightness + balance + max(0, variance)) / 0.5
    assert losses.regulariser(box, [interval]).item() == pytest.approx(expected, rel=1e-5)
    assert losses.regulariser(box, [interval, interval]).item() == pytest.approx(expected, rel=1e-5)
    even = torch.tensor([[1.0, -1.0]])
    tight = bounds.Interval(even - 0.1, even + 0.1)
    assert losses.regulariser(box, [tight]).item() == 0


def test_shis_regulariser_has_gradients() -> None:
    network, graph = made()
    x, _ = images(6)
    box = bounds.box(x, EPSILON)
    losses.regulariser(box, bounds.before_relus(graph, box)).backward()
    assert network[0].weight.grad is not None and network[0].weight.grad.abs().sum() > 0


@pytest.mark.parametrize("loss", ["cw", "pgd"])
def test_the_interval_attack_stays_in_the_box_and_breaks_no_verified_image(
    net: tuple[nn.Module, Graph], loss: str
) -> None:
    network, graph = net
    x, labels = images(60, seed=3)
    both = {}
    for name, jumping in (("plain", None), ("interval", graph)):
        attacked = interval_attack.attack(
            network, x, labels, epsilon=EPSILON, loss=loss, graph=jumping, steps=10, restarts=2,
            generator=torch.Generator().manual_seed(0),
        )  # fmt: skip
        assert (attacked - x).abs().max() <= EPSILON + 1e-6
        assert attacked.min() >= 0 and attacked.max() <= 1
        with torch.no_grad():
            both[name] = network(attacked).argmax(1) != labels
            wrong = network(x).argmax(1) != labels
        assert wrong.any() and torch.equal(attacked[wrong], x[wrong])
    assert both["interval"].sum() >= both["plain"].sum() > 0
    for verdict in accuracy.verify(network, x, labels, epsilon=EPSILON, engines=ENGINES):
        assert not (verdict.verified & (both["interval"] | both["plain"])).any()


def test_a_jump_crosses_what_a_gradient_does_not_see() -> None:
    """A logit that is flat around the image and wins beyond: the gradient there is 0."""
    network = nn.Sequential(nn.Flatten(), nn.Linear(1, 1), nn.ReLU(), nn.Linear(1, 2))
    with torch.no_grad():
        network[1].weight.fill_(1)
        network[1].bias.fill_(-0.6)
        network[3].weight.copy_(torch.tensor([[0.0], [10.0]]))
        network[3].bias.copy_(torch.tensor([0.1, 0.0]))
    graph = trace(network, (1, 1, 1))
    x, labels = torch.full((1, 1, 1, 1), 0.5), torch.tensor([0])
    plain = interval_attack.attack(network, x, labels, epsilon=0.3, graph=None)
    assert network(plain).argmax(1).item() == 0
    jumped = interval_attack.attack(network, x, labels, epsilon=0.3, graph=graph)
    assert network(jumped).argmax(1).item() == 1


def test_verified_accuracy_counts_whole_sets_by_engine(net: tuple[nn.Module, Graph]) -> None:
    network, graph = net
    x, labels = images(1100, seed=5)
    results = accuracy.verify(
        network, x, labels, epsilon=EPSILON, engines=["ibp", "symbolic", "ibp+symbolic", "any"]
    )
    assert network.training
    with torch.no_grad():
        right = network(x).argmax(1) == labels
        for result in results:
            box = bounds.box(x, EPSILON)
            margins = bounds.margins(graph, box, labels, engine=result.engine)
            assert torch.equal(result.verified, bounds.verified(margins, labels))
            assert not (result.verified & ~right).any()
            assert result.accuracy == result.verified.sum().item() / 1100
    (known,) = accuracy.verify(network, x, labels, epsilon=EPSILON, engines=["ibp"], correct=right)
    assert torch.equal(known.verified, results[0].verified)
    by_name = {r.engine: r.verified for r in results}
    assert torch.equal(by_name["ibp+symbolic"], by_name["ibp"] | by_name["symbolic"])
    assert 0 < by_name["ibp"].sum() < by_name["any"].sum()


def test_less_epsilon_verifies_more(net: tuple[nn.Module, Graph]) -> None:
    network, _ = net
    x, labels = images(60, seed=6)
    shares = [
        accuracy.verify(network, x, labels, epsilon=e, engines=["crown"])[0].accuracy
        for e in (0.01, 0.05, 0.1, 0.2, 1.0)
    ]
    assert shares == sorted(shares, reverse=True)
    assert shares[0] > shares[-1] == 0


@pytest.mark.parametrize("epsilon", [0.0, -0.1, 1.5, math.nan])
def test_epsilon_out_of_range(net: tuple[nn.Module, Graph], epsilon: float) -> None:
    x, labels = images(3)
    with pytest.raises(UserError, match="ε must be above 0 and at most 1"):
        accuracy.verify(net[0], x, labels, epsilon=epsilon, engines=["ibp"])
    if not epsilon >= 0:  # a box without points would be verified whatever the network
        for made in (epsilon, torch.tensor([[[[0.1]]], [[[epsilon]]], [[[0.1]]]])):
            with pytest.raises(UserError, match="epsilon must be at least 0"):
                bounds.box(x, made)
        with pytest.raises(UserError, match="epsilon must be at least 0"):
            losses.small_box(x, x, epsilon=epsilon, share=0)


@pytest.mark.parametrize(
    ("images_", "labels_", "said"),
    [
        (torch.rand(2, *SHAPE) + 0.5, torch.zeros(2, dtype=torch.int64), r"must lie in \[0, 1\]"),
        (torch.rand(2, *SHAPE).double(), torch.zeros(2, dtype=torch.int64), "are float64 and the"),
        (torch.rand(2, *SHAPE), torch.zeros(3, dtype=torch.int64), "one for each of 2 images"),
        (torch.rand(2, *SHAPE), torch.zeros(2), "labels must be int64"),
        (torch.rand(2, *SHAPE), [0, 1], "labels must be a tensor, not a list"),
        ([0.5], torch.zeros(1, dtype=torch.int64), "images must be a tensor, not a list"),
        (torch.rand(2, *SHAPE), torch.tensor([0, 3]), "from 0 to 2, for 3 logits, not from 0 to 3"),
        (torch.rand(0, *SHAPE), torch.zeros(0, dtype=torch.int64), "one at least"),
    ],
)
def test_images_and_labels_that_are_none(
    net: tuple[nn.Module, Graph], images_: Any, labels_: Any, said: str
) -> None:
    with pytest.raises(UserError, match=said):
        accuracy.verify(net[0], images_, labels_, epsilon=0.1, engines=["ibp"])
    if len(images_) and isinstance(images_, Tensor) and images_.max() <= 1:
        with pytest.raises(UserError, match=said):
            bounds.margins(net[1], bounds.box(images_, 0.1), labels_, engine="ibp")


def test_a_radius_may_be_written_as_a_fraction_and_verdicts_have_their_number(
    net: tuple[nn.Module, Graph],
) -> None:
    x, labels = images(4)
    (typed,) = accuracy.verify(net[0], x, labels, epsilon="8/255", engines=["ibp"])
    assert typed.epsilon == 8 / 255
    with pytest.raises(UserError, match="correct must be bool, one for each of 4 images"):
        accuracy.verify(
            net[0], x, labels, epsilon=0.1, engines=["ibp"], correct=torch.ones(2, dtype=torch.bool)
        )


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"loss": "foo"}, "There is no loss foo; there are cw, pgd"),
        ({"epsilon": -0.1}, "epsilon must be at least 0"),
        ({"restarts": 0}, "restarts must be at least 1, not 0"),
        ({"steps": 2.5}, "steps must be a whole number, not 2.5"),
        ({"labels": torch.tensor([0, 1, 3])}, "labels must be from 0 to 2"),
        ({"radius": 0.0}, "radius must be finite and greater than 0"),
    ],
)
def test_interval_attacks_that_are_none(
    net: tuple[nn.Module, Graph], settings: dict[str, Any], said: str
) -> None:
    network, graph = net
    x, labels = images(3)
    with pytest.raises(UserError, match=said):
        interval_attack.attack(
            network, x, graph=graph, **({"epsilon": 0.1, "labels": labels} | settings)
        )
    with pytest.raises(UserError, match="images of 1×4×4, not of 1×4×5"):
        interval_attack.attack(network, torch.rand(3, 1, 4, 5), labels, graph=graph, epsilon=0.1)


def test_the_interval_attack_is_no_attack_without_bounds(net: tuple[nn.Module, Graph]) -> None:
    x, labels = images(3)
    with pytest.raises(UserError, match="attack=interval needs bounds; please use"):
        robust_accuracy(net[0], x, labels, epsilon=0.1, attack="interval")


def test_unknown_engine_is_refused_before_the_work(net: tuple[nn.Module, Graph]) -> None:
    x, labels = images(3)
    with pytest.raises(UserError, match="There is no engine simbolic"):
        accuracy.verify(net[0], x, labels, epsilon=0.1, engines=["ibp", "simbolic"])
