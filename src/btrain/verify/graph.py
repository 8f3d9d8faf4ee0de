"""A network as the operations that bounds pass through, read from its own forward pass.

`trace` follows the network with `torch.fx`, whatever modules it is nested in. The weights are not
copied: each use of a graph reads those the network has then.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules import module as hooks_of_all
from torch.nn.utils import parametrize

from btrain import precision
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
_TRIED = 3
"""The number of images that a network is tried on: one like data, others far outside [0, 1]."""
_FAR = 8.0
_CLOSE = {torch.float64: 1e-9, torch.float32: 1e-4}
"""The distance allowed between a graph's logits and the network's, over 1 + the largest logit; 1e-2
for other types."""
_SAME = 1e-6
"""The distance allowed between a network's logits of the same images, over 1 + the largest."""


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
    """The memory that bounds need, as `bounds.size` has found it before."""

    @property
    def shape(self) -> Shape:
        """Return the shape of an image."""
        return self.nodes[0].shape

    @property
    def classes(self) -> int:
        """Return the number of classes, K."""
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
                    f"Bounds need the layer {name} ({type(module).__name__}) in evaluation mode, "
                    "for in training mode its outcome depends on the other images of the batch, "
                    "on chance or on how often it was called."
                )
        return [Operation(node.make(), node.inputs, node.shape) for node in self.nodes]


def trace(network: nn.Module, shape: Shape) -> Graph:
    """Return the graph of a network, as it is evaluated, for images of a shape, (C, H, W) or (N,).

    Computed once more by the graph and compared, so that nothing misread is ever bounded. The
    network's mode, statistics and attributes stay as they are.

    Raises:
        UserError: an operation cannot be bounded, or the forward pass branches on the images or
            uses chance.
    """
    if isinstance(network, _LEAVES) or _hooked(network) or "forward" in vars(network):
        network = nn.Sequential(network)  # torch.fx calls the root's class, without hooks
    for name, module in network.named_modules():
        if isinstance(module, torch.jit.ScriptModule):
            named = f"{name} is" if name else "it is"
            raise _unfollowed(f"{named} compiled by torch.jit")
    parameter = next(network.parameters(), torch.empty(0))
    with evaluating(network), torch.no_grad(), precision.exactly_float32(parameter.device):
        images = _images(shape).to(parameter)
        with _restored(network):
            logits = _logits(network, images, shape)
            traced = _followed(network)
            outcomes = _outcomes(traced, images)
        with _restored(network):
            reader = _Reader(network, traced, outcomes)
            for node in traced.graph.nodes:
                reader.read(node)
            graph = reader.graph()
            _compare(forward(graph.operations(), images), logits)
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


@contextmanager
def _restored(network: nn.Module) -> Iterator[None]:
    """Undo all that is set on a network meanwhile: attributes, modules and buffers' values."""
    dicts = [vars(module) for module in network.modules()]
    dicts += [d[name] for d in dicts for name in ("_parameters", "_buffers", "_modules")]
    before = [dict(d) for d in dicts]
    buffers = [(buffer, buffer.clone()) for buffer in network.buffers()]
    try:
        yield
    finally:
        for now, then in zip(dicts, before, strict=True):
            now.clear()
            now.update(then)
        for buffer, values in buffers:
            if not torch.equal(buffer, values):
                buffer.copy_(values)


def _hooked(module: nn.Module) -> bool:
    """Return whether a forward pass runs more than the module's forward method."""
    own = module._forward_hooks or module._forward_pre_hooks
    return bool(own or hooks_of_all._global_forward_hooks or hooks_of_all._global_forward_pre_hooks)


