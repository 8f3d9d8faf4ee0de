"""`btrain eval` from its settings to files and a table."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from btrain.data.splits import class_balanced_order
from btrain.durable import check_places, folder_made, real
from btrain.errors import UserError
from btrain.evaluation import attack as attacks
from btrain.evaluation import chain, earlier, verification
from btrain.evaluation.attack import Start, Subject
from btrain.evaluation.autoattack import library, library_norm
from btrain.evaluation.examples import Examples, as_evaluated, near_chance, predictions
from btrain.evaluation.pgd import Pgd, pgd_images
from btrain.evaluation.result import (
    BROKEN,
    PAGE,
    SAMPLES,
    SANITY,
    Evaluation,
    Result,
    Samples,
    Sanity,
    of_a_part,
    versions,
)
from btrain.evaluation.sanity import EXAMPLES, check_sanity
from btrain.evaluation.target import Target, find
from btrain.precision import bf16_hint
from btrain.runs.lock import locked
from btrain.settings.evaluation import AUTOATTACKS, CHAIN, INTERVAL_ATTACKS, EvalSettings
from btrain.terminal import say, tell
from btrain.verify import bounds
from btrain.verify.graph import Graph, trace

_SAMPLES = 12


def evaluate_checkpoint(settings: EvalSettings) -> Evaluation:
    """Run all attacks and checks, leave their files and return what they found.

    An attack that is there already, of the same everything, is not repeated; one that was
    interrupted goes on.

    Raises:
        UserError: bad input (then nothing was written), or a batch that memory does not hold.
    """
    if set(AUTOATTACKS) & set(_names(settings)):
        library()  # rather now than after an hour of PGD
    target = find(settings)
    if settings.precision == "bf16" and (hint := bf16_hint("precision", target.device)):
        say(hint)
    examples = Examples(
        target.data.test.images, target.data.test.labels, target.data.classes, target.device
    )
    if settings.attacks == ["all"] and settings.corruptions_root is None:
        say("Corruptions are left out; dataset.corruptions_root=FOLDER adds a folder of them.")
    try:
        with as_evaluated(target.model, target.device, settings.precision):
            return _evaluate(settings, target, examples)
    except torch.OutOfMemoryError as error:
        raise UserError(
            f"eval.batch_size={settings.batch_size} does not fit into memory; try a smaller one."
        ) from error


def _names(settings: EvalSettings) -> tuple[str, ...]:
    """Return the attacks to be run, but for the clean accuracy, which always is.

    Corruptions come first: they are cheap, and their files may be missing.
    """
    if settings.attacks == ["all"]:
        return CHAIN if settings.corruptions_root is None else ("corruptions", *CHAIN)
    names = [name for name in settings.attacks if name != "clean"]
    return tuple(sorted(names, key=lambda name: name != "corruptions"))


def _results(settings: EvalSettings) -> tuple[str, ...]:
    """Return the names of the results, as their files have them, but for the clean accuracy."""
    every = settings.attacks == ["all"]
    return (*_names(settings), *settings.verified) if every else tuple(settings.results)


def _evaluate(settings: EvalSettings, target: Target, examples: Examples) -> Evaluation:
    model, facts = target.model, _facts(settings, target, examples)
    ball = target.threat(target.epsilon)
    if set(AUTOATTACKS) & set(_names(settings)):
        library_norm(ball)
    told = facts | {"epsilon": target.epsilon, "norm": ball.norm}
    own = settings.out is None
    earlier.found(target.folder, told, own=own)  # ahead of the work
    check_places(_files(settings, target))
    graph = _graph(settings, target) if settings.bounded else None
    started = time.perf_counter()
    correct = attacks.clean_correct(model, examples, batch_size=settings.batch_size)
    seconds = time.perf_counter() - started
    if target.foreign and (hint := near_chance(correct, len(examples.classes))):
        facts["note"] = attacks.notes(facts["note"], hint)
    subject = Subject(
        model=model,
        examples=examples,
        correct=correct,
        epsilon=target.epsilon,
        step_size=target.step_size,
        seed=target.seed,
        batch_size=settings.batch_size,
        threat=target.threat,
        facts=facts,
        folder=target.folder,
        clean_seconds=seconds,
        show_progress=True,
    )
    earlier.set_aside(target.folder, told, own=own)
    with _taken(settings, target.folder):
        return _attacked(settings, subject, graph)


def _graph(settings: EvalSettings, target: Target) -> Graph:
    """Return the network as bounds pass through it.

    Raises:
        UserError: a layer cannot be bounded, or the bounds of one image do not fit into memory.
    """
    graph = trace(target.model, target.data.shape)
    like = target.data.test.images.new_empty(0, dtype=torch.float32)
    interval = set(INTERVAL_ATTACKS) & set(settings.attacks)
    for engine in [*settings.verify, *(["symbolic"] if interval else [])]:
        bounds.check_memory(graph, engine=engine, like=like, memory=settings.memory)
    return graph


def _files(settings: EvalSettings, target: Target) -> list[Path]:
    """Return the files that an evaluation leaves, and those that it keeps meanwhile."""
    found, radii = ("clean", *_results(settings)), {target.epsilon, *settings.radii}
    names = [f"{name}{ending}" for name in found for ending in (".json", ".npz", ".partial.npz")]
    names += [
        verification.partial_file(name, radius) for name in settings.verified for radius in radii
    ]
    names += [SANITY] if settings.sanity else []
    names += [SAMPLES, PAGE] if settings.report else []
    names += [BROKEN]
    return [target.folder / name for name in names]


@contextmanager
def _taken(settings: EvalSettings, folder: Path) -> Iterator[None]:
    """Hold the attacks of a folder for this process alone; others may run other attacks.

    Raises:
        UserError: another process runs one of them, or the folder cannot be written.
    """
    with folder_made(folder), ExitStack() as locks:
        for name in _results(settings) or ("clean",):
            locks.enter_context(locked(folder / f"{name}.lock"))
        yield


def _attacked(settings: EvalSettings, subject: Subject, graph: Graph | None) -> Evaluation:
    assert subject.folder is not None
    results: list[Result] = []
    start = Start(subject.correct)
    names = _names(settings)
    left = [*names, *settings.verified, *(["sanity checks"] if settings.sanity else [])]

    def done(result: Result) -> None:
        """Keep a result, and tell it where others are still to come: each may take minutes."""
        results.append(result)
        del left[0]
        if left:
            tell(f"{result.attack}: {result.accuracy:.2f} %; left: {', '.join(left)}")

    for name in names:
        result = _attack(settings, subject, name, start, graph)
        done(result)
        if settings.attacks == ["all"] and name in CHAIN:
            start = Start(torch.from_numpy(result.correct), name)
    results.insert(0, attacks.clean(subject))
    if graph is not None:
        known: verification.Known = {}
        for engine in settings.verify:
            done(
                verification.verified(
                    subject, graph, engine, settings.radii, known=known, memory=settings.memory
                )
            )
    sanity = _sanity(subject) if settings.sanity else None
    norm = subject.threat(subject.epsilon).norm
    told = subject.facts | {"epsilon": subject.epsilon, "norm": norm}
    chain.check(subject.folder, results, keep=told)
    if settings.report:
        _write_samples(subject)
    found = {result.attack: result.summary for result in results}
    corruptions = found.pop("corruptions", None)
    return Evaluation(subject.folder, [*found.values()], corruptions, sanity)


def _attack(
    settings: EvalSettings, subject: Subject, name: str, start: Start, graph: Graph | None
) -> Result:
    if name in INTERVAL_ATTACKS:
        assert graph is not None
        its, jumping = settings.interval_attack(name)
        return verification.attacked(subject, graph, its, jumping, start, memory=settings.memory)
    if name == "corruptions":
        return _corruptions(settings, subject)
    if name in AUTOATTACKS:
        return attacks.autoattack(subject, name, start)
    return attacks.pgd(subject, *settings.pgd_attack(name), start)


def _corruptions(settings: EvalSettings, subject: Subject) -> Result:
    from btrain.corruptions import CORRUPTIONS, EXTRA_CORRUPTIONS
    from btrain.corruptions.manifest import MANIFEST
    from btrain.corruptions.read import read

    assert settings.corruptions_root is not None
    root = Path(settings.corruptions_root)
    return attacks.corruptions(
        subject,
        root,
        CORRUPTIONS,
        EXTRA_CORRUPTIONS if settings.extra_corruptions else (),
        read=read,
        regenerated=(root / MANIFEST).is_file(),
    )


def _facts(settings: EvalSettings, target: Target, examples: Examples) -> dict[str, Any]:
    """Return what every JSON file says about model, data and machine."""
    config, device, norm = target.config, target.device, target.threat(target.epsilon).norm
    wanted = config.dataset.test_examples
    notes = [target.unfinished] if target.unfinished else []
    if wanted is not None:
        notes.append(of_a_part(wanted))
    if target.trained_norm not in (None, norm):
        notes.append(f"Attacked in {norm}, not in {target.trained_norm} as trained.")
    elif target.trained not in (None, target.epsilon):
        notes.append(f"ε = {target.epsilon:g} is not the trained {target.trained:g}.")
    if settings.precision != "float32":
        notes.append("Attacked and evaluated in bf16, not float32.")
    return {
        "dataset": config.dataset.name.name,
        "test_examples": wanted,
        "data_sha256": examples.sha256(),
        "model": config.model.name,
        **_trained_by(target),
        **target.checkpoint_facts(),
        **target.progress,
        "epsilon_trained": target.trained,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "precision": settings.precision,
        "note": attacks.notes(*notes),
    }


def _trained_by(target: Target) -> dict[str, str]:
    """Return the run's name and how it was trained; nothing of another project's file."""
    if target.run is None:
        return {}
    config = target.config
    defense = f"{config.defense.name.name}, bt={config.bt.name.name}"
    return {"run": real(target.run).name, "defense": defense}


def _some(subject: Subject, count: int) -> torch.Tensor:
    """Return the indices of a class-balanced subset, in the test set's order."""
    order = class_balanced_order(subject.examples.labels.cpu().numpy())
    return torch.from_numpy(order[:count]).sort().values


