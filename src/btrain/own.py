"""The user's own parts: the one place that imports code which is not btrain's.

A part is named by a factory, `mine.py:Net` or `package.module:Name`. Nothing is imported unless
`allow` was called for it, which is what a command line and a call from Python do; what a file says
is never enough.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib
import importlib.util
import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

from btrain.durable import real
from btrain.errors import UserError, first_line
from btrain.untrusted import sha256

GIVEN = "object:"
"""The beginning of the factory of an object that was given from Python."""

_allowed: set[str] = set()
_given: dict[tuple[str, str], Any] = {}
_sources: dict[str, str] = {}
"""By a loaded file's module name, the SHA-256 of what was executed."""


def allow(*factories: str) -> None:
    """Permit the import of what the user has named, on the command line or from Python."""
    _allowed.update(factories)


def allow_parts(config: Any) -> None:
    """Permit all own parts of a configuration that the user has typed."""
    allow(*(factory for factory, _ in parts(config).values()))


def parts(config: Any) -> dict[str, tuple[str, dict[str, Any]]]:
    """Return factory and settings of each own part of a configuration, by its group."""
    groups = {field.name: getattr(config, field.name) for field in dataclasses.fields(config)}
    return {
        name: (group.factory, dict(group.settings))
        for name, group in groups.items()
        if getattr(group, "factory", None) is not None
    }


def give(thing: Any, group: str = "") -> str:
    """Return a factory, already allowed, for an object of this process: `object:<its name>`.

    Two groups may be given objects of one name; without a group it is for any, and takes the place
    of what was given before.
    A callable is a factory itself; anything else is handed out as it is.
    """
    name = getattr(thing, "__name__", type(thing).__name__)
    factory = f"{GIVEN}{name}"
    if not group:
        for key in [key for key in _given if key[1] == factory]:
            del _given[key]
    _given[group, factory] = thing
    allow(factory)
    return factory


def load(group: str, factory: str) -> Any:
    """Import what a factory names.

    Args:
        group: `model`, `dataset`, …, for the sentence of an error.
        factory: `mine.py:Net`, relative to the working directory, or `package.module:Name`.

    Raises:
        UserError: nobody has allowed it, there is no such file, module or name, or its import
            fails.
    """
    if factory not in _allowed:
        raise UserError(f"{group}.factory={factory} is code that nobody has named or trusted here.")
    if factory.startswith(GIVEN):
        for key in ((group, factory), ("", factory)):
            if key in _given:
                return _given[key]
        name = factory.removeprefix(GIVEN)
        raise UserError(f"{group}.factory={factory}: no {name} was given from Python here.")
    place, colon, name = factory.rpartition(":")
    if not colon or not place or not name:
        raise UserError(
            f"{group}.factory={factory} must be FILE.py:NAME or package.module:NAME, with a colon."
        )
    module = _file(group, factory, place) if place.endswith(".py") else _module(group, place)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            raise UserError(f"{group}.factory={factory}: there is no {name} in {place}.")
        found = getattr(found, part)
    return found


def call(group: str, factory: str, settings: Mapping[str, Any], **known: Any) -> Any:
    """Return what a factory makes.

    Args:
        group: `model`, `dataset`, …, whose `settings` they are, for the sentence of an error.
        settings: the user's.
        known: what the factory may want to know (`classes`, `shape`); it gets what it takes.

    Raises:
        UserError: as `load`; it cannot be called, takes other settings, or fails; a setting is
            what is known.
    """
    make = load(group, factory)
    if factory.startswith(GIVEN) and not makes(make):
        if settings:
            name = next(iter(settings))
            raise UserError(
                f"{group}.settings.{name} cannot be set: {factory} is an object already."
            )
        return make
    if not callable(make):
        raise UserError(
            f"{group}.factory={factory} is of type {type(make).__name__} and cannot be called; "
            f"name what makes the {_MADE[group]}, a class or a function."
        )
    if group == "model" and not makes(make) and hasattr(make, "state_dict"):
        raise UserError(
            f"{group}.factory={factory} is a network already; name what makes it, a class or a "
            "function."
        )
    for name in settings:
        if name in known:
            raise UserError(
                f"{group}.settings.{name} cannot be set: {factory} is given it, {known[name]}."
            )
    takes = _parameters(make)
    arguments = {key: value for key, value in known.items() if takes is None or key in takes}
    arguments |= settings
    if takes is not None:
        _check_arguments(group, factory, make, arguments, settings, known)
    with explained(f"{group}.factory={factory}"):
        return make(**arguments)


