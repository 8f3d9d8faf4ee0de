"""The sources that Hydra reads options from: folders of YAML files, and the schemas.

Each has the name of Hydra's, which takes no other for it in the processes of a sweep.
Imports Hydra, so that only what composes a configuration imports this.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path

import yaml
from hydra._internal.core_plugins import file_config_source as hydras
from hydra._internal.core_plugins import importlib_resources_config_source as packaged
from hydra._internal.core_plugins import structured_config_source as structured
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult, ConfigSource

from btrain.errors import UserError, first_line
from btrain.untrusted import RefusedError, read_text

_LARGEST = 64 << 10  # bytes; btrain's own have 3,000
_MOST_VALUES = 10_000
_DEEPEST = 50
_OURS = "main"  # Hydra's name for the folder that the command itself brings


def register() -> None:
    """Let Hydra read every file and every schema through the classes below."""
    Plugins.instance()  # which registers Hydra's own
    types = SourcesRegistry.instance().types
    types[FileConfigSource.scheme()] = FileConfigSource
    types[ImportlibResourcesConfigSource.scheme()] = ImportlibResourcesConfigSource
    types[StructuredConfigSource.scheme()] = StructuredConfigSource


class StructuredConfigSource(structured.StructuredConfigSource):
    """The schemas, which Hydra copies with its sources; a quarter of its time went by that."""

    def __deepcopy__(self, memo: object) -> StructuredConfigSource:
        """Return itself: nobody changes it, and what is loaded from it is a copy already."""
        return self


_parsed: dict[tuple[str, str], ConfigResult] = {}
"""The files of btrain's and of Hydra's own by folder and name, for each is parsed once."""


def _parsed_once(
    source: ConfigSource, name: str, parse: Callable[[str], ConfigResult]
) -> ConfigResult:
    """Return what a file holds, as a copy, for Hydra takes the defaults out of it."""
    key = (source.full_path(), name)
    if key not in _parsed:
        _parsed[key] = parse(name)
    return copy.deepcopy(_parsed[key])


class ImportlibResourcesConfigSource(packaged.ImportlibResourcesConfigSource):
    """The YAML files of Hydra's package, each parsed once."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Return what a file holds."""
        return _parsed_once(self, config_path, super().load_config)


class FileConfigSource(hydras.FileConfigSource):
    """A folder of YAML files: btrain's own are parsed once, a user's are read with bounds."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Return what a file holds.

        Raises:
            UserError: it is no YAML of a moderate size in UTF-8.
        """
        if self.provider == _OURS:
            return _parsed_once(self, config_path, super().load_config)
        path = Path(self.path) / self._normalize_file_name(config_path)
        if not path.exists():
            return super().load_config(config_path)
        try:
            node = yaml.compose(read_text(path, _LARGEST), Loader=yaml.SafeLoader)
            _count(node, {}, 0)
            return super().load_config(config_path)
        except UnicodeError as error:
            raise UserError(f"{path} is no text in UTF-8; please save it as such.") from error
        except RefusedError as error:
            raise UserError(f"{path} is no file of settings: {error}.") from error
        except RecursionError as error:
            raise UserError(f"{path} is nested too deeply.") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = f", line {mark.line + 1}" if mark else ""
            raise UserError(f"{path}{line}: {error.problem or first_line(error)}.") from error
        except Exception as error:  # OmegaConf's, and whatever else a value is refused with
            raise UserError(f"{path}: {first_line(error)}.") from error


def _count(node: yaml.Node | None, known: dict[int, int], depth: int) -> int:
    """Return how many values a node comes to with what it refers to written out.

    Raises:
        RefusedError: there are too many, or too many levels.
    """
    if depth > _DEEPEST:
        raise RefusedError(f"it is nested deeper than {_DEEPEST} levels")
    if id(node) not in known:
        inside: list[yaml.Node] = []
        if isinstance(node, yaml.MappingNode):
            inside = [part for pair in node.value for part in pair]
        elif isinstance(node, yaml.SequenceNode):
            inside = node.value
        known[id(node)] = 1 + sum(_count(part, known, depth + 1) for part in inside)
        if known[id(node)] > _MOST_VALUES:
            raise RefusedError(f"it comes to more than {_MOST_VALUES:,} values")
    return known[id(node)]
