"""Telling tables and JSON from prose in files whose names do not say what they hold."""

import csv
import re
from collections.abc import Sequence

FIELDS = ("prompt", "seed", "image", "name", "extended")
DELIMITERS = ",\t;"
OTHER_NAMES = {
    *("caption", "captions", "description", "negative_prompt", "prompts", "sentence", "text"),
    *("file", "filename", "id", "image_path", "index", "path", "title", "url", "video"),
}
"""Columns of tables that other programs write; none of them is read."""
MAX_HEADER_WORDS = 3
"""Words of a column's name, at most; a phrase of prose has more."""
_NAME = re.compile(r"[a-z_][a-z0-9_]*")
_JSON_FIELD = re.compile(r'^[\s\[]*\{?\s*"[^"]+"\s*:')
_QUOTED_FIELD = re.compile(r'^[\s\[]*\{\s*"[^"]+"\s*:')
Lines = Sequence[tuple[int, str]]
"""Lines that are not blank, with their numbers."""


def split_row(line: str, delimiter: str) -> list[str]:
    """The cells of one line; the whole line if its quotation marks are open."""
    try:
        return next(csv.reader([line], delimiter=delimiter, strict=True))
    except (csv.Error, StopIteration):
        return [line]


def header_delimiter(lines: Lines) -> str | None:
    """The delimiter of a text file that is a table; None if it is not one.

    A first line that has a column called `prompt` makes a table: alone if all columns are known, else with rows below.
    Names that are common in tables make one too, if all lines have as many columns.
    """
    for delimiter in DELIMITERS:
        header = [cell.strip().casefold() for cell in split_row(lines[0][1], delimiter)]
        if len(header) < 2:
            continue
        if "prompt" in header and all(cell in FIELDS for cell in header):
            return delimiter
        if len(lines) == 1:
            continue
        if "prompt" in header and all(len(cell.split()) <= MAX_HEADER_WORDS for cell in header):
            return delimiter
        are_names = all(_NAME.fullmatch(cell) for cell in header)
        if are_names and OTHER_NAMES & set(header) and _are_as_wide(lines, delimiter):
            return delimiter
    return None


def _are_as_wide(lines: Lines, delimiter: str) -> bool:
    """Whether all lines have as many columns, or a quoted cell goes on over several lines."""
    return len({len(split_row(line, delimiter)) for _, line in lines}) == 1


def headless_reason(lines: Lines, with_images: bool) -> str | None:
    """The fault of a table that lacks a line of column names, or whose delimiter is not read; None for prose.

    Args:
        with_images: whether lines of an image path, a tab and a prompt are expected.
    """
    number, first = lines[0]
    bars = [cell.strip().casefold() for cell in first.strip(" |").split("|")]
    if len(bars) > 1 and "prompt" in bars and len(lines) > 1:
        return f"line {number} names columns between vertical bars, which are not read: save it as CSV, with commas"
    if first.strip().strip("\"'").casefold() == "prompt" and len(lines) > 1:
        return (
            f"line {number} is {first.strip()!r}, the name of a column: name a table .csv, or remove the line so that "
            "every line is a prompt"
        )
    widths = {line.strip().count("\t") for _, line in lines}
    if not with_images and len(widths) == 1 and widths != {0}:
        return (
            "has a tab in every line, as a table has, and no line of column names: begin with a line such as "
            "prompt<TAB>seed, or write spaces for tabs; image<TAB>prompt needs --i2v"
        )
    return None


def looks_like_json(lines: Lines) -> bool:
    """Whether a text is meant as JSON: brackets around, and names in quotes before colons."""
    first, last = lines[0][1].lstrip(), lines[-1][1].rstrip().rstrip(",")
    if any(_QUOTED_FIELD.match(line) for _, line in lines):
        return True
    is_open = first.startswith(("{", "["))
    return is_open and last.endswith(("}", "]")) and any(_JSON_FIELD.match(line) for _, line in lines)
