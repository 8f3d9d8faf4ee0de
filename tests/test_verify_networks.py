"""Which networks bounds are computed for: traced from their forward pass, whatever they nest."""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from btrain.errors import UserError
from btrain.models import Normalise, verified
from btrain.models.preact_resnet import PreActResNet
from btrain.models.small_cnn import SmallCNN
from btrain.models.wide_resnet import WideResNet
from btrain.settings.names import ENGINES
from btrain.verify import bounds
from btrain.verify.graph import Graph, evaluating, forward, trace

SIZES = {
    "mixtrain_mnist_small": ((1, 28, 28), 10, 166_406, 4_804),
    "mixtrain_mnist_large": ((1, 28, 28), 10, 1_974_762, 48_064),
    "mixtrain_cifar_small": ((3, 32, 32), 10, 214_918, 6_244),
    "mixtrain_cifar_large": ((3, 32, 32), 10, 2_466_858, 62_464),
    "wong_resnet": ((3, 32, 32), 10, 4_214_850, 107_496),
    "wang_resnet": ((3, 64, 64), 200, 739_720, 39_424),
    "cnn7": ((3, 32, 32), 10, 17_192_650, 229_888),
}
"""Image, classes, parameters and ReLUs, as counted in their papers' code."""


@pytest.mark.parametrize("name", SIZES)
def test_networks_by_name_have_their_papers_sizes(name: str) -> None:
    shape, classes, parameters, relus = SIZES[name]
    network = verified.build(name, shape=shape, classes=classes)
    assert sum(p.numel() for p in network.parameters()) == parameters
    assert trace(network, shape).relus == relus


def test_networks_by_name_refuse_other_images() -> None:
    with pytest.raises(UserError, match=r"wang_resnet takes images of 64×64 pixels, not 32×"):
        verified.build("wang_resnet", shape=(3, 32, 32), classes=10)


@pytest.mark.parametrize(
    "network",
    [
        SmallCNN(1, (3, 8, 8), 3, Normalise([0.5], [0.2])),
        PreActResNet((1, 1), 2, 3, 3, Normalise([0.5], [0.2])),
        WideResNet(10, 1, 3, 3, nn.Identity()),
    ],
    ids=lambda network: type(network).__name__,
)
def test_btrains_other_networks_are_bounded_soundly(network: nn.Module) -> None:
    """Pre-activation blocks, which write in place, and pooling by a mean."""
    torch.manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.running_var, 0.5, 1.5)
            nn.init.normal_(module.running_mean, 0, 0.2)
    network.eval()
    graph = trace(network, (3, 8, 8))
    x, labels, epsilon = torch.rand(1, 3, 8, 8), torch.tensor([1]), 0.01
    z = (x + epsilon * (2 * torch.rand(500, 3, 8, 8) - 1).sign()).clamp(0, 1)
    with torch.no_grad():
        out = network(z)
        for engine in ENGINES:
            margins = bounds.margins(graph, bounds.box(x, epsilon), labels, engine=engine)
            assert (out - out[:, 1:2] <= margins).all()


class Written(nn.Module):
    """A network that writes by hand what layers do: constants, signs, shapes, sums."""

    scale: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.tensor([0.5, -2.0]).view(1, -1, 1, 1))
        self.shift = nn.Parameter(torch.linspace(-1, 1, 16).view(4, 4))
        self.conv = nn.Conv2d(2, 2, 3, padding="same")
        self.fc = nn.Linear(32, 3)
        self.drop = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        y = 1 - self.conv(x * (2 * self.scale)) / 3
        y = torch.sub(F.relu(y), x) + self.shift
        y += self.conv(y).relu()
        z = self.drop(y).view(y.size(0), -1)
        z = -torch.flatten(z, 1)
        return self.fc(z) + F.avg_pool2d(y, 4).mean((2, 3)).sum() if self.training else self.fc(z)


