"""Reading config.json, and holding what it says to declared names, types and ranges.

Declarations are those of `wan.utils.ranges`, by name. Nothing is built, and no memory taken, before a config passed.
"""

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import read_json
from wan.utils.ranges import typed

MAX_CONFIG_BYTES = 1 << 24
"""A larger config.json is something else."""


def read_config(path: Path) -> dict[str, Any]:
    """A config.json, or another JSON file of settings.

    Raises:
        CheckpointError: missing, unreadable, malformed, or no object of names and values, each name once.
    """
    try:
        return read_json(path, CheckpointError, "download it again", MAX_CONFIG_BYTES)
    except CheckpointError as error:
        if isinstance(error.__cause__, FileNotFoundError):
            raise CheckpointError(f"no {path.name} in {path.parent}: give the folder of a model") from error
        raise


def check_settings(
    config: Mapping[str, Any],
    fields: Mapping[str, Any],
    source: str | Path,
    needed: Collection[str] = (),
    others: bool = False,
) -> dict[str, Any]:
    """Hold settings to their declarations.

    Args:
        config: names to values; names that begin with an underscore are left out.
        fields: the declarations by name, as `wan.utils.ranges.typed` takes them.
        source: where the settings come from, for messages.
        needed: names that must be there.
        others: leave out names without a declaration, in the place of refusing them.

    Returns:
        the declared settings that are there, as they are.

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
    found = {name: value for name, value in named.items() if name in fields}
    for name, value in found.items():
        try:
            typed(fields[name], value, name)
        except InputError as error:
            raise CheckpointError(f"{source}: {error}") from error
    return found
