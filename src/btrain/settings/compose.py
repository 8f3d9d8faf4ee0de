"""The way from YAML files and overrides to a checked `Config`, through Hydra and OmegaConf."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import logging
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from functools import cache, lru_cache
from pathlib import Path
from typing import Any, ClassVar, NoReturn, cast, get_origin, get_type_hints

from btrain import own
from btrain.errors import UserError, first_line
from btrain.settings import MISSING, Config, hints
from btrain.settings.bench import BenchRun
from btrain.settings.checks import number, within_64_bits
from btrain.settings.corrupt import CorruptConfig
from btrain.settings.method import ALLOCATORS, ATTACKS, DEFENSES, RIVALS, VerifiedConfig
from btrain.settings.names import DatasetName, OptimizerName, Start
from btrain.settings.run import DATASETS, MODELS, is_learnt
from btrain.settings.sparsity import SPARSITIES
from btrain.settings.words import names as names_in
from btrain.untrusted import read_text

log = logging.getLogger("btrain")

_LARGEST_YAML = 64 << 10  # bytes; a run's has 3,000
_DEEPEST = 50  # lists in lists of an override, of which Python's parser takes some hundreds
_LONGEST_NUMBER = 1000  # digits; Python reads 4,300


@dataclass(frozen=True)
class Task:
    """The use of a primary configuration file: its schema, its command, and the command's help."""

    schema: type[Any]
    command: str
    summary: str


TASKS = {
    "train": Task(Config, "train", "train a robust network, evaluate it, leave a run folder"),
    "corrupt": Task(CorruptConfig, "data corrupt", "make the corrupted test set of a data set"),
    "bench": Task(BenchRun, "bench", "measure how long a training step takes"),
}
"""The tasks by the name of their file."""

OPTIONS: dict[str, tuple[str, Mapping[Any, type[Any]]]] = {
    "model": ("architecture", MODELS),
    "dataset": ("name", DATASETS),
    "attack": ("name", ATTACKS),
    "defense": ("name", DEFENSES),
    "rival": ("name", RIVALS),
    "bt": ("name", ALLOCATORS),
    "sparsity": ("name", SPARSITIES),
}
"""The key that tells the option of a group whose options have settings of their own, and the
schema of each; a YAML file names it as `<option>_schema` in its defaults."""

FREE = "settings"
"""The key of a group that takes any names: what an own part is called with."""

OWN, OF_OWN = "own", ("factory", FREE)
"""The option of a group whose part the user makes, and the keys that it is made by."""


def config_dir() -> str:
    """Return the folder of the YAML files: inside a wheel, or at the top of the repository."""
    package = Path(__file__).resolve().parents[1]
    packaged = package / "configs"
    return str(packaged if packaged.is_dir() else package.parents[1] / "configs")


@cache
def register() -> None:
    """Make the schema and its resolvers known to Hydra; calling it again does no harm."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    from btrain.settings import user_files

    store = ConfigStore.instance().store
    store(name="schema", node=Config)
    store(name="corrupt_schema", node=CorruptConfig)
    store(name="bench_schema", node=BenchRun)
    for group in OPTIONS:
        _store_options(group)
    loosen([])
    user_files.register()
    OmegaConf.register_new_resolver("scale", _scale, replace=True)
    OmegaConf.register_new_resolver("full_step", _full_step, replace=True)
    OmegaConf.register_new_resolver("divided", _divided, replace=True)
    OmegaConf.register_new_resolver("with_views", _with_views, replace=True)
    OmegaConf.register_new_resolver("recipe_of", _recipe_of, replace=True)
    OmegaConf.register_new_resolver("augment", _augment, replace=True)
    OmegaConf.register_new_resolver("nesterov", _nesterov, replace=True)


def loosen(words: Sequence[str]) -> None:
    """Let an experiment of a command line give settings to options that the words replace.

    `without_replaced` leaves these out, and `from_hydra` refuses all other keys that the schemas do
    not have. Files that are read before `loosened`, an option's own among them, meet the schemas.
    """
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    typed = {word.lstrip("+").partition("=")[0] for word in words}
    groups = sorted(typed & OPTIONS.keys()) if "experiment" in typed else []
    node = OmegaConf.create({group: {} for group in groups})
    for group in groups:
        OmegaConf.set_struct(node[group], False)
    ConfigStore.instance().store(name="loosened", node=node)


def _store_options(group: str) -> None:
    """Make the schemas of a group's options known to Hydra; `settings` takes any key."""
    from hydra.core.config_store import ConfigStore
    from omegaconf import OmegaConf

    for option, schema in OPTIONS[group][1].items():
        node = OmegaConf.structured(schema)
        if FREE in node:
            OmegaConf.set_struct(node[FREE], False)
        ConfigStore.instance().store(group=group, name=f"{option.name}_schema", node=node)


