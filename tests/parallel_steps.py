"""Started by `test_parallel.py`: steps of many trainings on one, two and three processes, saved.

The networks are in float64, so that the sums of several processes differ from those of one by
nothing that a sign could notice.
"""

from __future__ import annotations

import importlib
import warnings
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch import Tensor, nn

from btrain import models
from btrain.attacks.fast_paths import make_fast_paths
from btrain.data import Batch, Data, load
from btrain.data.augmentation import to_unit
from btrain.methods.make import make_methods
from btrain.methods.statistics import stacked
from btrain.processes.world import World, joined
from btrain.settings import Config
from btrain.settings.method import VerifiedConfig
from btrain.training.update import train_batch
from composing import compose
from steps import memory_of
from torchrun import launched

CPU = torch.device("cpu")
MIXED, ONE_PERTURBED = "mixed", "one perturbed"
AUGMIX = ["defense=augmix"]

CASES = {
    "trades": (["defense=trades"], MIXED, 51),
    "mart": (["defense=mart"], MIXED, 51),
    "pgd": (["defense=pgd"], MIXED, 50),
    "uniform": (["bt=uniform", "attack.steps=3"], MIXED, 51),
    "compiled": (["bt=uniform", "attack.steps=3", "train.compile=true"], MIXED, 51),
    "plain mart": (["defense=mart", "bt=uniform", "attack.steps=3"], MIXED, 51),
    "random": (["bt=random"], MIXED, 51),
    "gaussian": (["bt=gaussian"], MIXED, 51),
    "early_exit": (["bt=early_exit"], MIXED, 51),
    "warm-up": (["bt.warmup_epochs=1"], MIXED, 51),
    "an empty group": (["defense=trades"], ONE_PERTURBED, 51),
    "an empty group of mart's": (["defense=mart", "bt.n_r=0"], ONE_PERTURBED, 8),
    "BatchNorm": (["model=preact_resnet18"], MIXED, 40),
    "BatchNorm, an empty group": (["model=preact_resnet18"], ONE_PERTURBED, 40),
    "BatchNorm1d": ([], MIXED, 40),
    "oracle": (["bt=oracle"], MIXED, 51),
    "attacked in train mode": (["bt=uniform", "attack.steps=2", "attack.mode=train"], MIXED, 51),
    "fast": (["rival=fast", "defense=pgd"], MIXED, 51),
    "shared clean forward": (
        ["bt=uniform", "attack.steps=2", "bt.score=shared"],
        MIXED,
        51,
    ),
    "shared by groups": (["bt.score=shared"], MIXED, 51),
    "shared, an empty group": (["bt.score=shared"], ONE_PERTURBED, 51),
    "shared by random groups": (["bt=random", "bt.score=shared"], MIXED, 51),
    "shared, mart": (["defense=mart", "bt.score=shared"], MIXED, 51),
    "kept starts": (["attack.start=kept", "bt.n_b=2", "bt.n_r=1"], MIXED, 51),
    "kept starts in bf16, shared": (
        [
            "attack.start=kept",
            "attack.store=bf16",
            "bt.n_b=1",
            "bt.n_r=1",
            "bt.score=shared",
        ],
        MIXED,
        51,
    ),
    "a share of the robust": (["bt.robust_share=0.5"], MIXED, 51),
    "a share of the robust, mart": (["defense=mart", "bt.robust_share=0.5"], MIXED, 51),
    "some stand for others": (["train.skip=0.5"], MIXED, 51),
    "some stand for others, fast": (["train.skip=0.5", "rival=fast", "defense=pgd"], MIXED, 51),
    "some stand for others, mart": (
        ["train.skip=0.5", "defense=mart", "bt.robust_share=0.5"],
        MIXED,
        51,
    ),
    "in parts": (
        [
            "train.accumulate=2",
            "train.batch_size=51",
            "defense=mart",
            "attack.start=kept",
            "bt.n_b=2",
            "bt.n_r=1",
            "bt.robust_share=0.5",
        ],
        MIXED,
        51,
    ),
    "in parts, some stand for others": (["train.accumulate=2", "train.skip=0.5"], MIXED, 47),
    "guarded": (["bt.guard=0.05", "bt.guard_steps=1", "bt.robust_share=0.5"], MIXED, 51),
    "scores of the last visit": (["bt.score=last"], MIXED, 51),
    "scores of the last visit, mart": (["defense=mart", "bt.score=last"], MIXED, 51),
    "pool": (["bt.pool=3", "train.batch_size=17"], MIXED, 51),
    "pool, an empty group": (["bt.pool=3", "train.batch_size=17"], ONE_PERTURBED, 50),
    "augmix": (AUGMIX, MIXED, 51),
    "augmix, random": ([*AUGMIX, "bt=random"], MIXED, 51),
    "augmix, an empty group": (AUGMIX, ONE_PERTURBED, 8),
    "plain augmix": ([*AUGMIX, "bt=uniform"], MIXED, 51),
    "augmix without JSD": ([*AUGMIX, "bt=uniform", "defense.jsd=false"], MIXED, 51),
    "BatchNorm, shared": (["model=preact_resnet18", "bt.score=shared"], MIXED, 40),
    "BatchNorm, augmix": ([*AUGMIX, "model=preact_resnet18"], MIXED, 40),
    "BatchNorm, pool": (["model=preact_resnet18", "bt.pool=2", "train.batch_size=20"], MIXED, 40),
    "mixtrain": (
        ["defense=mixtrain", "bt=bullettrain", "defense.per_batch=3", "defense.ramp=0"],
        MIXED,
        51,
    ),
    "mtl_ibp": (["defense=mtl_ibp", "attack.steps=2", "train.epochs=1"], MIXED, 51),
    "sabr of one": (
        ["defense=sabr", "bt=random", "defense.per_batch=1", "attack.steps=2", "defense.ramp=0"],
        MIXED,
        50,
    ),
    "bf16": (["model=preact_resnet18", "train.precision=bf16", "bt.warmup_epochs=1"], MIXED, 40),
}
"""Overrides, labels, examples of a batch."""

