"""The way from the settings to the cases, each measured by itself, and their lanes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path

import torch
from torch import Tensor

from btrain.attacks.fast_paths import check_fast_paths
from btrain.build import check_size, make_model
from btrain.data.augmentation import to_unit
from btrain.data.splits import load_configured
from btrain.errors import UserError
from btrain.exchange.from_run import SavedRun, image_shape, read_run
from btrain.methods.make import plain_defense
from btrain.runs.checkpoint import load
from btrain.settings import Config, CudaGraphs, DefenseName, Score, Start, TrainConfig
from btrain.settings.bench import BenchConfig, Contender
from btrain.settings.compose import compose
from btrain.settings.method import BulletTrainConfig
from btrain.terminal import counted, tell
from btrain.training.epochs import epoch_order
from btrain.training.timing.forced import class_counts
from btrain.training.timing.lane import CLASSES, Lane, Workload

_OWN_KEYS = {
    "defense": "bench.defenses",
    "model": "bench.models",
    "bt": "bench.methods",
    "train.batch_size": "bench.batch_sizes",
    "train.precision": "bench.precisions",
    "train.channels_last": "bench.channels_last",
    "train.compile": "bench.compiled",
    "train.cuda_graphs": "bench.cuda_graphs",
}
"""Settings of a run that the bench goes through itself, by its own lists."""

Fractions = tuple[float, float, float]


@dataclass(frozen=True)
class Case:
    """The lanes that take turns: all methods, precisions and layouts of one workload.

    Attributes:
        config: of a run with BulletTrain.
        fractions: F_B, F_R, F_O; None as trained.
        run: of `bench.checkpoint`.
    """

    config: Config
    fractions: Fractions | None
    run: SavedRun | None = None

    def __str__(self) -> str:
        config = self.config
        return f"{config.defense.name.value} {config.model.name} batch {config.train.batch_size}"


def make_cases(bench: BenchConfig, settings: Sequence[str]) -> list[Case]:
    """Return every combination of the lists that need another workload.

    Args:
        settings: overrides of `btrain train`.

    Raises:
        UserError: a setting is wrong, or one that the bench goes through itself or has no use for;
            fractions leave a batch without robust examples; the run of `bench.checkpoint` cannot be
            read, had no BulletTrain, or fewer images than a batch.
    """
    if bench.checkpoint is not None:
        return _trained_cases(Path(bench.checkpoint), bench, settings)
    cases = _cases(bench, settings)
    for case in cases:
        _reject_remembered(case.config)
    return cases


def _cases(bench: BenchConfig, settings: Sequence[str]) -> list[Case]:
    """Return the cases of the bench's lists with the settings of `btrain train`."""
    for setting in settings:
        key = setting.partition("=")[0].lstrip("+~")
        if key in _OWN_KEYS:
            raise UserError(f"{key} is a list here: please give {_OWN_KEYS[key]}=[…].")
    return [
        Case(_with_bullettrain([f"defense={defense.value}", f"model={model}", *settings,
                                f"train.batch_size={size}"]), fractions)
        for defense, model, size in product(bench.defenses, bench.models, bench.batch_sizes)
        for fractions in _fractions(bench, defense, size)
    ]  # fmt: skip


def _with_bullettrain(settings: Sequence[str]) -> Config:
    """Return the configuration of a training with BulletTrain; say of a rival who times it."""
    try:
        config: Config = compose([*settings, "bt=bullettrain"])
    except UserError as error:
        try:
            rival = compose([*settings, "bt=uniform"]).chosen("rival")
        except UserError:
            rival = None
        if rival is None:
            raise
        raise UserError(
            "btrain bench times BulletTrain beside the plain defense (bench.methods), not "
            f"{rival}; btrain paper times the runs of its targets by turns with their baseline "
            "(step.json in a run folder)."
        ) from error
    return config


def _remembered(config: Config) -> dict[str, str]:
    """Return the settings that live on what a run remembers of earlier batches, each with why."""
    attack, bt, train = config.attack, config.bt, config.train
    guard = bt.guard if isinstance(bt, BulletTrainConfig) else 1.0
    found = {}
    if train.skip:
        found[f"train.skip={train.skip:g}"] = "has no meaning there"
    if attack.start is Start.kept:
        found["attack.start=kept"] = "has no last attack to go on from there"
    if bt.score is Score.last:
        found["bt.score=last"] = "has no last visit's scores there"
    if guard < 1:
        found[f"bt.guard={guard:g}"] = "has no mean share of outliers to go by there"
    return found


def _reject_remembered(config: Config) -> None:
    """Raise UserError for a setting that lives on what a run remembers of earlier batches."""
    for setting, why in _remembered(config).items():
        raise UserError(f"btrain bench visits every batch once, so that {setting} {why}.")


def _fractions(bench: BenchConfig, defense: DefenseName, batch_size: int) -> list[Fractions]:
    """Return the defense's own, or those of each F_B asked for."""
    if defense.value not in bench.fractions:
        raise UserError(
            f"bench.defenses={defense.value} cannot be timed; those with bench.fractions can: "
            f"{', '.join(bench.fractions)}."
        )
    boundary, robust, outlier = bench.fractions[defense.value]
    share = robust / (robust + outlier) if robust + outlier else 1.0
    key, all_fractions = f"bench.fractions.{defense.value}", [(boundary, robust, outlier)]
    if bench.boundary_fractions is not None:
        key = "bench.boundary_fractions"
        all_fractions = [
            (b, (1 - b) * share, (1 - b) * (1 - share)) for b in bench.boundary_fractions
        ]
    for fractions in all_fractions:
        try:
            class_counts(fractions, batch_size)
        except UserError as error:
            raise UserError(f"{key}: {error}") from error
    return all_fractions


