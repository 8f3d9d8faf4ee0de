"""Bounds: sound, exact where they can be, and the same as symbolic intervals going forward."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from btrain.errors import UserError
from btrain.models import Normalise
from btrain.models.verified import Residual
from btrain.settings.names import ENGINES
from btrain.verify import bounds
from btrain.verify.graph import Graph, trace
from zonotopes import Zonotope, margins, through

SHAPE = (2, 6, 6)
CLASSES = 4


def convolutional() -> nn.Module:
    return nn.Sequential(
        Normalise([0.4, 0.5], [0.2, 0.3]),
        nn.Conv2d(2, 5, 3, 2, 1), nn.ReLU(), nn.Conv2d(5, 6, 3, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(54, 12), nn.ReLU(), nn.Linear(12, CLASSES),
    )  # fmt: skip


def residual() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 3, 3, 1, 1), nn.ReLU(),
        Residual(3, 3, smaller=False), Residual(3, 4, smaller=True),
        nn.Flatten(), nn.Linear(36, CLASSES),
    )  # fmt: skip


def normalised() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(2, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(),
        nn.Conv2d(4, 6, 4, 2, 1), nn.BatchNorm2d(6), nn.ReLU(), nn.BatchNorm2d(6),
        nn.AvgPool2d(2), nn.Conv2d(6, 6, 3, 1, 1), nn.ReLU(),
        nn.Flatten(), nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, CLASSES),
    )  # fmt: skip


def unusual() -> nn.Module:
    """Groups, dilation, windows that are not square, padding that is not even, pooling at last."""
    return nn.Sequential(
        nn.Conv2d(2, 4, (3, 2), (2, 1), (1, 0), groups=2), nn.ReLU(),
        nn.Conv2d(4, 4, 3, 1, 2, dilation=2), nn.ReLU(),
        nn.Conv2d(4, 6, 3, 2, 0), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
        nn.Linear(6, CLASSES),
    )  # fmt: skip


NETWORKS = {f.__name__: f for f in (convolutional, residual, normalised, unusual)}


def made(name: str, dtype: torch.dtype = torch.float64, seed: int = 0) -> tuple[nn.Module, Graph]:
    """A network with biases and statistics that matter, in evaluation mode, and its graph."""
    torch.manual_seed(seed)
    network = NETWORKS[name]().to(dtype)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
            for values in (module.running_var, module.weight):
                nn.init.uniform_(values, 0.5, 1.5)
            for values in (module.running_mean, module.bias):
                nn.init.normal_(values, 0, 0.3)
    network.eval()
    return network, trace(network, SHAPE)


def images(count: int, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Some of their pixels are near 0 or 1, where boxes are cut."""
    generator = torch.Generator().manual_seed(1)
    x = torch.rand(count, *SHAPE, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.arange(count) % CLASSES


@pytest.mark.parametrize(("dtype", "close"), [(torch.float64, 1e-12), (torch.float32, 1e-4)])
@pytest.mark.parametrize("name", NETWORKS)
def test_symbolic_is_the_zonotope_going_forward(
    name: str, dtype: torch.dtype, close: float
) -> None:
    network, graph = made(name, dtype)
    x, labels = images(3, dtype)
    ours = bounds.margins(graph, bounds.box(x, 0.1), labels, engine="symbolic")
    theirs = torch.stack([
        margins(through(network, Zonotope.box((one - 0.1).clamp(0, 1), (one + 0.1).clamp(0, 1))),
                int(label))
        for one, label in zip(x[:, None], labels, strict=True)
    ])  # fmt: skip
    assert (ours - theirs).abs().max() <= close * (1 + theirs.abs().max())


def trained() -> tuple[nn.Module, Graph]:
    """A network that has learnt to tell random images of four classes apart, in float32."""
    network, graph = made("convolutional", torch.float32)
    generator = torch.Generator().manual_seed(2)
    centres = torch.rand(CLASSES, *SHAPE, generator=generator)
    labels = torch.arange(64) % CLASSES
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(60):
        x = (centres[labels] + 0.3 * torch.randn(64, *SHAPE, generator=generator)).clamp(0, 1)
        optimiser.zero_grad()
        F.cross_entropy(network(x), labels).backward()
        optimiser.step()
    return network, graph


@pytest.mark.parametrize("name", [*NETWORKS, "trained"])
def test_no_point_of_the_box_lies_beyond_a_bound(name: str) -> None:
    """200,000 points a network, at random, in corners and attacked; 10⁶ in all, in float32."""
    network, graph = trained() if name == "trained" else made(name, torch.float32)
    x, labels = images(2, torch.float32)
    epsilon = 0.15
    region = bounds.box(x, epsilon)
    intervals = [bounds.logits(graph, region, engine=e) for e in ENGINES]
    uppers = torch.stack([bounds.margins(graph, region, labels, engine=e) for e in ENGINES])
    lower = torch.stack([i.lower for i in intervals])
    upper = torch.stack([i.upper for i in intervals])
    low, high = (x - epsilon).clamp(0, 1), (x + epsilon).clamp(0, 1)
    generator = torch.Generator().manual_seed(3)
    points = 0
    with torch.no_grad():
        for kind in ("inside", "corners") * 4:
            share = torch.rand(12_000, 2, *SHAPE, generator=generator)
            share = share if kind == "inside" else share.round()
            points += check(network, low + share * (high - low), labels, lower, upper, uppers)
    for target in range(CLASSES):  # uphill from everywhere, towards each class
        z = low + torch.rand(130, 2, *SHAPE, generator=generator) * (high - low)
        for _ in range(8):
            z = z.detach().requires_grad_()
            out = network(z.flatten(0, 1))
            margin = out[:, target] - out.gather(1, labels.repeat(130)[:, None]).squeeze(1)
            (gradient,) = torch.autograd.grad(margin.sum(), z)
            z = torch.minimum(torch.maximum(z.detach() + 0.1 * gradient.sign(), low), high)
            with torch.no_grad():
                points += check(network, z, labels, lower, upper, uppers)
    assert points >= 200_000


def check(
    network: nn.Module, z: Tensor, labels: Tensor,
    lower: Tensor, upper: Tensor, uppers: Tensor,
) -> int:  # fmt: skip
    """Points (n, m, …) of m boxes against the bounds of all engines, (4, m, K) each."""
    out = network(z.flatten(0, 1)).unflatten(0, z.shape[:2])
    margin = out - out.gather(2, labels.expand(len(z), -1)[..., None])
    assert (out.amax(0) <= upper).all()
    assert (out.amin(0) >= lower).all()
    assert (margin.amax(0) <= uppers).all()
    return z.shape[0] * z.shape[1]


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_a_box_of_one_image_is_bounded_by_its_logits(name: str, engine: str) -> None:
    network, graph = made(name)
    x, labels = images(4)
    with torch.no_grad():
        out = network(x)
        got = bounds.margins(graph, bounds.box(x, 0), labels, engine=engine)
        lower, upper = bounds.logits(graph, bounds.box(x, 0), engine=engine)
    for bound in (got + out.gather(1, labels[:, None]), lower, upper):
        assert (bound - out).abs().max() < 1e-12
    assert (lower <= out).all() and (out <= upper).all()


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", NETWORKS)
def test_gradients_are_those_of_finite_differences(name: str, engine: str) -> None:
    network, graph = made(name)
    x, labels = images(3)
    weights = list(network.parameters())
    generator = torch.Generator().manual_seed(4)
    weighted = torch.rand(3, CLASSES, generator=generator, dtype=torch.float64)

    def loss() -> Tensor:
        upper = bounds.margins(graph, bounds.box(x, 0.05), labels, engine=engine)
        return (upper * weighted).sum()

    gradients = torch.autograd.grad(loss(), weights)
    for weight, gradient in zip(weights, gradients, strict=True):
        direction = torch.randn(weight.shape, generator=generator, dtype=torch.float64)
        direction *= 1e-7 / direction.norm()
        with torch.no_grad():
            weight += direction
            above = loss()
            weight -= 2 * direction
            below = loss()
            weight += direction
        expected = (gradient * direction).sum().item()
        assert (above - below).item() / 2 == pytest.approx(expected, rel=1e-4, abs=1e-13)


@pytest.mark.parametrize("name", NETWORKS)
def test_float32_bounds_lie_beyond_those_of_float64(name: str) -> None:
    """Rounding in float32 moves no bound inwards: the margin is larger than what it takes."""
    network, rounded = made(name, torch.float32)
    exact = trace(copy.deepcopy(network).double(), SHAPE)
    x, labels = images(8, torch.float32)
    for engine in ENGINES:
        for epsilon in (0.0, 0.1):
            box = bounds.box(x, epsilon)
            theirs = bounds.margins(
                exact, bounds.Box(*(t.double() for t in box)), labels, engine=engine
            )
            ours = bounds.margins(rounded, box, labels, engine=engine)
            wrong = F.one_hot(labels, CLASSES) == 0
            assert (ours.double() > theirs)[wrong].all()


@pytest.mark.parametrize("large", [100.0, 10_000.0])
def test_rounding_of_values_that_cancel_later_is_allowed_for(large: float) -> None:
    """The true logits of a network in float32, whose second layer takes off what its first adds."""
    torch.manual_seed(1)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(72, 256), nn.ReLU(), nn.Linear(256, 256), nn.ReLU(),
        nn.Linear(256, CLASSES),
    )  # fmt: skip
    with torch.no_grad():
        network[1].bias += large
        network[3].bias -= network[3].weight.double().sum(1).mul(large).float()
    graph, exact = trace(network, SHAPE), copy.deepcopy(network).double()
    x, labels = images(2, torch.float32)
    generator = torch.Generator().manual_seed(5)
    signs = torch.rand(500, 2, *SHAPE, generator=generator, dtype=torch.float64).round() * 2 - 1
    for epsilon in (0.0, 1e-3):
        region = bounds.box(x, epsilon)
        with torch.no_grad():
            z = exact((region.centre + region.radius * signs).flatten(0, 1)).unflatten(0, (500, 2))
            for engine in ENGINES:
                lower, upper = bounds.logits(graph, region, engine=engine)
                margins = bounds.margins(graph, region, labels, engine=engine)
                apart = z - z.gather(2, labels.expand(500, 2)[..., None])
                assert (z <= upper).all() and (z >= lower).all() and (apart <= margins).all()


