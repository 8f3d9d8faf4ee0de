"""The words that were meant by words that are none."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from difflib import SequenceMatcher

_LIKE = 0.6
"""The least likeness, of 1, of a word that may have been meant."""

_GROUPS = ("", "train", "attack", "recipe", "defense", "bt")
"""The groups whose setting is meant first where several have one of that name."""

_ALSO_CALLED = {
    "learning_rate": "lr",
    "eps": "epsilon",
    "wd": "weight_decay",
    "bs": "batch_size",
    "gpu": "device",
}


def meant(key: str, known: Collection[str]) -> str | None:
    """Return the known key nearest to one that is none, or None where no key is near.

    A key of the same last part comes first: `train.lr` is `recipe.lr`, and `lr` is, too.
    """
    group, _, leaf = key.rpartition(".")
    leaf = _ALSO_CALLED.get(leaf, leaf)
    if same := [candidate for candidate in known if candidate.rpartition(".")[2] == leaf]:
        return max(same, key=lambda candidate: _nearness(group, candidate.rpartition(".")[0]))
    best = max(known, key=lambda other: (_likeness(key, other), -_rank(other)), default="")
    return best if _likeness(key, best) >= _LIKE else None


def _nearness(group: str, other: str) -> tuple[float, int]:
    """Return how near a group is to the one that was typed, then how often its settings are set."""
    return (_ratio(group, other, _LIKE) if group else 0.0), -_rank(f"{other}.")


def _rank(key: str) -> int:
    """Return the place of a key's group among those that are meant first."""
    group = key.rpartition(".")[0]
    return _GROUPS.index(group) if group in _GROUPS else len(_GROUPS)


def _likeness(key: str, candidate: str) -> float:
    """Return how like two keys are, of 1: as wholes, or in their last parts; 0 below `_LIKE`."""
    leaves = _ratio(key.rpartition(".")[2], candidate.rpartition(".")[2], _LIKE / 0.8)
    return max(_ratio(key, candidate, _LIKE), 0.8 * leaves)


def _ratio(one: str, other: str, least: float) -> float:
    """Return how like two words are, of 1, or 0 below `least`: most are by length or letters."""
    length = len(one) + len(other)
    if 2 * min(len(one), len(other)) < least * length:
        return 0.0
    matcher = SequenceMatcher(a=one, b=other, autojunk=False)
    if matcher.quick_ratio() < least:
        return 0.0
    ratio = matcher.ratio()
    return ratio if ratio >= least else 0.0


def option(arguments: Sequence[str], known: Collection[str], command: str) -> str:
    """Return a sentence on an argument with dashes that is no option, which comes first.

    Args:
        arguments: the others behind it, of which the next may be its value.
    """
    typed, equals, value = arguments[0].partition("=")
    key = typed.lstrip("-").replace("-", "_")
    key = key if key in known else meant(key, known) or ""
    if not equals and key and len(arguments) > 1 and _is_value(arguments[1]):
        typed, value = f"{typed} {arguments[1]}", arguments[1]
    if not key:
        return f"There is no option {typed}; `{command} --help` lists what there is."
    shown = f"{typed}={value}" if equals else typed
    return f"{shown} is no option; a setting is written without dashes: {key}={value or '…'}."


def _is_value(argument: str) -> bool:
    return "=" not in argument and not argument.startswith("-")


_OPENING, _CLOSING = "[{(", "]})"


def several_words(arguments: Sequence[str]) -> str | None:
    """Return a sentence on a setting with spaces in it, which a shell has made several words of."""
    words: list[str] = []
    for argument in [*arguments, ""]:
        if words and argument and _goes_on(words, argument):
            words.append(argument)
        elif len(words) > 1 and "=" in "".join(words):
            one = "".join(words)
            return f"{' '.join(words)} is {len(words)} words; please leave out the spaces: {one}."
        else:
            words = [argument]
    return None


def _goes_on(words: Sequence[str], argument: str) -> bool:
    """Return whether an argument is the rest of a setting whose first words are given."""
    text = "".join(words)
    if argument.startswith("-"):
        return False
    if argument[0] == "=":
        return "=" not in text
    if argument[0] == "," or argument[0] in _CLOSING:
        return True
    if "=" in argument:
        return False
    is_open = sum(map(text.count, _OPENING)) > sum(map(text.count, _CLOSING))
    return "=" in text and (is_open or text[-1] in ",=")