def _trained_cases(path: Path, bench: BenchConfig, settings: Sequence[str]) -> list[Case]:
    factories = {}
    for setting in settings:
        group, _, factory = setting.partition(".factory=")
        if not factory:
            raise UserError(f"{setting}: with bench.checkpoint the settings are the run's.")
        factories[group] = factory.strip("'")
    needed = ("model", "dataset", "bt", "defense", "attack", "sparsity")
    run = read_run(path, trust_code=bench.trust_code, factories=factories, needed=needed)
    config, batch_sizes = run.config, bench.batch_sizes
    if type(config.bt) is not BulletTrainConfig:
        raise UserError(f"{path} was trained with bt={config.bt.name.value}, not bullettrain.")
    if left_out := _remembered(config):
        tell(
            f"btrain bench visits every batch once, and times {path} without "
            f"{' and '.join(left_out)}."
        )
    images = len(load_configured(config.dataset, torch.device("cpu")).train)
    if max(batch_sizes) > images:
        raise UserError(
            f"bench.batch_sizes: {path} was trained on {counted(images, 'image')}, fewer "
            f"than {max(batch_sizes)}."
        )
    return [
        Case(replace(config, train=replace(config.train, batch_size=size)), None, run)
        for size in batch_sizes
    ]


def make_lanes(case: Case, bench: BenchConfig, device: torch.device) -> list[Lane]:
    """Return the lanes of a case; only TRADES has an official structure of its own.

    Raises:
        UserError: the run's images cannot be read; there is nothing to pool.
    """
    if Contender.pooled in bench.methods and case.config.bt.pool == 1:
        raise UserError("The method pooled of bench.methods needs a bt.pool above 1.")
    workload = _workload(case, bench, device)
    layouts = product(bench.precisions, bench.channels_last, bench.compiled, bench.cuda_graphs)
    trains = [
        replace(
            case.config.train,
            precision=precision,
            channels_last=channels_last,
            compile=compiled,
            cuda_graphs=CudaGraphs.always if graphs else CudaGraphs.never,
        )
        for precision, channels_last, compiled, graphs in layouts
    ]
    for train in trains:
        check_fast_paths(train, device)
    return [
        Lane(_variant(case.config, contender, train), contender, workload, device)
        for train, contender in product(trains, bench.methods)
        if _exists(case.config.defense.name, contender, train)
    ]


def _exists(defense: DefenseName, contender: Contender, train: TrainConfig) -> bool:
    """Return whether the defense has the method, and that the compiler or the graphs."""
    if train.cuda_graphs is CudaGraphs.always:
        replayed = contender in (Contender.lean, Contender.bullettrain)
        return replayed and not train.compile and defense is not DefenseName.augmix
    if train.compile and defense is DefenseName.augmix:
        return False
    return contender is not Contender.official or defense is DefenseName.trades


def _variant(config: Config, contender: Contender, train: TrainConfig) -> Config:
    """Return a lane's configuration: what is not BulletTrain takes the plain attack's steps.

    Only `pooled` attacks the batches of `bt.pool` at once.
    """
    pool = config.bt.pool if contender is Contender.pooled else 1
    config = replace(config, train=train, bt=replace(config.bt, pool=pool))
    plain = plain_defense(config)
    if contender is Contender.masked:  # BulletTrain's budgets, but for the longest
        bt = replace(config.bt, n_b=plain.bt.n_b, step_size_b=plain.bt.step_size_b)
        return replace(config, bt=bt)
    return config if contender in (Contender.bullettrain, Contender.pooled) else plain


def _workload(case: Case, bench: BenchConfig, device: torch.device) -> Workload:
    config = case.config
    if case.run is not None:
        return _trained(case.run, config.train.batch_size, device)
    shape = image_shape(config.dataset)
    check_size(config.model, CLASSES, shape)
    torch.manual_seed(config.seed)
    network = make_model(config.model, CLASSES, shape)
    x = torch.rand(config.train.batch_size, *shape).to(device)
    return Workload(network, lambda repetition: x, None, case.fractions)


def _trained(run: SavedRun, batch_size: int, device: torch.device) -> Workload:
    """Return a run's network, F_R and training images, a batch of its own for every repetition.

    Batches are drawn in the order of the run's epochs: neighbours in an image folder are of one
    class.
    """
    robust_fraction = float(load(run.path)["state"]["memory"]["robust_fraction"])
    split = load_configured(run.config.dataset, device).train
    batches = len(split) // batch_size

    def part(repetition: int) -> Tensor:
        epoch, batch = divmod(repetition, batches)
        order = epoch_order(len(split), run.config.seed, epoch).to(device)
        return order[batch * batch_size : (batch + 1) * batch_size]

    def images(repetition: int) -> Tensor:
        return to_unit(split.images[part(repetition)])

    def labels(repetition: int) -> Tensor:
        return split.labels[part(repetition)]

    return Workload(run.network(), images, labels, None, robust_fraction)
