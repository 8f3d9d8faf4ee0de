"""The channels inside a network that can be taken out, and networks without some of them.

A channel is inner where one layer makes it and one reads it: those between the two convolutions of
a residual block, those of a row of layers. Without it the two layers' weights are smaller, and so
are a norm's between them; the network's other tensors stay as they are.
"""

from __future__ import annotations

import copy
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

_MAKERS = (nn.Conv2d, nn.Linear)
_NORMS = (nn.BatchNorm1d, nn.BatchNorm2d)
_BETWEEN = (nn.ReLU, nn.LeakyReLU, nn.SiLU, nn.GELU, nn.Flatten, nn.Identity, nn.Dropout,
            nn.MaxPool2d, nn.AvgPool2d)  # fmt: skip
"""Layers that leave channels to themselves."""

Kept = Mapping[str, Tensor]
"""The channels that are there, by the name of the layer that makes them: ascending, (n,) int64."""


class Inner(NamedTuple):
    """A layer's channels, by the names of modules.

    Attributes:
        maker: the convolution or linear layer whose outputs they are.
        norm: the norm between the two, if there is one.
        reader: the only layer that reads them.
    """

    maker: str
    norm: str | None
    reader: str


class Axis(NamedTuple):
    """A dimension of a tensor along which a layer's channels lie.

    Attributes:
        entries: how many entries a channel has there: more than one behind a flattening.
    """

    dim: int
    maker: str
    entries: int


def inner_channels(model: nn.Module, exclude: Sequence[str] = ()) -> list[Inner]:
    """Return the channels that can be taken out of a network.

    A module tells of its own by `inner_channels`, names (maker, norm or None, reader) of modules in
    it; in a `nn.Sequential` they are found.

    Args:
        exclude: makers whose channels stay, by patterns.
    """
    found: dict[str, Inner] = {}
    for name, module in model.named_modules():
        prefix = f"{name}." if name else ""
        told: Sequence[Inner] = getattr(module, "inner_channels", ())
        rows = _in_a_row(module) if isinstance(module, nn.Sequential) else told
        for maker, norm, reader in rows:
            inner = Inner(prefix + maker, None if norm is None else prefix + norm, prefix + reader)
            if not any(fnmatchcase(inner.maker, pattern) for pattern in exclude):
                found.setdefault(inner.maker, inner)
    return list(found.values())


def _in_a_row(layers: nn.Sequential) -> Iterator[Inner]:
    """Yield the channels between neighbouring layers of a row that make and read channels."""
    maker, norm, count = None, None, 0
    for name, layer in layers.named_children():
        if isinstance(layer, _MAKERS) and getattr(layer, "groups", 1) == 1:
            if maker is not None:
                yield Inner(maker, norm, name)
            maker, norm, count = name, None, len(layer.weight)
        elif isinstance(layer, _NORMS) and norm is None and layer.num_features == count:
            norm = name  # behind a flattening it has more, and the channels stay
        elif not isinstance(layer, _BETWEEN):
            maker, norm = None, None


