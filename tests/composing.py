"""Configurations for tests that make many: the YAML files are merged once for equal options."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable, Sequence
from functools import cache, lru_cache
from pathlib import Path
from typing import Any

import omegaconf
from hydra._internal import config_loader_impl as loader
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra._internal.hydra import Hydra
from hydra.core.config_store import ConfigNode, ConfigStore
from hydra.core.default_element import InputDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from hydra.plugins.config_source import ConfigResult, ConfigSource
from omegaconf import DictConfig, OmegaConf, flag_override

from btrain import own
from btrain.settings import compose as configs
from btrain.settings import user_files

GROUPS = {path.name for path in Path(configs.config_dir()).iterdir() if path.is_dir()}

hydras_list = loader.create_defaults_list
hydras_choices = defaults_list._create_interpolation_map
omegaconfs_copy = DictConfig.__deepcopy__
hydras_mode = Hydra.get_mode
hydras_parse = OverridesParser.parse_rule
hydras_merge = ConfigLoaderImpl._compose_config_from_defaults_list
_lists: dict[tuple[str | bool | None, ...], DefaultsList] = {}
_merged: dict[int, bytes] = {}
_schemas: dict[str, tuple[ConfigNode, bytes]] = {}
_files: dict[tuple[str, str], bytes] = {}
_begun: dict[tuple[Any, ...], bytes] = {}


def remember() -> None:
    """Let Hydra merge btrain's own files once for equal options, in a command, too.

    Equal words are parsed once. All else is done anew: settings are put into a copy, values are
    checked.
    """
    loader.create_defaults_list = _list
    ConfigLoaderImpl._compose_config_from_defaults_list = _merge  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = _choices
    OverridesParser.parse_rule = _parse  # type: ignore[method-assign]
    user_files._parsed_once = _file
    ConfigStore.load = _schema  # type: ignore[method-assign]
    DictConfig.__deepcopy__ = _copy  # type: ignore[method-assign]
    Hydra.get_mode = _mode  # type: ignore[method-assign]
    configs.keys_of = cache(configs.keys_of)  # which the hints of mistakes go through
    parse = lru_cache(10_000)(omegaconf.base.parse)
    omegaconf.base.parse = omegaconf._utils.parse = parse


@cache
def _parsed(word: str, rule: str) -> Any:
    return hydras_parse(OverridesParser.create(), word, rule)


def _parse(self: OverridesParser, word: str, rule: str) -> Any:
    return copy.copy(_parsed(word, rule))  # which gets a loader of its own


def _file(source: ConfigSource, name: str, parse: Callable[[str], ConfigResult]) -> ConfigResult:
    key = (source.full_path(), name)
    if key not in _files:
        _files[key] = pickle.dumps(parse(name))
    found: ConfigResult = pickle.loads(_files[key])
    return found


def _schema(self: ConfigStore, config_path: str) -> ConfigNode:
    stored = self._load(config_path)
    if config_path not in _schemas or _schemas[config_path][0] is not stored:
        _schemas[config_path] = stored, pickle.dumps(stored)
    found: ConfigNode = pickle.loads(_schemas[config_path][1])
    return found


def _copy(self: DictConfig, memo: dict[int, Any]) -> DictConfig:
    """Return a copy that knows the same parent, as OmegaConf does at a quarter of the speed."""
    parent = self.__dict__["_parent"]
    self.__dict__["_parent"] = None
    try:
        copied: DictConfig = pickle.loads(pickle.dumps(self))
    except Exception:  # what it holds cannot be pickled
        self.__dict__["_parent"] = parent
        return omegaconfs_copy(self, memo)
    finally:
        self.__dict__["_parent"] = parent
    copied.__dict__["_parent"] = parent
    return copied


def _mode(self: Hydra, config_name: str | None, overrides: list[str]) -> Any:
    """Return the mode that words give; Hydra composes the whole configuration to see that."""
    if not _ours_alone(self.config_loader.repository) or any("hydra" in w for w in overrides):
        return hydras_mode(self, config_name, overrides)
    return None


def _ours_alone(repo: IConfigRepository) -> bool:
    """Return whether Hydra reads no folder of a user's, whose files may change."""
    folders = [source.path for source in repo.get_sources() if source.scheme() == "file"]
    return folders == [configs.config_dir()]


