"""The one rule of resuming: what is there may be kept, or gone on with, if the same settings made it."""

import json
from collections.abc import Mapping
from typing import Any

from wan.utils.errors import InputError

_ABSENT = "nothing"


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings as JSON gives them back: enumerations by value, tuples as lists, all else as text."""
    result: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return result


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested settings by dotted name, `memory.window_frames` for instance."""
    found: dict[str, Any] = {}
    for name, value in settings.items():
        found |= flat(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return found


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, each as "name was …, is …", by name."""
    old, new = flat(plain(before)), flat(plain(now))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name, _ABSENT) != new.get(name, _ABSENT))
    return [f"{name} was {old.get(name, _ABSENT)}, is {new.get(name, _ABSENT)}" for name in names]


def require_same_settings(
    before: Mapping[str, Any],
    now: Mapping[str, Any],
    what: str,
    cure: str,
    error: type[InputError] = InputError,
) -> None:
    """Make sure that `what` was made with the settings of now.

    Args:
        before, now: settings, nested or flat.
        what: the thing that is there, with its verb: "out/a.mp4 was made".
        cure: what to do otherwise.
        error: the class to raise.

    Raises:
        InputError: they differ; the message names what differs, with both values.
    """
    found = differences(before, now)
    if found:
        more = f", and {len(found) - 3} more differ" if len(found) > 3 else ""
        raise error(f"{what} with other settings ({'; '.join(found[:3])}{more}): {cure}")