@dataclass(frozen=True)
class Cut:
    """The places of channels in the tensors of a network.

    Attributes:
        inner: the channels.
        sizes: how many there are of each maker's.
        axes: of each tensor that has some of them, by its name in a state dict.
    """

    inner: Sequence[Inner]
    sizes: Mapping[str, int]
    axes: Mapping[str, Sequence[Axis]]

    @staticmethod
    def found(
        model: nn.Module, exclude: Sequence[str] = (), among: Container[str] | None = None
    ) -> Cut:
        """Return the places of all channels that can be taken out of a whole network.

        Args:
            exclude: makers whose channels stay, by patterns.
            among: the layers that both maker and reader must be of; None for any.

        Raises:
            ValueError: some module's `inner_channels` are wrong.
        """
        try:
            inner = inner_channels(model, exclude)
            if among is not None:
                inner = [one for one in inner if one.maker in among and one.reader in among]
            return Cut.of(model, inner)
        except (TypeError, LookupError) as error:
            raise ValueError(str(error)) from error

    @staticmethod
    def of(model: nn.Module, inner: Sequence[Inner]) -> Cut:
        """Return the places of some channels of a whole network.

        Raises:
            ValueError: layers that were named as maker, norm and reader do not fit.
        """
        tensors, sizes = model.state_dict(), dict[str, int]()
        axes: dict[str, list[Axis]] = {}
        for maker, norm, reader in inner:
            count = sizes[maker] = len(tensors[f"{maker}.weight"])
            read = tensors[f"{reader}.weight"].shape[1]
            if read % count:
                raise ValueError(f"{reader} does not read the channels of {maker}")
            names = [f"{maker}.weight", f"{maker}.bias"]
            if norm is not None and len(tensors[f"{norm}.running_mean"]) != count:
                raise ValueError(f"{norm} does not normalise the channels of {maker}")
            if norm is not None:
                keys = ("weight", "bias", "running_mean", "running_var")
                names += [f"{norm}.{key}" for key in keys]
            for name in names:
                if name in tensors:
                    axes.setdefault(name, []).append(Axis(0, maker, 1))
            axes.setdefault(f"{reader}.weight", []).append(Axis(1, maker, read // count))
        return Cut(inner, sizes, axes)

    def part(self, name: str, whole: Tensor, kept: Kept) -> Tensor:
        """Return what the kept channels have of a tensor, in its layout."""
        part = whole
        for axis in self.axes.get(name, ()):
            part = part.index_select(axis.dim, _entries(kept[axis.maker], axis.entries))
        if whole.dim() == 4 and whole.is_contiguous(memory_format=torch.channels_last):
            return part.contiguous(memory_format=torch.channels_last)
        return part

    def whole(self, name: str, part: Tensor, kept: Kept) -> Tensor:
        """Return a tensor of the whole network: 0 beside the kept channels, 1 for variances."""
        for axis in self.axes.get(name, ()):
            shape = list(part.shape)
            shape[axis.dim] = self.sizes[axis.maker] * axis.entries
            around = part.new_full(shape, float(name.endswith("running_var")))
            entries = _entries(kept[axis.maker], axis.entries)
            part = around.index_copy(axis.dim, entries, part)
        return part

    @torch.no_grad()
    def clear(self, model: nn.Module, kept: Kept) -> None:
        """Take all other channels' values out of a whole network."""
        for name, tensor in model.state_dict().items():
            if name in self.axes:
                tensor.copy_(self.whole(name, self.part(name, tensor, kept), kept))

    def compact(self, model: nn.Module, kept: Kept) -> nn.Module:
        """Return a network of the kept channels alone, a copy."""
        small = copy.deepcopy(model)
        for name in self.axes:
            path, _, key = name.rpartition(".")
            tensor: Tensor = getattr(small.get_submodule(path), key)
            tensor.data = self.part(name, tensor.detach(), kept)
        for maker, norm, reader in self.inner:
            count = len(kept[maker])
            _tell(small.get_submodule(maker), count, ("out_channels", "out_features"))
            _tell(small.get_submodule(reader), None, ("in_channels", "in_features"))
            if norm is not None:
                _tell(small.get_submodule(norm), count, ("num_features",))
        return small

    def read(self, model: nn.Module) -> dict[str, Tensor]:
        """Return the channels of a whole network that anything reads, of each layer one at least.

        The others' weights change none of its outputs.
        """
        tensors, kept = model.state_dict(), {}
        for maker, count in self.sizes.items():
            reader = next(inner.reader for inner in self.inner if inner.maker == maker)
            weight = tensors[f"{reader}.weight"].transpose(0, 1).reshape(count, -1)
            found = (weight != 0).any(dim=1).nonzero()[:, 0]
            kept[maker] = found if len(found) else found.new_zeros(1)
        return kept

    def like(self, model: nn.Module, weights: Mapping[str, Tensor]) -> nn.Module | None:
        """Return a network with as many channels as there are weights for; None if they do not fit.

        Args:
            model: a whole one.
            weights: by the names of its tensors.
        """
        kept = {}
        for maker, count in self.sizes.items():
            weight = weights.get(f"{maker}.weight")
            if weight is None or not weight.dim() or not 0 < len(weight) <= count:
                return None
            device = model.get_parameter(f"{maker}.weight").device
            kept[maker] = torch.arange(len(weight), device=device)
        return self.compact(model, kept)


def _entries(channels: Tensor, entries: int) -> Tensor:
    """Return the places of channels that have so many entries each."""
    if entries == 1:
        return channels
    inside = torch.arange(entries, device=channels.device)
    return (channels[:, None] * entries + inside).flatten()


def _tell(module: nn.Module, count: int | None, names: Sequence[str]) -> None:
    """Set what a layer says of its size; None: as its weight has it."""
    if count is None:
        count = module.get_parameter("weight").shape[1]
    for name in names:
        if hasattr(module, name):
            setattr(module, name, count)
