"""An evaluation for people: what the terminal shows at its end, and one self-contained page."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from markupsafe import Markup

from btrain.durable import write_file
from btrain.errors import printable
from btrain.evaluation.result import (
    PAGE,
    SEVERITIES,
    SHARES,
    STANDARD,
    Evaluation,
    Samples,
    Sanity,
    Summary,
    of_a_part,
    wilson,
)
from btrain.pages import tables
from btrain.pages.html import number, render
from btrain.pages.tables import NONE, Cell
from btrain.report import pictures
from btrain.runs.json_fields import phrase
from btrain.settings.evaluation import VERIFIED
from btrain.terminal import counted, lasting

_SAMPLE_CHARACTERS = 1_200_000
"""Room for sample images, so that a page stays under 2 MB."""


def describe(evaluation: Evaluation, page: Path | None) -> str:
    """Return the end of an evaluation for the terminal: tables, checks, places of the files."""
    found = [*evaluation.summaries()]
    head = ["attack", "accuracy %", "95 % interval", "n", "ε", "seconds"]
    parts = [tables.text(head, [row for one in found for row in (_line(one), *_others(one))])]
    if evaluation.corruptions is not None:
        parts.append(_corruptions_text(evaluation.corruptions))
    if evaluation.sanity is not None:
        parts.append(_sanity_text(evaluation.sanity))
    notes = dict.fromkeys(str(of.settings["note"]) for of in found if of.settings.get("note"))
    where = f"Written to {evaluation.folder}{f', page {page}' if page else ''}."
    return "\n\n".join([*parts, "\n".join(map(printable, [*notes, where]))])


def _line(found: Summary) -> list[str]:
    epsilon = found.settings.get("epsilon")
    radius = NONE if epsilon is None else f"{epsilon:.4g}"
    return [
        found.attack,
        f"{found.accuracy:.2f}",
        NONE if found.ci95 is None else f"{found.ci95[0]:.2f} to {found.ci95[1]:.2f}",
        str(found.n),
        radius if found.norm == "linf" else f"{found.norm} {radius}",
        NONE if found.seconds is None else f"{found.seconds:.1f}",
    ]


def _others(found: Summary) -> Iterable[list[str]]:
    """Yield a row for each other radius at which was verified."""
    for epsilon, share in found.settings.get(SHARES) or ():
        if epsilon != found.settings.get("epsilon") and found.n:
            low, high = wilson(round(share / 100 * found.n), found.n)
            ends = f"{100 * low:.2f} to {100 * high:.2f}"
            yield [found.attack, f"{share:.2f}", ends, str(found.n), f"{epsilon:.4g}", NONE]


def _corruptions_text(found: Summary) -> str:
    extra = found.settings.get("extra_table") or {}
    rows = [*_severities(found.settings["table"], ".2f")]
    rows += [["extra, no part of the means:"], *_severities(extra, ".2f")] if extra else []
    table = tables.text(["severity", *map(str, range(1, SEVERITIES + 1))], rows)
    return f"{table}\nmean accuracy {found.accuracy:.2f} %, mCE {found.settings['mce']:.2f} %"


def _severities(table: dict[str, list[float]], form: str) -> Iterable[list[str]]:
    return ([name, *(format(value, form) for value in row)] for name, row in table.items())


def _sanity_text(sanity: Sanity) -> str:
    width = max(len(check.name) for check in sanity.checks)
    lines = [
        printable(f"{check.verdict:<10}  {check.name:<{width}}  {check.detail}")
        for check in sanity.checks
    ]
    warning = [printable(sanity.warning)] if sanity.warning else []
    return "\n".join([f"Sanity checks on {counted(sanity.n, 'test image')}:", *lines, *warning])


def write_page(folder: Path) -> Path:
    """Draw `<folder>/index.html` from the folder's `*.json` and `samples.npz`.

    The page loads nothing and runs no script. The same files give the same bytes. A failure leaves
    the page that was there.

    Raises:
        UserError: the folder holds no evaluation, a file in it is damaged, the page cannot be
            written, or matplotlib is missing.
    """
    page = _page(Evaluation.read(folder))
    path = folder / PAGE
    write_file(path, page.encode())
    return path


def _page(evaluation: Evaluation) -> str:
    attacks, sanity, corrupted = evaluation.attacks, evaluation.sanity, evaluation.corruptions
    curves = sanity.curves if sanity else {}
    verified = _verified_curves(attacks)
    epsilons = (a.settings.get("epsilon") for a in attacks if a.attack != "clean")
    return render(
        "btrain.report",
        "evaluation.html",
        title=f"Robustness of {_common(attacks, _fact('run'))}".removesuffix(" of "),
        tiles=_tiles(evaluation),
        facts=_facts(attacks),
        attacks=_attack_table(attacks) if attacks else None,
        missing=[name for name in STANDARD if name not in {a.attack for a in attacks}],
        checks=sanity.checks if sanity else (),
        checks_warning=sanity and sanity.warning,
        marks={"passed": "✓", "suspicious": "⚠", "skipped": NONE},
        curves=_curves(sanity, next(filter(None, epsilons), None), verified),
        missing_curves=[name for name in ("epsilon", "steps") if name not in curves],
        verified=[*verified],
        checked_images=sanity and sanity.n,
        heat_scale=pictures.heat_scale(),
        classes=_class_table(attacks),
        number=number,
        corrupted=corrupted,
        corrupted_note=corrupted and _note(corrupted),
        corruptions=corrupted and _corruption_table(corrupted),
        samples=evaluation.samples and _samples(evaluation.samples),
        files=evaluation.files,
    )


def _tiles(evaluation: Evaluation) -> list[tuple[str, str]]:
    """Return the few numbers for one glance, with their labels."""
    tiles = []
    clean = [a for a in evaluation.attacks if a.attack == "clean"]
    verified = [a for a in evaluation.attacks if a.attack.startswith(VERIFIED)]
    others = [a for a in evaluation.attacks if a not in (*clean, *verified)]
    if clean:
        tiles.append((f"{clean[0].accuracy:.2f} %", "accuracy on clean images"))
    if others:
        lowest = min(others, key=lambda a: a.accuracy)
        tiles.append((f"{lowest.accuracy:.2f} %", f"at the lowest, under {lowest.attack}"))
    if verified:
        most = max(verified, key=lambda a: a.accuracy)
        engine = most.attack.removeprefix(VERIFIED)
        tiles.append((f"{most.accuracy:.2f} %", f"verified at the most, by {engine}"))
    if evaluation.corruptions:
        tiles.append((f"{evaluation.corruptions.accuracy:.2f} %", "on corrupted images, mean"))
    if evaluation.sanity:
        outcomes = [check.passed for check in evaluation.sanity.checks]
        skipped = outcomes.count(None)
        label = "sanity checks passed" + (f", {skipped} skipped" if skipped else "")
        label += ", which says nothing at chance" if evaluation.sanity.warning else ""
        tiles.append((f"{outcomes.count(True)} of {len(outcomes) - skipped}", label))
    return tiles


def _facts(attacks: list[Summary]) -> list[tuple[str, str]]:
    attacked = [attack for attack in attacks if attack.attack != "clean"]
    return [
        ("run", _common(attacks, _fact("run"))),
        ("network", _common(attacks, _fact("model"))),
        ("defense", _common(attacks, _fact("defense"))),
        ("data", _common(attacks, _fact("dataset"))),
        ("images", _common(attacks, _images)),
        ("note", _of_all(attacks) or ""),
        ("checkpoint", _common(attacks, _fact("checkpoint"))),
        ("ε", _common(attacked, _epsilon)),
        ("seed", _common(attacks, _fact("seed"))),
        ("device", _common(attacks, _fact("device"))),
        ("precision", _common(attacks, _precision)),
        ("versions", _common(attacks, _fact("versions"))),
    ]


_Fact = Callable[[Summary], str | None]


def _common(attacks: list[Summary], fact: _Fact) -> str:
    """Return a fact of all attacks; where they differ, every value with those it belongs to."""
    attacks_of: dict[str, list[str]] = {}
    for attack in attacks:
        if value := fact(attack):
            attacks_of.setdefault(value, []).append(attack.attack)
    if len(attacks_of) == 1:
        return next(iter(attacks_of))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in attacks_of.items())


def _fact(key: str) -> _Fact:
    """Return the function that finds a setting of an attack, in words."""

    def found(attack: Summary) -> str | None:
        value = attack.settings.get(key)
        return None if value is None else phrase(value)

    return found


def _epsilon(attack: Summary) -> str | None:
    epsilon = attack.settings.get("epsilon")
    if not epsilon:
        return None
    return _length(epsilon) if attack.norm == "linf" else f"{attack.norm} {_length(epsilon)}"


def _images(attack: Summary) -> str:
    wanted = attack.settings.get("test_examples")
    if wanted is None:
        return f"{attack.n}, the whole test set"
    return f"{attack.n}, not the whole test set (dataset.test_examples={wanted})"


def _precision(attack: Summary) -> str | None:
    precision = _fact("precision")(attack)
    return precision if precision in (None, "float32") else f"{precision}, not float32"


def _length(value: float) -> str:
    """Return a length in [0, 1] pixel units, also in grey levels of 255: 0.03137 (8/255)."""
    return f"{value:.4g} ({255 * value:.4g}/255)"


def _note(attack: Summary) -> str:
    """Return an attack's note, without what the page's facts say of the images."""
    note = _fact("note")(attack) or ""
    n = attack.settings.get("test_examples")
    return note if n is None else note.replace(of_a_part(n), "").strip()


def _of_all(attacks: list[Summary]) -> str | None:
    """Return the note that all attacks of a page have and that then stands once, or None."""
    notes = {_note(attack) for attack in attacks}
    return notes.pop() if len(attacks) > 1 and len(notes) == 1 else None


def _attack_table(attacks: list[Summary]) -> Markup:
    head = ["attack", "accuracy (%)", "95 % interval", "0 to 100 %"]
    head += ["steps", "restarts", "step size", "loss", "time"]
    shared = _of_all(attacks) is not None
    rows = [_attack_row(attack, "" if shared else _note(attack)) for attack in attacks]
    return tables.html(head, rows, "lines")


def _attack_row(attack: Summary, note: str) -> list[Cell | str]:
    low, high = attack.ci95 or (attack.accuracy, attack.accuracy)
    interval = Markup("{} to {}").format(number(low), number(high)) if attack.ci95 else NONE
    bar = Markup(
        '<span class="range" aria-hidden="true"><i style="left:{:.2f}%;width:{:.2f}%"></i>'
        '<b style="left:{:.2f}%"></b></span>'
    ).format(low, high - low, attack.accuracy)
    return [
        Cell(attack.attack, small=note),
        Markup("<strong>{}</strong>").format(number(attack.accuracy)),
        interval,
        bar,
        *(
            NONE if (value := attack.settings.get(key)) is None else f"{value:g}"
            for key in ("steps", "restarts", "step_size")
        ),
        _fact("loss")(attack) or NONE,
        NONE if attack.seconds is None else lasting(attack.seconds),
    ]


_Points = list[tuple[float, float]]


def _verified_curves(attacks: list[Summary]) -> dict[str, _Points]:
    """Return the verified share over ε by engine, which at 0 is the clean accuracy."""
    clean = [(0.0, found.accuracy) for found in attacks if found.attack == "clean"]
    return {
        found.attack.removeprefix(VERIFIED): [*clean, *map(tuple, found.settings[SHARES])]
        for found in attacks
        if found.settings.get(SHARES)
    }


def _curves(
    sanity: Sanity | None, epsilon: float | None, verified: dict[str, _Points]
) -> list[tuple[Markup, Markup]]:
    """Return accuracy against ε, with the attacks' ε marked, and against the number of steps."""
    mark = (epsilon, f"ε = {_length(epsilon)}") if epsilon else None
    drawn, curves = [], sanity.curves if sanity else {}
    attacked = curves.get("epsilon")
    if attacked or verified:
        norm = sanity.norm if sanity else "linf"
        known = {"linf": "largest change of a pixel", "l2": "length of the change"}
        label = f"ε ({known.get(norm, norm)}, pixels in [0, 1])"
        named = {f"verified, {engine}": points for engine, points in verified.items()}
        lines = ({"attacked" if verified else "": attacked} if attacked else {}) | named
        drawn.append(_curve(lines, "ε", label, mark=mark))
    if points := curves.get("steps"):
        steps = {"": points}
        drawn.append(_curve(steps, "steps", "attack steps (log scale)", logarithmic=True))
    return drawn