def facts(group: str, factory: str, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a run folder keeps of an own part: path, settings, SHA-256 of its file.

    Of an object that was given from Python it is the hash of its class or function alone.

    Raises:
        UserError: as `load`.
    """
    found = load(group, factory)
    path = digest = None
    if factory.startswith(GIVEN):
        kind = found if inspect.isclass(found) or inspect.isroutine(found) else type(found)
        with suppress(OSError, TypeError):  # of what was written in a console, or in C
            path = inspect.getsourcefile(kind)
            digest = hashlib.sha256(inspect.getsource(kind).encode()).hexdigest()
    else:
        place = factory.rpartition(":")[0]
        module = _module_name(_resolved(place)) if place.endswith(".py") else place
        path = getattr(sys.modules[module], "__file__", None)
        digest = _sources.get(module)
        if digest is None and path is not None and Path(path).is_file():
            digest = sha256(Path(path))
    name = getattr(found, "__qualname__", type(found).__name__)
    return {
        "factory": factory,
        "name": name,
        "path": path,
        "sha256": digest,
        "settings": dict(settings),
    }


@contextmanager
def explained(what: str) -> Iterator[None]:
    """Turn an exception of the user's code into one sentence with its file and line.

    Raises:
        UserError: there was one.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        raise UserError(f"{what} fails{_where(error)}: {_said(error)}.") from error


def _said(error: Exception) -> str:
    line = first_line(error)
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def _where(error: Exception) -> str:
    """Return the last line of the user's own files on the way to the error."""
    own = {getattr(sys.modules.get(name), "__file__", None) for name in _sources}
    if isinstance(error, SyntaxError) and error.filename in own:
        return f" in {Path(str(error.filename)).name}, line {error.lineno}"
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        if frame.filename in own:
            return f" in {Path(frame.filename).name}, line {frame.lineno}"
    return ""


def makes(thing: Any) -> bool:
    """Return whether it makes something, as a class or a function does; else it is the thing."""
    return inspect.isclass(thing) or inspect.isroutine(thing) or isinstance(thing, partial)


def _parameters(make: Callable[..., Any]) -> Mapping[str, inspect.Parameter] | None:
    """Return the parameters that take a keyword; None where Python cannot tell."""
    try:
        return {
            name: parameter
            for name, parameter in inspect.signature(make).parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
        }
    except (TypeError, ValueError):
        return None


def _check_arguments(
    group: str,
    factory: str,
    make: Callable[..., Any],
    arguments: Mapping[str, Any],
    settings: Mapping[str, Any],
    known: Mapping[str, Any],
) -> None:
    """Raise UserError for a setting too many or too few."""
    try:
        inspect.signature(make).bind(**arguments)
    except TypeError as error:
        takes = _parameters(make) or {}
        own = [name for name in takes if name not in known]
        has = f"it takes {', '.join(own)}" if own else "it takes none"
        for name in settings:
            if name not in takes:
                raise UserError(
                    f"{group}.settings.{name} is no setting of {factory}; {has}."
                ) from error
        for name in own:
            if name not in arguments and takes[name].default is inspect.Parameter.empty:
                raise UserError(
                    f"{factory} needs {name}; please give {group}.settings.{name}=…. "
                    f"{_called_for(group, factory, make)}"
                ) from error
        raise UserError(f"{group}.factory={factory} cannot be called: {first_line(error)}.") from (
            error
        )


_MADE = {
    "attack": "ball, a btrain.attacks.Ball",
    "bt": "allocator",
    "dataset": "data set",
    "defense": "object with inner_loss and outer_loss",
    "model": "network",
    "sparsity": "callable that gives the scores",
}
"""The thing that a factory of each group makes."""


def _called_for(group: str, factory: str, make: Any) -> str:
    """Return a sentence on what a factory is for, for who has named the thing itself."""
    told = f"It is called, once or more often, to make the {_MADE[group]}"
    if group not in ("bt", "sparsity") or inspect.isclass(make):
        return f"{told}."
    name = factory.rpartition(":")[2]
    return f"{told}; if it is that itself, name a function around it: def make(): return {name}."


def _resolved(place: str) -> Path:
    return real(Path(place).expanduser())


def _module_name(path: Path) -> str:
    """Return the same name in every process, so that what is pickled in one is found in another."""
    return f"btrain_own_{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"


def _file(group: str, factory: str, place: str) -> ModuleType:
    """Return the module of a file, executed again where the file has changed since."""
    path = _resolved(place)
    try:
        source = path.read_bytes()
    except OSError as error:
        raise UserError(
            f"{group}.factory={factory}: {path} cannot be read ({error.strerror})."
        ) from error
    name, digest = _module_name(path), hashlib.sha256(source).hexdigest()
    if _sources.get(name) == digest and name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    _find_beside(path.parent)
    sys.modules[name], _sources[name] = module, digest
    try:
        with explained(f"{group}.factory={factory}: importing {place}"):
            # Not by the spec's loader, which leaves a cache beside the file and may believe it.
            exec(compile(source, str(path), "exec"), module.__dict__)
    except BaseException:
        del sys.modules[name], _sources[name]
        raise
    return module


def _module(group: str, place: str) -> ModuleType:
    _find_beside(Path.cwd())
    try:
        with explained(f"{group}.factory: importing {place}"):
            return importlib.import_module(place)
    except UserError as error:
        cause = error.__cause__
        if isinstance(cause, ModuleNotFoundError) and f"{place}.".startswith(f"{cause.name}."):
            raise UserError(
                f"{group}.factory: there is no module {cause.name}; a file needs its .py, as in "
                f"{group}.factory=my_file.py:Name."
            ) from cause
        raise


def _find_beside(folder: Path) -> None:
    """Let an own file import its neighbours; last, so that they hide nothing."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
