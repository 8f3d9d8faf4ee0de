"""One attack on one model, from its name to a `Result`."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from btrain.attacks.balls import LinfBall
from btrain.evaluation.autoattack import autoattack_stands, library
from btrain.evaluation.corruptions import Reader, mean_settings, under_corruptions
from btrain.evaluation.examples import Examples, predictions
from btrain.evaluation.pgd import Pgd, Threat, pgd_stands
from btrain.evaluation.result import Result, versions, with_norm
from btrain.evaluation.worst_case import Partial
from btrain.settings.evaluation import AUTOATTACKS, PgdSettings
from btrain.terminal import say


@dataclass(frozen=True)
class Subject:
    """A model, its examples, and what they are attacked with.

    Attributes:
        model: already as it is to be evaluated (see `as_evaluated`).
        correct: which clean examples it classifies correctly, (n,) bool on the CPU.
        epsilon, step_size: in [0, 1] pixel units.
        threat: from a radius to its ball.
        facts: what every result tells about model, data and machine.
        folder: of the results, and of what is kept while an attack is under way; None: none.
        clean_seconds: how long it took to find `correct`.
    """

    model: nn.Module
    examples: Examples
    correct: Tensor
    epsilon: float
    step_size: float
    seed: int
    batch_size: int
    threat: Threat = LinfBall
    facts: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    clean_seconds: float = 0.0
    show_progress: bool = False


@dataclass(frozen=True)
class Start:
    """The examples that an attack begins with.

    Attributes:
        stands: (n,) bool on the CPU.
        left_by: the attack that left them standing; None: all that are classified correctly clean.
    """

    stands: Tensor
    left_by: str | None = None


def clean_correct(model: nn.Module, examples: Examples, *, batch_size: int) -> Tensor:
    """Return which clean examples are classified correctly, (n,) bool on the CPU."""
    return predictions(model, examples, batch_size=batch_size) == examples.labels.cpu()


def clean(subject: Subject) -> Result:
    """Return the result without an attack."""
    started = time.perf_counter() - subject.clean_seconds
    return finished(subject, "clean", _facts(subject, {}), subject.correct, started)


def pgd(subject: Subject, name: str, settings: PgdSettings, start: Start) -> Result:
    """Evaluate under PGD with restarts.

    Raises:
        UserError: the loss needs more classes.
    """
    started = time.perf_counter()
    attack = Pgd(
        epsilon=subject.epsilon,
        step_size=subject.step_size if settings.step_size is None else settings.step_size,
        steps=settings.steps,
        restarts=settings.restarts,
        loss=settings.loss,
        last_iterate=settings.last_iterate,
        seed=subject.seed,
        threat=subject.threat,
    )
    facts = attack_facts(subject, start) | {
        "step_size": attack.step_size,
        "steps": attack.steps,
        "restarts": attack.restarts,
        "loss": attack.loss,
        "counts": "last iterate" if attack.last_iterate else "any iterate",
    }
    if (there := kept(subject, name, facts)) is not None:
        return there
    partial = unfinished(subject, name, facts)
    stands = pgd_stands(
        subject.model,
        subject.examples,
        start.stands,
        attack,
        batch_size=subject.batch_size,
        partial=partial,
        show_progress=subject.show_progress,
        name=name,
    )
    return finished(subject, name, facts, stands, started, partial)


def autoattack(subject: Subject, name: str, start: Start) -> Result:
    """Evaluate under AutoAttack, `standard` or `rand`.

    Raises:
        UserError: its library is not installed, or it does not know the norm.
    """
    started = time.perf_counter()
    facts = attack_facts(subject, start, library())
    if (there := kept(subject, name, facts)) is not None:
        return there
    partial = unfinished(subject, name, facts)
    stands, found = autoattack_stands(
        subject.model,
        subject.examples,
        start.stands,
        version=AUTOATTACKS[name],
        ball=subject.threat(subject.epsilon),
        seed=subject.seed,
        batch_size=subject.batch_size,
        partial=partial,
        show_progress=subject.show_progress,
    )
    note = notes(facts.get("note"), found.pop("note"))
    return finished(subject, name, facts | found, stands, started, partial, note=note)


def corruptions(
    subject: Subject,
    root: Path,
    names: Sequence[str],
    extra: Sequence[str],
    *,
    read: Reader,
    regenerated: bool,
) -> Result:
    """Evaluate under all severities of some corruptions; `extra` ones are no part of the mean.

    Raises:
        UserError: a file is missing or does not fit the test set.
    """
    started = time.perf_counter()
    found = under_corruptions(
        subject.model,
        subject.examples,
        root,
        [*names, *extra],
        read=read,
        batch_size=subject.batch_size,
        show_progress=subject.show_progress,
    )
    counted, others = found.split(len(names))
    facts = _facts(subject, {"regenerated": regenerated}) | mean_settings(counted)
    if regenerated:
        note = "Corruptions regenerated by btrain, not the official files."
        facts["note"] = notes(facts.get("note"), note)
    if extra:
        facts["extra_table"] = others.table()
    return finished(subject, "corruptions", facts, torch.from_numpy(counted.correct), started)


def notes(*sentences: str | None) -> str | None:
    """Return sentences as one note, those that are missing left out; None without any."""
    return " ".join(filter(None, sentences)) or None


def _facts(subject: Subject, own: dict[str, Any], *libraries: str) -> dict[str, Any]:
    return {
        **own,
        **subject.facts,
        "classes": list(subject.examples.classes),
        "versions": versions(*libraries),
    }


def attack_facts(subject: Subject, start: Start, *libraries: str) -> dict[str, Any]:
    """Return what a result tells of an attack, but for the attack's own settings."""
    own = {
        "clean_accuracy": 100 * int(subject.correct.sum()) / len(subject.correct),
        "clean_mistakes": "count as fooled",
        "norm": subject.threat(subject.epsilon).norm,
        "epsilon": subject.epsilon,
        "seed": subject.seed,
        "started_from": start.left_by,
        "started_with": int(start.stands.sum()),
    }
    facts = _facts(subject, own, *libraries)
    if start.left_by is not None:
        note = "Each attack only on what the one before left standing."
        facts["note"] = notes(facts.get("note"), note)
    return facts


