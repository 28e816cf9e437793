"""Ranges of settings: what a declaration admits, and what the refusal says."""

import math
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Annotated, Any, Literal

import numpy as np
import pytest

from wan.utils.errors import InputError
from wan.utils.ranges import (
    Bounds,
    Choices,
    Count,
    Falling,
    Fraction,
    Length,
    PathText,
    Seed,
    Unique,
    check_ranges,
    declaration,
    shown,
    typed,
    wanted,
)

Step = Annotated[int, Bounds(1, 1000)]


class Colour(StrEnum):
    RED = "red"
    BLUE = "blue"


@dataclass
class Inner:
    rate: Annotated[float, Bounds(0, 1, below=True)] = 0.5


@dataclass
class Outer:
    count: Count
    inner: Inner = field(default_factory=Inner)
    colour: Colour = Colour.RED
    folder: PathText | None = None
    steps: Annotated[list[Annotated[int, Bounds(1, 1000)]], Length(1, 3), Falling()] = field(
        default_factory=lambda: [5]
    )
    pair: tuple[Fraction, Fraction] = (0.5, 0.5)
    on: bool = False
    kind: Annotated[str, Choices(("a", "b"))] = "a"
    names: Annotated[list[str], Unique()] = field(default_factory=list)
    seed: Seed = 0


GOOD: dict[str, list[Any]] = {
    "count": [1, 10**9, np.int64(3)],
    "inner": [{}, {"rate": 0}, {"rate": 0.999}, Inner(0.1)],
    "colour": ["red", "BLUE", Colour.BLUE],
    "folder": [None, "a/b", "ü", "x" * 255],
    "steps": [[1000, 1], [3, 2, 1]],
    "pair": [[0.1, 0.9], (0.1, 0.9)],
    "on": [True],
    "kind": ["b"],
    "names": [[], ["x", "y"]],
    "seed": [-(2**63), 2**63 - 1],
}
BAD: dict[str, list[tuple[Any, str]]] = {
    "count": [
        (0, "count 0 is out of range: give an integer from 1 to 1000000000"),
        (-1, "count -1 is out of range"),
        (10**9 + 1, "out of range"),
        (10**5000, "count of 16610 bits is out of range"),
        *((value, "does not fit: give an integer") for value in (True, 1.0, "1", None, [1], {}, math.nan, Colour.RED)),
    ],
    "inner": [
        ({"rate": 1}, "inner.rate 1 is out of range: give a number of at least 0 and below 1"),
        ({"rate": math.nan}, "inner.rate nan is out of range"),
        ({"rate": 10**400}, "inner.rate of 1329 bits is out of range"),
        ({"rat": 1}, "unknown setting 'inner.rat': did you mean inner.rate?"),
        (None, "give settings by name"),
        ([], "give settings by name"),
        (Inner(2), "inner.rate 2 is out of range"),
    ],
    "colour": [("green", "give one of red, blue"), (1, "one of red"), (None, "one of red"), (True, "one of red")],
    "folder": [(value, "folder") for value in ("", " ", "a\0b", "x" * 256, "/y" * 4000, 3, True, "\ud800")],
    "steps": [
        ([], "of 1 to 3 elements"),
        ([4, 3, 2, 1], "of 1 to 3 elements"),
        ([1, 2], "must fall"),
        ([2, 2], "must fall"),
        ([0], "steps[0] 0 is out of range: give an integer from 1 to 1000"),
        (["1"], "steps[0] '1' does not fit"),
        ("321", "does not fit: give a list"),
        (7, "does not fit: give a list"),
    ],
    "pair": [([0.1], "pair has 1 elements, not 2"), ([0.5, 1], "pair[1] 1 is out of range"), (0.5, "give a list")],
    "on": [(value, "give true or false") for value in (1, 0, "true", "on", None, 1.0)],
    "kind": [("c", "one of a, b"), ("", "one of a, b"), (None, "does not fit")],
    "names": [(["x", "x"], "nothing more than once"), ([1], "names[0] 1")],
    "seed": [(2**63, "out of range"), (-(2**63) - 1, "out of range"), (10**30, "out of range")],
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_in_range_is_taken(name: str) -> None:
    for value in GOOD[name]:
        settings = typed(Outer, {"count": 1} | {name: value}, "")
        check_ranges(settings)
    assert type(typed(Count, np.int64(3), "count")) is int and type(typed(Fraction, np.float32(0.5), "x")) is float
    assert typed(tuple[Fraction, Fraction], [0.1, 0.2], "pair") == (0.1, 0.2)


@pytest.mark.parametrize("name", BAD)
def test_what_is_not_is_refused_in_one_line_that_names_field_value_and_range(name: str) -> None:
    for value, message in BAD[name]:
        with pytest.raises(InputError) as refused:
            typed(Outer, {"count": 1} | {name: value}, "")
        text = str(refused.value)
        assert name in text and message in text and "\n" not in text and len(text) < 300, text
        assert text.isprintable() and text.encode()


def test_a_missing_and_an_unknown_field_are_named() -> None:
    with pytest.raises(InputError, match="count is missing: give an integer from 1"):
        typed(Outer, {}, "")
    with pytest.raises(InputError, match=r"unknown setting 'x\.cuont': did you mean x\.count"):
        typed(Outer, {"cuont": 1}, "x")


def test_an_object_that_a_program_built_is_checked_too() -> None:
    with pytest.raises(InputError, match=r"sampling\.inner\.rate nan is out of range"):
        check_ranges(Outer(1, Inner(math.nan)), "sampling")


def test_infinity_is_admitted_only_where_it_is_declared() -> None:
    assert typed(Annotated[float, Bounds(0, finite=False)], math.inf, "x") == math.inf
    for hint in (float, Annotated[float, Bounds(0)]):
        with pytest.raises(InputError, match="x inf is out of range"):
            typed(hint, math.inf, "x")
    with pytest.raises(InputError, match="x nan"):
        typed(Annotated[float, Bounds(finite=False)], math.nan, "x")


def test_a_literal_is_compared_by_type_too() -> None:
    hint = Literal["a", 1, True, None]
    for value in ("a", 1, True, None):
        assert typed(hint, value, "x") is value
    for value in ("b", 1.0, False, b"a", [1]):
        with pytest.raises(InputError, match=r"x .* does not fit: give 'a' or 1 or true or null"):
            typed(hint, value, "x")
    for value in (False, 0.0, None):  # 0 == False, but they differ by type
        with pytest.raises(InputError, match="give 0"):
            typed(Literal[0], value, "x")


def test_bytes_are_no_list_and_huge_values_are_shown() -> None:
    with pytest.raises(InputError, match="does not fit: give a list"):
        typed(list[int], b"12", "x")
    assert shown([10**5000]) == "a list of huge values"


def test_integers_fit_64_bits_without_being_told() -> None:
    with pytest.raises(InputError, match="of at least 0 that fits 64 bits"):
        typed(Annotated[int, Bounds(0)], 2**63, "x")


def test_declarations_in_words() -> None:
    assert wanted(Count | None) == "an integer from 1 to 1000000000, or null"
    assert wanted(Annotated[float, Bounds(0, above=True)]) == "a number above 0"
    assert wanted(declaration(Outer, "inner.rate")) == "a number of at least 0 and below 1"
    assert [shown(value) for value in (None, True, "a", 1e-3, Colour.RED)] == ["null", "true", "'a'", "0.001", "'red'"]
