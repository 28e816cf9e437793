"""Logs of JSON lines: one record per line, appended while work goes on."""

import errno
import json
import os
from pathlib import Path
from typing import Any, Self

from wan.utils.errors import InputError
from wan.utils.files import cannot_write, parse_json


class JsonLinesWriter:
    """Appends records to a file. Each is written at once: a killed process leaves at most half of its last line.

    Args:
        path: of the file; made if need be.

    Raises:
        InputError: it cannot be written, or the disk is full.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = path.open("ab", buffering=0)
        except OSError as error:
            raise cannot_write(path, error.strerror or str(error)) from error

    def write(self, record: dict[str, Any]) -> None:
        """Append a record.

        Raises:
            InputError: the disk is full; the line may be there in part.
        """
        line = (json.dumps(record) + "\n").encode()
        try:
            if self._file.write(line) != len(line):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise cannot_write(self._path, error.strerror or str(error)) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._file.close()


def read_json_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, without half a line at its end, which a killed writer left.

    Raises:
        InputError: it cannot be read, or a line holds no record.
    """
    try:
        lines = path.read_bytes().split(b"\n")
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror})") from error
    records = []
    for number, line in enumerate(lines, 1):
        try:
            record = parse_json(line)
        except ValueError as error:
            if number == len(lines):  # no line break follows
                break
            raise InputError(f"line {number} of {path} is not valid JSON") from error
        if not isinstance(record, dict):
            raise InputError(f"line {number} of {path} holds a JSON {type(record).__name__}, not an object")
        records.append(record)
    return records
