"""`--help` of the commands that Hydra composes: each setting as it is typed, with what it means.

The words are the comments of the YAML files, so that they stand in one place.
"""

from __future__ import annotations

import re
import shutil
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from btrain.errors import UserError, first_line
from btrain.settings import compose as configs
from btrain.settings.checks import typed
from btrain.untrusted import read_text

_WIDTH = 34
_LARGEST = 1 << 16  # bytes of a YAML file
_NAMES = ("name", "architecture", "network")
"""Settings that tell which option was chosen; they cannot be set."""


def help_text(
    arguments: Sequence[str], task: str = "train", told: configs.Task | None = None
) -> str:
    """Return a command's `--help`: every option and setting, or those of one group.

    Args:
        arguments: the words of the command line; a word that is no option and no setting, `attack`
            in `--help attack`, names the one group. Options that are given are in force.
        told: the command and its summary, where they are not the task's own.

    Raises:
        UserError: an override is wrong, or there is no such group.
    """
    from omegaconf import OmegaConf

    overrides = [word for word in arguments if "=" in word and not word.startswith("-")]
    folder = configs.user_folder(arguments)
    cfg = configs.composed(overrides, task, folder)
    groups = groups_of(task)
    sections = {str(key): node for key, node in OmegaConf.to_container(cfg).items()}  # type: ignore[union-attr]
    wanted = [word for word in arguments if word in groups or word in sections]
    stray = [word for word in arguments if re.fullmatch(r"[a-z_]\w*", word) and word not in wanted]
    if stray and stray[0] != folder:
        raise UserError(f"There is no group {stray[0]}; there are: {', '.join(groups)}.")
    shown = wanted or [*groups, *(key for key in sections if key not in groups)]
    told = told or configs.TASKS[task]
    head = f"btrain {told.command} [option=value …]\n  {told.summary}\n"
    text = "".join(
        _section(key, sections.get(key), cfg, key in groups, folder, task, full=bool(wanted))
        for key in shown
        if key != "hydra"
    )
    more = textwrap.fill(_MORE.format(command=told.command), _columns())
    return f"{'' if wanted else head}{text}\n{more}\n"


def groups_of(task: str) -> list[str]:
    """Return the groups of options of a task, in the order in which they are put together."""
    defaults = configs.read_yaml(Path(configs.config_dir()) / f"{task}.yaml")["defaults"]
    return [group for entry in defaults if isinstance(entry, dict) for group in entry]


class Group(NamedTuple):
    """The options of a group and the settings of the one in force, each with its meaning.

    Attributes:
        options: `(name, first sentence of its file)`; none where the group has no options.
        settings: `(name, value as it is typed, meaning)`.
    """

    options: list[tuple[str, str]]
    settings: list[tuple[str, str, str]]


def group_of(key: str, task: str = "train") -> Group:
    """Return what `--help <key>` tells, for another layout than the terminal's."""
    from omegaconf import OmegaConf

    cfg = configs.composed([], task, None)
    node = OmegaConf.to_container(cfg).get(key)  # type: ignore[union-attr]
    is_group = key in groups_of(task)
    options = configs.options_of(key, None) if is_group else ()
    told = comments(key, (_chosen(node, options) or "") if is_group else None, None, task)
    return Group(
        [(option, _headline(key, option, None)) for option in options],
        list(_settings(key, node, cfg, told, is_group)),
    )


def _settings(
    key: str, node: Any, cfg: Any, told: Mapping[str, str], is_group: bool
) -> Iterator[tuple[str, str, str]]:
    """Yield each setting of a group, its value as it is typed, and its meaning."""
    for name, raw in _leaves(key, node or {}):
        if not (is_group and name.rpartition(".")[2] in _NAMES):
            yield name, _shown(cfg, name, raw), told.get(name, "")


