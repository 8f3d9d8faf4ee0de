"""A network as a file that other projects read, written whole or not at all."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import IO, Any

import torch
from torch import nn

from btrain.controllers.sparsity.channels import same_outputs
from btrain.durable import replacing
from btrain.errors import UserError
from btrain.exchange import names
from btrain.exchange.command import FORMATS
from btrain.models.channels import Cut
from btrain.models.wide_resnet import ACTIVATIONS, WideResNet
from btrain.runs.checkpoint import FORMAT
from btrain.settings import Config
from btrain.settings.checks import require
from btrain.settings.compose import to_dict

BESIDE = (".md", ".sha256")
"""The ends of the names of a file's card and its hash, which lie beside it."""

ROBUSTBENCH_SHAPE = (3, 32, 32)
"""Of the images that RobustBench's WideResNets take: their pooling windows are fixed."""


def write(
    model: nn.Module,
    path: Path,
    *,
    format: str,
    shape: tuple[int, int, int],
    sub_block1: bool = False,
    overwrite: bool = False,
    config: Config | None = None,
    classes: int | None = None,
) -> int:
    """Write a network in a format of `command.FORMATS` and return how many parameters it has there.

    Args:
        model: one of btrain's networks, on the CPU, in eval mode.
        path: the file to write.
        format: `state_dict` and `safetensors` hold our key names, `robustbench` its; `onnx` is the
            whole network, from `images` (batch, C, H, W) in [0, 1] to `logits` (batch, K);
            `checkpoint` is one for btrain, which knows its network and data, without what training
            needs; `compact` the same without channels that nothing reads.
        shape: (C, H, W) of the images.
        sub_block1: of format robustbench, see `names.robustbench`.
        overwrite: whether a file that is there already may be replaced.
        config, classes: the run's and K, of formats checkpoint and compact.

    Raises:
        UserError: there is no such format, the network does not go into it, a package is missing,
            the file is there already or cannot be written.
    """
    require(format in FORMATS, "format", f"one of {', '.join(FORMATS)}", format)
    written = model
    if format in ("checkpoint", "compact"):
        if config is None:
            raise UserError(f"format={format} needs a run's config, which tells network and data.")
        written = compact(model, shape) if format == "compact" else model
        content = {
            "format": FORMAT,
            "state": {"model": dict(written.state_dict())},
            "config": to_dict(replace(config, run=replace(config.run, dir=None))),
            "classes": classes,
            "shape": list(shape),
            **({"compact": True} if format == "compact" else {}),
        }
        write_to: Callable[[IO[bytes]], Any] = partial(torch.save, content)
    else:
        write_to = _writer(model, format, shape, sub_block1)
    if path.is_dir() or (path.exists() and not overwrite):
        hint = "" if path.is_dir() else "; overwrite=true replaces it"
        raise UserError(f"out={path} is there already{hint}.")
    if not path.parent.is_dir():
        raise UserError(f"out={path}: there is no folder {path.parent}.")
    beside = [path.with_name(path.name + end) for end in BESIDE]
    for file_beside in beside:
        if file_beside.is_dir() or (file_beside.exists() and not overwrite):
            hint = " as a folder" if file_beside.is_dir() else "; overwrite=true removes it"
            raise UserError(f"{file_beside} is there already{hint}.")
    try:
        with replacing(path) as file:
            write_to(file)
        for file_beside in beside:  # which are of the file before
            file_beside.unlink(missing_ok=True)
    except (OSError, RuntimeError) as error:  # torch reports a full disk as a RuntimeError
        reason = str(error).strip().split("\n")[0]
        raise UserError(f"{path} could not be written ({reason}).") from error
    return sum(parameter.numel() for parameter in written.parameters())


def compact(model: nn.Module, shape: tuple[int, int, int]) -> nn.Module:
    """Return a network without the channels that nothing reads.

    Raises:
        UserError: it has none that could be left out, or computes something else without them.
    """
    try:
        cut = Cut.found(model)
    except ValueError as error:
        raise UserError(f"This network's inner_channels are wrong: {error}.") from error
    if not cut.inner:
        raise UserError("format=compact is for networks with inner channels; this one has none.")
    kept = cut.read(model)
    images = torch.rand(2, *shape, generator=torch.Generator().manual_seed(0))
    if not same_outputs(model, cut, kept, images):
        raise UserError(
            "Without the channels that nothing reads this network computes something else; its "
            "inner_channels are read by more than the layers they name."
        )
    return cut.compact(model, kept)


def _writer(
    model: nn.Module, format: str, shape: tuple[int, int, int], sub_block1: bool
) -> Callable[[IO[bytes]], Any]:
    """Return what writes the file, once it is known that it can."""
    if format == "onnx":
        _require("onnx", "onnx", "onnxscript")
        return partial(_write_onnx, model, shape)
    if format == "safetensors":
        _require("safetensors", "safetensors")
        return partial(_write_safetensors, model)
    weights = dict(model.state_dict())
    if format == "robustbench":
        if not isinstance(model, WideResNet) or model.activation is not ACTIVATIONS["relu"]:
            raise UserError(
                "format=robustbench is for WideResNets with ReLU; this network is none."
            )
        if shape != ROBUSTBENCH_SHAPE:
            theirs, ours = ("×".join(map(str, sizes)) for sizes in (ROBUSTBENCH_SHAPE, shape))
            raise UserError(f"RobustBench's WideResNet takes {theirs} images, not {ours}.")
        weights = names.robustbench(weights, sub_block1=sub_block1)
    return partial(torch.save, weights)


def _require(format: str, *packages: str) -> None:
    missing = [package for package in packages if find_spec(package) is None]
    if missing:
        raise UserError(
            f'format={format} needs {" and ".join(missing)}: pip install "btrain[export]".'
        )


def _write_safetensors(model: nn.Module, file: IO[bytes]) -> None:
    from safetensors.torch import save

    weights = {  # copies, for tied weights share memory
        key: value.clone(memory_format=torch.contiguous_format)
        for key, value in model.state_dict().items()
    }
    file.write(save(weights, metadata={"format": "pt"}))


def _write_onnx(model: nn.Module, shape: tuple[int, int, int], file: IO[bytes]) -> None:
    example = torch.zeros(2, *shape)  # one image would be taken for a constant
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about the exporter's own insides
        program = torch.onnx.export(
            model,
            (example,),
            input_names=["images"],
            output_names=["logits"],
            dynamic_shapes=({0: torch.export.Dim("batch")},),
            dynamo=True,
            verbose=False,
        )
    assert program is not None  # of dynamo=True
    file.write(program.model_proto.SerializeToString())
