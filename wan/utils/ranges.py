"""Values that a setting may have: one declaration per field, beside its type, and one walker that checks all of them.

    @dataclass
    class Settings:
        batch: Annotated[int, Bounds(1)] = 1
        betas: tuple[Momentum, Momentum] = (0.9, 0.99)  # Momentum = Annotated[float, Bounds(0, 1, below=True)]

`typed(Settings, value)` turns what a YAML file or a command line holds into the class, strictly: no text for numbers,
no numbers for switches, no fractions for integers. `check_ranges(settings)` checks an object that a program built.
"""

import dataclasses
import difflib
import math
import os
import re
import types
from collections.abc import Mapping, Sequence
from enum import Enum
from functools import lru_cache
from itertools import pairwise
from numbers import Integral, Real
from pathlib import Path, PurePath
from typing import Annotated, Any, Literal, NamedTuple, Protocol, TypeVar, Union, get_args, get_origin, get_type_hints

from wan.utils.errors import InputError

T = TypeVar("T")
MAX_INT = 2**63 - 1
"""The largest integer of 64 bits, which no setting leaves."""
MAX_SHOWN = 60
MAX_PATH, MAX_NAME = 4095, 255
"""Bytes of a path and of each name in it, as file systems take them."""


class Rule(Protocol):
    """What a declaration asks of a value, beside its type."""

    @property
    def wanted(self) -> str:
        """The rule in words, as they follow the name of the type: "of at least 1"."""

    def admits(self, value: Any) -> bool:
        """Check a value of the declared type."""


@dataclasses.dataclass(frozen=True)
class Bounds:
    """Bounds of a number. NaN is never admitted, infinity only if `finite` is off.

    Attributes:
        low, high: smallest and largest value; None for none.
        above, below: whether the bound itself is excluded.
        finite: whether infinity is refused.
    """

    low: float | None = None
    high: float | None = None
    above: bool = False
    below: bool = False
    finite: bool = True

    @property
    def wanted(self) -> str:
        """See `Rule`."""
        if self.low is not None and self.high is not None and not (self.above or self.below):
            return f"from {self.low} to {self.high}"
        parts = []
        if self.low is not None:
            parts.append(f"above {self.low}" if self.above else f"of at least {self.low}")
        if self.high is not None:
            parts.append(f"below {self.high}" if self.below else f"of at most {self.high}")
        return " and ".join(parts)

    def admits(self, value: Any) -> bool:
        """See `Rule`."""
        if self.low is not None and not (value > self.low or (value == self.low and not self.above)):
            return False
        return self.high is None or value < self.high or (value == self.high and not self.below)


@dataclasses.dataclass(frozen=True)
class Length:
    """Number of elements of a list."""

    low: int = 0
    high: int = 10**5

    @property
    def wanted(self) -> str:
        """See `Rule`."""
        return f"of {self.low} to {self.high} elements"

    def admits(self, value: Any) -> bool:
        """See `Rule`."""
        return self.low <= len(value) <= self.high


@dataclasses.dataclass(frozen=True)
class Falling:
    """Elements of a list that get smaller, each than the one before."""

    wanted: str = "which must fall from element to element"

    def admits(self, value: Any) -> bool:
        """See `Rule`."""
        return all(former > latter for former, latter in pairwise(value))


@dataclasses.dataclass(frozen=True)
class Unique:
    """Elements of a list of which no two are equal."""

    wanted: str = "which names nothing more than once"

    def admits(self, value: Any) -> bool:
        """See `Rule`."""
        return all(value[index] not in value[:index] for index in range(len(value)))


@dataclasses.dataclass(frozen=True)
class Choices:
    """A text that is one of some."""

    names: tuple[str, ...]

    @property
    def wanted(self) -> str:
        """See `Rule`."""
        return f"that is one of {', '.join(self.names)}"

    def admits(self, value: Any) -> bool:
        """See `Rule`."""
        return value in self.names


@dataclasses.dataclass(frozen=True)
class IsPath:
    """A text that can name a file: not empty, and no longer than file systems take."""

    wanted: str = "that names a file or a folder"

    def admits(self, value: Any) -> bool:
        """See `Rule`."""
        try:
            name = os.fsencode(value)
        except UnicodeEncodeError:
            return False
        is_short = len(name) <= MAX_PATH and all(len(part) <= MAX_NAME for part in name.split(b"/"))
        return bool(value.strip()) and "\0" not in value and is_short


@dataclasses.dataclass(frozen=True)
class IsInputPath(IsPath):
    """A path that is read and never written: it may name what comes with the project."""


@dataclasses.dataclass(frozen=True)
class IsDevice:
    """The name of a device; whether this machine has it is another question."""

    wanted: str = "that is cpu, cuda or cuda:N"

    def admits(self, value: Any) -> bool:
        """See `Rule`."""
        return re.fullmatch(r"cpu|cuda(:(0|[1-9]\d?))?", value) is not None