def _curve(
    lines: dict[str, _Points],
    name: str,
    label: str,
    *,
    logarithmic: bool = False,
    mark: tuple[float, str] | None = None,
) -> tuple[Markup, Markup]:
    """Return a drawing of lines by their names, and a table of their points."""
    lines = {line: sorted(points) for line, points in lines.items()}
    ends = [
        f"{f'{line} ' if line else ''}{accuracy:.1f} % at {x:g}"
        for line, points in lines.items()
        for x, accuracy in (points[0], points[-1])
    ]
    drawing = pictures.accuracy_curve(
        lines,
        x_label=label,
        logarithmic=logarithmic,
        mark=mark,
        description=f"Accuracy against {name}: {', '.join(ends)}",
    )
    if not any(lines):
        rows = [[f"{x:.4g}", number(y)] for points in lines.values() for x, y in points]
        return drawing, tables.html([name, "accuracy (%)"], rows, "lines narrow", named=False)
    by_x = {line: dict(points) for line, points in lines.items()}
    places = sorted({x for points in by_x.values() for x in points})
    rows = [
        [f"{x:.4g}", *(NONE if (y := of.get(x)) is None else number(y) for of in by_x.values())]
        for x in places
    ]
    return drawing, tables.html([name, *by_x], rows, "lines narrow", named=False)