def _section(
    key: str, node: Any, cfg: Any, is_group: bool, folder: str | None, task: str, *, full: bool
) -> str:
    """Return the lines of a group, or of a setting that stands alone; `full` tells its options."""
    told = comments(key, None, folder, task)
    if not is_group and not isinstance(node, Mapping):
        return _row(f"{key}={_shown(cfg, key, node)}", told.get(key, "")) + "\n"
    lines = [""]
    if is_group:
        options = configs.options_of(key, folder)
        chosen = _chosen(node, options)
        lines.append(f"{key}={chosen or '…'}")
        told = comments(key, chosen or "", folder, task)
        if full:
            lines += [_row(f"  {key}={option}", _headline(key, option, folder))
                      for option in options]  # fmt: skip
        else:
            others = ", ".join(option for option in options if option != chosen)
            lines.append(textwrap.fill(f"or {others}", _columns(), initial_indent="  ",
                                       subsequent_indent="  "))  # fmt: skip
    for name, value, meaning in _settings(key, node, cfg, told, is_group):
        lines.append(_row(f"  {name}={value}", meaning))
    return "\n".join([*lines, ""])


def _chosen(node: Any, options: Sequence[str]) -> str | None:
    """Return the option that a group's settings are of, by the name that they have."""
    found = [(node or {}).get(name) for name in _NAMES]
    return next((name for one in found if (name := getattr(one, "name", one)) in options), None)


def _leaves(prefix: str, node: Any) -> Iterator[tuple[str, Any]]:
    if isinstance(node, Mapping):
        for key, value in node.items():
            yield from _leaves(f"{prefix}.{key}", value)
    else:
        yield prefix, node


def _shown(cfg: Any, name: str, raw: Any) -> str:
    """Return a setting's value as it is typed; what follows other settings by their values."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        value = OmegaConf.select(cfg, name)
    except OmegaConfBaseException:
        value = raw
    value = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    if isinstance(value, float):
        return f"{value:.6g}"
    return getattr(value, "name", None) or typed(value)


def _row(left: str, right: str) -> str:
    """Return a setting and its meaning beside it, on the next line where it is long."""
    if not right:
        return left
    gap = " " * _WIDTH
    filled = textwrap.fill(right, _columns(), initial_indent=gap, subsequent_indent=gap)
    return f"{left:<{_WIDTH - 1}} {filled[_WIDTH:]}" if len(left) < _WIDTH else f"{left}\n{filled}"


def _columns() -> int:
    return max(70, min(shutil.get_terminal_size((100, 24)).columns, 120))


def _text(file: Path) -> str:
    """Return the text of an option's file, which may be a stranger's.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_text(file, _LARGEST)
    except (OSError, ValueError) as error:  # a refusal, and bytes that are no UTF-8
        raise UserError(f"{file} cannot be read as YAML: {first_line(error)}.") from error


def _headline(group: str, option: str, folder: str | None) -> str:
    """Return the first sentence of an option's file, which ends ahead of a command line."""
    words: list[str] = []
    for line in _text(configs.files_of(group, folder)[option]).splitlines():
        if not line.startswith("#") or line.startswith("# @") or line == "#":
            if words:
                break
            continue
        said, _, command = line[1:].partition("  btrain ")
        words.append(said.strip())
        if command:
            break
    return re.split(r"[.:]\s(?=[A-Z]|$)", " ".join(words) + " ")[0].strip(" :.")


def comments(key: str, option: str | None, folder: str | None, task: str) -> dict[str, str]:
    """Return what the YAML files say of the settings of a group, by their dotted names.

    They are the option's own file and those that it is made of. `option` is None for settings of
    the task's file.
    """
    if option is None:
        files = [Path(configs.config_dir()) / f"{task}.yaml"]
    else:
        files = list(_made_of(option, configs.files_of(key, folder)))
    found: dict[str, str] = {}
    for file in files:
        for name, said in _commented(_text(file)):
            whole = option is None or name.startswith(f"{key}.")
            found.setdefault(name if whole else f"{key}.{name}", said)
    own = {
        f"{key}.factory": "what makes it: FILE.py:NAME or package.module:NAME",
        f"{key}.settings": f"what it is made with: {key}.settings.NAME=VALUE",
    }
    return _OF_THE_SCHEMA | own | found


def _made_of(option: str, files: Mapping[str, Path]) -> Iterator[Path]:
    """Yield an option's file, then those that its defaults name."""
    if option in files:
        yield files[option]
        for entry in configs.read_yaml(files[option]).get("defaults", []):
            if isinstance(entry, str) and entry != option:
                yield from _made_of(entry, files)