def _list(
    repo: IConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> DefaultsList:
    if not _ours_alone(repo):
        return hydras_list(repo, config_name, overrides_list, prepend_hydra, skip_missing)
    options = [word for word in overrides_list if repo.group_exists(word.key_or_group)]
    key = (config_name, skip_missing, *(word.input_line for word in options))
    if key not in _lists:
        _lists[key] = hydras_list(repo, config_name, options, prepend_hydra, skip_missing)
    found = _lists[key]
    # As hydra's own `Overrides` tells them apart.
    settings = [
        word
        for word in overrides_list
        if not word.is_sweep_override() and (word not in options or isinstance(word.value(), dict))
    ]
    return DefaultsList(found.defaults, found.defaults_tree, settings, found.overrides)


def _choices(overrides: Overrides, defaults: list[InputDefault], self_added: bool) -> DictConfig:
    """Return the options that interpolations among the defaults can name, if there are any."""
    if any(default.is_interpolation() for default in defaults):
        return hydras_choices(overrides, defaults, self_added)
    return OmegaConf.create()


def _merge(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: IConfigRepository) -> Any:
    if not any(found.defaults is defaults for found in _lists.values()):
        return hydras_merge(self, defaults, repo)
    if id(defaults) not in _merged:
        _merged[id(defaults)] = pickle.dumps(_merge_anew(self, defaults, repo))
    return pickle.loads(_merged[id(defaults)])  # a copy, four times as fast as by `copy.deepcopy`


def _merge_anew(self: ConfigLoaderImpl, defaults: list[ResultDefault], repo: Any) -> Any:
    """Go on as Hydra does from the longest list that was merged before and begins alike."""
    steps = [(str(d.config_path), d.package, d.is_self, d.primary) for d in defaults]
    loosened = tuple(ConfigStore.instance().load("loosened.yaml").node)  # by the words, no file's
    keys = [(loosened, *steps[: n + 1]) for n in range(len(steps))]
    start = next((n for n in range(len(keys), 0, -1) if keys[n - 1] in _begun), 0)
    cfg = pickle.loads(_begun[keys[start - 1]]) if start else OmegaConf.create()
    for default, key in zip(defaults[start:], keys[start:], strict=True):
        with flag_override(cfg, "no_deepcopy_set_nodes", True):
            cfg.merge_with(self._load_single_config(default, repo).config)
        _begun[key] = pickle.dumps(cfg)
    cfg._metadata.ref_type = cfg._metadata.object_type
    return cfg


def compose(overrides: Sequence[str] = ()) -> Any:
    """Return `btrain.settings.compose.compose(overrides)`, without Hydra's own settings.

    The options (`model=small_cnn`) choose the YAML files; a setting (`model.width=4`) is put into
    what they come to, by Hydra's own function, as Hydra does.
    """
    config = pickle.loads(_checked(tuple(overrides)))
    own.allow_parts(config)
    return config


@cache
def _checked(overrides: tuple[str, ...]) -> bytes:
    options = tuple(word for word in overrides if word.partition("=")[0] in GROUPS)
    settings = [word for word in overrides if word not in options]
    cfg = pickle.loads(_composed(options))
    try:
        parsed = OverridesParser.create().parse_overrides(settings)
        ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
    except HydraException as error:
        raise configs.explain(error, overrides) from error
    cfg, _ = configs.without_replaced(cfg, overrides)
    return pickle.dumps(configs.from_hydra(cfg, overrides))


@cache
def _composed(options: tuple[str, ...]) -> bytes:
    return pickle.dumps(configs.composed(options, "train"))