_types: Callable[[Any], dict[str, Any]] = cache(get_type_hints)
"""A schema's settings with their types, evaluated once."""


def schema_of(saved: Mapping[str, Any]) -> Any:
    """Return the schema of a saved configuration, with that of each group's own option.

    It is the same object for equal options, to be merged into and not to be changed.
    """
    names = []
    for group, (key, _) in OPTIONS.items():
        node = saved.get(group)
        name = node.get(key) if isinstance(node, Mapping) else None
        names.append((group, name if isinstance(name, str) else None))
    return _schema_with(tuple(names))


@lru_cache(maxsize=64)
def _schema_with(names: tuple[tuple[str, str | None], ...]) -> Any:
    """Return the schema with that of the option of this name in each group, where there is one."""
    from omegaconf import OmegaConf

    schema = OmegaConf.structured(Config)
    for group, name in names:
        for option, kind in OPTIONS[group][1].items():
            if option.name == name:
                schema[group] = OmegaConf.structured(kind)
    return schema


def _scale(length: object, factor: float, divisor: float) -> float:
    """Return `${scale:ε,1.7,N}` = 1.7·ε / N; N = 0, where no step is taken, counts as 1."""
    return factor * _length(length) / max(divisor, 1)


def _full_step(
    n_b: int, steps: int, step_size: object, epsilon: object, start: object = None
) -> float:
    """Return the step size of an example with N_B steps: the plain attack's where N_B is its N.

    Else all steps together are 1.7·ε long, from a start that was kept ε.
    """
    if n_b == steps:
        return _length(step_size)
    return _scale(epsilon, 1.0 if start in (Start.kept, Start.kept.name) else 1.7, n_b)


def _length(value: object) -> float:
    """Return a length; NaN for what is none, which the schema refuses by its own key."""
    try:
        return number("a length", value)
    except UserError:
        return math.nan


def _with_views(augmix: object, views: int, steps: int) -> int:
    """Return `${with_views:${attack.augmix},1,10}` = 1 where views stand for attack steps."""
    return steps if augmix is None else views


