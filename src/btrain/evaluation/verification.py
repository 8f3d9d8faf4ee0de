"""Verified accuracy and the interval attack as results beside those of other attacks."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor

from btrain.evaluation.attack import (
    Start,
    Subject,
    attack_facts,
    finished,
    identity,
    kept,
    unfinished,
)
from btrain.evaluation.autoattack import BATCH, InParts
from btrain.evaluation.result import SHARES, Result
from btrain.evaluation.worst_case import Partial, worst_case
from btrain.settings.evaluation import VERIFIED, IntervalSettings
from btrain.verify import accuracy, bounds, interval_attack
from btrain.verify.graph import Graph


def partial_file(name: str, radius: float) -> str:
    """Return the name of the file that keeps what an engine has verified at a radius so far."""
    return f"{name}-{radius!r}.partial.npz"


Known = dict[tuple[str, float], Tensor]
"""Verdicts by engine and radius, (n,) bool on the CPU."""


def verified(
    subject: Subject,
    graph: Graph,
    engine: str,
    radii: Sequence[float] = (),
    *,
    known: Known | None = None,
    memory: int = bounds.MEMORY,
) -> Result:
    """Return which images an engine verifies at the subject's ε, and how many at other radii.

    An image is verified if no image within ε (L∞) and within [0, 1] can be misclassified.
    Interrupted, the same call goes on where it was.

    Args:
        radii: in [0, 1] pixel units, rising.
        known: verdicts on the same images; what a member has verified its union is spared. Those
            that are found are added.
        memory: that the bounds take, in bytes, about.
    """
    name, started = VERIFIED + engine.replace("+", "-"), time.perf_counter()
    at, known = subject.epsilon, {} if known is None else known
    facts = attack_facts(subject, Start(subject.correct)) | {
        "engine": engine,
        "bounds": bounds.REVISION,
    }
    told = facts | ({"radii": list(radii)} if radii else {})
    there = kept(subject, name, told)
    before = there or (kept(subject, name, facts) if radii else None)
    if before is not None:
        known[engine, at] = torch.from_numpy(before.correct)
    if there is not None:
        return there
    asked = _Asked(subject, graph, engine, name, facts, known, memory)
    found = _at_all(asked, radii)
    if radii:
        told[SHARES] = [[e, 100 * found[e].double().mean().item()] for e in sorted(found)]
    seconds = sum(partial.seconds_before for partial in asked.begun)
    seconds += 0.0 if before is None else before.seconds
    result = finished(subject, name, told, found[at], started - seconds)
    for partial in asked.begun:
        partial.remove()
    return result


@dataclass
class _Asked:
    """An engine that is asked for its verdicts, radius by radius.

    Attributes:
        name, facts: of the result.
        begun: the files of what it has said so far.
    """

    subject: Subject
    graph: Graph
    engine: str
    name: str
    facts: dict[str, Any]
    known: Known
    memory: int
    begun: list[Partial] = field(default_factory=list)

    def among(self, candidates: Tensor, epsilon: float) -> Tensor:
        """Return which of the candidates are verified at a radius, (n,) bool."""
        already = self._already(epsilon)

        def open_(_: int, some: Tensor) -> Tensor:
            sound = already[some]
            if len(asked := some[~sound]):
                x, labels = self.subject.examples.batch(asked)
                (verdict,) = accuracy.verify(
                    self.subject.model, x, labels, epsilon=epsilon, engines=[self.engine],
                    graph=self.graph, memory=self.memory,
                    correct=torch.ones_like(labels, dtype=torch.bool),
                )  # fmt: skip
                sound[~sound] = verdict.verified.cpu()
            return ~sound

        partial = None
        if self.subject.folder is not None:
            path = self.subject.folder / partial_file(self.name, epsilon)
            partial = Partial(path, identity(self.facts) | {"radius": epsilon})
            self.begun.append(partial)
        found = worst_case(
            open_,
            candidates,
            rounds=[f"{self.name}, ε = {epsilon:.4g}"],
            batch_size=self.subject.batch_size,
            partial=partial,
            show_progress=self.subject.show_progress,
        )
        self.known[self.engine, epsilon] = found
        return found

    def _already(self, epsilon: float) -> Tensor:
        """Return which images its members, or itself at a larger radius, have verified."""
        members, already = set(bounds.engines(self.engine)), torch.zeros_like(self.subject.correct)
        for (engine, radius), verdict in self.known.items():
            if radius >= epsilon and set(bounds.engines(engine)) <= members:
                already |= verdict
        return already


def _at_all(asked: _Asked, radii: Sequence[float]) -> dict[float, Tensor]:
    """Return the verdicts at the subject's ε and at the radii, which rise.

    One that is verified at a radius is so at smaller ones, and is not asked for at larger ones if
    it was not at this: shares fall with the radius.
    """
    at, correct = asked.subject.epsilon, asked.subject.correct
    before = asked.known.get((asked.engine, at))
    sound = {at: before if before is not None else asked.among(correct, at)}
    for epsilon in (radius for radius in reversed(radii) if radius < at):
        sound[epsilon] = asked.among(correct, epsilon)
    for epsilon in (radius for radius in radii if radius > at):
        sound[epsilon] = asked.among(sound[max(r for r in sound if r < epsilon)], epsilon)
    return sound


def attacked(
    subject: Subject,
    graph: Graph,
    name: str,
    settings: IntervalSettings,
    start: Start,
    *,
    memory: int = bounds.MEMORY,
) -> Result:
    """Return what stands under the interval attack, by default with CW between its jumps.

    Random starts are drawn for batches of `BATCH` images, from the same seed for each, whatever
    goes through the network at once.
    """
    started, usual = time.perf_counter(), IntervalSettings()
    others = [key for key, value in asdict(settings).items() if value != getattr(usual, key)]
    told = {key: getattr(settings, key) for key in ("restarts", "loss", "steps", *others)}
    if settings.restarts > 1:  # else nothing is drawn, and results of other batches are the same
        told["batch"] = BATCH
    facts = attack_facts(subject, start) | told
    if (there := kept(subject, name, facts)) is not None:
        return there
    network, partial = InParts(subject.model, subject.batch_size), unfinished(subject, name, facts)

    def fooled(_: int, some: Tensor) -> Tensor:
        x, labels = subject.examples.batch(some)
        found = interval_attack.attack(
            network, x, labels, epsilon=subject.epsilon,
            loss="pgd" if settings.loss == "ce" else "cw", graph=graph, steps=settings.steps,
            step_size=settings.step_size, restarts=settings.restarts, jumps=settings.jumps,
            jump=settings.jump, radius=settings.radius, memory=memory,
            generator=torch.Generator().manual_seed(subject.seed),
        )  # fmt: skip
        return ~accuracy.right(network, found, labels)

    stands = worst_case(
        fooled,
        start.stands,
        rounds=[name],
        batch_size=BATCH,
        partial=partial,
        show_progress=subject.show_progress,
    )
    return finished(subject, name, facts, stands, started, partial)
