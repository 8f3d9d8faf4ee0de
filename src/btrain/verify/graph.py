"""A network as the operations that bounds pass through, read from its own forward pass.

`trace` follows the network with `torch.fx`, whatever modules it is nested in. The weights are not
copied: each use of a graph reads those the network has then.
"""

from __future__ import annotations

import copy
import math
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from btrain.errors import UserError, first_line
from btrain.verify.coefficients import Shape
from btrain.verify.operations import Affine, Convolution, Linear, Reshape, Scale

KNOWN = (
    "convolutions, linear layers, ReLU, batch normalisation, average pooling, flatten, scaling "
    "by constants and sums"
)
_LEAVES = (
    nn.Conv2d, nn.Linear, nn.ReLU, nn.BatchNorm1d, nn.BatchNorm2d, nn.AvgPool2d,
    nn.AdaptiveAvgPool2d, nn.Flatten, nn.Identity, nn.Dropout, nn.Dropout2d,
)  # fmt: skip
_EVALUATED = (nn.BatchNorm1d, nn.BatchNorm2d, nn.Dropout, nn.Dropout2d)
"""Layers that must be in evaluation mode to be functions of one image."""


@dataclass(frozen=True)
class Input:
    """The images."""


@dataclass(frozen=True)
class Relu:
    """max(0, x)"""


@dataclass(frozen=True)
class Sum:
    """The sum of several layers' values."""


@dataclass(frozen=True)
class Node:
    """One operation of a graph: `make` reads the weights of the moment."""

    make: Callable[[], Input | Relu | Sum | Affine]
    inputs: tuple[int, ...]
    shape: Shape


@dataclass(frozen=True)
class Operation:
    """A node with its weights."""

    what: Input | Relu | Sum | Affine
    inputs: tuple[int, ...]
    shape: Shape


@dataclass(frozen=True)
class Graph:
    """A network's operations in the order of computation; the last one gives the logits."""

    nodes: tuple[Node, ...]
    evaluated: tuple[tuple[str, nn.Module], ...]
    """Name and module of the layers that must be in evaluation mode."""
    weights: Callable[[], Iterator[nn.Parameter]]
    """A function that gives the network's parameters."""
    sizes: dict[Hashable, tuple[int, int]] = field(default_factory=dict, compare=False)
    """A place where the bounds remember what memory they need."""

    @property
    def shape(self) -> Shape:
        """Return the shape of an image."""
        return self.nodes[0].shape

    @property
    def classes(self) -> int:
        """K."""
        return self.nodes[-1].shape[0]

    @property
    def relus(self) -> int:
        """Return the number of neurons with a ReLU."""
        return sum(math.prod(node.shape) for node in self.nodes if isinstance(node.make(), Relu))

    def operations(self) -> list[Operation]:
        """Return the operations with the network's present weights.

        Raises:
            UserError: a layer is in training mode, in which it is no function of one image.
        """
        for name, module in self.evaluated:
            if module.training:
                raise UserError(
                    f"Bounds need the layer {name} ({type(module).__name__}) in evaluation mode: "
                    "in training mode its outcome depends on the other images of the batch or on "
                    "chance."
                )
        return [Operation(node.make(), node.inputs, node.shape) for node in self.nodes]


def trace(network: nn.Module, shape: Shape) -> Graph:
    """Return the graph of a network for images of a shape, (C, H, W) or (N,).

    Computed once more by the graph and compared, so that nothing misread is ever bounded. The
    network's mode and statistics stay as they are.

    Raises:
        UserError: an operation cannot be bounded, or the forward pass branches on the images.
    """
    if isinstance(network, _LEAVES):
        network = nn.Sequential(network)
    try:
        traced = fx.GraphModule(network, _Tracer().trace(network))
    except fx.proxy.TraceError as error:
        raise UserError(
            f"Bounds need a network whose forward pass takes the same way for all images: "
            f"{first_line(error)}."
        ) from error
    with evaluating(network):
        reader = _Reader(network, _shapes(traced, shape), shape)
        for node in traced.graph.nodes:
            reader.read(node)
        graph = reader.graph()
        _compare(graph, network, shape)
    return graph


