"""From a YAML file, `key=value` settings and flags to a checked config: one reading for every config and entry point.

Flags and `key=value` settings go before the file, the file before the defaults. A flag and a `key=value` that
contradict one another are an error, and so is a setting under two names.
"""

import argparse
import dataclasses
import logging
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin

from pipelines.console.shipped import find_shipped
from pipelines.yaml_files import Quoted, parse, read_mapping
from wan.utils.errors import InputError
from wan.utils.ranges import IsInputPath, declaration, declarations, declared, shown, typed, unknown_setting

log = logging.getLogger(__name__)

Config = TypeVar("Config")


def load_config(
    kind: type[Config], path: Path, overrides: Sequence[str] = (), flags: Mapping[str, Any] | None = None
) -> Config:
    """Read a YAML file into the dataclass `kind`; keys that it leaves out keep their defaults.

    Args:
        overrides: `key=value` or `outer.inner=value`, which go before the file's own.
        flags: values by dotted name, as `pipelines.flags.Parser` collects them; they go before the file's own too.

    Raises:
        InputError: missing or malformed file, unknown key, a value of the wrong type or out of range, or settings that
            contradict one another.
    """
    values = current_names(read_mapping(path, "config"), kind, f"config {path}")
    given, flags = parse_overrides(kind, overrides), flags or {}
    for name, value in flags.items():
        wanted = typed(declaration(kind, name), value, name)
        if name in given and typed(declaration(kind, name), given[name], name) != wanted:
            raise InputError(
                f"{name} is given as a flag and as key=value, {shown(wanted)} and {shown(given[name])}: give it once"
            )
    for name, value in (given | dict(flags)).items():
        typed(declaration(kind, name), value, name)  # an error of the command line does not name the file
        _put(values, name, value, kind)
    try:
        config: Config = typed(kind, values, "")
    except InputError as error:
        raise InputError(f"config {path}: {error}") from error
    _take_shipped(config, kind)
    return config


def _take_shipped(config: Any, kind: type) -> None:
    """Let paths to read that name nothing lead to what comes with the project, see `find_shipped`."""
    for name, hint in declarations(kind).items():
        value = vars(config)[name]
        if isinstance(value, str) and any(isinstance(rule, IsInputPath) for rule in declared(hint).rules):
            found = find_shipped(Path(value))
            vars(config)[name] = value if found == Path(value) else str(found)


def given_names(kind: type, arguments: argparse.Namespace) -> set[str]:
    """Dotted names of the settings that a command line of `pipelines.flags.Parser` gives, by flag or `key=value`."""
    return set(parse_overrides(kind, arguments.settings)) | set(arguments.flags)


def parse_overrides(kind: type, overrides: Sequence[str]) -> dict[str, Any]:
    """The values of `key=value` settings by dotted name of today; of several for one name the last counts.

    Raises:
        InputError: no `=`, no value, or an unknown name.
    """
    found: dict[str, Any] = {}
    for text in overrides:
        name, equals, value_text = text.partition("=")
        name = name.strip()
        if not (equals and name):
            raise InputError(f"{shown(text)} is no setting: give key=value")
        nested: dict[str, Any] = {}
        if not value_text.strip():
            _put_raw(nested, name.split("."), None)
            hints = [declaration(kind, key) for key in _leaves(current_names(nested, kind, name), kind)]
            null = f", or {name}=null for none" if any(declared(hint).optional for hint in hints) else ""
            raise InputError(f"{name} has no value: give {name}=value{null}")
        _put_raw(nested, name.split("."), parse(value_text, name))
        for key, value in _leaves(current_names(nested, kind, name), kind).items():
            # A text is taken as it stands: run_folder=2024 needs no quotes.
            is_text = declared(declaration(kind, key)).kind is str and key.count(".") == name.count(".")
            if is_text and value is not None and not isinstance(value, Quoted):
                value = value_text
            found[key] = value
    return found


def _put_raw(values: dict[str, Any], keys: Sequence[str], value: Any) -> None:
    for key in keys[:-1]:
        values = values.setdefault(key, {})
    values[keys[-1]] = value


def _put(values: dict[str, Any], name: str, value: Any, kind: type) -> None:
    """Put a value at its place in nested settings."""
    *outer, last = name.split(".")
    for key in outer:
        inner = values.setdefault(key, {})
        if not isinstance(inner, dict):
            typed(declarations(kind)[key], inner, key)  # says what is wrong with it
        kind = declared(declarations(kind)[key]).kind
        values = inner
    values[last] = value


def _leaves(values: Mapping[str, Any], kind: type, prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name.

    Raises:
        InputError: a name that `kind` has not.
    """
    found: dict[str, Any] = {}
    hints = declarations(kind)
    for key, value in values.items():
        if key not in hints:
            raise InputError(unknown_setting(f"{prefix}{key}", key, kind, prefix))
        inner = declared(hints[key]).kind
        if isinstance(value, Mapping) and dataclasses.is_dataclass(inner):
            assert isinstance(inner, type)
            found |= _leaves(value, inner, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = value
    return found


def current_names(values: Mapping[str, Any], kind: type, source: str) -> dict[str, Any]:
    """Settings under the names and values of today; a former one is understood, and the log says what replaced it.

    Raises:
        InputError: a setting stands there under both names.
    """
    renamed: dict[str, Any] = {}
    hints = declarations(kind)
    former = {old: name for name, hint in hints.items() for old in declared(hint).former}
    for key, value in values.items():
        name = former.get(key, key)
        if name != key:
            _say_once(f"{key} is now called {name}: the former name still works")
            if name in values:
                raise InputError(f"{source} gives {name} and its former name {key}: keep {name}")
        if name in hints:
            value = _current_value(value, hints[name], name, source)
        renamed[name] = value
    return renamed


def _current_value(value: Any, hint: Any, name: str, source: str) -> Any:
    kind = declared(hint).kind
    if get_origin(kind) is list and isinstance(value, list):
        return [_current_value(element, get_args(kind)[0], name, source) for element in value]
    if get_origin(kind) is not None:
        return value
    assert isinstance(kind, type)
    if dataclasses.is_dataclass(kind) and isinstance(value, Mapping):
        return current_names(value, kind, source)
    if issubclass(kind, Enum) and isinstance(value, str) and value not in {member.value for member in kind}:
        try:
            member = kind(value)
        except ValueError:
            return value  # an error, or a member's name
        _say_once(f"{name} {value} is now called {member.value}: the former name still works")
        return member.value
    return value


@cache
def _say_once(message: str) -> None:
    log.warning("%s", message)