def test_rounding_of_a_constant_that_cancels_in_batch_normalisation_is_allowed_for() -> None:
    """The logits of a float32 network, whose normalisation takes off what its convolution adds."""
    torch.manual_seed(0)
    network = nn.Sequential(
        nn.Conv2d(SHAPE[0], 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Flatten(),
        nn.Linear(8 * (SHAPE[1] - 2) * (SHAPE[2] - 2), CLASSES),
    ).eval()  # fmt: skip
    with torch.no_grad():
        network[0].bias += 300
        network[1].running_mean.fill_(300)
        network[1].running_var.fill_(0.01)
    graph = trace(network, SHAPE)
    x, _ = images(8, torch.float32)
    region = bounds.box(x, 1e-6)
    signs = torch.rand(100, *x.shape, generator=torch.Generator().manual_seed(5)).round() * 2 - 1
    with torch.no_grad():
        z = network((region.centre + region.radius * signs).flatten(0, 1)).unflatten(0, (100, 8))
        for engine in ENGINES:
            lower, upper = bounds.logits(graph, region, engine=engine)
            assert (z <= upper).all() and (z >= lower).all()


@pytest.mark.parametrize(
    ("name", "engine"),
    [
        *(("convolutional", engine) for engine in ENGINES),
        ("residual", "symbolic"),
        ("normalised", "ibp"),
    ],
)
def test_little_memory_gives_the_same_bounds_and_gradients(name: str, engine: str) -> None:
    network, graph = made(name)
    x, labels = images(3)

    def bounded(memory: int) -> tuple[Tensor, ...]:
        network.eval()
        upper = bounds.margins(graph, bounds.box(x, 0.1), labels, engine=engine, memory=memory)
        network.train()  # as training goes on before the backward pass
        return upper, *torch.autograd.grad(upper.logsumexp(1).sum(), list(network.parameters()))

    plenty = bounded(2**30)
    size = bounds.size(graph, engine, joint=True, like=x)
    backward = engine in ("symbolic", "crown")
    # An image at a time, and half a layer at a time where layers go backward.
    for memory in (size.total, size.total // 2) if backward else (size.total,):
        for a, b in zip(plenty, bounded(memory), strict=True):
            assert (a - b).abs().max() <= 1e-12 * (1 + a.abs().max())
    if not backward:
        with pytest.raises(UserError, match="for one image, and may take"):
            bounded(size.total // 2)
    else:
        network.eval()
        with torch.no_grad():
            memory = 2 * size.largest  # three of its size are held at once
            upper = bounds.margins(graph, bounds.box(x, 0.1), labels, engine=engine, memory=memory)
        assert (upper - plenty[0]).abs().max() < 1e-12


def test_too_little_memory_for_one_image() -> None:
    _, graph = made("convolutional")
    x, labels = images(2)
    sentence = r"^Bounds by symbolic need at least [\d.]+ kB for one image, and may take 1 kB.$"
    with pytest.raises(UserError, match=sentence):
        bounds.margins(graph, bounds.box(x, 0.1), labels, engine="symbolic", memory=1000)
    assert len(graph.sizes) == 2  # of one piece, and of another engine: no other is tried
    _, graph = made("residual")
    with pytest.raises(UserError, match=r"and may take 524 kB; those by crown_ibp need \d+ kB.$"):
        bounds.check_memory(graph, engine="symbolic", like=x, memory=2**19)


def test_a_union_is_the_best_of_its_engines() -> None:
    _, graph = made("residual")
    x, labels = images(4)
    box = bounds.box(x, 0.02)
    each = {e: bounds.margins(graph, box, labels, engine=e) for e in ENGINES}
    two = bounds.margins(graph, box, labels, engine="symbolic+ibp")
    assert torch.equal(two, torch.minimum(each["symbolic"], each["ibp"]))
    everything = bounds.margins(graph, box, labels, engine="any")
    assert torch.equal(everything, torch.stack(list(each.values())).amin(0))
    lower, upper = bounds.logits(graph, box, engine="any")
    for engine in ENGINES:
        alone = bounds.logits(graph, box, engine=engine)
        assert (lower >= alone.lower).all() and (upper <= alone.upper).all()


def test_margins_are_bounded_together() -> None:
    """A difference of two logits' bounds by themselves is looser than the difference's bound."""
    _, graph = made("convolutional")
    x, labels = images(4)
    box = bounds.box(x, 0.1)
    for engine in ENGINES:
        joint = bounds.margins(graph, box, labels, engine=engine)
        lower, upper = bounds.logits(graph, box, engine=engine)
        apart = upper - lower.gather(1, labels[:, None])
        wrong = F.one_hot(labels, CLASSES) == 0
        assert (joint < apart)[wrong].all()


def test_interval_bounds_by_hand() -> None:
    """|W|·r around W·c + b, cut at 0, layer by layer."""
    network, graph = made("convolutional")
    x, _ = images(2)
    box = bounds.box(x, 0.1)
    lower, upper = box.centre - box.radius, box.centre + box.radius
    found = bounds.before_relus(graph, box)
    normalise, first, _, second, *_ = network
    lower, upper = normalise(lower), normalise(upper)
    for layer, interval in zip((first, second), found, strict=False):
        centre, radius = (upper + lower) / 2, (upper - lower) / 2
        centre = layer(centre)
        radius = F.conv2d(radius, layer.weight.abs(), None, layer.stride, layer.padding)
        assert torch.allclose(interval.lower, centre - radius, rtol=0, atol=1e-12)
        assert torch.allclose(interval.upper, centre + radius, rtol=0, atol=1e-12)
        lower, upper = interval.lower.relu(), interval.upper.relu()
    assert [tuple(i.lower.shape[1:]) for i in found] == [(5, 3, 3), (6, 3, 3), (12,)]


def test_slopes_on_the_images_give_the_bound_of_a_linear_piece() -> None:
    """Where no ReLU changes sign the coefficients are the gradient."""
    network, graph = made("convolutional")
    x, labels = images(3)
    upper, slopes = bounds.slopes(graph, bounds.box(x, 1e-7), labels)
    z = x.clone().requires_grad_()
    out = network(z)
    for j in range(CLASSES):
        margin = out[:, j] - out.gather(1, labels[:, None]).squeeze(1)
        (gradient,) = torch.autograd.grad(margin.sum(), z, retain_graph=True)
        assert torch.allclose(slopes[:, j], gradient, rtol=0, atol=1e-9)
        assert torch.allclose(upper[:, j], margin, rtol=0, atol=1e-5)


def test_unknown_engine() -> None:
    with pytest.raises(UserError, match="There is no engine crwon; there are ibp, symbolic"):
        bounds.engines("ibp+crwon")


def test_images_of_another_size() -> None:
    _, graph = made("convolutional")
    box = bounds.box(torch.rand(1, 2, 9, 9, dtype=torch.float64), 0.1)
    with pytest.raises(UserError, match="made for images of 2×6×6, not of 2×9×9"):
        bounds.margins(graph, box, torch.zeros(1, dtype=torch.int64), engine="ibp")
