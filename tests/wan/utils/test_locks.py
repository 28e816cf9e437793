"""Locks: one holder, named to the others; the dead hold nothing; a holder on another host counts while it is alive."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from paths import ROOT

from wan.utils import locks
from wan.utils.errors import InputError
from wan.utils.locks import LockedError, exclusive

HOLD = """
import sys, time
from pathlib import Path
from wan.utils.locks import exclusive
with exclusive(Path(sys.argv[1]), "the folder"):
    print("held", flush=True)
    time.sleep(60)
"""


def holder(path: Path) -> "subprocess.Popen[str]":
    """A process that holds a lock."""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], stdout=subprocess.PIPE, text=True, env=environment
    )
    assert process.stdout is not None and process.stdout.readline() == "held\n"
    return process


def test_a_second_process_is_refused_with_the_name_of_the_first(tmp_path: Path) -> None:
    process = holder(tmp_path / "sub" / ".lock")
    try:
        in_use = pytest.raises(LockedError, match=f"the folder is in use by process {process.pid} on ")
        with in_use, exclusive(tmp_path / "sub" / ".lock", "the folder"):
            pass
    finally:
        process.kill()
        process.wait()
    with exclusive(tmp_path / "sub" / ".lock", "the folder"):
        assert json.loads((tmp_path / "sub" / ".lock").read_text())["pid"] == os.getpid()
    assert not list((tmp_path / "sub").iterdir())


def test_a_killed_holder_lets_the_waiting_one_in(tmp_path: Path) -> None:
    process, told = holder(tmp_path / ".lock"), list[str]()
    threading.Timer(0.5, lambda: process.send_signal(signal.SIGKILL)).start()
    with exclusive(tmp_path / ".lock", "the folder", on_wait=told.append):
        assert len(told) == 1 and f"process {process.pid}" in told[0]
    process.wait()


@pytest.mark.parametrize(("age", "held"), [(5, True), (3600, False)])
def test_another_host_holds_a_lock_while_it_touches_it(tmp_path: Path, age: float, held: bool) -> None:
    path = tmp_path / ".lock"
    path.write_text(json.dumps({"pid": 1, "host": "elsewhere", "command": "train", "since": "then"}))
    os.utime(path, (time.time() - age,) * 2)
    if held:
        with pytest.raises(LockedError, match="process 1 on elsewhere"), exclusive(path, "it"):
            pass
    else:
        with exclusive(path, "it"):
            pass


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b'{"pid": 1}', b"[" * 100_000])
def test_a_lock_left_by_the_dead_does_not_hold_whatever_it_says(tmp_path: Path, content: bytes) -> None:
    (tmp_path / ".lock").write_bytes(content)
    with exclusive(tmp_path / ".lock", "it"):
        pass


def test_many_take_turns(tmp_path: Path) -> None:
    inside, most, done = [0], [0], [0]

    def work() -> None:
        for _ in range(5):
            with exclusive(tmp_path / ".lock", "it", on_wait=lambda holder: None):
                inside[0] += 1
                most[0] = max(most[0], inside[0])
                time.sleep(0.001)
                inside[0] -= 1
                done[0] += 1

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] and done == [20]


def test_a_holder_touches_its_lock(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(locks, "HEARTBEAT_SECONDS", 0.05)
    with exclusive(tmp_path / ".lock", "it"):
        os.utime(tmp_path / ".lock", (0, 0))
        deadline = time.monotonic() + 10
        while not (tmp_path / ".lock").stat().st_mtime and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (tmp_path / ".lock").stat().st_mtime


def test_on_a_full_disk_a_lock_holds_without_a_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", refuse)
    refused = pytest.raises(LockedError, match="another process")
    with exclusive(tmp_path / ".lock", "it"), refused, exclusive(tmp_path / ".lock", "it"):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("what", ["a folder", "a link"])
def test_what_is_no_lock_and_stands_in_its_place_is_to_be_removed(what: str, tmp_path: Path) -> None:
    path = tmp_path / ".lock"
    if what == "a folder":
        path.mkdir()
    else:
        path.symlink_to("/nonexistent/lock")
    with pytest.raises(InputError, match=rf"\.lock is {what}.*remove it"), exclusive(path, "it"):
        pass
