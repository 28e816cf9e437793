"""Strict YAML: text, numbers, switches, lists and mappings, of which nothing is guessed.

Scalars are those of YAML 1.2's core schema: `on` and `yes` are text, and `1e-3` is a number. What a config has no use
for is refused: anchors, tags, several documents, names given twice, deep nesting.
"""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from yaml.events import (
    AliasEvent,
    DocumentStartEvent,
    Event,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
)

from pipelines.console.shipped import ROOT
from wan.utils.errors import InputError

MAX_BYTES = 2**20
MAX_DEPTH = 16
MAX_NODES = 10**5
_NULL = re.compile(r"|~|null|Null|NULL")
_SWITCH = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INTEGER = re.compile(r"[-+]?[0-9]+")
_NUMBER = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?")
_SPECIAL = re.compile(r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")
MAX_DIGITS = 1000


def read_mapping(path: Path, what: str) -> dict[str, Any]:
    """The names and values of a YAML file.

    Args:
        what: the file's kind, for messages: "config".

    Raises:
        InputError: missing, too large, not text, not YAML, or no mapping.
    """
    try:
        if not path.is_file():
            there = "is no regular file" if path.exists() else "is not there"
            cause = "is a folder" if path.is_dir() else there
            raise InputError(f"no {what} file {path}: it {cause}; those of the project are in {ROOT / 'configs'}")
        if path.stat().st_size > MAX_BYTES:
            raise InputError(f"{what} {path} is larger than 1 MiB: give a YAML file of settings")
        data = path.read_bytes()
    except InputError:
        raise
    except (OSError, ValueError) as error:  # ValueError: a name with NUL
        raise InputError(f"cannot read {what} {path} ({error}): check the path") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{what} {path} is not UTF-8 text (byte {error.start}): give a YAML file") from error
    value = parse(text, f"{what} {path}")
    if value is None:
        raise InputError(f"{what} {path} is empty: write key: value lines")
    if not isinstance(value, dict):
        kind = "a list" if isinstance(value, list) else "a single value"
        raise InputError(f"{what} {path} is not a set of settings: it is {kind}; write key: value lines")
    return value


def parse(text: str, source: str) -> Any:
    """The value of a YAML text, None if there is none; names of mappings are text.

    Raises:
        InputError: not YAML, or something that the module refuses.
    """
    try:
        return _Builder(yaml.parse(text, Loader=yaml.SafeLoader), source).document()
    except yaml.MarkedYAMLError as error:
        place = "" if error.problem_mark is None else f" in line {error.problem_mark.line + 1}"
        raise InputError(f"{source} is not valid YAML{place}: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        raise InputError(
            f"{source} is not valid YAML: character {error.position} is no printable text; write text"
        ) from error


def resolve(text: str) -> Any:
    """The value of a scalar without quotes: null, a switch, a number, or the text itself."""
    if _NULL.fullmatch(text):
        return None
    if text in _SWITCH:
        return _SWITCH[text]
    if len(text) <= MAX_DIGITS and _INTEGER.fullmatch(text):
        return int(text)
    if _NUMBER.fullmatch(text) or _SPECIAL.fullmatch(text):
        return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text


class Quoted(str):
    """A text that stood in quotes."""

    __slots__ = ()


class _Frame(NamedTuple):
    """A list or mapping that is being read, and the name whose value comes next."""

    value: dict[str, Any] | list[Any]
    key: list[str]


class _Builder:
    """Makes values of parser events, without recursion: nesting costs no stack."""

    def __init__(self, events: Iterator[Event], source: str) -> None:
        self._events, self._source = events, source

    def document(self) -> Any:
        """The value of the only document."""
        frames: list[_Frame] = []
        root: list[Any] = []
        documents = nodes = 0
        for event in self._events:
            documents += isinstance(event, DocumentStartEvent)
            nodes += isinstance(event, ScalarEvent | MappingStartEvent | SequenceStartEvent)
            self._refuse(event, documents, nodes, len(frames))
            if isinstance(event, MappingEndEvent | SequenceEndEvent):
                self._place(frames.pop().value, frames, root, event)
            elif isinstance(event, MappingStartEvent):
                frames.append(_Frame({}, []))
            elif isinstance(event, SequenceStartEvent):
                frames.append(_Frame([], []))
            elif isinstance(event, ScalarEvent):
                self._scalar(event, frames, root)
        return root[0] if root else None

    def _scalar(self, event: ScalarEvent, frames: list[_Frame], root: list[Any]) -> None:
        if frames and isinstance(frames[-1].value, dict) and not frames[-1].key:
            if event.value in frames[-1].value:
                self._fail(event, f"{event.value[:60]!r} is given twice: keep one of them")
            frames[-1].key.append(event.value)
            return
        is_plain = event.style is None
        self._place(resolve(event.value) if is_plain else Quoted(event.value), frames, root, event)

    def _place(self, value: Any, frames: list[_Frame], root: list[Any], event: Event) -> None:
        """Put a finished value where it belongs."""
        if not frames:
            root.append(value)
        elif isinstance(frames[-1].value, list):
            frames[-1].value.append(value)
        elif frames[-1].key:
            frames[-1].value[frames[-1].key.pop()] = value
        else:
            self._fail(event, "a list or mapping cannot be a name: write key: value")

    def _refuse(self, event: Event, documents: int, nodes: int, depth: int) -> None:
        if documents > 1:
            self._fail(event, "a second document begins: keep one")
        if isinstance(event, AliasEvent) or getattr(event, "anchor", None) is not None:
            self._fail(event, "anchors (& and *) are not supported: write the value where it is needed")
        if getattr(event, "tag", None) not in (None, "!"):
            self._fail(event, f"tags such as {str(getattr(event, 'tag', ''))[:60]} are not supported: write the value")
        if depth > MAX_DEPTH:
            self._fail(event, f"it is nested more than {MAX_DEPTH} deep: no setting is")
        if nodes > MAX_NODES:
            self._fail(event, f"it holds more than {MAX_NODES} values: no config does")

    def _fail(self, event: Event, message: str) -> None:
        line = "" if event.start_mark is None else f", line {event.start_mark.line + 1}"
        raise InputError(f"{self._source}{line}: {message}")
