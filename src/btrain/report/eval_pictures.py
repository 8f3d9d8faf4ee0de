"""The parts of an evaluation's page for people who look: curves, heat tables, images."""

from __future__ import annotations

import numpy as np

from btrain.report import figures, html
from btrain.report.eval_files import SEVERITIES, Attack, Corruptions, Samples, Sanity
from btrain.report.html import Markup, element

_SAMPLE_CHARACTERS = 1_200_000
"""Room for sample images, so that a page stays under 2 MB."""


def exact(value: float) -> Markup:
    """A number with two decimals that carries all of them for whoever reads the page by program."""
    return element("data", f"{value:.2f}", value=repr(value))


def length(value: float) -> str:
    """A length in [0, 1] pixel units, also in grey levels of 255: 0.03137 (8/255)."""
    return f"{value:.4g} ({255 * value:.4g}/255)"


def interval_bar(accuracy: float, interval: tuple[float, float] | None) -> Markup:
    """An accuracy and its interval (percent) as a mark on a line from 0 to 100."""
    low, high = interval or (accuracy, accuracy)
    return element(
        "span",
        element("i", style=f"left:{low:.2f}%;width:{high - low:.2f}%"),
        element("b", style=f"left:{accuracy:.2f}%"),
        class_="range",
        aria_hidden="true",
    )


def curves(sanity: Sanity | None, epsilon: float | None) -> Markup:
    """Accuracy against ε, with the attacks' ε marked, and against the number of steps."""
    found = sanity.curves if sanity else {}
    drawn = []
    if points := found.get("epsilon"):
        mark = (epsilon, f"ε = {length(epsilon)}") if epsilon else None
        label = "ε (largest change of a pixel, pixels in [0, 1])"
        drawn.append(_curve(points, "ε", label, logarithmic=False, mark=mark))
    if points := found.get("steps"):
        drawn.append(
            _curve(points, "steps", "attack steps (log scale)", logarithmic=True, mark=None)
        )
    missing = [name for name in ("epsilon", "steps") if name not in found]
    return html.together(
        element("p", f"On the {sanity.n} images of the sanity checks.", class_="soft")
        if drawn and sanity and sanity.n
        else "",
        element("div", *drawn, class_="pair"),
        _absent(f"no curve over {' and '.join(missing)} (sanity.json)") if missing else "",
    )


def _curve(
    points: list[tuple[float, float]],
    name: str,
    label: str,
    *,
    logarithmic: bool,
    mark: tuple[float, str] | None,
) -> Markup:
    points = sorted(points)
    first, last = points[0], points[-1]
    description = (
        f"Accuracy against {name}: {first[1]:.1f} % at {first[0]:g}, {last[1]:.1f} % at {last[0]:g}"
    )
    drawing = figures.accuracy_curve(
        points, x_label=label, logarithmic=logarithmic, mark=mark, description=description
    )
    rows = [
        element("tr", element("td", f"{x:.4g}"), element("td", exact(accuracy)))
        for x, accuracy in points
    ]
    numbers = element(
        "details",
        element("summary", "numbers"),
        html.table([name, "accuracy (%)"], rows, class_="lines narrow"),
    )
    return element("figure", drawing, numbers)


def class_table(attacks: list[Attack]) -> Markup:
    """A row a class, a column an attack."""
    attacks = [attack for attack in attacks if attack.per_class]
    if not attacks:
        return _absent("no accuracy by class")
    counts = {label: n for attack in attacks for label, (_, n) in attack.per_class.items()}
    rows = [
        element(
            "tr",
            element("th", label, scope="row", title=label),
            element("td", str(n), class_="plain"),
            *(_heat_cell(attack.per_class.get(label, (None, 0))[0]) for attack in attacks),
        )
        for label, n in counts.items()
    ]
    head = ["class", "images", *(attack.name for attack in attacks)]
    return html.together(_scale("accuracy"), html.table(head, rows, class_="heat"))