@contextmanager
def evaluating(network: nn.Module) -> Iterator[None]:
    """Put all layers in evaluation mode, and each back in its own afterwards."""
    training = [module for module in network.modules() if module.training]
    network.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, _LEAVES) or super().is_leaf_module(m, module_qualified_name)


def _shapes(traced: fx.GraphModule, shape: Shape) -> dict[fx.Node, Any]:
    """Each node's outcome for two images, without memory."""
    outcomes: dict[fx.Node, Any] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            outcomes[by_name[n.name]] = outcome = super().run_node(n)
            return outcome

    by_name = {node.name: node for node in traced.graph.nodes}
    dtype = next((p.dtype for p in traced.parameters()), torch.float32)
    on_meta = copy.deepcopy(traced).to("meta")
    try:
        Record(on_meta).run(torch.empty(2, *shape, dtype=dtype, device="meta"))
    except (RuntimeError, ValueError, TypeError) as error:
        raise UserError(
            f"The network does not take images of {'×'.join(map(str, shape))}: {first_line(error)}."
        ) from error
    return outcomes


def _compare(graph: Graph, network: nn.Module, shape: Shape) -> None:
    """Run the graph and the network on the same images.

    Raises:
        UserError: they differ, as with a layer that writes on values which are used again.
    """
    parameter = next(network.parameters(), torch.empty(0))
    images = torch.rand((2, *shape), generator=torch.Generator().manual_seed(0))
    images = images.to(parameter)
    with torch.no_grad():
        theirs, ours = network(images), forward(graph.operations(), images)
    bound = 1e-3 * (1 + theirs.abs().max().item())
    if theirs.shape != ours.shape or not (theirs - ours).abs().max().item() <= bound:
        raise UserError(
            "The network's operations, one by one, do not give what the network gives: a layer "
            "may write on values that are used again, or do more than its kind of layer does."
        )


def on_meta(operation: Operation) -> Operation:
    """Return the same operation with weights that have sizes alone."""
    what: Any = operation.what
    weights = {f.name: getattr(what, f.name) for f in fields(what)}
    moved = {name: w.to("meta") for name, w in weights.items() if isinstance(w, Tensor)}
    return replace(operation, what=replace(what, **moved))


def forward(operations: Sequence[Operation], x: Tensor) -> Tensor:
    """Return the logits of images, by the operations."""
    values: list[Tensor] = []
    for operation in operations:
        match operation.what:
            case Input():
                values.append(x)
            case Relu():
                values.append(values[operation.inputs[0]].relu())
            case Sum():
                values.append(summed([values[i] for i in operation.inputs]))
            case affine:
                values.append(affine.forward(values[operation.inputs[0]]))
    return values[-1]


