"""Verified accuracy and the interval attack as results beside those of other attacks."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from tqdm import tqdm

from btrain.evaluation.attack import Start, Subject, attack_facts, finished, identity, kept
from btrain.evaluation.examples import batches
from btrain.evaluation.result import SHARES, Result
from btrain.evaluation.worst_case import Partial, worst_case
from btrain.settings.evaluation import INTERVAL_ATTACKS, VERIFIED
from btrain.verify import accuracy, interval_attack
from btrain.verify.graph import Graph, trace


def unfinished(name: str, radius: float) -> str:
    """Return the name of the file that keeps what an engine has verified at a radius so far."""
    return f"{name}-{radius!r}.partial.npz"


def verified(subject: Subject, graph: Graph, engine: str, radii: Sequence[float] = ()) -> Result:
    """Return which images an engine verifies at the subject's ε, and how many at other radii.

    An image is verified if no image within ε (L∞) and within [0, 1] can be misclassified. One that
    is verified at a radius is so at smaller ones, and is not asked for at larger ones if it was not
    at this: shares fall with the radius. Interrupted, the same call goes on where it was.

    Args:
        radii: in [0, 1] pixel units, rising.
    """
    name, started = VERIFIED + engine.replace("+", "-"), time.perf_counter()
    facts = attack_facts(subject, Start(subject.correct)) | {"engine": engine}
    told = facts | ({"radii": list(radii)} if radii else {})
    if (there := kept(subject, name, told)) is not None:
        return there
    begun: list[Partial] = []

    def among(candidates: Tensor, epsilon: float) -> Tensor:
        """Return which of the candidates are verified at a radius, (n,) bool."""

        def open_(_: int, some: Tensor) -> Tensor:
            x, labels = subject.examples.batch(some)
            (verdict,) = accuracy.verify(
                subject.model, x, labels, epsilon=epsilon, engines=[engine], graph=graph
            )
            return ~verdict.verified

        if subject.folder is not None:
            path = subject.folder / unfinished(name, epsilon)
            begun.append(Partial(path, identity(facts) | {"radius": epsilon}))
        return worst_case(
            open_,
            candidates,
            rounds=[f"{name}, ε = {epsilon:.4g}"],
            batch_size=subject.batch_size,
            partial=begun[-1] if begun else None,
            show_progress=subject.show_progress,
        )

    before = kept(subject, name, facts) if radii else None
    at = subject.epsilon
    sound = {at: torch.from_numpy(before.correct) if before else among(subject.correct, at)}
    for epsilon in (radius for radius in reversed(radii) if radius < at):
        larger = sound[min(known for known in sound if known > epsilon)]
        sound[epsilon] = larger | among(subject.correct & ~larger, epsilon)
    for epsilon in (radius for radius in radii if radius > at):
        sound[epsilon] = among(sound[max(known for known in sound if known < epsilon)], epsilon)
    if radii:
        told[SHARES] = [[e, 100 * sound[e].double().mean().item()] for e in sorted(sound)]
    seconds = sum(partial.seconds_before for partial in begun)
    result = finished(subject, name, told, sound[at], started - seconds)
    for partial in begun:
        partial.remove()
    return result


def attacked(subject: Subject, graph: Graph, name: str, start: Start) -> Result:
    """Return what stands under the interval attack, CW between its jumps."""
    started, restarts = time.perf_counter(), INTERVAL_ATTACKS[name]
    facts = attack_facts(subject, start) | {"restarts": restarts, "loss": "cw", "steps": 40}
    if (there := kept(subject, name, facts)) is not None:
        return there
    stands = start.stands.clone()
    generator = torch.Generator().manual_seed(subject.seed)
    for some in tqdm(
        list(batches(start.stands.nonzero().squeeze(1), subject.batch_size)), name, leave=False,
        disable=None if subject.show_progress else True,
    ):  # fmt: skip
        x, labels = subject.examples.batch(some)
        found = interval_attack.attack(
            subject.model, x, labels, epsilon=subject.epsilon, graph=graph, restarts=restarts,
            generator=generator,
        )  # fmt: skip
        stands[some] = _right(subject.model, found, labels)
    return finished(subject, name, facts, stands, started)


@torch.no_grad()
def _right(model: nn.Module, x: Tensor, labels: Tensor) -> Tensor:
    right: Tensor = model(x).argmax(dim=1) == labels
    return right.cpu()


def graph_of(subject: Subject) -> Graph:
    """Return the network as bounds pass through it.

    Raises:
        UserError: a layer cannot be bounded.
    """
    return trace(subject.model, tuple(subject.examples.batch(torch.tensor([0]))[0].shape[1:]))
