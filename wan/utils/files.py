"""Files and folders that are complete or absent: written beside their target and renamed when they are whole.

Temporary names are unique to the process that writes them, so two processes never write into one file. What a killed
process of this host left behind is removed by the next writer of the same target.
"""

import errno
import hashlib
import itertools
import json
import os
import re
import shutil
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from wan.utils.errors import InputError

MAX_TURNS = 20
"""Attempts to put a folder in the place of another, while others do the same."""
MAX_STEM_BYTES = 120
"""Longest part of the target's name in a temporary name: file systems take 255 bytes."""
MIN_FREE_BYTES = 16 * 2**20
"""Less free disk than this cannot hold a video."""
PROBE_BYTES = 4096
_OWNER = re.compile(r"\.(?P<host>[^.]+)-(?P<pid>\d+)-\d+\.part$")
_numbers = itertools.count()


def host_name() -> str:
    """This machine's name, in characters that a file name may hold."""
    return re.sub(r"[^\w-]", "_", socket.gethostname()) or "host"


_LFS = b"version https://git-lfs"
LFS_POINTER = "a Git-LFS pointer, which stands for the {}: run `git lfs pull`"
"""What such a file is and the cure; to be formatted with what it stands for."""


def process_exists(pid: int) -> bool:
    """Whether a process of this machine runs."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:  # it exists, and belongs to somebody else
        return True
    return True


def temporary_path(path: Path) -> Path:
    """An unused hidden name beside `path` that tells which process uses it."""
    return path.with_name(f".{_stem(path)}.{host_name()}-{os.getpid()}-{next(_numbers)}.part")


def remove_abandoned(path: Path) -> None:
    """Remove what processes of this host that have ended left of `path`."""
    _remove_abandoned(path.parent, f".{_stem(path)}")


def remove_all_abandoned(folder: Path) -> None:
    """Remove what processes of this host that have ended left in a folder, of whatever target."""
    _remove_abandoned(folder, None)


def _remove_abandoned(folder: Path, beginning: str | None) -> None:
    with suppress(OSError):
        for other in folder.iterdir():
            owner = _OWNER.search(other.name)
            if owner is None or owner["host"] != host_name() or process_exists(int(owner["pid"])):
                continue
            if beginning is None or other.name[: owner.start()] == beginning:
                remove(other)


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink(missing_ok=True)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn the errors of a full disk, or of a folder that cannot be written, into one line.

    Raises:
        InputError: `path` cannot be written.
    """
    try:
        yield
    except OSError as error:
        raise cannot_write(path, error.strerror or str(error)) from error
    except SafetensorError as error:
        raise cannot_write(path, str(error)) from error


def check_writable(folder: Path) -> None:
    """Make a folder if need be, and make sure that files can be written there.

    Raises:
        InputError: it cannot be made or written, or its disk is full.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # A file without a name: processes that start together must not trip over one another's. Limits and quotas
        # strike when something is written, not when a file is made.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
        free = shutil.disk_usage(folder).free
    except OSError as error:
        raise InputError(
            f"cannot write to {folder} ({error.strerror}): choose another folder or fix its permissions"
        ) from error
    if free < MIN_FREE_BYTES:
        raise InputError(f"the disk of {folder} is full ({free >> 20} MiB free): free some space")


@contextmanager
def no_empty_folder_left(folder: Path) -> Iterator[None]:
    """Remove a folder and its parents after an error inside, as far as they were made inside and are empty."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        yield
    except BaseException:
        with suppress(OSError):
            for path in made:
                path.rmdir()
        raise


def check_target(path: Path) -> None:
    """Make sure that a file can be written or replaced; its folder is made if need be.

    Raises:
        InputError: its folder cannot be written, or something else than a file has its name.
    """
    check_writable(path.parent)
    with writing(path):
        if path.exists() and not path.is_file():
            raise cannot_write(path, "a folder or a device has this name")


