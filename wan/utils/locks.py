"""Locks between processes, also of several hosts on a shared disk: who holds one is named, the dead hold none.

A lock is a file that its holder locks with `flock` and into which it writes who it is. The operating system releases it
when the holder ends, however that happens. Some network file systems lock within one host only: there the holder also
touches the file regularly, and a lock of another host that was touched lately counts as held.
"""

import errno
import fcntl
import json
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from wan.utils.errors import InputError
from wan.utils.files import cannot_write, host_name, parse_json

log = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 10.0
STALE_SECONDS = 60.0
"""A lock of another host that was not touched for so long is nobody's."""
_UNSUPPORTED = (errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


class LockedError(InputError):
    """Another process works on the same files.

    Attributes:
        holder: who, in words.
    """

    def __init__(self, what: str, holder: str) -> None:
        super().__init__(f"{what} is in use by {holder}: wait until it has ended, or choose another folder")
        self.holder = holder


@contextmanager
def exclusive(path: Path, what: str, on_wait: Callable[[str], None] | None = None) -> Iterator[None]:
    """Hold a lock inside the context.

    Args:
        path: of the lock's file; its folder is made if need be, and the file removed at the end.
        what: the locked thing, for the message.
        on_wait: told once who holds the lock; then the lock is waited for. Without it a held lock is an error at once.

    Raises:
        LockedError: another process holds it.
        InputError: the file cannot be written.
    """
    descriptor = _acquire(path, what, on_wait)
    stop = threading.Event()
    beat = threading.Thread(target=_beat, args=(path, stop), name=f"lock {path.name}", daemon=True)
    beat.start()
    try:
        yield
    finally:
        stop.set()
        beat.join()
        with suppress(OSError):
            path.unlink()
        os.close(descriptor)


def _acquire(path: Path, what: str, on_wait: Callable[[str], None] | None) -> int:
    """The descriptor of the lock's file, locked, with this process as its holder."""
    told = False
    while True:
        descriptor = _open(path)
        is_ours = _try(descriptor, path) and not _held_elsewhere(descriptor)
        if is_ours and _is_current(descriptor, path):
            _write_holder(descriptor)
            return descriptor
        holder = describe(_named_holder(descriptor))
        stale = is_ours  # the former holder removed the file between opening and locking it: open the new one
        os.close(descriptor)
        if stale:
            continue
        if on_wait is None:
            raise LockedError(what, holder)
        if not told:
            on_wait(holder)
            told = True
        time.sleep(0.2)


def _open(path: Path) -> int:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if path.is_dir() or path.is_symlink():
            what = "a folder" if path.is_dir() else "a link to a file that cannot be made"
            raise InputError(f"{path} is {what}, where the file of a lock must be: remove it") from error
        raise cannot_write(path, error.strerror or str(error)) from error


def _try(descriptor: int, path: Path) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _UNSUPPORTED:
            raise cannot_write(path, str(error)) from error
        log.debug("%s: the file system has no locks, only heartbeats tell who works here", path)
        holder = _read_holder(descriptor)
        alive = time.time() - os.fstat(descriptor).st_mtime < STALE_SECONDS
        return not holder or not alive or holder.get("pid") == os.getpid()
    return True


def _held_elsewhere(descriptor: int) -> bool:
    """Whether another host's process touched the file lately; its clock is that of the file system."""
    holder = _read_holder(descriptor)
    if holder.get("host") in (None, host_name()):
        return False
    last = os.fstat(descriptor).st_mtime
    os.utime(descriptor)
    now = os.fstat(descriptor).st_mtime
    os.utime(descriptor, (last, last))
    return now - last < STALE_SECONDS


def _is_current(descriptor: int, path: Path) -> bool:
    """Whether the path still leads to the open file."""
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    holder = {
        "pid": os.getpid(),
        "host": host_name(),
        "command": " ".join(sys.argv)[:200],
        "since": time.strftime("%Y-%m-%d %H:%M:%S"),
    }
    with suppress(OSError):  # of a full disk: the lock holds without a name
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(errors="replace"), 0)


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        holder = parse_json(os.pread(descriptor, 4096, 0))
    except (OSError, ValueError):
        return {}
    return holder if isinstance(holder, dict) else {}


def _named_holder(descriptor: int) -> dict[str, Any]:
    """The holder, who writes its name just after it has locked the file."""
    for _ in range(20):
        holder = _read_holder(descriptor)
        if holder:
            return holder
        time.sleep(0.01)
    return {}


def describe(holder: dict[str, Any]) -> str:
    """Who holds a lock, in words."""
    if not holder:
        return "another process"
    return f"process {holder.get('pid')} on {holder.get('host')} ({holder.get('command')}, since {holder.get('since')})"


def _beat(path: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_SECONDS):
        with suppress(OSError):
            os.utime(path)
