"""Prompt files: text, JSON lines, a JSON list or a table, told apart by what they hold.

- Text: one prompt per line. With images, every line is an image path, a tab and a prompt.
- JSON lines: one object per line; a JSON list: objects or strings.
- A table (CSV, TSV or semicolons): the first line names the columns.

The fields of an object and the columns of a table are `prompt`, and optionally `seed` (of the noise), `image` (the
first frame), `name` (of the output files) and `extended` (the prompt at length, which then conditions the model in its
place). An object may have `dimensions` (what the prompt tests, for suites). Other fields are refused.

A file whose name ends in .jsonl, .ndjson, .json, .csv or .tsv must be what the ending says. Any other file is text
unless all of it is of another kind. Text that begins as JSON or as a table, and is none, is refused. The encoding is
UTF-8, or UTF-16 with a byte order mark.
"""

import csv
import json
import logging
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.prompts.names import find_file, shown
from pipelines.prompts.tables import DELIMITERS, FIELDS, header_delimiter, headless_reason, looks_like_json
from wan.text import has_text
from wan.utils.errors import InputError
from wan.utils.files import RepeatedNameError, parse_json

log = logging.getLogger(__name__)

SEED_LIMIT = 2**63
MAX_NAME_BYTES = 200
"""Longest name of a request: file systems take 255 bytes, and endings and temporary names need some."""
MAX_FILE_BYTES = 2**28
DIMENSIONS = "dimensions"
"""A field of JSON objects alone: a cell of a table holds no list."""
FILE_CURE = "give a text file with one prompt per line, JSON lines or a CSV"
LINE_SUFFIXES, TABLE_SUFFIXES = (".jsonl", ".ndjson"), (".csv", ".tsv")
RESERVED_NAMES = {
    "con",
    "prn",
    "aux",
    "nul",
    *(f"{port}{number}" for port in ("com", "lpt") for number in range(1, 10)),
}
"""Names that Windows keeps for devices, with any ending."""


@dataclass(frozen=True)
class PromptRequest:
    """One line of a prompt file, checked.

    Attributes:
        prompt: what the video shows; the extended form, if the file gives one.
        seed: of its noise; None to derive it from the prompt and the seed of the run.
        image: its first frame.
        name: of its files, without an ending; None to derive it from the prompt and the seed.
        short: the prompt that the extended form stands for, if there is one.
        dimensions: what it tests, for suites.
        where: file and line, for messages.
    """

    prompt: str
    seed: int | None = None
    image: Path | None = None
    name: str | None = None
    short: str | None = None
    dimensions: tuple[str, ...] = ()
    where: str = field(default="the prompt", compare=False)


@dataclass(frozen=True)
class _Record:
    """Fields as they stand in a file, not checked yet, and the place where."""

    place: str
    values: dict[str, Any]


def read_lines(
    path: Path, what: str = "prompt file", cure: str = FILE_CURE, bytes_in_names: bool = False
) -> list[tuple[int, str]]:
    """The lines of a text file that are not blank, with their numbers from 1; nothing else is stripped.

    Args:
        what, cure: for messages: what the file is, and what to give in its place.
        bytes_in_names: let bytes that are not UTF-8 pass as surrogates, as they stand for such bytes in file names.

    Raises:
        InputError: the file is missing, too large, not text, or holds no lines.
    """
    lines = [(number, line) for number, line in enumerate(_read_text(path, what, cure, bytes_in_names).split("\n"), 1)]
    lines = [(number, line) for number, line in lines if line.strip()]
    if not lines:
        raise InputError(f"{shown(path)} holds no prompts: write one per line")
    return lines


def read_prompt_file(path: Path, with_images: bool = False) -> list[PromptRequest]:
    """The requests of a prompt file, in order; see the module for the formats.

    Args:
        with_images: whether lines of text are an image path, a tab and a prompt. Image paths are relative to the prompt
            file if there is such an image, else to the working directory.

    Raises:
        InputError: the file cannot be read or a line is not a request; the message names the line.
    """
    lines = read_lines(path)
    records = _records(path, lines, with_images)
    if records is None:
        records = [_text_record(path, number, line, with_images) for number, line in lines]
    if not records:
        raise InputError(f"{shown(path)} holds no prompts: write at least one")
    requests = [_request(path, record) for record in records]
    _check_distinct(requests)
    return requests


