"""The network that a command wants evaluated, its test data and the conditions."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from btrain.attacks.balls import BALLS
from btrain.build import check_network, find_device, make_model
from btrain.data import Data
from btrain.data.splits import load_configured
from btrain.durable import check_within, real
from btrain.errors import UserError
from btrain.evaluation.pgd import Threat, farthest, threat_of
from btrain.evaluation.result import WEIGHTS
from btrain.runs.folder import RunFolder, settings_sha256
from btrain.settings import Config, FilesConfig, OwnModelConfig
from btrain.settings.checks import no_farther
from btrain.settings.compose import to_dict
from btrain.settings.evaluation import EvalSettings, apply, compose
from btrain.untrusted import sha256

if TYPE_CHECKING:
    from btrain.exchange.from_run import SavedRun


@dataclass(frozen=True)
class Target:
    """A network on its device, and where its results belong.

    Attributes:
        config: the run's, with the overrides; of another project's file what they compose to.
        threat: of the attacks, from a radius to its ball.
        epsilon: of the attacks.
        trained, trained_norm: the ball of the training; None: not known.
        step_size: the data set's, for that ε.
        foreign: whether network or images are others than a run's own.
        progress: what tells how far the run came, and which run it is; empty of another project's.
        unfinished: a sentence on a run that is not at its end, or None.
    """

    model: nn.Module
    data: Data
    config: Config
    device: torch.device
    checkpoint: Path
    run: Path | None
    threat: Threat
    epsilon: float
    trained: float | None
    trained_norm: str | None
    step_size: float
    seed: int
    folder: Path
    foreign: bool
    progress: dict[str, Any]
    unfinished: str | None

    def checkpoint_facts(self) -> dict[str, Any]:
        """Return which weights these are."""
        path = self.checkpoint
        if self.run is not None:
            path = real(path).relative_to(real(self.run))
        return {"checkpoint": path.as_posix(), WEIGHTS: sha256(self.checkpoint)}


def find(settings: EvalSettings) -> Target:
    """Read checkpoint and data.

    Raises:
        UserError: one of them is missing, damaged or does not fit the other.
    """
    checkpoint, run = _paths(Path(settings.checkpoint))
    device = find_device(settings.device)
    if run is None and "model" in settings.config:
        original = config = _foreign(settings)
        model, trained, progress, unfinished = None, None, {}, None
    else:
        original, saved = _ours(checkpoint, run, settings)
        model, unfinished = saved.network(), saved.unfinished()
        progress = {"epoch": saved.epochs, "settings_sha256": settings_sha256(original)}
        config, trained = apply(original, settings.config), original.attack.epsilon
        _keep_downloads_here(config, settings)
    norm = settings.norm or original.attack.norm
    settings.check_lengths(norm)
    epsilon = _epsilon(settings, original, config, trained)
    data = load_configured(config.dataset, device)
    known = {"classes": len(data.classes), "shape": data.shape}
    threat = BALLS.get(norm) or threat_of(original.attack, known)
    no_farther("epsilon", epsilon, farthest(threat, data.shape))
    if model is None or any(key.startswith("model") for key in settings.config):
        model = _built(config, data, checkpoint)
    seed = config.seed if settings.seed is None else settings.seed
    folder, changes = _folder(settings, checkpoint, run), _changes(original, config)
    foreign = trained is None or not changes.keys() <= {"dataset.test_examples"}
    if settings.out is None:
        changes |= {} if norm == original.attack.norm else {"norm": norm}
        changes |= {} if epsilon in (trained, config.attack.epsilon) else {"epsilon": epsilon}
        changes |= {} if seed == config.seed else {"seed": seed}
        changes |= {} if settings.precision == "float32" else {"precision": settings.precision}
        folder = folder / _name(changes)
    _check_folder(folder, settings.out, run)
    return Target(
        model=model.to(device),
        data=data,
        config=config,
        device=device,
        checkpoint=checkpoint,
        run=run,
        threat=threat,
        epsilon=epsilon,
        trained=trained,
        trained_norm=None if trained is None else original.attack.norm,
        step_size=config.eval.step_size * (epsilon / config.eval.epsilon),
        seed=seed,
        folder=folder,
        foreign=foreign,
        progress=progress,
        unfinished=unfinished,
    )


def _paths(path: Path) -> tuple[Path, Path | None]:
    """Return the file of the weights, and the run folder that it belongs to."""
    if not path.exists():
        raise UserError(f"checkpoint={path} does not exist.")
    if path.is_dir():
        file = path / "checkpoints" / "last.pt"
        if not file.is_file():
            raise UserError(f"{path} is no run folder with a checkpoint ({file} is missing).")
        return file, path
    run = path.parent.parent
    inside = path.parent.name == "checkpoints" and (run / "config.yaml").is_file()
    return path, run if inside else None


def _ours(checkpoint: Path, run: Path | None, settings: EvalSettings) -> tuple[Config, SavedRun]:
    """Return what a run left, and its configuration: of a run folder its `config.yaml`."""
    from btrain.exchange.from_run import (
        UntrustedError,
        agreed,
        read_config,
        read_run,
        trusted,
    )

    trust = settings.trust_code, settings.factories
    replaced = {"dataset": settings.config.get("dataset"), "attack": settings.norm}
    needed = ["model", *(group for group, other in replaced.items() if other is None)]
    try:
        saved = read_run(checkpoint, trust_code=trust[0], factories=trust[1], needed=needed)
    except UserError as error:
        if run is not None or isinstance(error, UntrustedError):
            raise
        raise UserError(f"{error} Another project's file needs model= and dataset=.") from error
    config = saved.config
    if run is not None:
        whole = read_config(RunFolder(run).settings(), run / "config.yaml")
        config = agreed(trusted(whole, run, *trust), config, run, checkpoint)
    return config, saved


def _keep_downloads_here(config: Config, settings: EvalSettings) -> None:
    """Download nothing to a place outside of here that a checkpoint from elsewhere chose."""
    if not isinstance(config.dataset, FilesConfig):
        return
    root = Path(config.dataset.root)
    outside = root.is_absolute() or ".." in root.parts
    if outside and not {"dataset.root", "dataset.download"} & {*settings.config}:
        config.dataset.download = False


def _foreign(settings: EvalSettings) -> Config:
    if "dataset" not in settings.config:
        raise UserError(f"{settings.checkpoint} does not tell its data set; please give dataset=….")
    return compose(settings.config)


def _built(config: Config, data: Data, checkpoint: Path) -> nn.Module:
    from btrain.exchange.from_run import outline
    from btrain.exchange.read import check_architecture, load_weights, read_weights

    weights, classes = read_weights(checkpoint), len(data.classes)
    if not isinstance(config.model, OwnModelConfig):
        shapes = outline(config.model, classes, data.shape, weights, checkpoint)
        check_architecture(shapes, weights, checkpoint)
    with torch.random.fork_rng(devices=[]):
        model = make_model(config.model, classes, data.shape)
    load_weights(model, checkpoint)
    check_network(config.model, model, data)
    return model


def _epsilon(
    settings: EvalSettings, original: Config, config: Config, trained: float | None
) -> float:
    """Return the radius that was typed, or that of the training where nothing speaks for another.

    Raises:
        UserError: the run is configured to be evaluated with another one, the data set that was
            typed is one for which another is usual, or the norm is another.
    """
    if settings.epsilon is not None:
        return settings.epsilon
    if settings.norm not in (None, original.attack.norm):
        raise UserError(f"norm={settings.norm} needs a radius; please give epsilon=….")
    if trained is None:
        return float(config.attack.epsilon)
    if config.eval.epsilon != trained:
        other = f"is configured to be evaluated with {config.eval.epsilon:g}"
    elif (usual := _usual(config)) not in (trained, _usual(original)):
        other = f"dataset={config.dataset.name.name} is usually attacked with {usual:g}"
    else:
        return trained
    raise UserError(
        f"{settings.checkpoint} was trained with ε = {trained:g} and {other}; "
        "please give epsilon=…."
    )


def _usual(config: Config) -> float | None:
    """Return the radius that a data set is usually attacked with, in the norm of the run."""
    usual = {"linf": config.dataset.epsilon, "l2": config.dataset.l2_epsilon}
    return usual.get(config.attack.norm)


def _folder(settings: EvalSettings, checkpoint: Path, run: Path | None) -> Path:
    if settings.out is not None:
        return Path(settings.out)
    if run is None:
        return Path("eval") / checkpoint.stem
    return run / "eval" if checkpoint.stem == "last" else run / "eval" / checkpoint.stem


def _check_folder(folder: Path, out: str | None, run: Path | None) -> None:
    """Raise UserError, ahead of the first attack, for a folder that cannot be made."""
    named = f"out={out}" if out is not None else str(folder)
    if out is None and run is not None:
        check_within(folder, run)
    for place in (folder, *folder.parents):
        if place.exists() and not place.is_dir():
            what = "it" if place == folder else str(place)
            raise UserError(f"{named} cannot hold the results: {what} is a file, not a folder.")


def _changes(original: Config, config: Config) -> dict[str, Any]:
    """Return the overrides that make it another evaluation, which gets a folder of its own."""
    before, after = to_dict(original), to_dict(config)
    keys = [("dataset", "name"), ("dataset", "image_size"), ("dataset", "test_examples")]
    keys += [("dataset", "factory"), ("dataset", "settings")]
    keys += [("model", key) for key in after["model"]]
    if after["dataset"]["name"] == "imagefolder":
        keys.append(("dataset", "root"))
    return {
        f"{group}.{key}": after[group][key]
        for group, key in keys
        if key in after[group] and after[group][key] != before[group].get(key)
    }


def _name(changes: dict[str, Any]) -> str:
    text = "-".join(f"{key}_{value}" for key, value in changes.items())
    return re.sub(r"[^\w.-]+", "_", text)
