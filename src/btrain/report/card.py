"""The model card of an exported network: what it is, how it was trained, how good it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from btrain.durable import write_files
from btrain.errors import UserError
from btrain.evaluation.result import WEIGHTS, Evaluation, Summary, wilson
from btrain.exchange.from_run import SavedRun
from btrain.exchange.write import BESIDE
from btrain.pages.tables import NONE, markdown
from btrain.report.compare import threat
from btrain.runs.folder import RunFolder, flat
from btrain.settings import Config, RivalName
from btrain.settings.compose import as_yaml, to_dict
from btrain.terminal import counted
from btrain.untrusted import sha256


def write_card(out: Path, saved: SavedRun, format: str, parameters: int) -> list[Path]:
    """Write `<out>.md` and `<out>.sha256`; return where.

    Args:
        out: the exported file.
        saved: the run that it was made of.
        format: what `out` was exported as.
        parameters: how many `out` has.

    Raises:
        UserError: a file cannot be read or written.
    """
    try:
        digest = sha256(out)
    except OSError as error:
        raise UserError(f"{out} cannot be read ({error.strerror}).") from error
    card, beside = (out.with_name(out.name + end) for end in BESIDE)
    text = _text(saved, out.name, digest, format, parameters)
    write_files({card: text.encode(), beside: f"{digest}  {out.name}\n".encode()})
    return [card, beside]


def _text(saved: SavedRun, file: str, digest: str, format: str, parameters: int) -> str:
    """Return the card in Markdown."""
    config, folder = saved.config, _run_of(saved.path)
    summary = (folder.summary() if folder is not None else None) or {}
    width, height = saved.shape[2], saved.shape[1]
    reading = (
        f"`btrain eval checkpoint={file}` evaluates it."
        if format in ("checkpoint", "compact")
        else f"Format `{format}` of `btrain export`."
    )
    parts = [
        f"# {config.model.name}, {_name(config)}, {config.dataset.title}",
        f"A `{config.model.name}` for {counted(saved.classes, 'class')} of "
        f"`{config.dataset.title}`, {width}×{height} images with "
        f"{counted(saved.shape[0], 'channel')} in [0, 1], made robust with "
        f"{_method(config)} against {_threat(config)}.",
        *_accuracies(folder, summary, config, saved.path),
        "## How it was trained",
        _facts(saved, folder, summary),
        f"```yaml\n{_settings(config)}\n```",
        "## The file",
        f"`{file}`, SHA-256 `{digest}`, {parameters:,} parameters. {reading}",
    ]
    return "\n\n".join(filter(None, parts)) + "\n"


def _run_of(checkpoint: Path) -> RunFolder | None:
    """Return the folder of a checkpoint's run; None for a file that lies elsewhere."""
    folder = checkpoint.parent
    return RunFolder(folder.parent) if folder.name == "checkpoints" else None


def _name(config: Config) -> str:
    rival, defense = config.rival.name, config.defense.name
    return defense.name if rival is RivalName.none else rival.name


def _method(config: Config) -> str:
    if config.rival.name is not RivalName.none:  # which has a loss and steps of its own
        return f"`rival={config.rival.name.name}`"
    return f"`defense={config.defense.name.name}` and `bt={config.bt.name.name}`"


def _threat(config: Config) -> str:
    if config.attack.augmix is not None:
        return "common corruptions"
    norm = {"linf": "an L∞ ball", "l2": "an L2 ball"}.get(config.attack.norm, "a ball of its own")
    return f"changes in {norm} of radius {config.attack.epsilon:.4g}"


def _accuracies(
    folder: RunFolder | None, summary: dict[str, Any], config: Config, checkpoint: Path
) -> list[str]:
    """Return a table with a row an attack, and what it says; empty where nothing was evaluated.

    Those of the checkpoint alone are shown: of the run's own evaluation, which is of its last and
    its best, and of `btrain eval`.
    """
    if folder is None:
        return []
    rows, n = [], summary.get("test_examples")
    prefix = {folder.last.name: "", folder.best.name: "best_"}.get(checkpoint.name)
    attacked = f"PGD, {threat(flat(to_dict(config)))}"
    for name, key in (("clean", "clean_acc"), (attacked, "robust_acc")):
        accuracy = None if prefix is None else summary.get(prefix + key)
        if accuracy is not None and n:
            low, high = wilson(round(accuracy * n / 100), n)
            rows.append([name, f"{accuracy:.2f}", f"{100 * low:.2f} to {100 * high:.2f}", str(n)])
    found = [*_evaluations(folder, checkpoint)]
    for of, where in found:
        interval = NONE if of.ci95 is None else f"{of.ci95[0]:.2f} to {of.ci95[1]:.2f}"
        epsilon = of.settings.get("epsilon")
        ball = "" if epsilon is None else f", ε {epsilon:.3g}"
        rows.append([f"{of.attack}{ball} ({where})", f"{of.accuracy:.2f}", interval, str(of.n)])
    if not rows:
        return []
    told = "Accuracies are percent of n test images, with 95 % intervals over other draws of them."
    if not any("autoattack" in of.attack for of, _ in found):
        told += "\nAutoAttack was not run, so the true robust accuracy may be lower."
    return [markdown(["under", "right %", "95 % interval", "n"], rows), told]


def _evaluations(folder: RunFolder, checkpoint: Path) -> Iterator[tuple[Summary, str]]:
    """Yield each result of `btrain eval` with a checkpoint's weights, and where it is from.

    An evaluation on other images or in another ball has a folder of its own, which is named.
    """
    digest, inside = sha256(checkpoint), folder.path / "eval"
    own = [inside, inside / checkpoint.stem]
    for place in [*own, *sorted({*inside.glob("*/")} - {*own})]:
        told = "btrain eval" if place in own else f"btrain eval, {place.name}"
        with suppress(UserError):
            for of in Evaluation.read(place).summaries():
                if of.settings.get(WEIGHTS) == digest:
                    yield of, told


_PLACES = {"root", "dir", "weights"}
"""The settings that are places of a machine."""


def _settings(config: Config) -> str:
    """Return what decides the result, as YAML; no folder of the machine is among it."""
    told = to_dict(config)
    for part in filter(lambda group: isinstance(group, dict), told.values()):
        for place in _PLACES:
            part.pop(place, None)
        if "factory" in part:
            part["factory"] = re.split(r"[/\\]", str(part["factory"]))[-1]
    return as_yaml(told).strip()


def _reached(saved: SavedRun, folder: RunFolder | None) -> str | None:
    """Return how far training had come, None where that is not known."""
    told = saved.unfinished() or saved.reached
    if told is None or folder is None or saved.path.name != folder.best.name:
        return told
    return f"{told.removesuffix('.')}, the best on held-out images"


def _facts(saved: SavedRun, folder: RunFolder | None, summary: dict[str, Any]) -> str:
    seconds, device = summary.get("train_seconds"), summary.get("device", "a device")
    last = folder is not None and saved.path.name == folder.last.name
    training = "training" if last else "training, all of the run"
    told = {
        "weights": _reached(saved, folder),
        "the run was cut by": summary.get("cut"),
        "the run was ended by a collapse in": summary.get("collapse"),
        training: None if seconds is None else f"{seconds:.0f} s on {device}",
        "torch": summary.get("torch_version"),
        "commit of btrain": summary.get("git_commit"),
        "SHA-256 of the data": summary.get("data_sha256"),
    }
    return "\n".join(f"- {name}: {value}" for name, value in told.items() if value is not None)