def _read_text(path: Path, what: str, cure: str, bytes_in_names: bool) -> str:
    try:
        if path.is_dir():
            raise InputError(f"{shown(path)} is a folder: {cure}")
        # Path.is_file itself raises for names that are too long and folders that may not be entered.
        if not path.is_file():
            raise InputError(f"no {what} {shown(path)}: {cure}")
        if path.stat().st_size > MAX_FILE_BYTES:
            raise InputError(f"{shown(path)} is larger than {MAX_FILE_BYTES >> 20} MiB: {cure}")
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {shown(path)} ({error.strerror}): {cure}") from error
    encoding, errors = "utf-8-sig", "surrogateescape" if bytes_in_names else "strict"
    if content.startswith((b"\xff\xfe\0\0", b"\0\0\xfe\xff")):
        raise InputError(f"{shown(path)} is UTF-32 text: save it as UTF-8")
    if content.startswith((b"\xff\xfe", b"\xfe\xff")):
        encoding, errors = "utf-16", "strict"
    try:
        text = content.decode(encoding, errors)
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        raise InputError(f"cannot read line {line} of {shown(path)} as UTF-8 text: save the file as UTF-8") from error
    if "\0" in text:
        raise InputError(f"{shown(path)} is a binary file, or UTF-16 without a byte order mark: save it as UTF-8")
    # str.splitlines would also split at characters that prompts may hold.
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _records(path: Path, lines: Sequence[tuple[int, str]], with_images: bool) -> list[_Record] | None:
    """The records of a file that is JSON or a table; None if it is text.

    Raises:
        InputError: it is broken JSON, or a table that cannot be read.
    """
    suffix = path.suffix.lower()
    if suffix in LINE_SUFFIXES:
        return _json_lines(path, lines)
    first = lines[0][1].lstrip()
    is_list = first.startswith("[")
    if suffix == ".json" and (is_list or not _means_json(path, lines)):
        return _json_document(path, lines)
    if suffix in TABLE_SUFFIXES:
        return _table(path, lines, _delimiter(lines[0][1], suffix))
    if is_list and (_is_list_of_requests(lines) or looks_like_json(lines)):
        return _json_document(path, lines)
    if _means_json(path, lines) or (is_list and all(_is_list_of_requests([line]) for line in lines)):
        return _json_lines(path, lines)
    if first.startswith("{") and _is_json_object(_joined(lines)):
        return _json_document(path, lines)
    if looks_like_json(lines):
        # It is none, so this raises the error that names the line.
        return _json_document(path, lines)
    delimiter = header_delimiter(lines)
    if delimiter is not None:
        return _table(path, lines, delimiter)
    reason = headless_reason(lines, with_images)
    if reason is not None:
        raise InputError(f"{shown(path)} {reason}")
    return None


def _joined(lines: Sequence[tuple[int, str]]) -> str:
    """The text of a file again, with its blank lines, so that positions in it are right."""
    text, at = [], 1
    for number, line in lines:
        text.append("\n" * (number - at) + line)
        at = number
    return "".join(text)


def _is_json_object(text: str) -> bool:
    try:
        return isinstance(parse_json(text), dict)
    except RepeatedNameError:
        return True
    except ValueError:
        return False


def _is_list_of_requests(lines: Sequence[tuple[int, str]]) -> bool:
    try:
        value = parse_json(_joined(lines))
    except RepeatedNameError:
        return True
    except ValueError:
        return False
    # Numbers alone are text in brackets.
    return isinstance(value, list) and (not value or any(isinstance(item, dict | str | list) for item in value))


def _means_json(path: Path, lines: Sequence[tuple[int, str]]) -> bool:
    """Whether a file is JSON lines: all lines are objects, or look like it and at least one is.

    Raises:
        InputError: some lines are objects, and others are plain text.
    """
    plain = [number for number, line in lines if not line.lstrip().startswith("{")]
    are_objects = [line.lstrip().startswith("{") and _is_json_object(line) for _, line in lines]
    if any(are_objects) and plain:
        raise InputError(
            f"{shown(path)}: line {lines[are_objects.index(True)][0]} is JSON, line {plain[0]} is not: write all "
            "lines as JSON, or none"
        )
    return any(are_objects)


def _json_lines(path: Path, lines: Sequence[tuple[int, str]]) -> list[_Record]:
    records = []
    for number, line in lines:
        try:
            records.append(_record(path, f"line {number}", parse_json(line)))
        except ValueError as error:
            raise _not_json(path, number, error) from error
    return records


def _json_document(path: Path, lines: Sequence[tuple[int, str]]) -> list[_Record]:
    """The records of a .json file: a list of requests or a single one; numbers count requests."""
    try:
        value = parse_json(_joined(lines))
    except json.JSONDecodeError as error:
        raise _not_json(path, error.lineno, error) from error
    except ValueError as error:
        raise _not_json(path, None, error) from error
    items = value if isinstance(value, list) else [value]
    return [_record(path, f"request {number}", item) for number, item in enumerate(items, 1)]


