"""A network's passes in bf16, and the frozen copy of it that is attacked between two updates."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from btrain.attacks import evaluation_mode
from btrain.models.preact_resnet import PreActBlock
from btrain.models.wide_resnet import WideBlock
from btrain.precision import full

_BLOCKS = (PreActBlock, WideBlock)
_SHORT = (nn.Conv2d, nn.Linear)  # computed in bf16; BatchNorm's weights stay float32


class InBFloat16(nn.Module):
    """A network whose passes run in bf16 and whose logits are float32 again.

    It shares the network's weights, which stay float32, and its mode at the start. What is done
    with the logits (losses, SVar) is outside of autocast.

    Attributes:
        shadow: for passes in eval mode without gradients of the weights, after `refresh`.
    """

    shadow: nn.Module

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network
        self.training = network.training
        shadow = _Shadow(bare(network))
        object.__setattr__(self, "shadow", shadow)  # no submodule: it has no mode, no parameters

    def forward(self, images: Tensor) -> Tensor:
        return _short_pass(self.network, images)

    def refresh(self) -> InBFloat16:
        """Brings the shadow up to the weights and statistics of now."""
        self.shadow.refresh()  # type: ignore[operator]
        return self


def _short_pass(network: nn.Module, images: Tensor) -> Tensor:
    with torch.autocast(images.device.type, torch.bfloat16):
        logits: Tensor = network(images)
    return full(logits)


class _Shadow(nn.Module):
    """The network in eval mode with weights in bf16, which autocast need not cast in every pass.

    In a pre-activated block the first convolution feeds a BatchNorm and nothing else, so in eval
    mode that is part of the convolution, exactly.
    """

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = copy.deepcopy(network).eval().requires_grad_(False)
        self._folds: list[tuple[nn.Conv2d, nn.BatchNorm2d]] = []
        self._folded: list[Tensor] = []
        for ours, theirs in zip(network.modules(), self.network.modules(), strict=True):
            if isinstance(ours, _BLOCKS) and isinstance(theirs, _BLOCKS):
                self._folds.append((ours.conv1, ours.bn2))
                self._folded += _fold(theirs)
        for module in self.network.modules():
            if isinstance(module, _SHORT):
                module.bfloat16()
        originals = {**dict(network.named_parameters()), **dict(network.named_buffers())}
        copies = {**dict(self.network.named_parameters()), **dict(self.network.named_buffers())}
        folded = set(map(id, self._folded))
        kept = [name for name, tensor in copies.items() if id(tensor) not in folded]
        self._sources = [originals[name].detach() for name in kept]
        self._targets = [copies[name] for name in kept]
        self.refresh()

    def forward(self, images: Tensor) -> Tensor:
        return _short_pass(self.network, images)

    @torch.no_grad()
    def refresh(self) -> None:
        """Copies all weights and statistics, a BatchNorm's into its convolution."""
        sources = [*self._sources]
        for convolution, norm in self._folds:
            assert norm.running_mean is not None
            assert norm.running_var is not None
            scale = norm.weight * torch.rsqrt(norm.running_var + norm.eps)
            sources.append(convolution.weight * scale.view(-1, 1, 1, 1))
            sources.append(norm.bias - norm.running_mean * scale)
        torch._foreach_copy_([*self._targets, *self._folded], sources)


def _fold(block: PreActBlock | WideBlock) -> list[Tensor]:
    """Leaves out a block's second BatchNorm; the weight and the new bias of the convolution."""
    bias = nn.Parameter(torch.zeros_like(block.bn2.bias), requires_grad=False)
    block.conv1.bias = bias
    block.bn2 = nn.Identity().eval()  # type: ignore[assignment]
    return [block.conv1.weight, bias]


@contextmanager
def attacked(model: nn.Module) -> Iterator[nn.Module]:
    """The network in eval mode, to be attacked: itself, or in bf16 its shadow."""
    if isinstance(model, InBFloat16):
        yield model.shadow
        return
    with evaluation_mode(network := bare(model)):
        yield network


def bare(network: nn.Module) -> nn.Module:
    """The network without what averages the gradients of its weights over several processes."""
    return network.module if isinstance(network, DistributedDataParallel) else network
