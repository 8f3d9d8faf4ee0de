"""The ways in which steps see and attack the network: plain, in bf16, compiled, by CUDA graphs."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec

import torch
from torch import Tensor, nn

from btrain.attacks.graphs import group_multiple, replayed_pgd
from btrain.attacks.pgd import prefix_pgd
from btrain.attacks.shadow import InBFloat16, Shadowed
from btrain.errors import UserError
from btrain.settings import CudaGraphs, Precision, TrainConfig


@dataclass(frozen=True)
class FastPaths:
    """The things that all steps of a run share, for they are dear: copies, compiled code, graphs.

    Attributes:
        view: the network as a step sees it, brought up to the weights of now.
        pgd: `prefix_pgd`, or what does the same faster.
        multiple: what that wants group sizes rounded up to.
    """

    view: Callable[[nn.Module], nn.Module]
    pgd: Callable[..., Tensor] = prefix_pgd
    multiple: int = 1


def make_fast_paths(train: TrainConfig, device: torch.device) -> FastPaths:
    """Make those that the configuration asks for.

    `auto` counts as `never`: a run settles it first (`with_graphs_settled`).
    """
    view = _view(train)
    if train.cuda_graphs is not CudaGraphs.always:
        return FastPaths(view)
    largest = train.batch_size + 1  # a last batch of one example joins its neighbour
    return FastPaths(view, replayed_pgd(device, largest), group_multiple(train.batch_size))


def _view(train: TrainConfig) -> Callable[[nn.Module], nn.Module]:
    short = train.precision is Precision.bf16
    if not short and not train.compile and train.cuda_graphs is not CudaGraphs.always:
        return lambda network: network

    @lru_cache(maxsize=1)
    def beside(network: nn.Module) -> Shadowed:
        return (InBFloat16 if short else Shadowed)(network, compiled=train.compile)

    return lambda network: beside(network).refresh()


def check_fast_paths(train: TrainConfig, device: torch.device) -> None:
    """Make sure that this machine can do what `train.compile` and `train.cuda_graphs` ask for.

    Raises:
        UserError: it cannot.
    """
    if train.cuda_graphs is CudaGraphs.always and device.type != "cuda":
        raise UserError(
            f"train.cuda_graphs=always needs a CUDA device; this run's is {device.type}."
        )
    if not train.compile:
        return
    compiler = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise UserError(
            f"train.compile=true needs a C++ compiler, and {compiler} is not found; install one or "
            "name one in CXX."
        )
    if device.type == "cuda" and find_spec("triton") is None:
        raise UserError("train.compile=true needs triton on a CUDA device: pip install triton.")