def _not_json(path: Path, line: int | None, error: ValueError) -> InputError:
    if isinstance(error, InputError):
        return error
    reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error).splitlines()[0]
    where = shown(path) if line is None else f"{shown(path)} line {line}"
    return InputError(f'{where} is not valid JSON ({reason}): write it as {{"prompt": "…"}}')


def _record(path: Path, place: str, value: Any) -> _Record:
    if isinstance(value, str):
        return _Record(place, {"prompt": value.strip()})
    if not isinstance(value, dict):
        kind = "list" if isinstance(value, list) else json.dumps(value)[:40]
        raise InputError(f'{shown(path)} {place} is {kind}, not a request: write {{"prompt": "…"}}')
    if isinstance(value.get("prompt"), str):
        value["prompt"] = value["prompt"].strip()
    return _Record(place, value)


def _delimiter(header: str, suffix: str) -> str:
    """The delimiter of a file whose name says that it is a table."""
    preferred = "\t" if suffix == ".tsv" else ","
    counts = {delimiter: header.count(delimiter) for delimiter in DELIMITERS}
    return preferred if counts[preferred] else max(DELIMITERS, key=lambda delimiter: counts[delimiter])


def _rows(path: Path, lines: Sequence[tuple[int, str]], delimiter: str) -> Iterator[tuple[int, list[str]]]:
    reader = csv.reader((line + "\n" for line in _joined(lines).split("\n")), delimiter=delimiter, strict=True)
    first = 1
    while True:
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise InputError(
                f"{shown(path)} line {first} is not a row of a table ({error}): check its quotation marks"
            ) from error
        if row is None:
            return
        if any(cell.strip() for cell in row):
            yield first, row
        first = reader.line_num + 1


def _table(path: Path, lines: Sequence[tuple[int, str]], delimiter: str) -> list[_Record]:
    rows = _rows(path, lines, delimiter)
    line, header = next(rows, (1, [""]))
    columns = [cell.strip().casefold() for cell in header]
    if "prompt" not in columns:
        raise InputError(
            f"{shown(path)} line {line} does not name the columns of a table: begin with a line such as prompt or "
            "prompt,seed,name; prompts without columns belong in a .txt, one per line"
        )
    if len(set(columns)) < len(columns):
        raise InputError(f"{shown(path)} line {line} names a column twice: every column needs a name of its own")
    records = []
    for number, row in rows:
        if len(row) != len(columns):
            raise InputError(
                f"{shown(path)} line {number} has {len(row)} columns, the first line {len(columns)}: put prompts with "
                f"{'tabs' if delimiter == chr(9) else repr(delimiter)} in quotation marks"
            )
        cells = dict(zip(columns, row, strict=True))
        values: dict[str, Any] = {name: cell for name, cell in cells.items() if name == "prompt" or cell.strip()}
        # Every row has the unknown columns, so that they are refused even if they are empty.
        values |= {name: cell for name, cell in cells.items() if name not in FIELDS}
        if re.fullmatch(r"\s*\+?[0-9]{1,30}\s*", values.get("seed", "")):
            values["seed"] = int(values["seed"])
        values["prompt"] = values["prompt"].strip()
        records.append(_Record(f"line {number}", values))
    return records


def _text_record(path: Path, number: int, line: str, with_images: bool) -> _Record:
    if not with_images:
        return _Record(f"line {number}", {"prompt": line.strip()})
    image, tab, prompt = line.rstrip().partition("\t")
    if not tab:
        raise InputError(
            f"{shown(path)} line {number}: with --i2v every line must be an image path, a tab, and a prompt"
        )
    return _Record(f"line {number}", {"image": image, "prompt": prompt})