def _is_known(module: nn.Module) -> bool:
    """Return whether a module computes what a layer that bounds pass through computes.

    A class made of such a layer with a forward method of its own does not; one with other weights
    does, as torch's parametrizations make them.
    """
    kind = next((kind for kind in _LEAVES if isinstance(module, kind)), None)
    if kind is None or "forward" in vars(module) or _hooked(module):
        return False
    names = ("forward", "_conv_forward") if kind is nn.Conv2d else ("forward",)
    return all(getattr(type(module), name) is getattr(kind, name) for name in names)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        if isinstance(m, _LEAVES):
            return _is_known(m)
        return super().is_leaf_module(m, module_qualified_name)

    def call_module(
        self, m: nn.Module, forward: Callable[..., Any], args: Any, kwargs: dict[str, Any]
    ) -> Any:
        try:
            return super().call_module(m, forward, args, kwargs)
        except Exception as error:
            if not isinstance(m, _LEAVES):
                raise
            name = f"the layer {self.path_of_module(m)} ({type(m).__name__})"
            raise _unbounded(name, ", which computes more than its kind of layer") from error


def _followed(network: nn.Module) -> fx.GraphModule:
    """Return the network's forward pass as `torch.fx` reads it.

    Raises:
        UserError: it cannot.
    """
    try:
        return fx.GraphModule(network, _Tracer().trace(network))
    except UserError:
        raise
    except fx.proxy.TraceError as error:
        raise UserError(
            f"Bounds need a network whose forward pass takes the same way for all images: "
            f"{first_line(error)}."
        ) from error
    except Exception as error:  # a forward pass is anybody's code
        raise _unfollowed(first_line(error)) from error


def _unfollowed(why: str) -> UserError:
    return UserError(f"The network's forward pass cannot be followed (torch.fx): {why}.")


def _images(shape: Shape) -> Tensor:
    """Return images to try a network on, (3, C, H, W) or (3, N)."""
    generator = torch.Generator().manual_seed(0)
    near = torch.rand((1, *shape), generator=generator)
    far = _FAR * torch.randn((_TRIED - 1, *shape), generator=generator)
    return torch.cat([near, far])


def _logits(network: nn.Module, images: Tensor, shape: Shape) -> Any:
    """Return what a network gives for images.

    Raises:
        UserError: it fails, gives other logits when asked again, or some that are not finite.
    """
    try:
        first, second = network(images.clone()), network(images.clone())
    except Exception as error:
        raise UserError(
            f"The network does not take images of {'×'.join(map(str, shape))}: {first_line(error)}."
        ) from error
    if isinstance(first, Tensor):
        if not first.isfinite().all():
            raise UserError("The network's logits are not finite.")
        if first.shape != second.shape or not _near(first, second, _SAME):
            raise UserError(
                "The network gives the same images other logits each time; bounds need one that "
                "uses no chance."
            )
    return first