def _sanity(subject: Subject) -> Sanity:
    some = _some(subject, EXAMPLES)
    sanity = check_sanity(
        subject.model,
        subject.examples.subset(some),
        subject.correct[some],
        epsilon=subject.epsilon,
        seed=subject.seed,
        batch_size=subject.batch_size,
        threat=subject.threat,
        show_progress=subject.show_progress,
    )
    assert subject.folder is not None
    sanity = replace(sanity, broken=some[list(sanity.broken)].tolist())
    facts = subject.facts | {"seed": subject.seed, "versions": versions()}
    sanity.write(subject.folder, facts)
    return sanity


def _write_samples(subject: Subject) -> None:
    """Write a dozen images for people to look at: clean, under PGD-20, and what they pass for."""
    some = subject.examples.subset(_some(subject, _SAMPLES))
    attack = Pgd(subject.epsilon, subject.step_size, 20, seed=subject.seed, threat=subject.threat)
    adversarial = pgd_images(subject.model, some, attack)
    assert subject.folder is not None
    with torch.no_grad():
        adversarial_prediction = subject.model(adversarial).argmax(dim=1)
    Samples(
        clean=some.batch(torch.arange(len(some)))[0].cpu().numpy(),
        adversarial=adversarial.cpu().numpy(),
        labels=some.labels.cpu().numpy(),
        clean_prediction=predictions(subject.model, some, batch_size=_SAMPLES).numpy(),
        adversarial_prediction=adversarial_prediction.cpu().numpy(),
        class_names=list(some.classes),
    ).write(subject.folder)
