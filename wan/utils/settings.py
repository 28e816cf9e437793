"""The one rule of resuming: what is there may be kept, or gone on with, if the same settings made it."""

import json
from collections.abc import Mapping
from typing import Any

from wan.utils.errors import InputError

_ABSENT = "nothing"
NOTED_LATER = ("architecture", "tokenizer")
"""Settings that records of earlier versions lack: there they are unknown, and accepted. They may be nested."""
FORMER_VALUES = {("memory.kind", "trained"): "full"}
"""What records say of settings that were not resolved: an unresolved memory was everything."""

IDLE = {("memory.kind", "full"): ("memory.window_frames", "memory.sink_frames")}
"""Settings that another one switches off: what they say does not matter."""


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
    """What differs, each as "name was …, is …", by name; see `NOTED_LATER`."""
    old, new = (_known(flat(plain(settings))) for settings in (before, now))
    names = sorted(name for name in old.keys() | new.keys() if old.get(name, _ABSENT) != new.get(name, _ABSENT))
    return [
        f"{name} was {old.get(name, _ABSENT)}, is {new.get(name, _ABSENT)}"
        for name in names
        if not _is_unknown(name, old, new)
    ]


def _known(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Flat settings under the values of today, without idle ones."""
    known = {
        name: FORMER_VALUES.get((name, value), value) if isinstance(value, str) else value
        for name, value in settings.items()
    }
    idle = {name for (key, value), names in IDLE.items() if known.get(key) == value for name in names}
    return {name: value for name, value in known.items() if name not in idle}


def _is_unknown(name: str, *sides: Mapping[str, Any]) -> bool:
    """Whether a flat name belongs to a setting of `NOTED_LATER` that one of two sides lacks as a whole."""
    parts = name.split(".")
    for place, part in enumerate(parts):
        if part in NOTED_LATER:
            whole = ".".join(parts[: place + 1])
            return not all(any(other == whole or other.startswith(f"{whole}.") for other in side) for side in sides)
    return False


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
