"""The YAML files of `--config-dir`, checked before Hydra takes their values.

Imports Hydra, so that only what composes a configuration imports this.
"""

from __future__ import annotations

from pathlib import Path

import yaml
from hydra._internal.core_plugins import file_config_source as hydras
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.plugins import Plugins
from hydra.plugins.config_source import ConfigResult

from btrain.errors import UserError, first_line
from btrain.untrusted import RefusedError, read_text

_LARGEST = 64 << 10  # bytes; btrain's own have 3,000
_MOST_VALUES = 10_000
_DEEPEST = 50
_OURS = "main"  # Hydra's name for the folder that the command itself brings


def check_all() -> None:
    """Let Hydra read every file through `FileConfigSource`."""
    Plugins.instance()  # which registers Hydra's own
    SourcesRegistry.instance().types[FileConfigSource.scheme()] = FileConfigSource


class FileConfigSource(hydras.FileConfigSource):
    """A folder of YAML files that are read with bounds.

    It has the name of Hydra's, which takes no other for it in the processes of a sweep.
    """

    def load_config(self, config_path: str) -> ConfigResult:
        """Return what a file holds.

        Raises:
            UserError: it is no YAML of a moderate size in UTF-8.
        """
        path = Path(self.path) / self._normalize_file_name(config_path)
        if self.provider == _OURS or not path.exists():
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