def test_arithmetic_written_by_hand() -> None:
    torch.manual_seed(0)
    network = Written().double().eval()
    graph = trace(network, (2, 4, 4))
    x = torch.rand(5, 2, 4, 4, dtype=torch.float64)
    assert torch.allclose(forward(graph.operations(), x), network(x), rtol=0, atol=1e-12)
    with torch.no_grad():
        network.shift += 1  # the weights of the moment
    assert torch.allclose(forward(graph.operations(), x), network(x), rtol=0, atol=1e-12)
    z = (x[:1] + 0.1 * (2 * torch.rand(1000, 2, 4, 4).double() - 1).sign()).clamp(0, 1)
    for engine in ENGINES:
        lower, upper = bounds.logits(graph, bounds.box(x[:1], 0.1), engine=engine)
        out = network(z)
        assert (lower <= out).all() and (out <= upper).all()


def test_batch_normalisation_is_joined_to_what_is_before_it() -> None:
    network = nn.Sequential(
        Normalise([0.5], [0.2]), nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Flatten(),
        nn.Linear(12, 4), nn.BatchNorm1d(4), nn.ReLU(), nn.Linear(4, 2),
    ).eval()  # fmt: skip
    kinds = [type(o.what).__name__ for o in trace(network, (1, 4, 4)).operations()]
    assert kinds == ["Input", "Scale", "Convolution", "Relu", "Reshape", "Linear", "Relu", "Linear"]


def test_tracing_leaves_mode_statistics_and_random_numbers_alone() -> None:
    network = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    network[0].eval()
    state = torch.get_rng_state()
    before = {name: t.clone() for name, t in network.state_dict().items()}
    trace(network, (1, 4, 4))
    assert [m.training for m in network] == [False, True, True, True]
    assert all(torch.equal(t, before[name]) for name, t in network.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_tracing_reads_the_network_as_it_is_evaluated_and_sets_nothing_on_it() -> None:
    class Branching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.fc = nn.Linear(4, 2)
            self.calls = 0

        def forward(self, x: Tensor) -> Tensor:
            self.calls += 1
            x = F.dropout(x - torch.tensor([0.1]), 0.5, self.training)
            return 2 * self.fc(x) if self.training else self.fc(x)

    network = Branching()
    before = dict(vars(network))
    graph = trace(network, (4,))
    assert vars(network) == before
    x = torch.rand(5, 4)
    assert torch.allclose(forward(graph.operations(), x), network.eval()(x))


class Function(nn.Module):
    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def branching(x: Tensor) -> Tensor:
    return x if x.sum() > 0 else -x


def overwriting(x: Tensor) -> Tensor:
    flat = x.flatten(1)
    x.relu_()
    return flat.view(x.shape)


class CappedReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).clamp(max=2.0)


def hooked(layer: nn.Module) -> nn.Module:
    """A layer that gives less where it would give much."""
    layer.register_forward_hook(lambda module, args, out: out - 3 * F.relu(out - 1))
    return layer