def _outcomes(traced: fx.GraphModule, images: Tensor) -> dict[fx.Node, Any]:
    """Return each node's outcome.

    Raises:
        UserError: the forward pass, as it was read, fails.
    """
    outcomes: dict[fx.Node, Any] = {}

    class Record(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            outcomes[n] = outcome = super().run_node(n)
            return outcome

    try:
        Record(traced).run(images.clone())
    except Exception as error:
        raise _unfollowed(first_line(error)) from error
    return outcomes


def _compare(ours: Tensor, theirs: Tensor) -> None:
    """Compare a graph's logits with the network's, both (m, K).

    Raises:
        UserError: they differ, as with a layer that writes on values which are used again.
    """
    if theirs.shape != ours.shape or not _near(ours, theirs, _CLOSE.get(theirs.dtype, 1e-2)):
        raise UserError(
            "The network's operations, one by one, do not give what the network gives: a layer "
            "may write on values that are used again, or do more than its kind of layer does."
        )


def _near(ours: Tensor, theirs: Tensor, share: float) -> bool:
    """Return whether each image's logits differ by a share of 1 + its largest at most."""
    ours, theirs = (t.reshape(t.shape[0] if t.dim() else 1, -1) for t in (ours, theirs))
    allowed = share * (1 + theirs.abs().amax(dim=1, keepdim=True))
    return bool(((ours - theirs).abs() <= allowed).all())


def _unbounded(name: str, why: str) -> UserError:
    return UserError(f"No bound can be computed through {name}{why}; bounds pass through {KNOWN}.")


def on_meta(operation: Operation) -> Operation:
    """Return the same operation with weights that have sizes alone."""
    what: Any = operation.what
    weights = {f.name: getattr(what, f.name) for f in fields(what)}
    moved = {name: w.to("meta") for name, w in weights.items() if isinstance(w, Tensor)}
    return replace(operation, what=replace(what, **moved))


def forward(operations: Sequence[Operation], x: Tensor) -> Tensor:
    """Return the logits of images, by the operations, (m, C, H, W) or (m, N) -> (m, K)."""
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
    """Return the sum of one or more tensors of one shape."""
    total = values[0]
    for value in values[1:]:
        total = total + value
    return total


@dataclass
class _Reader:
    """Reads a traced network node by node."""

    network: nn.Module
    traced: fx.GraphModule
    outcomes: dict[fx.Node, Any]
    """The outcome of each node for `_TRIED` images."""
    nodes: list[Node] = field(default_factory=list)
    place: dict[fx.Node, int] = field(default_factory=dict)
    """The index in `nodes` of each node's values."""
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
        if outcome.dim() not in (2, 4) or outcome.shape[0] != _TRIED:
            raise self._refused(node)
        self.place[node] = len(self.nodes)
        self.nodes.append(Node(make, inputs, tuple(outcome.shape[1:])))

    def _refused(self, node: fx.Node, why: str = "") -> UserError:
        if node.op == "call_module":
            kind = type(self.network.get_submodule(str(node.target))).__name__
            name = f"the layer {node.target} ({kind})"
        else:
            called = getattr(node.target, "__name__", node.target)
            name = f"the operation {called}" + _where(node)
        return _unbounded(name, why)

    def _operation(self, node: fx.Node) -> None:
        if node.op == "call_module":
            self._module(node, self.network.get_submodule(str(node.target)))
            return
        name = _name(node)
        if node.op == "call_function" and getattr(node.target, "__module__", "") not in _TORCH:
            raise self._refused(node)
        given = self._given(node, name)
        writes = name in _IN_PLACE or bool(given.get("inplace"))
        on = given["input"]
        before = self.place.get(on) if isinstance(on, fx.Node) else None
        if name in ("relu", "relu_"):
            self._put(node, Relu, (self._at(node),))
        elif name in _SUMS:
            self._sum(node, given, *_SUMS[name])
        elif name in _PRODUCTS:
            self._product(node, given, inverse=_PRODUCTS[name])
        elif name == "neg":
            self._scale(node, self._at(node), factor=-1.0)
        elif name in _RESHAPES:
            self._reshape(node)
        elif name == "mean":
            self._mean(node, given)
        elif name in ("avg_pool2d", "adaptive_avg_pool2d"):
            self._pool(node, self._numbers(node, given))
        elif name == "linear":
            self._linear(node, *self._weights(node, given))
        elif name == "conv2d":
            given = self._numbers(node, given)
            options = (given.get(name, at) for name, at in _STEPS.items())
            self._convolution(node, *self._weights(node, given), *options)
        elif name in ("dropout", "dropout2d"):
            if given.get("training", True) is not False:
                raise self._refused(node, ", which uses chance")
            self.place[node] = self._at(node)
        else:
            raise self._refused(node)
        if writes and before is not None and self.place[node] != before:
            self._written(node, on, before)

    def _given(self, node: fx.Node, name: str = "") -> dict[str, Any]:
        """Return a call's arguments by name, the first one always as `input`.

        Raises:
            UserError: there are others that would change its meaning, like `alpha` of a sum.
        """
        names = _ARGUMENTS.get(name, ("input",))
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        unread = len(node.args) > len(names) or set(given) - set(names)
        if "input" not in given or (name in _ARGUMENTS and unread):
            raise self._refused(node)
        return given

    def _at(self, node: fx.Node) -> int:
        value = self._given(node, "" if node.op == "call_module" else _name(node))["input"]
        if not isinstance(value, fx.Node) or value not in self.place:
            raise self._refused(node)
        return self.place[value]

    def _written(self, node: fx.Node, on: fx.Node, before: int) -> None:
        """Let all names of values that a node has written on mean what it wrote.

        Raises:
            UserError: other values share their memory and are used again.
        """
        memory = self.outcomes[on].untyped_storage().data_ptr()
        order = {n: i for i, n in enumerate(self.traced.graph.nodes)}
        for other in list(self.place):
            if other is node or self.outcomes[other].untyped_storage().data_ptr() != memory:
                continue
            if self.place[other] == before:
                self.place[other] = self.place[node]
            elif any(
                order[user] > order[node] and isinstance(self.outcomes[user], Tensor)
                for user in other.users
            ):
                raise self._refused(node, ", which may write on values that are used again")

    def _module(self, node: fx.Node, module: nn.Module) -> None:
        at = self._at(node)
        shape = self.nodes[at].shape
        if parametrize.is_parametrized(module):  # some are other weights in training mode
            self.evaluated.append((str(node.target), module))
        match module:
            case nn.Conv2d():
                if module.padding_mode != "zeros" and module.padding not in ((0, 0), "valid"):
                    raise self._refused(node, f", which pads with {module.padding_mode}")
                self._convolution(
                    node, lambda: module.weight, lambda: module.bias, module.stride,
                    module.padding, module.dilation, module.groups,
                )  # fmt: skip
            case nn.Linear():
                self._linear(node, lambda: module.weight, lambda: module.bias)
            case nn.ReLU():
                self._put(node, Relu, (at,))
                if module.inplace:
                    self._written(node, self._given(node)["input"], at)
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

    def _weights(
        self, node: fx.Node, given: dict[str, Any]
    ) -> tuple[Callable[[], Any], Callable[[], Any]]:
        """Return what computes the weight and the bias of a layer called as a function."""
        weight, bias = (self._constant(node, given.get(name)) for name in ("weight", "bias"))
        if weight is None or bias is None:
            raise self._refused(node, ", of weights that depend on the image")
        return weight, bias

    def _numbers(self, of: fx.Node, given: dict[str, Any]) -> dict[str, Any]:
        """Return arguments with the numbers that were computed from an image's size as numbers.

        Raises:
            UserError: one is computed from something else.
        """

        def number(node: fx.Node) -> Any:
            outcome = self.outcomes[node]
            return node if isinstance(outcome, Tensor) else self._number(of, node)

        return {name: fx.node.map_arg(value, number) for name, value in given.items()}

    def _number(self, of: fx.Node, node: fx.Node) -> Any:
        """Return a number that depends on the sizes of an image alone, not on that of the batch.

        Raises:
            UserError: it depends on something else.
        """

        def of_sizes(node: fx.Node) -> bool:
            name, args = _name(node), list[Any](node.args)
            if name == "size" and len(args) == 2:
                return bool(args[1] % self.outcomes[args[0]].dim())
            if name == "getitem":
                sizes, index = self.outcomes[args[0]], args[1]
                whole = _name(args[0]) in ("size", "getattr")  # not turned round, or a part of it
                known = whole and isinstance(sizes, torch.Size) and isinstance(index, int)
                return known and index % len(sizes) != 0
            return name in _ARITHMETIC and all(map(of_sizes, node.all_input_nodes))

        if not of_sizes(node):
            raise self._refused(of, ", of a number that depends on more than an image's size")
        return self.outcomes[node]

    def _linear(
        self, node: fx.Node, weight: Callable[[], Any], bias: Callable[[], Any]
    ) -> None:  # fmt: skip
        at = self._at(node)
        if len(self.nodes[at].shape) != 1:
            raise self._refused(node)
        self._put(node, lambda: Linear(weight(), bias()), (at,))

    def _convolution(
        self, node: fx.Node, weight: Callable[[], Any], bias: Callable[[], Any],
        stride: Any, padding: Any, dilation: Any, groups: Any,
    ) -> None:  # fmt: skip
        at = self._at(node)
        shape = self.nodes[at].shape
        if len(shape) != 3:
            raise self._refused(node)
        steps, apart = _pair(stride), _pair(dilation)
        if isinstance(padding, str):
            total = [d * (k - 1) for d, k in zip(apart, weight().shape[2:], strict=True)]
            if padding == "same" and any(n % 2 for n in total):
                raise self._refused(node, ", which pads one side more than the other")
            padding = tuple(n // 2 for n in total) if padding == "same" else (0, 0)
        pad = _pair(padding)

        def make() -> Convolution:
            return Convolution(weight(), bias(), steps, pad, apart, groups, shape)

        self._put(node, make, (at,))

    def _pool(self, node: fx.Node, options: dict[str, Any]) -> None:
        """Put average pooling as a convolution of each channel by itself."""
        at = self._at(node)
        shape = self.nodes[at].shape
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
        self._average(node, kernel, stride, padding, at)

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

    def _mean(self, node: fx.Node, given: dict[str, Any]) -> None:
        """Put the mean over a map, with or without its two dimensions left at 1."""
        at = self._at(node)
        shape, out = self.nodes[at].shape, self.outcomes[node].shape
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
        if outcome.shape[0] != _TRIED or math.prod(out) != math.prod(shape):
            raise self._refused(node)
        if out == shape:
            self.place[node] = at
        else:
            self._put(node, lambda: Reshape(shape, out), (at,))

    def _sum(self, node: fx.Node, given: dict[str, Any], first: float, second: float) -> None:
        """Put first·a + second·b, where one of the two may be a constant."""
        signs = (first, second)
        values = [self._value(node, given, name) for name in ("input", "other")]
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
        at, constant = values[i], values[1 - i]
        assert isinstance(at, int) and callable(constant)
        sign = signs[1 - i]
        self._scale(
            node, at, factor=None if signs[i] == 1 else signs[i], shift=lambda: constant() * sign
        )

    def _product(self, node: fx.Node, given: dict[str, Any], *, inverse: bool) -> None:
        """Put a·b, or a/b, where one of the two is a constant."""
        values = [self._value(node, given, name) for name in ("input", "other")]
        i = 0 if isinstance(values[0], int) else 1
        at, constant = values[i], values[1 - i]
        if not callable(constant):
            raise self._refused(node, ", of two values that depend on the image")
        if inverse and i == 1:
            raise self._refused(node, ", a division by what depends on the image")
        assert isinstance(at, int)
        self._scale(node, at, factor=(lambda: 1 / constant()) if inverse else constant)

    def _value(
        self, node: fx.Node, given: dict[str, Any], name: str
    ) -> int | Callable[[], Any]:  # fmt: skip
        """Return an argument's place, or what computes it if it does not depend on the images."""
        value = given.get(name)
        if isinstance(value, fx.Node) and value in self.place:
            return self.place[value]
        constant = self._constant(node, value)
        if value is None:
            raise self._refused(node)
        if constant is None:
            if isinstance(self.outcomes[value], Tensor):
                raise self._refused(node)
            number = self._number(node, value)
            return lambda: number
        return constant

    def _constant(self, of: fx.Node, value: Any) -> Callable[[], Any] | None:
        """Return what computes a value from the weights alone; None if it needs the images.

        Raises:
            UserError: it uses chance.
        """
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
        network = self.network
        made = {  # in the forward pass, as torch.tensor(…) is
            str(n.target): operator.attrgetter(str(n.target))(self.traced)
            for n in nodes
            if n.op == "get_attr" and not _has(network, str(n.target))
        }

        def compute() -> Any:
            found: dict[fx.Node, Any] = {}
            for node in nodes:
                args, kwargs = fx.node.map_arg((node.args, node.kwargs), found.__getitem__)
                if node.op == "get_attr":
                    name = str(node.target)
                    found[node] = made[name] if name in made else operator.attrgetter(name)(network)
                elif node.op == "call_module":
                    found[node] = network.get_submodule(str(node.target))(*args, **kwargs)
                elif node.op == "call_method":
                    found[node] = getattr(args[0], str(node.target))(*args[1:], **kwargs)
                else:
                    assert callable(node.target)
                    found[node] = node.target(*args, **kwargs)
            return found[value]

        first, second = compute(), compute()
        same = torch.equal(first, second) if isinstance(first, Tensor) else first == second
        if not same:
            raise self._refused(of, ", of a constant that changes from call to call")
        return compute

    def _like(self) -> Callable[[], Tensor]:
        """Return a function that gives a tensor of the network's dtype and on its device."""
        parameter = next(self.network.parameters(), None)
        return lambda: torch.empty(0) if parameter is None else parameter

    def _scale(self, node: fx.Node, at: int, *, factor: Any = None, shift: Any = None) -> None:
        shape = self.nodes[at].shape
        if tuple(self.outcomes[node].shape[1:]) != shape:
            raise self._refused(node)
        for given in (factor, shift):
            size = getattr(given() if callable(given) else given, "shape", ())
            if any(n != 1 for n in size[: max(0, len(size) - len(shape))]):
                raise self._refused(node, ", of a constant that differs from image to image")
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
            size = tuple(value.shape)[-len(shape) :] if value.dim() > len(shape) else value.shape
            return value.reshape((1,) * (len(shape) - len(size)) + tuple(size))

        return lambda: Scale(fitted(factor), fitted(shift), shape)


def _has(network: nn.Module, name: str) -> bool:
    """Return whether a network has an attribute of a dotted name."""
    try:
        operator.attrgetter(name)(network)
    except AttributeError:
        return False
    return True


def _name(node: fx.Node) -> str:
    """Return the name of the function or method that a node calls."""
    target = node.target
    return target if isinstance(target, str) else str(getattr(target, "__name__", target))


def _normalisation(module: nn.BatchNorm1d | nn.BatchNorm2d, shape: Shape) -> Scale:
    """Return batch normalisation by its running statistics."""
    assert module.running_mean is not None and module.running_var is not None
    factor = torch.rsqrt(module.running_var + module.eps)
    if module.weight is not None:
        factor = factor * module.weight
    shift = -module.running_mean * factor
    terms = shift.detach().abs()
    if module.bias is not None:
        shift = shift + module.bias
        terms = terms + module.bias.detach().abs()
    size = (-1, *(1 for _ in shape[1:]))
    return Scale(factor.reshape(size), shift.reshape(size), shape, terms.reshape(size))


def _fused(nodes: Sequence[Node]) -> list[Node]:
    """Return nodes with scales joined to what they alone follow: batch normalisation costs nothing
    then.
    """
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


_STEPS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
"""A convolution's options and what they are unless given."""
_ARITHMETIC = ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg")
"""The operations on numbers that make others of them."""
_IN_PLACE = ("relu_", "add_", "iadd", "sub_", "isub", "mul_", "imul", "div_", "itruediv")
_RESHAPES = ("flatten", "view", "reshape", "contiguous", "squeeze", "unsqueeze")
_ARGUMENTS = {
    **dict.fromkeys((*_SUMS, *_PRODUCTS), ("input", "other")),
    "relu": ("input", "inplace"),
    "relu_": ("input",),
    "neg": ("input",),
    "mean": ("input", "dim", "keepdim", "dtype"),
    "avg_pool2d": ("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad",
                   "divisor_override"),
    "adaptive_avg_pool2d": ("input", "output_size"),
    "linear": ("input", "weight", "bias"),
    "conv2d": ("input", "weight", "bias", "stride", "padding", "dilation", "groups"),
    "dropout": ("input", "p", "training", "inplace"),
    "dropout2d": ("input", "p", "training", "inplace"),
}  # fmt: skip
"""The arguments of functions and methods in their order, where others change what they mean."""


def _pair(value: Any) -> tuple[int, int]:
    """Return (height, width), from one number for both or a pair."""
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