@dataclasses.dataclass(frozen=True)
class Formerly:
    """The names that a field had before, which are understood still."""

    names: tuple[str, ...]

    def __init__(self, *names: str) -> None:
        object.__setattr__(self, "names", names)


Count = Annotated[int, Bounds(1, 10**9)]
"""How many of something, at least one."""
Positive = Annotated[float, Bounds(0, above=True)]
"""A finite number above zero."""
NotNegative = Annotated[float, Bounds(0)]
"""A finite number of at least zero."""
Fraction = Annotated[float, Bounds(0, 1, above=True, below=True)]
"""A number between zero and one, both excluded."""
Seed = Annotated[int, Bounds(-(2**63), MAX_INT)]
"""What random numbers are drawn from: any integer of 64 bits."""
PathText = Annotated[str, IsPath()]
"""A path, as text."""
InputPath = Annotated[str, IsInputPath()]
"""A path that is read and never written, as text."""
LayerIndices = list[Annotated[int, Bounds(0, 10**5)]]
"""Indices of layers; whether the model has them is checked against its sizes."""


class Declared(NamedTuple):
    """A declaration taken apart.

    Attributes:
        kind: the type without `None` and without rules.
        optional: whether None is admitted.
        rules: of the value.
        former: the names that the field had before.
    """

    kind: Any
    optional: bool
    rules: tuple[Rule, ...]
    former: tuple[str, ...]


def declared(hint: Any) -> Declared:
    """Take a type hint apart: `Annotated`, and unions with None, in any order."""
    if get_origin(hint) is Annotated:
        inner, *marks = get_args(hint)
        parts = declared(inner)
        former = tuple(name for mark in marks if isinstance(mark, Formerly) for name in mark.names)
        rules = tuple(mark for mark in marks if not isinstance(mark, Formerly))
        return Declared(parts.kind, parts.optional, parts.rules + rules, parts.former + former)
    if get_origin(hint) in (Union, types.UnionType):
        (inner,) = (part for part in get_args(hint) if part is not type(None))
        return declared(inner)._replace(optional=True)
    return Declared(hint, False, (), ())


@lru_cache(maxsize=256)
def declarations(kind: type) -> dict[str, Any]:
    """The hints of a dataclass's fields, by name."""
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: hints[field.name] for field in dataclasses.fields(kind) if field.init}


def wanted(hint: Any) -> str:
    """Say what a declaration admits, such as "an integer of at least 1, or null"."""
    kind, optional, rules, _ = declared(hint)
    separator = ", " if get_origin(kind) is list else " "
    words = separator.join([_noun(kind), *(rule.wanted for rule in rules if rule.wanted)])
    return words + (", or null" if optional else "")


def _noun(kind: Any) -> str:
    if get_origin(kind) in (list, tuple):
        elements = get_args(kind)
        if get_origin(kind) is tuple and elements[-1] is not Ellipsis:
            return f"a list of {len(elements)} values, each {wanted(elements[0])}"
        return f"a list, each element {wanted(elements[0])}"
    if get_origin(kind) is Literal:
        return " or ".join(shown(each) for each in get_args(kind))
    if isinstance(kind, type) and issubclass(kind, Enum):
        return f"one of {', '.join(member.value for member in kind)}"
    if dataclasses.is_dataclass(kind):
        return "settings by name"
    nouns = {bool: "true or false", int: "an integer", float: "a number", str: "text", Path: "a path"}
    return nouns[kind]


