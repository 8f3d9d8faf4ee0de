"""Configurations for tests that make many: the YAML files are merged once for equal options."""

from __future__ import annotations

import pickle
from collections.abc import Sequence
from functools import cache, lru_cache
from itertools import takewhile
from pathlib import Path
from typing import Any

import omegaconf
from hydra._internal import config_loader_impl as loader
from hydra._internal import defaults_list
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.config_repository import IConfigRepository
from hydra._internal.defaults_list import DefaultsList, Overrides
from hydra.core.default_element import InputDefault, ResultDefault
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, flag_override

from btrain import own
from btrain.settings import compose as configs

GROUPS = {path.name for path in Path(configs.config_dir()).iterdir() if path.is_dir()}

hydras_list = loader.create_defaults_list
hydras_choices = defaults_list._create_interpolation_map
hydras_merge = ConfigLoaderImpl._compose_config_from_defaults_list
_lists: dict[tuple[str | bool | None, ...], DefaultsList] = {}
_merged: dict[int, bytes] = {}
_of_hydra: dict[tuple[str, ...], bytes] = {}


def remember() -> None:
    """Let Hydra merge btrain's own files once for equal options, in a command, too.

    All else is done anew: words are parsed, settings are put into a copy, values are checked.
    """
    loader.create_defaults_list = _list
    ConfigLoaderImpl._compose_config_from_defaults_list = _merge  # type: ignore[method-assign]
    defaults_list._create_interpolation_map = _choices
    configs.keys_of = cache(configs.keys_of)  # which the hints of mistakes go through
    parse = lru_cache(10_000)(omegaconf.base.parse)
    omegaconf.base.parse = omegaconf._utils.parse = parse


def _list(
    repo: IConfigRepository,
    config_name: str | None,
    overrides_list: list[Override],
    prepend_hydra: bool,
    skip_missing: bool,
) -> DefaultsList:
    folders = [source.path for source in repo.get_sources() if source.scheme() == "file"]
    if folders != [configs.config_dir()]:  # a user's files may change
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
    """Go on as Hydra does from what its own files come to, which stand ahead of all others."""
    own = [*takewhile(lambda default: str(default.config_path).startswith("hydra/"), defaults)]
    key = tuple(str(default.config_path) for default in own)
    if key not in _of_hydra:
        _of_hydra[key] = pickle.dumps(hydras_merge(self, own, repo))
    cfg = pickle.loads(_of_hydra[key])
    with flag_override(cfg, "no_deepcopy_set_nodes", True):
        for default in defaults[len(own) :]:
            cfg.merge_with(self._load_single_config(default, repo).config)
    cfg._metadata.ref_type = cfg._metadata.object_type
    return cfg


def compose(overrides: Sequence[str] = ()) -> Any:
    """Return `btrain.settings.compose.compose(overrides)`, without Hydra's own settings.

    The options (`model=small_cnn`) choose the YAML files; a setting (`model.width=4`) is put into
    what they come to, by Hydra's own function, as Hydra does.
    """
    options = tuple(word for word in overrides if word.partition("=")[0] in GROUPS)
    settings = [word for word in overrides if word not in options]
    cfg = pickle.loads(_composed(options))
    try:
        parsed = OverridesParser.create().parse_overrides(settings)
        ConfigLoaderImpl._apply_overrides_to_config(parsed, cfg)
    except HydraException as error:
        raise configs.explain(error, overrides) from error
    cfg, _ = configs.without_replaced(cfg, overrides)
    config = configs.from_hydra(cfg, overrides)
    own.allow_parts(config)
    return config


@cache
def _composed(options: tuple[str, ...]) -> bytes:
    return pickle.dumps(configs.composed(options, "train"))