def identity(facts: dict[str, Any]) -> dict[str, Any]:
    """Return the facts that an attack's result depends on: a run may be renamed."""
    return {key: value for key, value in facts.items() if key not in _OF_THE_RUN}


_OF_THE_RUN = ("note", "run", "defense", "epoch", "settings_sha256")


def kept(subject: Subject, name: str, facts: dict[str, Any]) -> Result | None:
    """Return the result of the very same attack, if there is one: nothing is computed twice."""
    if subject.folder is None or (result := Result.read(subject.folder, name)) is None:
        return None
    there = with_norm(result.settings)
    same = all(
        there.get(key) == value for key, value in json.loads(json.dumps(identity(facts))).items()
    )
    if same and subject.show_progress:
        say(f"{name} is there already; delete {subject.folder / name}.json to repeat it.")
    return result if same else None


def unfinished(subject: Subject, name: str, facts: dict[str, Any]) -> Partial | None:
    """Return the file of what an attack finds while it is under way; None without a folder."""
    if subject.folder is None:
        return None
    return Partial(subject.folder / f"{name}.partial.npz", identity(facts))


def finished(
    subject: Subject,
    name: str,
    facts: dict[str, Any],
    correct: Tensor,
    started: float,
    partial: Partial | None = None,
    **changed: Any,
) -> Result:
    """Return the result of an attack that is done, written where it belongs."""
    result = Result(
        attack=name,
        correct=correct.numpy().astype(bool),
        labels=subject.examples.labels.cpu().numpy().astype(np.int64),
        classes=subject.examples.classes,
        seconds=time.perf_counter() - started + (partial.seconds_before if partial else 0.0),
        settings=facts | changed,
    )
    if subject.folder is not None:
        result.write(subject.folder)
    if partial is not None:
        partial.remove()
    return result
