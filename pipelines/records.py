"""Results in JSON files: read strictly, locked, gone on with under the same settings alone, written as they come."""

import json
import logging
import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from wan.utils.errors import InputError
from wan.utils.files import check_target, read_json, write_json
from wan.utils.locks import LockedError, exclusive
from wan.utils.settings import plain, require_same_settings

log = logging.getLogger(__name__)

SETTINGS = "settings"
CURE = "move it away, or give another path"
Record = dict[str, Any]


class Records:
    """Records that grow in a JSON file; `open_records` makes one.

    The file holds the settings that all records share, the records in one of its entries, and whatever else its page
    is given.

    Args:
        path: of the file; None keeps nothing.
        page: what the file holds, or is to hold.
        section: the entry that holds the records, by name, or as a list.
        identity: the field by which a record of a list is told; None for records by name.
        cure: what to do with a file that cannot be gone on with.

    Attributes:
        page: everything; change it, and `save`.
    """

    def __init__(self, path: Path | None, page: Record, section: str, identity: str | None, cure: str) -> None:
        self.page = page
        self._path, self._section, self._identity, self._cure = path, section, identity, cure

    def made_with(self, settings: Mapping[str, Any]) -> None:
        """Say what the records depend on, before the first is added.

        Raises:
            InputError: those that are there were made with other settings; the message names what differs.
        """
        if SETTINGS in self.page:
            require_same_settings(self.page[SETTINGS], settings, f"{self._path} was made", self._cure)
        else:
            self.page = {SETTINGS: plain(settings)} | self.page

    def find(self, name: Any) -> Record | None:
        """The record of a name, or of the value that tells it; None if there is none yet."""
        records = self.page[self._section]
        if self._identity is None:
            found: Record | None = records.get(name)
            return found
        name = _as_read(name)
        return next((record for record in records if record[self._identity] == name), None)

    def put(self, name: Any, record: Mapping[str, Any]) -> None:
        """Add a record, in the place of a former one, and save."""
        records = self.page[self._section]
        if self._identity is None:
            records[name] = dict(record)
        else:
            record = _as_read(dict(record) | {self._identity: name})
            former = self.find(name)
            if former is None:
                records.append(record)
            else:
                records[records.index(former)] = record
        self.save()

    def save(self) -> None:
        """Write the file; atomic. Numbers that are not finite become null.

        Raises:
            InputError: it cannot be written.
        """
        if self._path is not None:
            write_json(self._path, without_infinities(self.page), default=str)


@contextmanager
def reserved(path: Path) -> Iterator[None]:
    """Make sure that a file can be written, and keep other processes from it meanwhile.

    Raises:
        InputError: it cannot be written, or another process is at it.
    """
    check_target(path)
    with exclusive(path.with_name(f".{path.name}.lock"), str(path)):
        yield


@contextmanager
def open_records(
    path: Path | None,
    section: str = "records",
    identity: str | None = None,
    others: Mapping[str, Any] | None = None,
    cure: str = CURE,
) -> Iterator[Records]:
    """Hold a file of records, which no other process can open meanwhile; then say `Records.made_with`.

    Args:
        path: of the file, which need not be there; None for records that are not kept.
        section, identity, cure: see `Records`.
        others: further entries of the page, empty.

    Raises:
        InputError: the file is damaged, held by another process, or cannot be written.
    """
    page = dict(others or {}) | {section: {} if identity is None else []}
    with ExitStack() as stack:
        if path is not None:
            stack.enter_context(reserved(path))
            if path.exists():
                there = read_json(path)
                _check(there, {SETTINGS: {}} | page, section, identity, f"{path} holds no such results: {cure}")
                page = there
        yield Records(path, page, section, identity, cure)


def _check(page: Record, new: Mapping[str, Any], section: str, identity: str | None, message: str) -> None:
    """Make sure that a page has the entries of a new one, and records in its section."""
    if any(type(page.get(name)) is not type(value) for name, value in new.items()):
        raise InputError(message)
    records = page[section] if identity is not None else page[section].values()
    if not all(isinstance(record, dict) and (identity is None or identity in record) for record in records):
        raise InputError(message)


def read_record(path: Path, settings: Mapping[str, Any], cure: str = CURE) -> Record | None:
    """A JSON file that was made with some settings; None if there is no file.

    Raises:
        InputError: it is damaged, does not say what made it, or was made with other settings.
    """
    if not path.exists():
        return None
    page = read_json(path)
    if not isinstance(page.get(SETTINGS), dict):
        raise InputError(f"{path} does not say with which settings it was made: {cure}")
    require_same_settings(page[SETTINGS], settings, f"{path} was made", cure)
    return page


def write_record(path: Path, settings: Mapping[str, Any], record: Mapping[str, Any]) -> None:
    """Write a JSON file that `read_record` takes; atomic. Numbers that are not finite become null.

    Raises:
        InputError: it cannot be written.
    """
    write_json(path, without_infinities({SETTINGS: plain(settings)} | dict(record)), default=str)


@contextmanager
def claimed(path: Path, what: str, wait: bool) -> Iterator[bool]:
    """Hold a lock, which ends with the process however that ends.

    Args:
        path: of the lock's file.
        what: what is locked, in words.
        wait: until it is free.

    Yields:
        whether it is held; always, after waiting.
    """
    on_wait = (lambda holder: log.info("waiting for %s, at which is %s", what, holder)) if wait else None
    with ExitStack() as stack:
        try:
            stack.enter_context(exclusive(path, what, on_wait))
        except LockedError as error:
            log.info("%s", error)
            yield False
        else:
            yield True


def _as_read(value: Any) -> Any:
    """A value as JSON gives it back."""
    return json.loads(json.dumps(without_infinities(value), default=str))


def without_infinities(value: Any) -> Any:
    """What JSON can say: None in the place of numbers that are not finite."""
    if isinstance(value, Mapping):
        return {key: without_infinities(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [without_infinities(one) for one in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
