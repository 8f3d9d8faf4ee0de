"""From a configuration to the objects of a run."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from btrain import models
from btrain.allocation import METRICS
from btrain.augmix import augmix
from btrain.data import Data, load
from btrain.defenses import DEFENSES
from btrain.errors import UserError
from btrain.schema import (
    AttackMode,
    Config,
    DefenseName,
    ModelConfig,
    OptimizerName,
    RecipeConfig,
    ScheduleName,
)
from btrain.training.augmix_step import AugMixMethod, augmix_step
from btrain.training.loop import Plan, Step
from btrain.training.schedule import cosine, cyclic, step_decay
from btrain.training.state import TrainState
from btrain.training.step import Method, train_step


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
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise UserError(f"device={name} cannot be used ({reason}); try auto or cpu.") from error
    return device


def make_step(config: Config, device: torch.device, *, warm_up: bool = False) -> Step:
    """What is done with a batch: Algorithm 2's open choices, from the configuration.

    `warm_up` asks for the plain defense, whatever the allocator.
    """
    allocator = "uniform" if warm_up else config.bt.name.value
    if config.defense.name is DefenseName.augmix:
        return partial(augmix_step, method=_augmix_method(config, device, allocator))
    return partial(train_step, method=make_method(config, device, allocator))


def make_method(config: Config, device: torch.device, allocator: str) -> Method:
    """The choices of the adversarial defenses."""
    bt, attack = config.bt, config.attack
    settings = {} if config.defense.beta is None else {"beta": config.defense.beta}
    return Method(
        defense=DEFENSES[config.defense.name.value](**settings),
        allocator=allocator,
        metric=METRICS[bt.metric.value],
        budget=torch.tensor([bt.n_o, bt.n_r, bt.n_b], device=device),
        n_b=bt.n_b,
        step_size_b=bt.step_size_b,
        mean_steps=bt.mean_steps,
        oracle_steps=bt.oracle_steps,
        oracle_step_size=bt.oracle_step_size,
        epsilon=attack.epsilon,
        start=attack.start.value,
        start_std=attack.start_std,
        attack_in_train_mode=attack.mode is AttackMode.train,
        gamma=bt.gamma,
        momentum=bt.momentum,
        share_clean_forward=bt.share_clean_forward,
        forward_unperturbed=bt.forward_unperturbed,
    )


def _augmix_method(config: Config, device: torch.device, allocator: str) -> AugMixMethod:
    bt, defense, views = config.bt, config.defense, config.attack.augmix
    assert views is not None
    assert defense.jsd is not None
    assert defense.jsd_weight is not None

    def make_views(images: Tensor, generator: torch.Generator) -> Tensor:
        return augmix(
            images,
            generator=generator,
            severity=views.severity,
            width=views.width,
            depth=views.depth,
            all_ops=views.all_ops,
        )

    return AugMixMethod(
        make_views=make_views,
        allocator=allocator,
        metric=METRICS[bt.metric.value],
        budget=torch.tensor([0, 0, 1], device=device),
        jsd=defense.jsd,
        jsd_weight=defense.jsd_weight,
        gamma=bt.gamma,
        momentum=bt.momentum,
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
    return TrainState.fresh(model, _make_optimizer(config.recipe, model), config.seed, device)


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


def _make_optimizer(recipe: RecipeConfig, model: nn.Module) -> torch.optim.Optimizer:
    if recipe.optimizer is OptimizerName.adam:
        return torch.optim.Adam(model.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)
    return torch.optim.SGD(
        model.parameters(),
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        nesterov=recipe.nesterov,
    )


def make_plan(config: Config) -> Plan:
    recipe = config.recipe
    milestones = [milestone / recipe.epochs for milestone in recipe.milestones]
    schedules = {
        ScheduleName.step: step_decay(milestones, recipe.lr_decay),
        ScheduleName.cyclic: cyclic(recipe.peak),
        ScheduleName.cosine: cosine(),
    }
    return Plan(
        seed=config.seed,
        epochs=config.train.epochs,
        batch_size=config.train.batch_size,
        lr=recipe.lr,
        schedule=schedules[recipe.schedule],
        crop_padding=recipe.crop_padding,
        flip=recipe.flip,
        max_seconds=config.train.max_seconds,
    )
