"""The frozen network that is attacked between two updates, and a network's passes in bf16."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from btrain.attacks.pgd import evaluation_mode
from btrain.models.preact_resnet import PreActBlock
from btrain.models.wide_resnet import WideBlock
from btrain.precision import full

_BLOCKS = (PreActBlock, WideBlock)
_FEW = 16
_SHORT = (nn.Conv2d, nn.Linear)  # computed in bf16; BatchNorm's weights stay float32


class Shadowed(nn.Module):
    """A network beside which another one is attacked: in eval mode and frozen.

    It shares the network's weights and its mode at the start. Here the other one does so, too: an
    update of the weights is one of both. Frozen, because the compiler would otherwise compute
    gradients of the weights in the attack, and because a CUDA graph must not know of them.
    """

    def __init__(self, network: nn.Module, *, compiled: bool = False) -> None:
        """Wrap a network; `compiled` is of the shadow's passes with a gradient at the images."""
        super().__init__()
        self.network = network
        self.training = network.training
        shadow = self._make_shadow(bare(network))
        if compiled:
            shadow.attacked = _Compiled(shadow.attacked)
        object.__setattr__(self, "_shadow", shadow)  # no submodule: it has no mode, no parameters
        self._stale = True

    def _make_shadow(self, network: nn.Module) -> _Frozen:
        return _Frozen(_twin(network))

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.network(images)
        return logits

    @property
    def shadow(self) -> _Frozen:
        """Return the network for passes in eval mode without gradients of the weights.

        Its weights are those of when it was first asked for after a `refresh`.
        """
        shadow: _Frozen = vars(self)["_shadow"]
        if self._stale:
            shadow.refresh()
            self._stale = False
        return shadow

    def refresh(self) -> Shadowed:
        """Bring the shadow up to the weights and statistics of when it is next asked for."""
        self._stale = True
        return self


class InBFloat16(Shadowed):
    """A network whose passes run in bf16 and whose logits are float32 again.

    Its weights stay float32; the shadow is a copy. Losses and scores are computed from the logits
    outside of autocast.
    """

    def _make_shadow(self, network: nn.Module) -> _Frozen:
        return _Shadow(network)

    def forward(self, images: Tensor) -> Tensor:
        return _short_pass(self.network, images)


def _twin(network: nn.Module, of_its_own: tuple[type[nn.Module], ...] = ()) -> nn.Module:
    """Return the same weights and statistics in another network, frozen and in eval mode.

    Modules of the types `of_its_own` have copies of their weights.
    """
    shared = [module for module in network.modules() if not isinstance(module, of_its_own)]
    memo: dict[int, Tensor] = {
        id(p): nn.Parameter(p.detach(), requires_grad=False)
        for module in shared
        for p in module.parameters(recurse=False)
    }
    memo |= {id(b): b for module in shared for b in module.buffers(recurse=False)}
    return copy.deepcopy(network, memo).eval().requires_grad_(False)


class _Frozen(nn.Module):
    """A frozen network in eval mode.

    Attributes:
        network: itself.
        attacked: what its passes go through, itself or compiled.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.attacked = network

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.attacked(images)
        return logits

    def refresh(self) -> None:
        """Do nothing: the weights are the network's own."""


class _Compiled(nn.Module):
    """A frozen network whose attack steps are compiled, once for all sizes of a batch.

    Other passes are made as they are, and so are those of a few images, for which torch chooses
    other convolutions and the compiler would start over: they would not repay its half minute.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self._compiled = torch.compile(network, dynamic=True)

    def forward(self, images: Tensor) -> Tensor:
        compiled = images.requires_grad and torch.is_grad_enabled() and len(images) >= _FEW
        if compiled:
            # A clone, for the compiler tells a view of the whole batch from one of a part; marked,
            # for it would take a group as large as the images are high for one that always is.
            images = images.clone()
            torch._dynamo.maybe_mark_dynamic(images, 0)
        logits: Tensor = (self._compiled if compiled else self.network)(images)
        return logits


def _short_pass(network: nn.Module, images: Tensor, *, frozen: bool = False) -> Tensor:
    """Return the float32 logits of a pass in bf16.

    A frozen network has no weights to cast, and a CUDA graph must not find others' casts.
    """
    with torch.autocast(images.device.type, torch.bfloat16, cache_enabled=not frozen):
        logits: Tensor = network(images)
    return full(logits)


class _Shadow(_Frozen):
    """The network in eval mode with weights in bf16, which autocast need not cast in every pass.

    In a pre-activated block the first convolution feeds a BatchNorm and nothing else, so in eval
    mode that is part of the convolution, exactly.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__(_twin(network, of_its_own=_SHORT))
        self._folds: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
        self._targets: list[Tensor] = []  # in bf16; first those that a BatchNorm is folded into
        for ours, theirs in zip(network.modules(), self.network.modules(), strict=True):
            if isinstance(ours, _BLOCKS) and isinstance(theirs, _BLOCKS):
                self._folds.append((ours.conv1, ours.bn2))
                self._targets += _fold(theirs)
        folded = set(map(id, self._targets))
        self._sources: list[Tensor] = []
        for name, module in self.network.named_modules():
            if isinstance(module, _SHORT):
                module.bfloat16()
                for key, copied in module.named_parameters():
                    if id(copied) not in folded:
                        self._sources.append(network.get_parameter(f"{name}.{key}").detach())
                        self._targets.append(copied)

    def forward(self, images: Tensor) -> Tensor:
        return _short_pass(self.attacked, images, frozen=True)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copy the weights of convolutions and linear layers; all else is shared."""
        torch._foreach_copy_(self._targets, [*self._folded(), *self._sources])

    def _folded(self) -> list[Tensor]:
        """Return each fold's weight and bias, many in one kernel on a GPU."""
        if not self._folds:
            return []
        convolutions, norms = zip(*self._folds, strict=True)
        variances = torch._foreach_add([n.running_var for n in norms], [n.eps for n in norms])
        roots = [torch.rsqrt(variance) for variance in variances]
        scales = torch._foreach_mul([n.weight for n in norms], roots)
        by_filter = [scale.view(-1, 1, 1, 1) for scale in scales]
        weights = torch._foreach_mul([c.weight for c in convolutions], by_filter)
        shifts = torch._foreach_mul([n.running_mean for n in norms], scales)
        biases = torch._foreach_sub([n.bias for n in norms], shifts)
        return [part for fold in zip(weights, biases, strict=True) for part in fold]


def _fold(block: PreActBlock | WideBlock) -> list[Tensor]:
    """Leave out a block's second BatchNorm; return the convolution's weight and new bias."""
    bias = nn.Parameter(torch.zeros_like(block.bn2.bias), requires_grad=False)
    block.conv1.bias = bias
    block.bn2 = nn.Identity().eval()  # type: ignore[assignment]
    return [block.conv1.weight, bias]


@contextmanager
def attacked(model: nn.Module) -> Iterator[nn.Module]:
    """Return the network in eval mode, to be attacked: itself, or its shadow where it has one."""
    if isinstance(model, Shadowed):
        yield model.shadow
        return
    with evaluation_mode(network := bare(model)):
        yield network


def bare(network: nn.Module) -> nn.Module:
    """Return the network without what averages its weights' gradients over several processes."""
    return network.module if isinstance(network, DistributedDataParallel) else network


def in_float32(network: nn.Module) -> nn.Module:
    """Return the bare network, without what makes its passes in bf16 or attacks another one."""
    return bare(network.network if isinstance(network, Shadowed) else network)
