"""One self-contained HTML page of an evaluation: what was measured, what was not, and pictures."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from btrain.durable import write_file
from btrain.report import eval_pictures, html
from btrain.report.eval_files import STANDARD, Attack, Check, Evaluation, read
from btrain.report.html import Markup, element


def write_page(folder: Path) -> Path:
    """Draws `<folder>/index.html` from the folder's `*.json` and `samples.npz`.

    The page loads nothing and runs no script. The same files give the same bytes. A failure leaves
    the page that was there.

    Raises:
        UserError: the folder holds no evaluation, a file in it is damaged, the page cannot be
            written, or matplotlib is missing.
    """
    evaluation = read(folder)
    path = folder / "index.html"
    write_file(path, _page(evaluation).encode())
    return path


def _page(evaluation: Evaluation) -> str:
    attacks, sanity = evaluation.attacks, evaluation.sanity
    epsilon = next((a.epsilon for a in attacks if a.name != "clean" and a.epsilon), None)
    checkpoint = _common(attacks, lambda a: a.facts.get("checkpoint"))
    return html.page(
        f"Robustness evaluation {checkpoint}".strip(),
        element("h1", "Robustness evaluation"),
        _tiles(evaluation),
        _facts(attacks),
        element("h2", "Attacks"),
        _attack_table(attacks),
        element("h2", "Sanity checks"),
        _checks(sanity.checks if sanity else []),
        element("h2", "Accuracy against attack strength"),
        eval_pictures.curves(sanity, epsilon),
        element("h2", "Accuracy by class"),
        eval_pictures.class_table(attacks),
        element("h2", "Corrupted images"),
        eval_pictures.corruption_table(evaluation.corruptions),
        element("h2", "Images"),
        eval_pictures.sample_grid(evaluation.samples),
        element("footer", f"Made by btrain from {', '.join(evaluation.files)}."),
    )


def _tiles(evaluation: Evaluation) -> Markup:
    """The few numbers that somebody with one glance should take away."""
    tiles = []
    clean = [a for a in evaluation.attacks if a.name == "clean"]
    others = [a for a in evaluation.attacks if a.name != "clean"]
    if clean:
        tiles.append((_percent(clean[0].accuracy), "accuracy on clean images"))
    if others:
        lowest = min(others, key=lambda a: a.accuracy)
        tiles.append((_percent(lowest.accuracy), f"at the lowest, under {lowest.name}"))
    if evaluation.corruptions:
        tiles.append((_percent(evaluation.corruptions.accuracy), "on corrupted images, mean"))
    if evaluation.sanity:
        outcomes = [check.passed for check in evaluation.sanity.checks]
        skipped = outcomes.count(None)
        label = "sanity checks passed" + (f", {skipped} skipped" if skipped else "")
        tiles.append((f"{outcomes.count(True)} of {len(outcomes) - skipped}", label))
    return element(
        "div",
        *(element("div", element("b", value), label, class_="tile") for value, label in tiles),
        class_="tiles",
    )


def _facts(attacks: list[Attack]) -> Markup:
    attacked = [attack for attack in attacks if attack.name != "clean"]
    facts = {
        "data": _common(attacks, lambda a: a.facts.get("dataset")),
        "images": _common(attacks, _images),
        "checkpoint": _common(attacks, lambda a: a.facts.get("checkpoint")),
        "ε": _common(attacked, lambda a: a.epsilon and eval_pictures.length(a.epsilon)),
        "seed": _common(attacks, lambda a: a.facts.get("seed")),
        "device": _common(attacks, lambda a: a.facts.get("device")),
        "precision": _common(attacks, _precision),
        "versions": _common(attacks, lambda a: a.facts.get("versions")),
    }
    return element(
        "dl",
        *(
            html.together(element("dt", name), element("dd", value))
            for name, value in facts.items()
            if value
        ),
    )


def _common(attacks: list[Attack], fact: Callable[[Attack], str | float | None]) -> str:
    """A fact of all attacks; where they differ, every value with the attacks it belongs to."""
    attacks_of: dict[str, list[str]] = {}
    for attack in attacks:
        if value := fact(attack):
            attacks_of.setdefault(str(value), []).append(attack.name)
    if len(attacks_of) == 1:
        return next(iter(attacks_of))
    return "; ".join(f"{value} ({', '.join(names)})" for value, names in attacks_of.items())


def _images(attack: Attack) -> str:
    if attack.test_examples is None:
        return f"{attack.n}, the whole test set"
    return f"{attack.n}, not the whole test set (dataset.test_examples={attack.test_examples})"


def _precision(attack: Attack) -> str | None:
    precision = attack.facts.get("precision")
    return precision if precision in (None, "float32") else f"{precision}, not float32"


def _attack_table(attacks: list[Attack]) -> Markup:
    missing = [name for name in STANDARD if name not in {attack.name for attack in attacks}]
    absent = element("p", f"Not measured: {', '.join(missing)}.", class_="absent")
    if not attacks:
        return absent
    head = [
        "attack",
        "accuracy (%)",
        "95 % interval",
        "0 to 100 %",
        "steps",
        "restarts",
        "step size",
        "loss",
        "time",
    ]
    table = html.table(head, [_attack_row(attack) for attack in attacks], class_="lines")
    return html.together(table, absent if missing else "")


def _attack_row(attack: Attack) -> Markup:
    low, high = attack.ci95 or (None, None)
    interval = (
        html.together(eval_pictures.exact(low), " to ", eval_pictures.exact(high))
        if low is not None and high is not None
        else "–"
    )
    note = element("small", attack.note) if attack.note else ""
    return element(
        "tr",
        element("th", attack.name, note, scope="row"),
        element("td", element("strong", eval_pictures.exact(attack.accuracy))),
        element("td", interval),
        element("td", eval_pictures.interval_bar(attack.accuracy, attack.ci95)),
        element("td", _or_dash(attack.steps)),
        element("td", _or_dash(attack.restarts)),
        element("td", _or_dash(attack.step_size)),
        element("td", attack.loss or "–"),
        element("td", "–" if attack.seconds is None else duration(attack.seconds)),
    )


def _checks(checks: list[Check]) -> Markup:
    if not checks:
        return element("p", "Not measured: no sanity checks (sanity.json).", class_="absent")
    words = {True: "✓ passed", False: "⚠ suspicious", None: "– skipped"}
    classes = {True: "passed", False: "suspicious", None: "skipped"}
    suspicious = any(check.passed is False for check in checks)
    lines = [
        element(
            "li",
            element("span", words[check.passed], class_=classes[check.passed]),
            element("span", check.name),
            element("small", check.detail) if check.detail else "",
        )
        for check in checks
    ]
    warning = element(
        "p",
        "A suspicious check can mean that gradients are masked and that the accuracies above are "
        "too high.",
        class_="warning",
    )
    return html.together(
        warning if suspicious else "",
        element("ul", *lines, class_="checks"),
    )


def duration(seconds: float) -> str:
    """Seconds as people say them: 0.42 s, 12 s, 3 min 05 s, 2 h 10 min."""
    if seconds < 10:
        return f"{seconds:.2g} s"
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left:02} min" if hours else f"{minutes} min {rest:02} s"


def _percent(value: float) -> str:
    return f"{value:.2f} %"


def _or_dash(value: float | None) -> str:
    return "–" if value is None else f"{value:g}"
