"""Reading config.json, and holding what it says to declared names, types and ranges.

A field is declared once, by one of `whole`, `real`, `flag`, `one_of`, `list_of` and `optional`; `check_settings` holds
a config to its declarations. Nothing is built, and no memory taken, before a config passed.
"""

import json
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

from wan.utils.errors import CheckpointError

MAX_CONFIG_BYTES = 1 << 24
"""A larger config.json is something else."""
MAX_SHOWN = 60
"""Characters of a wrong value in a message."""

Field = Callable[[Any], str | None]
"""Says what is wanted instead of a value; None if the value is right."""


def whole(low: int, high: int) -> Field:
    """A field that holds an integer from `low` to `high`."""

    def check(value: Any) -> str | None:
        right = isinstance(value, int) and not isinstance(value, bool) and low <= value <= high
        return None if right else f"a whole number from {low} to {high}"

    return check


def real(low: float, high: float, above: bool = False) -> Field:
    """A field that holds a finite number from `low` to `high`; with `above` not `low` itself."""

    def check(value: Any) -> str | None:
        number = isinstance(value, int | float) and not isinstance(value, bool)
        right = number and low <= value <= high and not (above and value == low)  # never true of NaN
        between = f"above {low:g}, {high:g} at most" if above else f"from {low:g} to {high:g}"
        return None if right else f"a number {between}"

    return check


def flag() -> Field:
    """A field that holds true or false."""
    return lambda value: None if isinstance(value, bool) else "true or false"


def one_of(*values: Any) -> Field:
    """A field that holds one of some values."""

    def check(value: Any) -> str | None:
        # By type too: true and 1, or 1 and 1.0, are equal in Python.
        right = any(type(value) is type(each) and value == each for each in values)
        return None if right else " or ".join(json.dumps(each) for each in values)

    return check


def list_of(element: Field, length: int | None = None, longest: int = 4096) -> Field:
    """A field that holds a list of values of one kind.

    Args:
        element: what each must be.
        length: of the list; None for any up to `longest`.
    """

    def check(value: Any) -> str | None:
        right = isinstance(value, list | tuple) and len(value) <= longest and length in (None, len(value))
        wrong = next((wanted for each in value if (wanted := element(each))), None) if right else None
        if right and wrong is None:
            return None
        return f"a list{f' of {length}' if length else ''}" + (f", each {wrong}" if wrong else "")

    return check


def optional(field: Field) -> Field:
    """A field that may also hold null."""

    def check(value: Any) -> str | None:
        wanted = None if value is None else field(value)
        return f"null or {wanted}" if wanted else None

    return check


def settings_of(fields: Mapping[str, Field]) -> Field:
    """A field that holds an object with exactly some fields."""

    def check(value: Any) -> str | None:
        names = ", ".join(fields)
        if not isinstance(value, dict) or value.keys() != fields.keys():
            return f"an object of {names}"
        wrong = [(name, wanted) for name, field in fields.items() if (wanted := field(value[name]))]
        return f"an object of {names}, with {wrong[0][0]} {wrong[0][1]}" if wrong else None

    return check


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or another JSON file of settings.

    Raises:
        CheckpointError: missing, unreadable, malformed, or no object of names and values, each name once.
    """
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise CheckpointError(f"{path} is too large for a file of settings: download it again")
        config = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_object)
    except FileNotFoundError as error:
        raise CheckpointError(f"no {path.name} in {path.parent}: give the folder of a model") from error
    except OSError as error:
        raise CheckpointError(
            f"cannot read {path} ({error.strerror}): check its permissions, or download it again"
        ) from error
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:  # ValueError includes bad JSON, bad UTF-8 and repeated names
        reason = str(error).splitlines()[0]
        raise CheckpointError(f"{path} is not valid JSON ({reason}): download it again") from error
    if not isinstance(config, dict):
        raise CheckpointError(f"{path} holds a JSON {type(config).__name__}, no settings: download it again")
    return config


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object; Python would take the last of several values of one name."""
    found = dict(pairs)
    if len(found) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return found


def check_settings(
    config: Mapping[str, Any],
    fields: Mapping[str, Field],
    source: str | Path,
    needed: Collection[str] = (),
    others: bool = False,
) -> dict[str, Any]:
    """Hold settings to their declarations.

    Args:
        config: names to values; names that begin with an underscore are left out.
        fields: the declarations by name.
        source: where the settings come from, for messages.
        needed: names that must be there.
        others: leave out names without a declaration, in the place of refusing them.

    Returns:
        the declared settings that are there.

    Raises:
        CheckpointError: a name is unknown or missing, or a value has another type or is out of range.
    """
    named = {name: value for name, value in config.items() if not name.startswith("_")}
    unknown = sorted(named.keys() - fields.keys())
    if unknown and not others:
        raise CheckpointError(f"{source} has a setting that we do not know, {unknown[0]!r}: remove it or update")
    missing = [name for name in needed if name not in named]
    if missing:
        raise CheckpointError(f"{source} lacks {', '.join(missing)}: download it again or write what it should say")
    for name, value in named.items():
        wanted = fields[name](value) if name in fields else None
        if wanted:
            raise CheckpointError(f"{source}: {name} is {shown(value)}, it must be {wanted}")
    return {name: value for name, value in named.items() if name in fields}


def shown(value: Any) -> str:
    """A value for a message, cut if it is long."""
    text = ascii(value) if not isinstance(value, int) or isinstance(value, bool) or abs(value) < 1 << 64 else "huge"
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}…"