def _commented(text: str) -> Iterator[tuple[str, str]]:
    """Yield each key of a YAML file that has a comment behind it, dotted, with the comment."""
    path: list[tuple[int, str]] = []
    for line in text.splitlines():
        if not (match := re.match(r"( *)(\w+):(.*)$", line)):
            continue
        indent, key, rest = len(match[1]), match[2], match[3]
        path = [*(part for part in path if part[0] < indent), (indent, key)]
        if comment := re.search(r"\s#\s*(.*)$", rest):
            yield ".".join(name for _, name in path), comment[1]


_OF_THE_SCHEMA = {
    "dataset.train_examples": "the first so many of a seeded, class-balanced order; null: all",
    "dataset.test_examples": "the same of the test set",
    "dataset.val_examples": "training images held out, to choose the best epoch by",
    "dataset.l2_epsilon": "of attack=l2_pgd, in [0, 1] pixel units",
    "dataset.epsilon": "that attack.epsilon follows, in [0, 1] pixel units",
    "dataset.step_size": "that attack.step_size follows, in [0, 1] pixel units",
    "dataset.eval_step_size": "that eval.step_size follows, in [0, 1] pixel units",
    "dataset.root": "the folder of the files",
    "dataset.download": "whether missing files are fetched",
    "model.mean": "subtracted from images inside the network, a number a channel; null: none",
    "model.std": "the images are then divided by it",
    "model.weights": "a run or a file of weights to start from; null: random ones",
    "model.width": "channels of the first stage; of a WideResNet its factor",
    "model.depth": "layers: 6·n + 4",
    "model.activation": "relu or silu",
    "attack.augmix": "of attack=augmix alone",
    "attack.epsilon": "radius of the ball, in [0, 1] pixel units",
    "attack.step_size": "of an example with the full number of steps, in [0, 1] pixel units",
    "attack.start_std": "of a normal start, in [0, 1] pixel units",
    "attack.steps": "N of the plain defense",
    "attack.start": "normal, uniform, clean or kept",
    "attack.mode": "BatchNorm during the attack: eval or train",
    "defense.alpha": "α: the weight of the worst case, or the share of batches that have one",
    "defense.jsd_weight": "of the Jensen-Shannon divergence beside the cross-entropy",
    "defense.beta": "β, the weight of the robust term",
    "recipe.epochs": "of a whole run",
    "recipe.batch_size": "images",
    "recipe.lr": "learning rate at its highest",
    "recipe.momentum": "of SGD",
    "recipe.weight_decay": "of all weights",
    "recipe.milestones": "epochs completed before the rate changes; they stretch with train.epochs",
    "recipe.lr_factors": "of lr, from each milestone on",
    "recipe.crop_padding": "pixels around an image ahead of a random crop; 0: no crop",
    "recipe.flip": "half of the images left to right",
    "recipe.optimizer": "sgd or adam",
    "recipe.nesterov": "of SGD",
    "recipe.schedule": "of the learning rate: step (milestones), cyclic, cosine",
    "recipe.peak": "share of the run at which a cyclic rate is highest",
    "recipe.early_stop_on_collapse": "end ahead of an epoch in which PGD accuracy on a training "
    "batch, of 128 images at least, fell by more than 20 points, and which is not repaired",
    "recipe.repair_steps": "more steps for everybody in an epoch behind one that overfitted, in "
    "which training saw over 20 points more images resist its attack than PGD does",
    "recipe.ema": "decay of the weights' moving average, which is then what is evaluated; 0: none",
    "recipe.clip_norm": "largest norm of the gradient of all weights together; null: any",
    "logger.wandb": "whether it is one of the loggers: logger=[wandb,tensorboard]",
    "logger.tensorboard": "whether it is one of the loggers",
    "logger.mode": "of wandb alone",
    "logger.project": "of wandb alone",
    "logger.group": "of wandb alone: runs of one row of a table",
    "logger.tags": "of wandb alone",
}
"""The meaning of settings that stand in no YAML file, for their default is in the schema."""

_MORE = (
    "btrain {command} --help GROUP shows the options of one group. --multirun sweeps over "
    "comma-separated values; --cfg job shows the settings as YAML, --info defaults where they come "
    "from; --config-dir DIR adds a folder of your own options."
)