def cannot_write(path: Path, reason: str) -> InputError:
    """The error of a target that cannot be written."""
    return InputError(f"cannot write {path} ({reason}): free space, fix permissions or choose another folder")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """A temporary path beside `path` that takes its place once the block ends well, and is removed if it does not.

    The file gets the mode that the umask says, whatever wrote it.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists() and not path.is_file():  # a device such as /dev/null must not become a file
            raise cannot_write(path, "a folder or a device has this name")
        remove_abandoned(path)
        temporary = temporary_path(path)
        try:
            temporary.touch()
            mode = temporary.stat().st_mode & 0o777
            yield temporary
            temporary.chmod(mode)
            temporary.replace(path)
        finally:
            remove(temporary)


@contextmanager
def atomic_folder(path: Path) -> Iterator[Path]:
    """As `atomic_path`, for a folder, which is made empty; the new one takes the place of an old one.

    Raises:
        InputError: the folder cannot be written, or the disk is full.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        remove_abandoned(path)
        temporary, former = temporary_path(path), temporary_path(path)
        try:
            temporary.mkdir()
            mode = temporary.stat().st_mode & 0o777
            try:
                yield temporary
            except InputError as error:  # of a file inside, whose place nobody knows
                if str(temporary) not in str(error):
                    raise
                raise type(error)(str(error).replace(str(temporary), str(path))) from error
            for file in temporary.rglob("*"):
                file.chmod(mode if file.is_dir() else mode & 0o666)
            _exchange(temporary, path, former)
        finally:
            remove(temporary)
            remove(former)


def _exchange(temporary: Path, path: Path, former: Path) -> None:
    """Put `temporary` in the place of `path`; what stood there goes to `former`."""
    for turn in range(MAX_TURNS):
        with suppress(FileNotFoundError):
            path.replace(former)
        try:
            temporary.rename(path)
            return
        except OSError as error:
            # Another writer of the same folder was quicker: its folder is whole, and ours takes its place in turn.
            taken = error.errno in (errno.ENOTEMPTY, errno.EEXIST) and turn + 1 < MAX_TURNS
            if not taken:
                with suppress(OSError):
                    former.rename(path)
                raise
            remove(former)


def write_text(path: Path, text: str) -> None:
    """Write a text file; atomic.

    Raises:
        InputError: it cannot be written.
    """
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, record: object, default: Callable[[Any], object] | None = None) -> None:
    """Write a record as JSON; atomic.

    Args:
        default: turns what JSON does not know into something that it does.

    Raises:
        InputError: the file cannot be written.
    """
    write_text(path, json.dumps(record, indent=1, default=default) + "\n")


def read_json(
    path: Path,
    error: type[InputError] = InputError,
    cure: str = "it is damaged or not complete; make it again",
    max_bytes: int | None = None,
) -> dict[str, Any]:
    """A JSON file that holds an object.

    Args:
        error: the class to raise.
        cure: for a file that is read, and holds something else.
        max_bytes: a larger file is something else, and is not read; None for any size.

    Raises:
        InputError: missing, not a file, not JSON, a name that is given twice, or another kind of value.
    """
    try:
        if max_bytes is not None and path.stat().st_size > max_bytes:
            raise error(f"{path} is larger than {max_bytes >> 20} MiB, which is something else: {cure}")
        if is_lfs_pointer(path):
            raise error(f"{path} is {LFS_POINTER.format('file')}")
        record = parse_json(path.read_text(encoding="utf-8"))
    except OSError as failure:
        reason = failure.strerror
        raise error(f"cannot read {path} ({reason}): check the path and its permissions") from failure
    except InputError:
        raise
    except ValueError as failure:  # includes bad UTF-8
        reason = str(failure).splitlines()[0]
        raise error(f"{path} is not valid JSON ({reason}): {cure}") from failure
    if not isinstance(record, dict):
        raise error(f"{path} holds a JSON {type(record).__name__}, not an object of names and values: {cure}")
    return record


def is_lfs_pointer(path: Path) -> bool:
    """Whether a file is one of Git LFS's, which stands for the one that was not fetched.

    Raises:
        OSError: it cannot be read.
    """
    with path.open("rb") as file:
        return file.read(len(_LFS)) == _LFS


class RepeatedNameError(ValueError):
    """A JSON object gives a name twice; Python would take the last value."""


def parse_json(text: str | bytes) -> Any:
    """A JSON value.

    Raises:
        ValueError: not JSON, nested too deeply, or (`RepeatedNameError`) an object gives a name twice.
    """
    try:
        return json.loads(text, object_pairs_hook=_unique_names)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _unique_names(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    record = dict(pairs)
    if len(record) != len(pairs):
        names = [name for name, _ in pairs]
        raise RepeatedNameError(f"{next(name for name in names if names.count(name) > 1)!r} is given twice")
    return record


def content_hash(path: Path) -> str:
    """SHA-256 of a file's content, 32 hexadecimal digits of it.

    Raises:
        InputError: it cannot be read.
    """
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()[:32]
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): check the path and its permissions") from error


def _stem(path: Path) -> str:
    """The target's name; the beginning of a long one, and a hash of it."""
    name = path.name.encode(errors="surrogateescape")
    if len(name) <= MAX_STEM_BYTES:
        return path.name
    return f"{name[:MAX_STEM_BYTES].decode(errors='ignore')}-{hashlib.sha256(name).hexdigest()[:16]}"