def _request(path: Path, record: _Record) -> PromptRequest:
    """A checked request."""
    where, values = f"{shown(path)} {record.place}", record.values
    unknown = [shown(name) or "(no name)" for name in values if name not in (*FIELDS, DIMENSIONS)]
    if unknown:
        raise InputError(
            f"{where} has unknown fields ({', '.join(unknown)}): the fields are {', '.join(FIELDS)}; remove the others"
        )
    prompt, image, extended = values.get("prompt"), values.get("image"), values.get("extended")
    if prompt is None:
        raise InputError(f"{where} has no prompt: write what the video should show")
    for name, value in (("prompt", prompt), ("image", image), ("extended", extended)):
        if value is not None and not isinstance(value, str):
            raise InputError(f"{where} has the {name} {json.dumps(value)[:40]}, which is not text: put it in quotes")
    if image is not None and (not image.strip() or "\0" in image):
        raise InputError(f"{where} has an image without a name: give a path, or leave the field out")
    check_prompt(prompt, where)
    if extended is not None:
        check_prompt(extended, f"{where}, extended")
    return PromptRequest(
        prompt=prompt if extended is None else extended.strip(),
        seed=_checked_seed(values.get("seed"), where),
        image=None if image is None else find_file(image, (path.parent, Path())),
        name=_checked_name(values.get("name"), where),
        short=None if extended is None else prompt,
        dimensions=checked_dimensions(values.get(DIMENSIONS), where),
        where=where,
    )


def checked_dimensions(value: Any, where: str) -> tuple[str, ...]:
    """The dimensions of a prompt; none for None.

    Raises:
        InputError: not a list of different names.
    """
    if value is None:
        return ()
    if not isinstance(value, list) or not value or not all(isinstance(name, str) and name.strip() for name in value):
        raise InputError(f'{where} has the dimensions {json.dumps(value)[:40]}: write a list of names, ["…"]')
    if len(set(value)) < len(value):
        raise InputError(f"{where} names a dimension twice: remove one")
    return tuple(value)


def check_prompt(prompt: str, where: str) -> None:
    """Refuse a prompt that says nothing, or that is not text.

    Raises:
        InputError: nothing visible is left once it is cleaned as the text encoder does, or it holds NUL or surrogates.
    """
    if "\0" in prompt or any("\ud800" <= character <= "\udfff" for character in prompt):
        raise InputError(f"{where}: '{shown(prompt)[:60]}' is not valid text: write it in UTF-8")
    if not has_text(prompt):
        what = "is empty" if not prompt.strip() else f"holds nothing that can be seen ({ascii(prompt)[1:-1][:40]})"
        raise InputError(f"{where} {what}: write what the video should show")


def _checked_seed(seed: Any, where: str) -> int | None:
    if seed is None:
        return None
    if isinstance(seed, str) and re.fullmatch(r"[+-]?[0-9]{1,30}", seed) and int(seed) >= 0:
        raise InputError(f"{where}: the seed is the text {seed!r}, not a number: drop the quotes")
    if isinstance(seed, bool) or not isinstance(seed, int) or not 0 <= seed < SEED_LIMIT:
        text = f"{seed}" if isinstance(seed, str) else json.dumps(seed)
        raise InputError(f"{where} has the seed {shown(text)[:40]}: give a whole number from 0 to 2^63 - 1")
    return seed


def _checked_name(name: Any, where: str) -> str | None:
    """A name that every file system takes, inside the output folder."""
    if name is None:
        return None
    if not isinstance(name, str):
        raise InputError(f"{where} has the name {json.dumps(name)[:40]}, which is not text: put it in quotes")
    name = unicodedata.normalize("NFC", name.strip())
    problem = None
    if not name:
        problem = "is empty"
    elif re.search(r'[<>:"/\\|?*]', name) or not name.isprintable():
        problem = 'holds a character that a file name must not hold (< > : " / \\ | ? * or one that is not printed)'
    elif name[0] in ".-" or name[-1] == ".":
        problem = "begins with a dot or a dash, or ends with a dot"
    elif name.split(".")[0].rstrip().casefold() in RESERVED_NAMES:
        problem = "is reserved on Windows"
    elif name.casefold().endswith((".mp4", ".json")):
        problem = "has an ending, which is added to it"
    elif len(name.encode()) > MAX_NAME_BYTES:
        problem = f"is longer than {MAX_NAME_BYTES} bytes"
    if problem is not None:
        raise InputError(f"{where}: the name '{shown(name)[:60]}' {problem}: give another")
    return name


def _check_distinct(requests: Sequence[PromptRequest]) -> None:
    """Refuse names that are one file, and requests that would make one video twice.

    Raises:
        InputError: the message names both lines.
    """
    names: dict[str, PromptRequest] = {}
    videos: dict[tuple[object, ...], PromptRequest] = {}
    for request in requests:
        if request.name is not None:
            other = names.setdefault(request.name.casefold(), request)
            if other is not request:
                raise InputError(f"{request.where} has the name {request.name!r} of {other.where}: give another")
        if request.seed is not None:
            other = videos.setdefault((request.prompt, request.seed, request.image, request.name), request)
            if other is not request:
                raise InputError(
                    f"{request.where} asks for the same video as {other.where}: change its seed or remove it"
                )