def summed(values: Sequence[Tensor]) -> Tensor:
    """Return the sum of one or more tensors."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


@dataclass
class _Reader:
    """Reads a traced network node by node."""

    network: nn.Module
    outcomes: dict[fx.Node, Any]
    image: Shape
    nodes: list[Node] = field(default_factory=list)
    place: dict[fx.Node, int] = field(default_factory=dict)
    """The shape of each node's values in `nodes`."""
    evaluated: list[tuple[str, nn.Module]] = field(default_factory=list)

    def graph(self) -> Graph:
        shape = self.nodes[-1].shape
        if len(shape) != 1:
            raise UserError(f"Bounds need logits, one vector an image, not {shape}.")
        return Graph(tuple(_fused(self.nodes)), tuple(self.evaluated), self.network.parameters)

    def read(self, node: fx.Node) -> None:
        """Take one node of the network's forward pass.

        Raises:
            UserError: it cannot be bounded.
        """
        if node.op == "placeholder":
            if self.nodes:
                if node.args:  # an argument with a default value
                    return
                raise UserError("Bounds need a network of one argument, the images.")
            self._put(node, Input, ())
        elif node.op == "output":
            last = node.args[0]
            if not isinstance(last, fx.Node) or last not in self.place:
                raise UserError("Bounds need a network that returns its logits alone.")
            if self.place[last] != len(self.nodes) - 1:  # what is computed besides is left out
                self.nodes = self.nodes[: self.place[last] + 1]
        elif any(n in self.place for n in node.all_input_nodes) and isinstance(
            self.outcomes[node], Tensor
        ):
            self._operation(node)

    def _put(self, node: fx.Node, make: Callable[[], Any], inputs: tuple[int, ...]) -> None:
        outcome = self.outcomes[node]
        if outcome.dim() not in (2, 4) or outcome.shape[0] != 2:
            raise self._refused(node)
        self.place[node] = len(self.nodes)
        self.nodes.append(Node(make, inputs, tuple(outcome.shape[1:])))

    def _shape(self, node: fx.Node) -> Shape:
        return self.nodes[self.place[node]].shape

    def _refused(self, node: fx.Node, why: str = "") -> UserError:
        if node.op == "call_module":
            kind = type(self.network.get_submodule(str(node.target))).__name__
            name = f"the layer {node.target} ({kind})"
        else:
            called = getattr(node.target, "__name__", node.target)
            name = f"the operation {called}" + _where(node)
        return UserError(
            f"No bound can be computed through {name}{why}; bounds pass through {KNOWN}."
        )

    def _operation(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._module(node, self.network.get_submodule(str(node.target)))
            return
        name = node.target if isinstance(node.target, str) else node.target.__name__
        if node.op == "call_function" and getattr(node.target, "__module__", "") not in _TORCH:
            raise self._refused(node)
        if name in ("relu", "relu_"):
            self._only(node, 1, ("inplace",))
            self._put(node, Relu, (self._at(node),))
        elif name in _SUMS:
            self._only(node, 2)
            self._sum(node, *_SUMS[name])
        elif name in _PRODUCTS:
            self._only(node, 2)
            self._product(node, inverse=_PRODUCTS[name])
        elif name == "neg":
            self._scale(node, node.args[0], factor=-1.0)
        elif name in ("flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze"):
            self._reshape(node)
        elif name == "mean":
            self._mean(node)
        elif name in ("avg_pool2d", "adaptive_avg_pool2d"):
            self._pool(node, _bound(node, name))
        else:
            raise self._refused(node)
        if name.endswith("_") or name in ("iadd", "isub", "imul", "itruediv"):
            self.place[node.args[0]] = self.place[node]  # type: ignore[index]

    def _at(self, node: fx.Node) -> int:
        value = node.args[0] if node.args else next(iter(node.kwargs.values()))
        if not isinstance(value, fx.Node) or value not in self.place:
            raise self._refused(node)
        return self.place[value]

    def _only(self, node: fx.Node, many: int, ignored: tuple[str, ...] = ()) -> None:
        """Refuse arguments that change the meaning, like `alpha` of a sum."""
        if (len(node.args) > many and not ignored) or set(node.kwargs) - {"input", *ignored}:
            raise self._refused(node)

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        at = self._at(node)
        shape = self.nodes[at].shape
        match module:
            case nn.Conv2d():
                self._convolution(node, module)
            case nn.Linear():
                if len(shape) != 1:
                    raise self._refused(node)
                self._put(node, lambda: Linear(module.weight, module.bias), (at,))
            case nn.ReLU():
                self._put(node, Relu, (at,))
                if module.inplace:
                    self.place[node.args[0]] = self.place[node]  # type: ignore[index]
            case nn.BatchNorm1d() | nn.BatchNorm2d():
                if module.running_mean is None or module.running_var is None:
                    raise self._refused(node, ", which keeps no running statistics")
                self.evaluated.append((str(node.target), module))
                self._put(node, lambda: _normalisation(module, shape), (at,))
            case nn.AvgPool2d() | nn.AdaptiveAvgPool2d():
                self._pool(node, vars(module))
            case nn.Flatten():
                self._reshape(node)
            case nn.Identity():
                self.place[node] = at
            case nn.Dropout() | nn.Dropout2d():
                self.evaluated.append((str(node.target), module))
                self.place[node] = at
            case _:
                raise self._refused(node)

    def _convolution(self, node: fx.Node, module: nn.Conv2d) -> None:
        shape = self._shape(node.args[0])  # type: ignore[arg-type]
        padding = module.padding
        if isinstance(padding, str):
            total = [d * (k - 1) for d, k in zip(module.dilation, module.kernel_size, strict=True)]
            if padding == "same" and any(n % 2 for n in total):
                raise self._refused(node, ", which pads one side more than the other")
            padding = tuple(n // 2 for n in total) if padding == "same" else (0, 0)
        if module.padding_mode != "zeros" and any(padding):
            raise self._refused(node, f", which pads with {module.padding_mode}")
        if len(shape) != 3:
            raise self._refused(node)
        pad = (int(padding[0]), int(padding[1]))

        def make() -> Convolution:
            return Convolution(
                module.weight, module.bias, _pair(module.stride), pad, _pair(module.dilation),
                module.groups, shape,
            )  # fmt: skip

        self._put(node, make, (self._at(node),))

    def _pool(self, node: fx.Node, options: dict[str, Any]) -> None:
        """Average pooling as a convolution of each channel by itself."""
        shape = self._shape(node.args[0])  # type: ignore[arg-type]
        if len(shape) != 3:
            raise self._refused(node)
        padding = _pair(options.get("padding", 0))
        if "output_size" in options:
            out = self.outcomes[node].shape[2:]
            if any(n % m for n, m in zip(shape[1:], out, strict=True)):
                raise self._refused(node, ", whose windows differ in size")
            kernel = stride = (shape[1] // out[0], shape[2] // out[1])
        else:
            kernel = _pair(options["kernel_size"])
            stride = _pair(options.get("stride") or kernel)
            if (
                options.get("ceil_mode")
                or options.get("divisor_override")
                or (any(padding) and not options.get("count_include_pad", True))
            ):
                raise self._refused(node, ", whose windows differ in size")
        self._average(node, kernel, stride, padding, self._at(node))

    def _average(
        self, node: fx.Node, kernel: tuple[int, int], stride: tuple[int, int],
        padding: tuple[int, int], at: int,
    ) -> None:  # fmt: skip
        shape = self.nodes[at].shape
        like = self._like()

        def make() -> Convolution:
            weight = like().new_full((shape[0], 1, *kernel), 1 / math.prod(kernel))
            return Convolution(weight, None, stride, padding, (1, 1), shape[0], shape)

        out = tuple(
            (n + 2 * p - k) // s + 1
            for n, p, k, s in zip(shape[1:], padding, kernel, stride, strict=True)
        )
        self.place[node] = len(self.nodes)
        self.nodes.append(Node(make, (at,), (shape[0], *out)))

    def _mean(self, node: fx.Node) -> None:
        """Return the mean over a map, with or without its two dimensions left at 1."""
        at = self._at(node)
        shape, out = self.nodes[at].shape, self.outcomes[node].shape
        given = _bound(node, "mean")
        dim = given.get("dim")
        if len(shape) != 3 or not isinstance(dim, tuple | list):
            raise self._refused(node)
        if {d % 4 for d in dim} != {2, 3} or given.get("dtype") is not None:
            raise self._refused(node)
        self._average(node, (shape[1], shape[2]), (1, 1), (0, 0), at)
        if len(out) == 2:
            at, pooled = self.place[node], (shape[0], 1, 1)
            self._put(node, lambda: Reshape(pooled, (shape[0],)), (at,))

    def _reshape(self, node: fx.Node) -> None:
        at = self._at(node)
        shape, outcome = self.nodes[at].shape, self.outcomes[node]
        out = tuple(outcome.shape[1:])
        if outcome.shape[0] != 2 or math.prod(out) != math.prod(shape):
            raise self._refused(node)
        if out == shape:
            self.place[node] = at
        else:
            self._put(node, lambda: Reshape(shape, out), (at,))

    def _sum(self, node: fx.Node, first: float, second: float) -> None:
        """first·a + second·b, where one of the two may be a constant."""
        signs = (first, second)
        values = [self._value(node, i) for i in range(2)]
        if all(isinstance(value, int) for value in values):
            places = [
                value if sign == 1 else self._extra_scale(value, sign)
                for value, sign in zip(values, signs, strict=True)
                if isinstance(value, int)
            ]
            if any(self.nodes[p].shape != tuple(self.outcomes[node].shape[1:]) for p in places):
                raise self._refused(node)
            self._put(node, Sum, tuple(places))
            return
        i = 0 if isinstance(values[0], int) else 1
        constant = values[1 - i]
        assert callable(constant)
        sign = signs[1 - i]
        self._scale(
            node, node.args[i], factor=None if signs[i] == 1 else signs[i],
            shift=lambda: constant() * sign,
        )  # fmt: skip

    def _product(self, node: fx.Node, *, inverse: bool) -> None:
        values = [self._value(node, i) for i in range(2)]
        i = 0 if isinstance(values[0], int) else 1
        constant = values[1 - i]
        if not callable(constant) or (inverse and i == 1):
            raise self._refused(node, ", of two values that depend on the image")
        self._scale(node, node.args[i], factor=(lambda: 1 / constant()) if inverse else constant)

    def _value(self, node: fx.Node, i: int) -> int | Callable[[], Any]:
        """Return an argument's place, or what computes it if it does not depend on the images."""
        value = (*node.args, *node.kwargs.values())[i]
        if isinstance(value, fx.Node) and value in self.place:
            return self.place[value]
        constant = self._constant(value)
        if constant is None:
            raise self._refused(node)
        return constant

    def _constant(self, value: Any) -> Callable[[], Any] | None:
        """Return what computes a value from the weights alone; None if it needs the images."""
        if not isinstance(value, fx.Node):
            return lambda: value
        nodes: list[fx.Node] = []

        def collect(node: fx.Node) -> bool:
            if node.op == "placeholder":
                return False
            if not all(collect(n) for n in node.all_input_nodes):
                return False
            nodes.append(node)
            return True

        if not collect(value):
            return None

        def compute() -> Any:
            found: dict[fx.Node, Any] = {}
            for node in nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
                if node.op == "get_attr":
                    found[node] = operator.attrgetter(str(node.target))(self.network)
                elif node.op == "call_module":
                    found[node] = self.network.get_submodule(str(node.target))(*args, **kwargs)
                elif node.op == "call_method":
                    found[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    assert callable(node.target)
                    found[node] = node.target(*args, **kwargs)
            return found[value]

        return compute

    def _like(self) -> Callable[[], Tensor]:
        """Return a function that gives a tensor of the network's dtype and on its device."""
        parameter = next(self.network.parameters(), None)
        return lambda: torch.empty(0) if parameter is None else parameter

    def _scale(
        self, node: fx.Node, of: Any, *, factor: Any = None, shift: Any = None
    ) -> None:  # fmt: skip
        at = self.place[of]
        shape = self.nodes[at].shape
        if tuple(self.outcomes[node].shape[1:]) != shape:
            raise self._refused(node)
        self._put(node, self._scaling(factor, shift, shape), (at,))

    def _extra_scale(self, at: int, factor: float) -> int:
        shape = self.nodes[at].shape
        self.nodes.append(Node(self._scaling(factor, None, shape), (at,), shape))
        return len(self.nodes) - 1

    def _scaling(self, factor: Any, shift: Any, shape: Shape) -> Callable[[], Scale]:
        like = self._like()

        def fitted(given: Any) -> Tensor | None:
            if given is None:
                return None
            value, weight = given() if callable(given) else given, like()
            value = torch.as_tensor(value, dtype=weight.dtype, device=weight.device)
            while value.dim() > len(shape):
                value = value.squeeze(0)
            return value.reshape((1,) * (len(shape) - value.dim()) + tuple(value.shape))

        return lambda: Scale(fitted(factor), fitted(shift), shape)


def _normalisation(module: nn.BatchNorm1d | nn.BatchNorm2d, shape: Shape) -> Scale:
    """Batch normalisation by its running statistics."""
    assert module.running_mean is not None and module.running_var is not None
    factor = torch.rsqrt(module.running_var + module.eps)
    if module.weight is not None:
        factor = factor * module.weight
    shift = -module.running_mean * factor
    if module.bias is not None:
        shift = shift + module.bias
    size = (-1, *(1 for _ in shape[1:]))
    return Scale(factor.reshape(size), shift.reshape(size), shape)


def _fused(nodes: Sequence[Node]) -> list[Node]:
    """Scales joined to what they alone follow: batch normalisation costs nothing then."""
    uses = [0] * len(nodes)
    for node in nodes:
        for i in node.inputs:
            uses[i] += 1
    kept: list[Node] = []
    now: list[int] = []
    for node in nodes:
        inputs = tuple(now[i] for i in node.inputs)
        if len(inputs) == 1 and uses[node.inputs[0]] == 1 and inputs[0] == len(kept) - 1:
            joined = _joined(kept[-1], node)
            if joined is not None:
                kept[-1] = joined
                now.append(len(kept) - 1)
                continue
        now.append(len(kept))
        kept.append(Node(node.make, inputs, node.shape))
    return kept


def _joined(before: Node, scale: Node) -> Node | None:
    """Return an affine operation and the scale after it as one node, if that is possible."""
    first, second = before.make(), scale.make()
    if not isinstance(second, Scale) or isinstance(first, Input | Relu | Sum):
        return None
    if first.scaled(second) is None:
        return None

    def make() -> Affine:
        affine, following = before.make(), scale.make()
        assert isinstance(following, Scale) and not isinstance(affine, Input | Relu | Sum)
        scaled = affine.scaled(following)
        assert scaled is not None
        return scaled

    return Node(make, before.inputs, scale.shape)


_TORCH = ("torch", "torch._C._nn", "torch.nn.functional", "_operator", "torch._C", None)
_SUMS = {
    "add": (1.0, 1.0), "add_": (1.0, 1.0), "iadd": (1.0, 1.0),
    "sub": (1.0, -1.0), "sub_": (1.0, -1.0), "isub": (1.0, -1.0),
}  # fmt: skip
"""The signs of the two terms."""
_PRODUCTS = {
    "mul": False, "mul_": False, "imul": False,
    "div": True, "div_": True, "truediv": True, "itruediv": True, "true_divide": True,
}  # fmt: skip
"""True if it is a division."""


def _bound(node: fx.Node, name: str) -> dict[str, Any]:
    """Return a call's arguments by name."""
    names = {
        "avg_pool2d": ("input", "kernel_size", "stride", "padding", "ceil_mode",
                       "count_include_pad", "divisor_override"),
        "adaptive_avg_pool2d": ("input", "output_size"),
        "mean": ("input", "dim", "keepdim"),
    }[name]  # fmt: skip
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _pair(value: Any) -> tuple[int, int]:
    """(height, width), from one number for both or a pair."""
    if isinstance(value, int):
        return value, value
    return (value[0], value[0]) if len(value) == 1 else (value[0], value[1])


def _where(node: fx.Node) -> str:
    """Return the module in whose forward pass an operation stands, to be part of a sentence."""
    stack = node.meta.get("nn_module_stack")
    if not stack:
        return ""
    name, kind = list(stack.values())[-1]
    kind = getattr(kind, "__name__", str(kind))
    return f" in {name} ({kind})" if name else f" in {kind}"