STEPS = 4


def main(folders: dict[int, Path]) -> None:
    """Leave FOLDER/<rank>.pt by each process; by the number of processes, the folder."""
    digits = load("digits", Path("unused"), device=CPU)
    configs = {
        name: compose(["dataset=digits", "model=small_cnn", *overrides])
        for name, (overrides, _, _) in CASES.items()
    }
    importlib.import_module("torch._inductor.pattern_matcher")  # as every compilation does
    for processes, folder in folders.items():
        if processes > 1:  # forks, ahead of anything that this process computes
            launched(processes, take_steps, folder, digits, configs)
    take_steps(folders[1], digits, configs)


def take_steps(folder: Path, digits: Data, configs: dict[str, Config]) -> None:
    # Without generating code, which takes its time and changes no graph.
    without_code = patch.object(torch, "compile", partial(torch.compile, backend="aot_eager"))
    with without_code, warnings.catch_warnings(), joined() as world:
        warnings.simplefilter("ignore")  # the compiler's own
        done = {
            name: run(digits, world, configs[name], kind, m, norm="1d" in name)
            for name, (_, kind, m) in CASES.items()
        }
        torch.save(done, folder / f"{world.rank}.pt")


def run(
    digits: Data, world: World, config: Config, kind: str, m: int, *, norm: bool = False
) -> dict[str, Tensor | list[Tensor]]:
    torch.manual_seed(0)
    architecture = config.model.architecture.value
    model = models.build(architecture, width=4, depth=None, classes=10, shape=(1, 8, 8))
    if norm:
        model = nn.Sequential(model, nn.BatchNorm1d(10))
    if config.train.precision.name == "float32":
        model.double()
        if not isinstance(config.defense, VerifiedConfig):  # whose bounds pass through no hook
            model.register_forward_pre_hook(lambda module, inputs: inputs[0].double())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    memory = memory_of(config, digits, CPU)
    memory["robust_fraction"] = memory["robust_fraction"] + 0.5
    generator = torch.Generator().manual_seed(0)
    paths = make_fast_paths(config.train, CPU)
    method_of = make_methods(config, CPU, paths=paths, world=world)
    several, fractions, stats = None if world.size == 1 else world, [], []
    for number in range(STEPS):
        x = to_unit(digits.train.images[number * m : (number + 1) * m])
        if isinstance(config.defense, VerifiedConfig):
            x = x.double()
        batch = Batch(x, labelled(model, x, kind), torch.arange(m))
        if config.train.skip:
            batch = batch._replace(weight=1 + (torch.arange(m) % 3 > 0).to(x.dtype))
        network, method = paths.view(world.wrapped(model.train())), method_of(number // 2)
        sums = train_batch(network, optimizer, method, batch, memory, generator, several)
        fractions.append(memory["robust_fraction"].double())
        stats.append(stacked(sums))
    state = {f"model.{name}": tensor for name, tensor in model.state_dict().items()}
    kept = ("kept", "score", "outlier")
    state |= {name: memory[name] for name in memory if name.startswith(kept)}
    return {**state, "F_R": torch.stack(fractions), "stats": torch.stack(stats)}


def labelled(model: nn.Module, x: Tensor, kind: str) -> Tensor:
    """Labels that the network finds right, two of three, or all but one wrong."""
    with torch.no_grad():
        predicted = model.eval()(x).argmax(dim=1)
    numbers = torch.arange(len(x))
    wrong = numbers % 3 == 0 if kind is MIXED else numbers != len(x) // 2
    return (predicted + wrong) % 10
