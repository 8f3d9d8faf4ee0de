"""From a configuration to the objects of a run."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from pathlib import Path

import torch
from torch import nn

from btrain import models
from btrain.data import Data, load
from btrain.data.augmentation import batch_slices
from btrain.errors import UserError, first_line
from btrain.precision import to_channels_last
from btrain.schema import (
    Config,
    ModelConfig,
    OnNonfinite,
    OptimizerName,
    RecipeConfig,
    ScheduleName,
)
from btrain.training.loop import Plan
from btrain.training.methods import make_memory
from btrain.training.parallel import World
from btrain.training.schedule import cosine, cyclic, step_decay
from btrain.training.state import TrainState


def find_device(name: str) -> torch.device:
    """`auto` is the first CUDA device, or the CPU where there is none.

    Raises:
        UserError: there is no such device.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda"):
            raise RuntimeError("only cpu and cuda are supported")
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"device={name} cannot be used ({reason}); try auto or cpu.") from error
    return device


def meant(device: torch.device) -> AbstractContextManager[object]:
    """Where no GPU is named inside, it is this one: of several processes each has its own."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


_NEED_ONE_PROCESS = ("own_step", "graphs")
"""Kinds of `Config.choices`."""


def check_shares(config: Config, examples: int, world: World) -> None:
    """Makes sure that this training, on so many examples, can be done by several processes.

    Raises:
        UserError: it cannot; the sentence names the key.
    """
    if world.size == 1:
        return
    chosen = config.choices()
    for kind in _NEED_ONE_PROCESS:
        if kind in chosen:
            raise UserError(
                f"{chosen[kind]} needs one process; with torchrun there are {world.size}."
            )
    sizes = [part.stop - part.start for part in batch_slices(examples, config.train.batch_size)]
    if min(sizes) < 2 * world.size:
        raise UserError(
            f"train.batch_size={config.train.batch_size} leaves a batch of {min(sizes)} of "
            f"{examples} examples; {world.size} processes need two examples each of every batch."
        )


def load_data(config: Config, device: torch.device) -> Data:
    dataset = config.dataset
    return load(
        dataset.name.value,
        Path(dataset.root),
        device=device,
        download=dataset.download,
        image_size=dataset.image_size,
        train_examples=dataset.train_examples,
        test_examples=dataset.test_examples,
        val_examples=dataset.val_examples,
    )


def make_state(config: Config, data: Data, device: torch.device) -> TrainState:
    torch.manual_seed(config.seed)
    model = make_model(config.model, len(data.classes), data.shape).to(device)
    if config.train.channels_last:
        model = to_channels_last(model)
    optimizer = make_optimizer(config.recipe, model)
    memory = make_memory(config, data, device)
    return TrainState.fresh(model, optimizer, memory, config.seed, device, config.recipe.ema)


def make_model(model: ModelConfig, classes: int, shape: tuple[int, int, int]) -> nn.Module:
    """The network of a configuration, for K classes of (C, H, W) images, freshly initialised."""
    return models.build(
        model.architecture.value,
        width=model.width,
        depth=model.depth,
        classes=classes,
        shape=shape,
        mean=model.mean,
        std=model.std,
    )


def make_optimizer(recipe: RecipeConfig, model: nn.Module) -> torch.optim.Optimizer:
    """The recipe's optimizer of all weights; fused, so that Adam counts its steps on the device."""
    if recipe.optimizer is OptimizerName.adam:
        return torch.optim.Adam(
            model.parameters(),
            lr=recipe.lr,
            weight_decay=recipe.weight_decay,
            fused=True,
        )
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
        fused=True,
    )


def make_plan(config: Config) -> Plan:
    """The portions of a run are its batches, or pools of them that are attacked at once."""
    recipe = config.recipe
    milestones = [milestone / recipe.epochs for milestone in recipe.milestones]
    schedules = {
        ScheduleName.step: step_decay(milestones, recipe.lr_factors),
        ScheduleName.cyclic: cyclic(recipe.peak),
        ScheduleName.cosine: cosine(),
    }
    return Plan(
        seed=config.seed,
        epochs=config.train.epochs,
        batch_size=config.train.batch_size * config.bt.pool,
        lr=recipe.lr,
        schedule=schedules[recipe.schedule],
        crop_padding=recipe.crop_padding,
        flip=recipe.flip,
        max_seconds=config.train.max_seconds,
        skip_nonfinite=config.train.on_nonfinite is OnNonfinite.skip,
        score_every=config.train.score_every,
    )