def _class_table(attacks: list[Summary]) -> Markup | None:
    """Return a row a class, a column an attack."""
    attacks = [attack for attack in attacks if attack.per_class]
    counts = {name: of["n"] for attack in attacks for name, of in attack.per_class.items()}
    rows = [
        [
            Cell(name, title=name),
            Cell(str(count), kind="plain"),
            *(_heat_cell(attack.per_class.get(name, {}).get("accuracy")) for attack in attacks),
        ]
        for name, count in counts.items()
    ]
    head = ["class", "images", *(attack.attack for attack in attacks)]
    return tables.html(head, rows, "heat") if rows else None


def _corruption_table(found: Summary) -> Markup:
    """Return a row a corruption, a column a severity from weak to strong, and each row's mean."""
    rows = _corruption_rows(found.settings["table"])
    if extra := found.settings.get("extra_table"):
        rows += [["extra, no part of the means above"], *_corruption_rows(extra)]
    head = ["severity", *map(str, range(1, SEVERITIES + 1)), "mean"]
    return tables.html(head, rows, "heat")


def _corruption_rows(table: dict[str, list[float]]) -> list[list[Cell | str]]:
    return [
        [
            Cell(name.replace("_", " "), title=name),
            *map(_heat_cell, accuracies),
            Cell(f"{np.mean(accuracies):.1f}", kind="plain"),
        ]
        for name, accuracies in table.items()
    ]


