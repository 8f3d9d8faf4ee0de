"""Tab completion: the words that a command line can go on with, and the shells' scripts for it.

Asked at every Tab, so that nothing heavy is imported.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_type_hints

from btrain.errors import UserError

_BASH = """\
_btrain() {
    local line="${COMP_LINE:0:COMP_POINT}" IFS=$' \\t\\n' word begun one
    local -a typed
    read -a typed <<< "$line"
    case "$line" in *[[:space:]]) typed+=("") ;; esac
    word="${typed[${#typed[@]}-1]}"
    begun="${word%"${word##*[=:]}"}"
    COMPREPLY=()
    while IFS= read -r one; do
        one="${one#"$begun"}"
        case "$one" in *[=/.]) word="" ;; *) word=" " ;; esac
        [[ $one =~ ^[][A-Za-z0-9_./=,:+~-]*$ ]] || printf -v one %q "$one"
        one="$one$word"
        COMPREPLY+=("$one")
    done < <("$1" --complete "${typed[@]:1}" 2>/dev/null)
}
complete -o nospace -F _btrain btrain
"""

_ZSH = """\
_btrain() {
    local -a found
    found=("${(@f)$("${words[1]}" --complete "${(@)words[2,CURRENT]}" 2>/dev/null)}")
    compadd -S '' -- ${(M)found:#*[=/.]}
    compadd -- ${found:#*[=/.]}
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _btrain btrain
"""

_FISH = """\
function __btrain_complete
    set -l typed (commandline -opc) (commandline -ct)
    $typed[1] --complete $typed[2..-1] 2>/dev/null
end
complete -c btrain -f -a '(__btrain_complete)'
"""

_SCRIPTS = {"bash": _BASH, "zsh": _ZSH, "fish": _FISH}


def script(shell: str) -> str:
    """Return what a shell evaluates to complete `btrain`.

    Raises:
        UserError: there is no such shell.
    """
    if shell not in _SCRIPTS:
        raise UserError(f"--completion takes bash, zsh or fish, not {shell or 'nothing'}.")
    return _SCRIPTS[shell]


def candidates(typed: Sequence[str]) -> list[str]:
    """Return what the last word can become, each as the whole word; "" after a space.

    Args:
        typed: the words behind `btrain`. What ends in `=`, `/` or `.` goes on.
    """
    *before, word = typed or [""]
    if not before:
        return _beginning(word, [*_WORDS, "--help", "--version", "--completion"])
    if before[0] == "--completion":
        return _beginning(word, _SCRIPTS)
    if before == ["data"]:
        return _beginning(word, ["corrupt"])
    make = _WORDS.get(before[0])
    if make is None:
        return []
    if before[-1] in ("--config-dir", "-cd"):
        return [f"{path}" for path in _paths(word) if path.endswith("/")]
    key, equals, value = word.partition("=")
    if not equals:
        takes_folders = before[0] == "report" or before[:2] == ["eval", "compare"]
        found = _by_levels(word, make(before[1:]))
        return found + _paths(word) if takes_folders else found
    return [f"{key}={found}" for found in _values(before, key, value)]


def _beginning(word: str, known: Iterable[str]) -> list[str]:
    return sorted(name for name in known if name.startswith(word))


def _by_levels(word: str, known: Iterable[str]) -> list[str]:
    """Return the words that begin so, up to their next dot."""
    level = word.count(".") + 1
    short = (name if name.count(".") < level else ".".join(name.split(".")[:level]) + "."
             for name in known)  # fmt: skip
    return _beginning(word, set(short))


# The words of each command


def _of_train(before: Sequence[str]) -> list[str]:
    from btrain.settings import Config

    flags = ("--help", "--multirun", "--config-dir", "--cfg", "--info")
    return [*flags, *_keys(Config), "hydra/launcher=", "hydra.launcher.n_jobs="]


def _of_data(before: Sequence[str]) -> list[str]:
    from btrain.settings.corrupt import CorruptConfig

    return ["--help", *_keys(CorruptConfig)]


def _of_bench(before: Sequence[str]) -> list[str]:
    from btrain.settings import Config
    from btrain.settings.bench import BenchRun

    return ["--help", "gpu", *_keys(BenchRun), *_keys(Config)]


def _of_eval(before: Sequence[str]) -> list[str]:
    from btrain.settings import evaluation

    if before[:1] == ["compare"]:
        return ["attack="]
    return ["--help", "compare", *(f"{word}=" for word in evaluation.KNOWN)]


def _of_export(before: Sequence[str]) -> list[str]:
    from btrain.exchange.command import KNOWN

    return ["--help", *(f"{word}=" for word in KNOWN)]


def _of_paper(before: Sequence[str]) -> list[str]:
    from btrain.settings.compose import options_of

    own = ("profile=", "out=", "only=", "plan=", "corruptions_root=", "dataset.root=", "device=")
    return ["--help", "all", *options_of("paper/target"), *own]


def _of_report(before: Sequence[str]) -> list[str]:
    return ["--help", "--watch", "--merge-seeds", "target=", "out=", "report.watch="]


_WORDS = {
    "train": _of_train,
    "plan": _of_train,
    "eval": _of_eval,
    "data": _of_data,
    "paper": _of_paper,
    "report": _of_report,
    "export": _of_export,
    "bench": _of_bench,
}


def _keys(schema: type) -> list[str]:
    from btrain.settings.compose import keys_of

    return [f"{key}=" for key in keys_of(schema)]


# Values


def _values(before: Sequence[str], key: str, value: str) -> list[str]:
    """Return what a value can become; of a list with commas its last part."""
    key = key.lstrip("+~")
    named = _named(before, key)
    if named is not None:
        last = re.split(r"[,\[]", value)[-1]
        head = value[: len(value) - len(last)]
        return [f"{head}{name}" for name in _beginning(last, named)]
    return _paths(value) if key.rpartition(".")[2] in _PATHS else []


def _named(before: Sequence[str], key: str) -> Iterable[str] | None:
    """Return the names that a key can have, or None where it takes something else."""
    from btrain.settings.compose import arranged, options_of, user_folder

    if key == "device":
        return ("auto", "cpu", "cuda")
    if key == "hydra/launcher":
        return ("basic", "joblib", "submitit_local", "submitit_slurm")
    if before[0] == "eval" and key in ("attack", "verify", "norm", "precision", "attack.loss"):
        from btrain.settings import evaluation
        from btrain.settings.names import ANY, ENGINES

        lists = {
            "attack": evaluation.ATTACKS,
            "verify": (*ENGINES, ANY),
            "norm": evaluation.NORMS,
            "precision": evaluation.PRECISIONS,
            "attack.loss": evaluation.LOSSES,
        }
        return lists[key]
    if before[0] == "export" and key in ("format", "which"):
        from btrain.exchange.command import FORMATS

        return FORMATS if key == "format" else ("best", "last")
    if before[0] in ("paper", "report") and key in ("profile", "target"):
        return options_of(f"paper/{key}")
    if key in _FLAGS:
        return ("true", "false")
    try:
        folder = user_folder(arranged(before))
    except UserError:
        folder = None
    if "." not in key and (options := options_of(key, folder)):
        return options
    return _of_type(key)


def _of_type(key: str) -> Iterable[str] | None:
    """Return the names of a setting with a few choices."""
    from btrain.settings import Config
    from btrain.settings.bench import BenchRun
    from btrain.settings.compose import OPTIONS

    group, _, leaf = key.partition(".")
    schemas: list[Any] = [OPTIONS[group][1].values()] if group in OPTIONS else []
    for owner in (Config, BenchRun):
        schemas.append([kind] if isinstance(kind := get_type_hints(owner).get(group), type) else [])
    for schema in (schema for found in schemas for schema in found):
        hints = get_type_hints(schema)
        for kind in (hints.get(leaf), *get_args(hints.get(leaf))):
            if kind is bool:
                return ("true", "false")
            if isinstance(kind, type) and issubclass(kind, Enum):
                return [member.name for member in kind]
    return None


_FLAGS = (
    *("sanity", "report", "trust_code", "overwrite", "sub_block1", "model_card", "plan"),
    "report.watch",
)
"""The words besides a run's settings that are true or false."""

_PATHS = (
    *("checkpoint", "out", "corruptions_root", "root", "dir", "weights", "factory"),
    *("frost", "plot"),
)
"""The last parts of keys that take a file or a folder."""


def _paths(word: str) -> list[str]:
    """Return the paths that begin so, folders with a slash behind them; hidden ones if asked."""
    head, tail = os.path.split(word)
    place = Path(head).expanduser() if head else Path()
    found = []
    try:
        for entry in sorted(os.scandir(place), key=lambda entry: entry.name):
            if entry.name.startswith(tail) and (tail or not entry.name.startswith(".")):
                path = f"{word[: len(word) - len(tail)]}{entry.name}"
                found.append(f"{path}/" if entry.is_dir() else path)
    except OSError:
        return []
    return found