REFUSED = {
    "max pooling": (
        nn.MaxPool2d(2),
        r"the layer 1 \(MaxPool2d\); bounds pass through conv",
    ),
    "sigmoid": (nn.Sigmoid(), r"through the layer 1 \(Sigmoid\)"),
    "product": (Function(lambda x: x * x), r"through the operation mul in .*two values"),
    "function": (Function(torch.exp), "through the operation exp"),
    "other mean": (Function(lambda x: x.mean(1, keepdim=True)), "through the operation mean"),
    "uneven windows": (nn.AdaptiveAvgPool2d(4), "whose windows differ in size"),
    "ceil mode": (nn.AvgPool2d(4, ceil_mode=True), "whose windows differ in size"),
    "circular": (nn.Conv2d(2, 2, 3, padding=1, padding_mode="circular"), "pads with circular"),
    "no statistics": (nn.BatchNorm2d(2, track_running_stats=False), "keeps no running statistics"),
    "branch": (Function(branching), "takes the same way for all images"),
    "overwritten": (Function(overwriting), "may write on values that are used again"),
    "scaled sum": (Function(lambda x: torch.add(x, x, alpha=2)), "through the operation add"),
    "division": (Function(lambda x: 1 / x), "truediv.*, a division by what depends on the image"),
    "own forward": (CappedReLU(), r"the operation clamp in 1 \(CappedReLU\)"),
    "hook": (hooked(nn.BatchNorm2d(2)), r"1 \(BatchNorm2d\), which computes more than its kind"),
    "alias": (Function(lambda x: (x.flatten(1).relu_(), x)[1]), "values that are used again"),
    "chance": (Function(lambda x: x + 1e-5 * torch.randn(2, 1, 1)), "uses no chance"),
    "Python's chance": (Function(lambda x: x + 1e-3 * random.random()), "uses no chance"),
    "an image's own": (Function(lambda x: x * torch.rand(3, 2, 1, 1).clamp(1)), "image to image"),
    "number": (Function(lambda x: x * x.max().item()), "through the operation max"),
    "a pixel": (Function(lambda x: x * x.tolist()[0][0][0][0]), "than an image's size"),
    "batch": (Function(lambda x: x * x.size(0)), "than an image's size"),
    "batch by index": (Function(lambda x: x * x.shape[-4]), "than an image's size"),
    "batch, turned round": (Function(lambda x: x * x.shape[::-1][3]), "than an image's size"),
    "large batches": (Function(lambda x: x * (1 + x.size(0) // 100)), "than an image's size"),
    "count": (Function(lambda x: x + x.numel() // 3000), "than an image's size"),
    "mean over the batch": (Function(lambda x: x - x.mean(0)), "through the operation mean"),
    "length": (Function(lambda x: x.view(len(x), -1)), r"cannot be followed \(torch.fx\): 'len'"),
    "new layer": (Function(lambda x: nn.ReLU()(x)), r"cannot be followed \(torch.fx\): module"),
    "no numbers": (Function(lambda x: x * float("nan")), "logits are not finite"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_bounded_is_named(case: str) -> None:
    layer, said = REFUSED[case]
    network = nn.Sequential(nn.Conv2d(1, 2, 3), layer)
    with torch.no_grad():
        size = network.eval()(torch.zeros(1, 1, 8, 8)).flatten(1).shape[1]
    network = nn.Sequential(*network, nn.Flatten(), nn.Linear(size, 3)).eval()
    with pytest.raises(UserError, match=said):
        trace(network, (1, 8, 8))


@pytest.mark.parametrize("layer", [nn.BatchNorm2d(2), nn.Dropout(0.1)])
def test_a_layer_in_training_mode_is_named(layer: nn.Module) -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 3), layer, nn.ReLU(), nn.Flatten(), nn.Linear(8, 3))
    graph = trace(network, (1, 4, 4))
    box, labels = bounds.box(torch.rand(1, 1, 4, 4), 0.1), torch.tensor([0])
    with pytest.raises(UserError, match=r"need the layer 1 \(\w+\) in evaluation mode"):
        bounds.margins(graph, box, labels, engine="ibp")
    with evaluating(network):
        assert bounds.margins(graph, box, labels, engine="ibp").shape == (1, 3)


@pytest.mark.parametrize(
    ("network", "said"),
    [
        (nn.Conv2d(1, 2, 3), "need logits, one vector an image"),
        (nn.Linear(5, 3), "does not take images of 1×8×8"),
        (Function(lambda x: (x, x)), "returns its logits alone"),
    ],
)
def test_what_is_no_classifier_is_refused(network: nn.Module, said: str) -> None:
    with pytest.raises(UserError, match=said):
        trace(network, (1, 8, 8))


def test_a_graph_follows_its_network() -> None:
    network = nn.Sequential(nn.Flatten(), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))
    graph: Graph = trace(network, (1, 2, 2))
    x = torch.rand(2, 1, 2, 2)
    with torch.no_grad():
        network[3].bias += 1
    assert torch.allclose(forward(graph.operations(), x), network(x))


class SaturatingReLU(nn.ReLU):
    def forward(self, x: Tensor) -> Tensor:
        return F.relu(x) - 3 * F.relu(x - 1)


def with_forward_of_its_own() -> nn.Module:
    layer = nn.ReLU()
    layer.forward = SaturatingReLU().forward  # type: ignore[method-assign]
    return layer


@pytest.mark.parametrize("case", ["class", "hook", "instance", "whole network"])
def test_layers_that_do_more_than_their_kind_are_read_as_they_compute(case: str) -> None:
    """They differ from their kind for values above 1 alone, which few images reach."""
    layer = {"class": SaturatingReLU, "instance": with_forward_of_its_own}.get(case, nn.ReLU)()
    linear = nn.Linear(64, 1, bias=False)
    nn.init.constant_(linear.weight, 1 / 40)
    network = nn.Sequential(nn.Flatten(), hooked(linear) if case == "hook" else linear, layer)
    network = hooked(network) if case == "whole network" else network
    x = torch.full((1, 1, 8, 8), 0.7)
    lower, upper = bounds.logits(trace(network, (1, 8, 8)), bounds.box(x, 0.3), engine="ibp")
    out = network(torch.linspace(0.4, 1, 20)[:, None, None, None].expand(20, 1, 8, 8))
    assert (lower <= out).all() and (out <= upper).all()


@pytest.mark.filterwarnings("ignore:.*weight_norm. is deprecated:FutureWarning")
@pytest.mark.parametrize("made", [weight_norm, spectral_norm, nn.utils.weight_norm])
def test_weights_made_of_others_are_followed(made: Callable[[nn.Module], nn.Module]) -> None:
    network = nn.Sequential(made(nn.Conv2d(1, 2, 3)), nn.Flatten(), made(nn.Linear(8, 3))).eval()
    graph = trace(network, (1, 4, 4))
    x = torch.rand(4, 1, 4, 4)
    for _ in range(2):
        assert torch.allclose(forward(graph.operations(), x), network(x), atol=1e-6)
        with torch.no_grad():
            for weight in network.parameters():
                weight.add_(0.1 * torch.randn_like(weight))


CALLED: dict[str, Callable[[nn.Conv2d, Tensor], Tensor]] = {
    "layer": lambda conv, x: conv(input=x),
    "in place": lambda conv, x: F.relu(input=conv(x), inplace=True),
    "in place, used again": lambda conv, x: (lambda h: F.relu(h, True) + h)(conv(x)),
    "another name, used again": lambda conv, x: (lambda h: h.contiguous().relu_() + h)(conv(x)),
    "negative": lambda conv, x: torch.neg(input=conv(x)),
    "difference": lambda conv, x: torch.sub(other=conv(x), input=conv.bias.view(2, 1, 1)),
    "convolution": lambda conv, x: F.conv2d(x, conv.weight, bias=conv.bias, padding=1, stride=2),
    "linear": lambda conv, x: F.linear(conv(x).flatten(1), conv.weight.view(1, 18)),
    "sizes": lambda conv, x: conv(x) / conv(x).shape[1] + 2 * x.size(-1) ** -0.5,
    "pooling": lambda conv, x: F.avg_pool2d(x, kernel_size=x.size(2) // 2),
}


@pytest.mark.parametrize("case", CALLED)
def test_functions_and_arguments_by_name(case: str) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(1, 2, 3)
    network = nn.Sequential(Called(conv, CALLED[case]), nn.Flatten()).double().eval()
    graph = trace(network, (1, 5, 5))
    x = 4 * torch.randn(5, 1, 5, 5, dtype=torch.float64)
    assert torch.allclose(forward(graph.operations(), x), network(x), rtol=0, atol=1e-12)


class Called(nn.Module):
    def __init__(self, conv: nn.Conv2d, call: Callable[[nn.Conv2d, Tensor], Tensor]) -> None:
        super().__init__()
        self.conv, self.call = conv, call

    def forward(self, x: Tensor) -> Tensor:
        return self.call(self.conv, x)