def _heat_cell(accuracy: float | None) -> Cell:
    if accuracy is None:
        return Cell(NONE, kind="plain")
    return Cell(number(accuracy, ".1f"), style=pictures.heat(accuracy))


def _samples(samples: Samples) -> dict[str, Any]:
    """Return clean and adversarial images and their difference, amplified around mid-grey."""
    difference = samples.adversarial - samples.clean
    largest = float(np.abs(difference).max())
    factor = max(1, int(0.5001 / largest)) if largest else 1
    cards: list[Markup] = []
    room = _SAMPLE_CHARACTERS
    for i in range(len(samples.clean)):
        card = _sample(samples, i, 0.5 + factor * difference[i], factor)
        room -= len(card)
        if cards and room < 0:
            break
        cards.append(card)
    return {
        "cards": cards,
        "count": len(samples.clean),
        "largest": _length(largest),
        "factor": factor,
        "shrunk": pictures.reduction(samples.clean.shape),
    }


def _sample(samples: Samples, i: int, amplified: pictures.Picture, factor: int) -> Markup:
    names, label = samples.class_names, int(samples.labels[i])
    shown = (
        ("clean", samples.clean[i], int(samples.clean_prediction[i])),
        ("adversarial", samples.adversarial[i], int(samples.adversarial_prediction[i])),
    )
    return render(
        "btrain.report",
        "sample.html",
        label=names[label],
        pictures=[
            (kind, pictures.png(image), names[predicted], predicted == label)
            for kind, image, predicted in shown
        ],
        difference=pictures.png(amplified),
        factor=factor,
    )