def corruption_table(corruptions: Corruptions | None) -> Markup:
    """A row a corruption, a column a severity from weak to strong, and each row's mean."""
    if corruptions is None:
        return _absent("no corrupted images (corruptions.json)")
    rows = _corruption_rows(corruptions.table)
    if corruptions.extra:
        title = "extra, no part of the means above"
        width = str(SEVERITIES + 2)
        rows.append(element("tr", element("th", title, colspan=width, scope="rowgroup")))
        rows += _corruption_rows(corruptions.extra)
    head = ["severity", *map(str, range(1, SEVERITIES + 1)), "mean"]
    words: list[str] = ["Mean accuracy ", exact(corruptions.accuracy), " %"]
    if corruptions.mce is not None:
        words += [", mCE ", exact(corruptions.mce), " % (100 − mean accuracy, not normalised)"]
    words += [f", {corruptions.n} images." if corruptions.n else "."]
    regenerated = "Regenerated: made by btrain, not the official files; not comparable with them."
    return html.together(
        element("p", *words),
        element("p", regenerated, class_="warning") if corruptions.regenerated else "",
        element("p", corruptions.note, class_="soft") if corruptions.note else "",
        _scale("accuracy"),
        html.table(head, rows, class_="heat"),
    )


def _corruption_rows(table: dict[str, list[float]]) -> list[Markup]:
    return [
        element(
            "tr",
            element("th", name.replace("_", " "), scope="row", title=name),
            *(_heat_cell(accuracy) for accuracy in accuracies),
            element("td", f"{np.mean(accuracies):.1f}", class_="plain"),
        )
        for name, accuracies in table.items()
    ]


def _heat_cell(accuracy: float | None) -> Markup:
    if accuracy is None:
        return element("td", "–", class_="plain")
    number = element("data", f"{accuracy:.1f}", value=repr(accuracy))
    return element("td", number, style=figures.heat(accuracy))


def _scale(of: str) -> Markup:
    strip = element("i", style=figures.heat_scale())
    return element("div", f"{of}: 0", strip, "100 %", class_="scale")


def sample_grid(samples: Samples | None) -> Markup:
    """Clean and adversarial images and their difference, amplified around mid-grey."""
    if samples is None:
        return _absent("no sample images (samples.npz)")
    difference = samples.adversarial - samples.clean
    largest = float(np.abs(difference).max())
    factor = max(1, int(0.5001 / largest)) if largest else 1
    amplified = 0.5 + factor * difference
    cards: list[Markup] = []
    room = _SAMPLE_CHARACTERS
    for i in range(len(samples.clean)):
        card = _sample(samples, i, amplified[i], factor)
        room -= len(card)
        if cards and room < 0:
            break
        cards.append(card)
    shrunk = figures.reduction(samples.clean.shape)
    words = (
        f"The first {len(cards)} of {len(samples.clean)} samples. The largest change of a pixel is "
        f"{length(largest)}; differences are amplified {factor} times around grey, which is no "
        "change."
    )
    if shrunk > 1:
        words += f" Shown at 1/{shrunk} of their size."
    return html.together(
        element("p", words, class_="soft"), element("div", *cards, class_="samples")
    )


def _sample(samples: Samples, i: int, amplified: figures.Picture, factor: int) -> Markup:
    names = samples.class_names
    label = int(samples.labels[i])
    pictures = (
        ("clean", samples.clean[i], int(samples.clean_prediction[i])),
        ("adversarial", samples.adversarial[i], int(samples.adversarial_prediction[i])),
    )
    shown = [
        element(
            "figure",
            html.image(figures.png(picture), f"{kind} image, taken for {names[predicted]}"),
            element(
                "figcaption", kind, element("br"), _prediction(names[predicted], predicted == label)
            ),
        )
        for kind, picture, predicted in pictures
    ]
    difference = element(
        "figure",
        html.image(figures.png(amplified), f"difference, amplified {factor} times"),
        element("figcaption", f"difference × {factor}"),
    )
    return element(
        "div",
        element("h3", f"label: {names[label]}"),
        element("div", *shown, difference, class_="triple"),
        class_="sample",
    )


def _prediction(name: str, right: bool) -> Markup:
    mark, class_ = ("✓", "passed") if right else ("✗", "suspicious")
    return element("span", f"{mark} {name}", class_=class_)


def _absent(what: str) -> Markup:
    return element("p", f"Not measured: {what}.", class_="absent")