def _augment(dataset: Mapping[str, Any], usual: bool | int) -> bool | int:
    """Return `${augment:${dataset},4}` = 4: a recipe's augmentation, as far as the images allow.

    Of data of the user's own nobody knows what a crop or a mirror does to them: 0 or false. A crop
    moves the images of a folder by an eighth of their side at most.
    """
    if dataset["name"] is DatasetName.own:
        return type(usual)()
    if dataset["name"] is DatasetName.imagefolder and type(usual) is int:
        return min(usual, max(int(dataset["image_size"]), 0) // 8)
    return usual


def _nesterov(optimizer: OptimizerName, momentum: float) -> bool:
    """Return `${nesterov:sgd,0.9}` = true: whether a recipe has a momentum that can be Nesterov's.

    Adam's cannot.
    """
    return optimizer is OptimizerName.sgd and momentum > 0


def _recipe_of(defense: str, dataset: str) -> str:
    """Return the recipe of a defense on a data set: `${recipe_of:${defense},${dataset}}`.

    It is that of both, of an option of the user's, of verified training or TRADES on that data set,
    of the defense, or TRADES'. A part of a data set, `mnist_sample`, has the recipes of the whole.
    """
    from hydra.core.global_hydra import GlobalHydra

    # Of Hydra, for it knows the user's folder, too.
    known = GlobalHydra.instance().config_loader().get_group_options("recipe")
    schemas = {name.name: kind for name, kind in DEFENSES.items()}
    family = "verified" if schemas.get(defense) is VerifiedConfig else "trades"
    names = dict.fromkeys((dataset, dataset.removesuffix("_sample")))
    wanted = [f"{of}_{name}" for name in names for of in (defense, family, "trades")]
    # A recipe of the user's defense is no one's for other data.
    wanted.insert(1 if defense not in schemas else len(wanted), defense)
    return next((name for name in wanted if name in known), "trades")


def _divided(count: int, divisor: float) -> int:
    """Return `${divided:10,1.5}` = 7, rounded up: fewer epochs or a smaller batch than before."""
    return math.ceil(count / divisor)


def compose(overrides: Sequence[str] = (), task: str = "train") -> Any:
    """Return the configuration of a task's command with the overrides, of its schema's class.

    The overrides are the user's, who allows what they name. The log tells what is left out.

    Raises:
        UserError: an unknown key or option, a wrong type, a value out of range.
    """
    cfg, notes = without_replaced(composed(overrides, task), overrides)
    config = from_hydra(cfg, overrides)
    for note in notes:
        log.warning("%s", note)
    own.allow_parts(config)
    return config


def composed(overrides: Sequence[str], task: str, folder: str | None = None) -> Any:
    """Return what Hydra makes of the YAML files and the overrides, neither resolved nor checked.

    Args:
        folder: of more options, as --config-dir gives.

    Raises:
        UserError: an unknown key or option, a wrong type.
    """
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir

    register()
    loosen(overrides)
    try:
        with initialize_config_dir(version_base="1.3", config_dir=config_dir()):
            if folder is not None:
                _add_options(folder)
            return hydra_compose(task, overrides=list(overrides))
    except Exception as error:  # of libraries that have read what a user wrote
        raise explain(error, overrides, task) from error


def _add_options(folder: str) -> None:
    """Let Hydra look for options in a folder, too, ahead of btrain's own."""
    from hydra._internal.config_loader_impl import ConfigLoaderImpl
    from hydra.core.global_hydra import GlobalHydra

    instance = GlobalHydra.instance()
    path = instance.config_loader().get_search_path()
    path.prepend("command-line", f"file://{Path(folder).resolve()}")
    assert instance.hydra is not None
    instance.hydra.config_loader = ConfigLoaderImpl(path)


def quoted(text: str) -> str:
    """Return any text as a value on Hydra's command line."""
    # Within quotes Hydra takes backslashes for themselves, but for those ahead of a quote.
    escaped = re.sub(r"(\\*)('|$)", lambda end: 2 * end[1] + end[2].replace("'", "\\'"), text)
    return f"'{escaped}'"


_PATHS = (
    *("dataset.root", "run.dir", "model.weights", "corrupt.out", "corrupt.frost"),
    *("bench.checkpoint", "bench.out", "bench.plot"),
)


def with_path_quoted(argument: str) -> str:
    """Quote a path as Hydra takes any text, `~` expanded; leave other arguments as they are.

    A list of factories is a sweep, and stays as it is, too.
    """
    key, _, value = argument.partition("=")
    factory = key.endswith(".factory") and "," not in value
    if not (key in _PATHS or factory) or not value or value[0] in "'\"" or value == "null":
        return argument
    return f"{key}={quoted(os.path.expanduser(value))}"  # noqa: PTH111


_SHORT = {"-h": "--help", "-c": "--cfg", "-p": "--package", "-r": "--run", "-m": "--multirun",
          "-i": "--info", "-cp": "--config-path", "-cn": "--config-name", "-cd": "--config-dir",
          "-sc": "--shell-completion"}  # fmt: skip
_WITH_A_VALUE = ("--config-dir", "--config-path", "--config-name", "--cfg", "--package", "--info",
                 "--experimental-rerun")  # fmt: skip
_LONG = (*_SHORT.values(), "--hydra-help", "--version", "--resolve", "--experimental-rerun")


def arranged(arguments: Sequence[str]) -> list[str]:
    """Return the words of a command line as all that follows takes them.

    Hydra's own options are spelt out, as `-m` and argparse's `--multi` stand for `--multirun`, and
    ahead of the settings, as argparse wants them; paths are quoted.
    """
    options, settings = _apart([_spelt_out(argument) for argument in arguments])
    return [*options, *map(with_path_quoted, settings)]


def _spelt_out(argument: str) -> str:
    """Return an argument with the option that it begins with in full; others stay as they are."""
    option, *value = argument.partition("=")
    long = [name for name in _LONG if option.startswith("--") and name.startswith(option)]
    if option in _SHORT:
        option = _SHORT[option]
    elif len(long) == 1:
        option = long[0]
    return "".join([option, *value])


def is_sweep_asked_for(arguments: Sequence[str]) -> bool:
    """Return whether the words of a command line, arranged, ask for a sweep."""
    words = [word.lstrip("+").partition("=") for word in arguments]
    modes = [value.strip("'\"") for key, _, value in words if key == "hydra.mode"]
    return "--multirun" in arguments or modes[-1:] in (["MULTIRUN"], ["RunMode.MULTIRUN"], ["2"])


def _apart(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return Hydra's own options with their values, and the words that set something."""
    options, settings, rest = [], [], list(arguments)
    while rest:
        argument = rest.pop(0)
        if not argument.startswith("-"):
            settings.append(argument)
            continue
        options.append(argument)
        # --info may stand alone
        if argument in _WITH_A_VALUE and rest and "=" not in rest[0] and rest[0][:1] != "-":
            options.append(rest.pop(0))
    return options, settings


def check_words(arguments: Sequence[str], task: str) -> None:
    """Raise UserError for words that are no settings, and for options that Hydra does not have."""
    from hydra._internal.utils import get_args_parser

    command = f"btrain {TASKS[task].command}"
    settings = _apart(arguments)[1]
    if split := hints.several_words(settings):
        raise UserError(split)
    for word in settings:
        if not word.lstrip("+~ ").partition("=")[0]:
            raise UserError(f"{word.strip() or repr(word)} is not of the form key=value.")

    class Parser(argparse.ArgumentParser):
        """Hydra's options, a mistake with which is one sentence."""

        def error(self, message: str) -> NoReturn:
            message = message.removeprefix("argument ").replace("(choose from", "(there are:")
            message = message.replace("expected one argument", "a value is missing")
            raise UserError(f"{message}; see {command} --help.")

    parser = Parser(parents=[get_args_parser()], add_help=False)
    wanted = [word for word in arguments if word not in ("--version", "--hydra-help")]
    _, unknown = parser.parse_known_args(wanted)
    for position, argument in enumerate(arguments):
        if argument in ("--shell-completion", "-sc"):
            raise UserError('Tab completion comes by eval "$(btrain --completion bash)".')
        several = argument[:2] != "--" and argument.partition("=")[0] not in _SHORT  # -mr
        if argument.startswith("-") and (several or argument in unknown):
            keys = keys_of(TASKS[task].schema)
            raise UserError(hints.option(arguments[position:], keys, command))


def user_folder(arguments: Sequence[str]) -> str | None:
    """Return the folder of options that `--config-dir` adds, if any: of several the last.

    Args:
        arguments: arranged.

    Raises:
        UserError: it is none.
    """
    folder = None
    for argument, following in zip(arguments, [*arguments[1:], ""], strict=False):
        option, equals, value = argument.partition("=")
        if option == "--config-dir":
            folder = value if equals else following
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"--config-dir {folder} is no folder.")
    return folder


def files_of(group: str, folder: str | None = None) -> dict[str, Path]:
    """Return the YAML files of a group by their names; the user's replace btrain's."""
    folders = [config_dir(), *([] if folder is None else [folder])]
    files = (file for place in folders for file in sorted((Path(place) / group).glob("*.yaml")))
    return {file.stem: file for file in files}


def options_of(group: str, folder: str | None = None) -> list[str]:
    """Return the options of a group, with those of the user's folder."""
    return sorted(name for name in files_of(group, folder) if not name.startswith("_"))


def is_sweep() -> bool:
    """Return whether the current job is one of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return bool(HydraConfig.get().mode is RunMode.MULTIRUN)


def jobs_at_once() -> int | None:
    """Return how many jobs the current job's launcher has at a time on this machine.

    1 without a sweep; None where the launcher does not tell.
    """
    from hydra.core.hydra_config import HydraConfig

    hydra = HydraConfig.get()
    launcher = hydra.runtime.choices["hydra/launcher"]
    if not is_sweep() or launcher == "basic":
        return 1
    if launcher != "joblib":
        return None
    jobs = hydra.launcher.n_jobs or 1
    return int(jobs) if jobs > 0 else max(1, (os.cpu_count() or 1) + 1 + int(jobs))


def words_of_job() -> list[str]:
    """Return the arranged words that the current job was started with, or its sweep chose."""
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import OmegaConf

    overrides = HydraConfig.get().overrides.task
    return cast(list[str], OmegaConf.to_container(overrides, resolve=False))


def check_search(config: Any, hydra_config: Any) -> None:
    """Raise UserError for a sweep that chooses values by what came out, without held-out images.

    The test set chooses nothing.
    """
    sweeper = hydra_config.runtime.choices["hydra/sweeper"]
    is_sweep = hydra_config.mode is not None and hydra_config.mode.name == "MULTIRUN"
    if is_sweep and sweeper != "basic":
        held_out = config.dataset.val_examples if isinstance(config, Config) else 0
        if not held_out:
            raise UserError(
                f"hydra/sweeper={sweeper} goes by the accuracy on held-out images; please give "
                "dataset.val_examples=N."
            )


def resolved(overrides: Any) -> list[str]:
    """Return the overrides of a job, which Hydra keeps beside what they refer to.

    Raises:
        UserError: one refers to what is not there.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    typed = cast(list[str], OmegaConf.to_container(overrides, resolve=False))
    found = []
    for i, override in enumerate(typed):
        try:
            found.append(str(overrides[i]))
        except OmegaConfBaseException as error:
            raise UserError(f"{override}: {_reason(error)}.") from error
    return found


def without_replaced(cfg: Any, overrides: Sequence[str]) -> tuple[Any, list[str]]:
    """Return a configuration without settings that an experiment gave to a replaced option.

    A setting goes if the option that was typed lacks it, another option of the group has it, and
    nobody typed it.

    Args:
        cfg: what Hydra composed, without its own settings; it is left as it is.

    Returns:
        The configuration, and a sentence for each option on what it lacks.
    """
    from omegaconf import OmegaConf, open_dict

    given = {override.lstrip("+").partition("=")[0]: override for override in overrides}
    words = [override.lstrip("+") for override in overrides]
    experiments = " and ".join(word for word in words if word.startswith("experiment="))
    notes = []
    for group, (_, options) in OPTIONS.items() if experiments else ():
        if group not in given:
            continue
        replaced = [
            leaf
            for leaf in map(str, cfg[group])
            if leaf not in _types(OmegaConf.get_type(cfg[group]))
            and any(leaf in _types(schema) for schema in options.values())
            and not any(f"{key}.".startswith(f"{group}.{leaf}.") for key in given)
        ]
        if not replaced:
            continue
        cfg = cfg.copy()
        with open_dict(cfg):
            for leaf in replaced:
                del cfg[group][leaf]
        keys = ", ".join(f"{group}.{leaf}" for leaf in replaced)
        notes.append(
            f"{given[group]} has no {keys}: left out, though {experiments} "
            f"gives {'it' if len(replaced) == 1 else 'them'}."
        )
    return cfg, notes


def from_hydra(cfg: Any, overrides: Sequence[str], folder: str | None = None) -> Any:
    """Turn a composed configuration into its task's checked dataclasses; name the run folder.

    Args:
        cfg: what Hydra composed, without its own settings; it is left as it is.
        overrides: the command line's, for the name of the run folder.
        folder: of more options, as --config-dir gives.

    Raises:
        UserError: a value is missing or out of range, or `+key=value` added a key.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    for override in overrides:
        if re.match(rf"(?!\w+\.{FREE}=)[\w.]+=\{{", override):
            raise UserError(f"{override} replaces a whole group; please set its keys one by one.")
        if option := re.match(r"\+*(\w+)\.(\w+)=(.*)$", override):
            group, key, value = option.groups()
            if group in OPTIONS and OPTIONS[group][0] == key:
                raise UserError(
                    f"{override} would give an option another one's name; choose {group}={value}."
                )
    if removed := _removed(overrides, OmegaConf.get_type(cfg)):
        raise UserError(f"{removed} takes away what every run needs.")
    try:
        config: Any = OmegaConf.to_object(cfg)
    except MissingMandatoryValue as error:
        raise UserError(
            f"{error.full_key} has no default; please give {error.full_key}=…."
        ) from error
    except UserError as error:
        raise _with_giver(error, overrides, folder) from None
    except OmegaConfBaseException as error:
        raise explain(error, overrides) from error
    _reject_added_keys(config, "", type(config))
    within_64_bits(dataclasses.asdict(config))
    if isinstance(config, Config):
        _reject_unread(config, overrides)
        if config.run.dir is None:
            config.run.dir = str(Path("runs") / run_name(config, overrides))
    return config


def _with_giver(error: UserError, overrides: Sequence[str], folder: str | None) -> UserError:
    """Return the mistake, with the name of the experiment if its file sets the wrong value."""
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    for name in names_in(given.get("experiment", "")):
        keys = [
            key
            for key in dict.fromkeys(_settings_of(name, folder))
            if key not in given
            and re.search(rf"(?<![\w.]){re.escape(key)}(?![\w.]*\w)", str(error))
        ]
        if keys:
            changes = " or ".join(f"{key}=…" for key in keys)
            return UserError(
                f"{error} experiment={name} sets {' and '.join(keys)}; {changes} would change that."
            )
    return error


def _settings_of(experiment: str, folder: str | None) -> list[str]:
    """Return the keys that an experiment sets, `bt.n_b`, with those of what it is made of.

    Args:
        folder: of the user's, whose experiments are taken ahead of btrain's own.
    """
    places = [Path(place) / "experiment" for place in (folder, config_dir()) if place is not None]
    files = (place / f"{experiment.removeprefix('/experiment/')}.yaml" for place in places)
    file = next((file for file in files if file.is_file()), None)
    if file is None:
        return []
    content = read_yaml(file)
    bases = [of for of in content.pop("defaults", []) if isinstance(of, str)]
    keys = [f"{group}.{leaf}" for group, of in content.items() if isinstance(of, dict)
            for leaf in of]  # fmt: skip
    return keys + [key for base in bases for key in _settings_of(base, folder)]


def _reject_unread(config: Config, overrides: Sequence[str]) -> None:
    """Raise UserError for a setting that was typed and that nothing reads beside the others."""
    unread = {key: choice.written for choice in config.choices() for key in choice.unread}
    if isinstance(config.defense, VerifiedConfig):
        unread |= config.defense.unread(config.bt)
    for key in (override.partition("=")[0].lstrip("+") for override in overrides):
        if key in unread:
            raise UserError(f"{key} has no meaning with {unread[key]}.")


def _reject_added_keys(node: Any, prefix: str, schema: type) -> None:
    """Raise UserError for `+foo=1`, which passes OmegaConf's schema as an extra attribute."""
    known = {field.name for field in dataclasses.fields(node)}
    for name, value in vars(node).items():
        if name not in known:
            unread = _unread(prefix + name, type(node).__name__)
            raise UserError(unread or _unknown_key(prefix + name, schema))
        if dataclasses.is_dataclass(value):
            _reject_added_keys(value, f"{prefix}{name}.", schema)


def to_dict(config: Config) -> dict[str, Any]:
    """Return plain containers: what `config.yaml` and checkpoints hold."""

    def plain(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: plain(item) for key, item in value.items()}
        return value.name if isinstance(value, Enum) else value

    return plain(dataclasses.asdict(config))  # type: ignore[no-any-return]


def defaults(config: Any) -> dict[str, Any]:
    """Return what the schema says of settings that it has a default for, as `to_dict` writes."""
    found: dict[str, Any] = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            found[field.name] = defaults(value)
        elif field.default_factory is not dataclasses.MISSING:
            found[field.name] = field.default_factory()
        elif field.default != MISSING:
            default = field.default
            found[field.name] = default.name if isinstance(default, Enum) else default
    return found


def to_yaml(config: Config) -> str:
    """Return the text of a run folder's `config.yaml`."""
    return as_yaml(to_dict(config))


def as_yaml(settings: dict[str, Any]) -> str:
    """Return plain settings as YAML."""
    from omegaconf import OmegaConf

    return OmegaConf.to_yaml(OmegaConf.create(settings))


@lru_cache(maxsize=256)
def _parsed(text: str) -> Any:
    """Return what a YAML text holds; a command reads the same run's several times."""
    from btrain.untrusted import plain_yaml

    return plain_yaml.parse(text)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a run folder's `config.yaml` as plain containers.

    Raises:
        UserError: the file cannot be read as YAML.
    """
    try:
        content = copy.deepcopy(_parsed(read_text(path, _LARGEST_YAML)))
    except Exception as error:
        raise UserError(f"{path} is not a readable configuration: {first_line(error)}.") from error
    if not isinstance(content, dict):
        raise UserError(f"{path} is not a readable configuration: it holds no mapping.")
    return {str(key): value for key, value in content.items()}


# Settings that a run's name leaves out: those that it begins with, and those that may change when
# the run goes on.
_NOT_IN_NAME = ("dataset", "model", "defense", "bt", "seed", "dataset.root", "train.max_seconds")
_LONGEST_NAME = 150  # bytes; file systems take 255


def run_name(config: Config, overrides: Sequence[str]) -> str:
    """Return a readable folder name, different for different settings.

    `mnist-small_cnn-trades-bullettrain-attack.epsilon_0.1-seed0`.
    """
    data = config.dataset.title
    plain = [override.lstrip("+~") for override in overrides]
    last = {override.partition("=")[0]: override for override in plain}
    changed = [
        override for key, override in last.items() if is_learnt(key) and key not in _NOT_IN_NAME
    ]
    options = [config.model.name, config.defense.name.name, config.bt.name.name]
    for i, group in enumerate(("model", "defense", "bt")):
        if hasattr(getattr(config, group), "factory") and group in last:
            options[i] = last[group].partition("=")[2]  # of several own options, each by its file
    parts = [data, *options]
    name = "-".join([*parts, *sorted(changed), f"seed{config.seed}"])
    name = re.sub(r"[^\w.-]+", "_", name)
    encoded = name.encode()
    if len(encoded) > _LONGEST_NAME:
        start = encoded[: _LONGEST_NAME - 9].decode(errors="ignore")
        name = f"{start}-{hashlib.sha256(encoded).hexdigest()[:8]}"
    return name


def explain(error: Exception, overrides: Sequence[str], task: str = "train") -> UserError:
    """Return one sentence for what was raised in composing a configuration.

    Args:
        overrides: the words of the command line; its options may be among them.
    """
    cause: BaseException = error.__cause__ or error
    for known in (error, cause):
        if isinstance(known, UserError):  # of a resolver, or of a file of the user's
            return known
    folder, (_, overrides) = user_folder(overrides), _apart(overrides)
    if several := re.match(r"Ambiguous value for argument '(.*?)'", str(error)):
        return UserError(f"{several.group(1)} gives several values; a sweep needs --multirun.")
    if second := re.match(r"Multiple values for (\S+)\. To override", str(error)):
        typed = [word for word in overrides if word.lstrip("+").startswith(f"{second[1]}=")]
        if typed and typed[-1].startswith("+"):
            plain = typed[-1].lstrip("+")
            return UserError(f"{typed[-1]} would be a second {second[1]}; please write {plain}.")
    if type(error).__name__ == "OverrideParseException":
        return UserError(f"{vars(error)['override']} is not of the form key=value.")
    if removed := _removed(overrides, TASKS[task].schema):
        return UserError(f"{removed} takes away what every run needs.")
    of_null = isinstance(cause, AssertionError | AttributeError)
    if part := _of_null(overrides, task) if of_null else None:
        return UserError(part)
    unknown = re.search(r"Key '(.*?)' (is )?not in", str(cause)) or re.search(
        r"Could not override '(.*?)'\.( No match in the defaults list\.)?\s*$",
        str(cause).split("\n")[0] + "\n",
    )
    key = re.search(r"full_key: (\S+)", str(cause))
    kind = re.search(r"object_type=(\w+)", str(cause))
    if unknown:
        name = key.group(1) if key else unknown.group(1)
        if name == "experiment":  # typed with a dot, or a file's whole content
            dotted = (word.lstrip("+").partition("=")[0] for word in overrides)
            name = next((word for word in dotted if word.startswith("experiment.")), name)
        unread = _no_norm(name, overrides) or (_unread(name, kind.group(1)) if kind else None)
        return UserError(unread or _unknown_key(name, TASKS[task].schema))
    option = re.search(r"Could not find '(.*?)'", str(error))
    if option:
        found = option.group(1)
        split = found.rpartition if found.startswith("hydra/") else found.partition
        group, _, name = split("/") if "/" in found else ("", "", found)
        return UserError(_unknown_option(group, name, folder))
    if key and first_line(cause).endswith("is not Optional"):
        chosen = _chosen(key.group(1), kind.group(1)) if kind else None
        return UserError(
            f"{key.group(1)} must have a value{f' with {chosen}' if chosen else ''}, not null."
        )
    if key and not key.group(1).startswith("["):
        return UserError(_wrong_value(key.group(1), _reason(cause)))
    for group, _, value in (override.partition("=") for override in overrides):
        known_options = options_of(group, folder) if group else []
        if known_options and not value.startswith("_") and value not in known_options:
            return UserError(_unknown_option(group, value, folder))
    for override in overrides:
        if override.count("[") + override.count("{") > _DEEPEST:
            return UserError(f"{override.partition('=')[0]} is nested too deeply.")
        if re.search(rf"\d{{{_LONGEST_NUMBER}}}", override):
            return UserError(f"{override.partition('=')[0]} has too many digits.")
    if isinstance(cause, RecursionError):
        return UserError("Options name each other in their defaults, without end.")
    return UserError(f"{_reason(cause) or type(cause).__name__}.")


def _removed(overrides: Sequence[str], schema: type | None) -> str | None:
    """Return the override that removes what every run has, or None."""
    kept = schema.__annotations__ if schema is not None else {}
    for override in overrides:
        group, _, rest = override[1:].partition("=")[0].partition(".")
        if override[:1] == "~" and group in kept and not rest.startswith(f"{FREE}."):
            return override
    return None


def _of_null(overrides: Sequence[str], task: str) -> str | None:
    """Return a sentence on an override of what is in a part that is null, None without one."""
    for override in overrides:
        key, _, value = override.lstrip("+~").partition("=")
        parts = [*key.split("."), *(["{"] if value.startswith("{") else [])]
        if len(parts) > 2 and parts[0] in OPTIONS and task == "train":
            group, part, *_ = parts
            files = files_of(group)
            having = [name for name in options_of(group) if read_yaml(files[name]).get(part)]
            if having:
                return f"{override}: {group}.{part} is null here; {group}={having[0]} has it."
    return None


_WRONG = {
    r"Value '(.*)' of type '\w+' could not be converted to Integer": "a whole number",
    r"Value '(.*)' of type '\w+' could not be converted to Float": "a number",
    r"Value '(.*)' is not a valid bool.*": "one of true, false",
}
"""OmegaConf's words for a value of another type, and what it must be."""


def _wrong_value(key: str, reason: str) -> str:
    """Return a sentence on a value that the schema does not take, for one of OmegaConf's."""
    for pattern, wanted in _WRONG.items():
        if found := re.fullmatch(pattern, reason):
            return f"{key} must be {wanted}, not {found[1]}."
    if re.fullmatch(r"Invalid value assigned: \w+ is not a ListConfig, list or tuple", reason):
        return f"{key} must be a list, like {key}=[1,2]."
    if re.match(r"Invalid type assigned: \w+ is not a subclass of ", reason):
        return f"{key} is a group of settings; please set its keys one by one."
    return f"{key}: {reason}."


def _reason(error: BaseException) -> str:
    """Return the line of a library's message that says what is wrong, without a full stop.

    That is the first one, or the next where the first one ends in a colon.
    """
    lines = [line.strip() for line in str(error).strip().split("\n")]
    line = lines[0]
    if line.endswith(":") and len(lines) > 1:
        line = f"{line} {lines[1]}"
    line = re.sub(r"\w+ raised while (resolving interpolation|composing config): ", "", line)
    if re.match(r"(mismatched|extraneous|missing|token|no viable) ", line):  # of its grammar
        return "what stands in ${…} cannot be read"
    return re.sub(r"^_(\w+\(\))", r"\1", line).strip('"').rstrip(".")


def _unknown_key(key: str, schema: type) -> str:
    if schema is Config and (key == "experiment" or "@experiment" in key):
        return "An experiment's file begins with the line `# @package _global_`."
    known = keys_of(schema)
    group, _, leaf = key.partition(".")
    if key in known and group in OPTIONS:  # a file of the user's gives it to an option of no schema
        names = [option.name for option, kind in OPTIONS[group][1].items() if leaf in _types(kind)]
        names.sort(key=lambda name: name != OWN)
        first = next((name for name in names if name in options_of(group)), names[0])
        return (
            f"{key} is set by a file whose `defaults` do not say what it is an option of; "
            f"`- {first}` as their first line, for example, does."
        )
    meant = hints.meant(key, known)
    (command,) = (task.command for task in TASKS.values() if task.schema is schema)
    hint = f"Did you mean {meant}?" if meant else f"`btrain {command} --help` lists them."
    return f"There is no setting {key}. {hint}"


def _unread(key: str, kind: str) -> str | None:
    """Return a sentence for a setting that another option of its group has, else None.

    An own part's settings are told from its option's. `kind` is the name of the schema of the
    option that was chosen.
    """
    group, _, leaf = key.partition(".")
    if group not in OPTIONS or (chosen := _chosen(key, kind)) is None:
        return None
    schemas = {option.name: schema for option, schema in OPTIONS[group][1].items()}
    there = next(_types(schema) for schema in schemas.values() if schema.__name__ == kind)
    if having := [name for name, schema in schemas.items() if leaf in _types(schema)]:
        having.sort(key=lambda name: name != OWN)
        add = f"; add {group}={' or '.join(having)}" if leaf in OF_OWN else ""
        meant = f" Did you mean {group}.{FREE}.{leaf}?" if FREE in there and not add else ""
        return f"{key} is no setting with {chosen}{add}.{meant}"
    if FREE in there:
        near = hints.meant(key, [f"{group}.{name}" for name in there])
        either = f"{near} or " if near else ""
        return f"There is no setting {key}. Did you mean {either}{group}.{FREE}.{leaf}?"
    return None


def _no_norm(key: str, overrides: Sequence[str]) -> str | None:
    """Return a sentence for `attack.norm`, which is the attack's own and no setting, else None."""
    if key != "attack.norm":
        return None
    given = dict(override.lstrip("+").partition("=")[::2] for override in overrides)
    schemas = {option.name: schema for option, schema in OPTIONS["defense"][1].items()}
    defense = given.get("defense", "")
    if schemas.get(defense) is VerifiedConfig:
        return f"defense={defense} bounds an L∞ ball; {key} does not go with it."
    return f"{key} is no setting: attack=linf_pgd and attack=l2_pgd each have their own norm."


def _chosen(key: str, kind: str) -> str | None:
    """Return the option of a key's group as it is written, by its schema's name, or None.

    Where several options share a schema, or it has no option of its name, it is "this <group>".
    """
    group = key.partition(".")[0]
    schemas = OPTIONS[group][1] if group in OPTIONS else {}
    names = [option.name for option, schema in schemas.items() if schema.__name__ == kind]
    if not names:
        return None
    one = len(names) == 1 and names[0] in options_of(group)
    return f"{group}={names[0]}" if one else f"this {group}"


def _unknown_option(group: str, option: str, folder: str | None) -> str:
    if not group:
        return f"There is no configuration file {option}.yaml."
    if group == "hydra/launcher":
        return (
            f"hydra/launcher={option} is not installed; pip install 'btrain[sweep]' brings joblib, "
            "submitit_local and submitit_slurm."
        )
    if group == "hydra/sweeper":
        return (
            f"hydra/sweeper={option} is not installed; pip install 'btrain[optuna]' brings optuna. "
            "Without hydra/sweeper= every combination is tried."
        )
    there = options_of(group, folder)
    meant = hints.meant(option, there)
    listed = f"; there are: {', '.join(there)}" if there else ""
    return f"{group}={option} is no option{listed}.{f' Did you mean {meant}?' if meant else ''}"


def keys_of(node: type, prefix: str = "") -> list[str]:
    """Return the keys that can be given: of a schema and of every option of its groups, each once.

    A group without options has settings alone.
    """
    keys = [] if prefix or node is not Config else ["experiment"]
    for name, kind in _types(node).items():
        if get_origin(kind) is ClassVar:
            continue
        options = OPTIONS[name][1].values() if name in OPTIONS and not prefix else [kind]
        if not dataclasses.is_dataclass(kind) or (not prefix and options_of(name)):
            keys.append(prefix + name)
        for option in options:
            if dataclasses.is_dataclass(option):
                keys += keys_of(cast(type, option), f"{prefix}{name}.")
    return list(dict.fromkeys(keys))