def shown(value: Any) -> str:
    """A value as a message shows it: as YAML has it, in one line, and short."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, Integral) and abs(int(value)) >= 10**40:
        return f"of {int(value).bit_length()} bits"
    text = value.value if isinstance(value, Enum) else str(value) if isinstance(value, PurePath) else value
    try:
        text = str(text) if isinstance(text, int | float) else ascii(text) if _is_odd(text) else repr(text)
    except ValueError:  # of integers of many digits
        return f"a {type(value).__name__} of huge values"
    return text if len(text) <= MAX_SHOWN else text[: MAX_SHOWN - 1] + "…"


def _is_odd(value: Any) -> bool:
    """Whether printing a value could fail, as lone surrogates do, or take very long."""
    try:
        return not str(value).encode().isascii()
    except (UnicodeEncodeError, ValueError):
        return True


def typed(hint: Any, value: Any, name: str) -> Any:
    """A value in its declared type.

    Args:
        hint: the declaration; a dataclass takes a mapping, and keeps its defaults for what that leaves out.
        value: what a file or a command line holds, or an object of the type already.
        name: of the setting, for messages.

    Raises:
        InputError: another type, a value out of range, or an unknown name.
    """
    kind, optional, rules, _ = declared(hint)
    if value is None and optional:
        return None
    if dataclasses.is_dataclass(kind):
        return _typed_settings(kind, value, name)
    if get_origin(kind) in (list, tuple):
        result = _typed_list(kind, value, name, hint)
    else:
        result = _typed_scalar(kind, value)
        if result is _NO_FIT:
            raise InputError(f"{name} {shown(value)} does not fit: give {wanted(hint)}")
    fits_64_bits = not isinstance(result, int) or -(2**63) <= result <= MAX_INT
    if not (fits_64_bits and _is_finite(result, rules) and all(rule.admits(result) for rule in rules)):
        more = " that fits 64 bits" if not fits_64_bits and all(rule.admits(result) for rule in rules) else ""
        raise InputError(f"{name} {shown(value)} is out of range: give {wanted(hint)}{more}")
    return result


def _is_finite(value: Any, rules: Sequence[Rule]) -> bool:
    """Whether a value is no NaN, and no infinity unless a rule admits that."""
    if not isinstance(value, float) or math.isfinite(value):
        return True
    return math.isinf(value) and any(isinstance(rule, Bounds) and not rule.finite for rule in rules)


_NO_FIT = object()


def _typed_scalar(kind: Any, value: Any) -> Any:
    """A value as `kind`, or `_NO_FIT`."""
    if get_origin(kind) is Literal:
        # By type too: true and 1, or 1 and 1.0, are equal in Python.
        fits = any(type(value) is type(each) and value == each for each in get_args(kind))
        return value if fits else _NO_FIT
    if isinstance(kind, type) and issubclass(kind, Enum):
        return _typed_choice(kind, value)
    if isinstance(value, bool) or kind is bool:
        return value if isinstance(value, bool) and kind is bool else _NO_FIT
    if kind is int:
        return int(value) if isinstance(value, Integral) else _NO_FIT
    if kind is float:
        if not isinstance(value, Real):
            return _NO_FIT
        try:
            return float(value)
        except OverflowError:
            return math.inf
    if kind is Path:
        return Path(value) if isinstance(value, str | Path) and IsPath().admits(str(value)) else _NO_FIT
    if kind is str:
        return value if isinstance(value, str) and not isinstance(value, Enum) else _NO_FIT
    raise TypeError(f"settings cannot be of type {kind}")


def _typed_choice(kind: type[Enum], value: Any) -> Any:
    """A member of an enumeration by its value, a former value (`_missing_`) or its name."""
    if isinstance(value, kind):
        return value
    if not isinstance(value, str) or isinstance(value, Enum):
        return _NO_FIT
    try:
        return kind(value)
    except ValueError:
        return kind.__members__.get(value, _NO_FIT)


def _typed_list(kind: Any, value: Any, name: str, hint: Any) -> Any:
    elements, make = get_args(kind), get_origin(kind)
    if isinstance(value, str | bytes) or not isinstance(value, Sequence):
        raise InputError(f"{name} {shown(value)} does not fit: give {wanted(hint)}")
    is_fixed = make is tuple and elements[-1] is not Ellipsis
    if is_fixed and len(value) != len(elements):
        raise InputError(f"{name} has {len(value)} elements, not {len(elements)}: give {wanted(hint)}")
    hints = elements if is_fixed else [elements[0]] * len(value)
    return make(typed(*pair, f"{name}[{index}]") for index, pair in enumerate(zip(hints, value, strict=True)))


def _typed_settings(kind: Any, value: Any, name: str) -> Any:
    hints = declarations(kind)
    if isinstance(value, kind):
        check_ranges(value, name)
        return value
    if not isinstance(value, Mapping):
        names = ", ".join(f"{name}.{one}" if name else one for one in hints)
        raise InputError(f"{name or kind.__name__} {shown(value)} does not fit: give settings by name, {names}")
    prefix = f"{name}." if name else ""
    for key in value:
        if key not in hints:
            raise InputError(unknown_setting(f"{prefix}{key}", key, kind, prefix))
    missing = [field.name for field in dataclasses.fields(kind) if _is_required(field) and field.name not in value]
    if missing:
        raise InputError(f"{prefix}{missing[0]} is missing: give {wanted(hints[missing[0]])}")
    return kind(**{key: typed(hints[key], one, f"{prefix}{key}") for key, one in value.items()})


def _is_required(field: "dataclasses.Field[Any]") -> bool:
    return field.init and field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


def unknown_setting(full_name: str, key: str, kind: type, prefix: str = "") -> str:
    """Say that a dataclass has no field of a name, and what may have been meant."""
    hints = declarations(kind)
    near = difflib.get_close_matches(str(key), hints, n=1)
    cure = f"did you mean {prefix}{near[0]}?" if near else f"choose from {', '.join(hints)}"
    return f"unknown setting {shown(full_name)}: {cure}"


def check_ranges(settings: Any, name: str = "") -> None:
    """Check every field of a dataclass object against its declaration.

    Raises:
        InputError: a field has another type or is out of range; the message names field, value and range.
    """
    prefix = f"{name}." if name else ""
    kind: type = type(settings)
    for field, hint in declarations(kind).items():
        typed(hint, vars(settings)[field], f"{prefix}{field}")


def declaration(kind: type, path: str) -> Any:
    """The hint of a field by its dotted name, `memory.window_frames` for instance."""
    *outer, last = path.split(".")
    for name in outer:
        kind = declared(declarations(kind)[name]).kind
    return declarations(kind)[last]
