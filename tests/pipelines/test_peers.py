"""What processes of a run do when another one of them is gone, while their main threads wait for something else."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from paths import ROOT
from training_world import free_port

GONE = "error: another process of this run is gone: start the same command again, on all nodes, to go on\n"
BODY = """
import os, signal, sys, time
from accelerate import Accelerator
from pipelines.training import peers
from wan.utils.errors import InputError

peers.GRACE_SECONDS = peers.POLL_SECONDS = 0.2
peers.MEETING_SECONDS = 20.0
rank = int(os.environ["RANK"])
{before}
accelerator = Accelerator(cpu=True)
try:
    with peers.watching_peers(accelerator):
        print("inside", flush=True)
        {inside}
except InputError:
    time.sleep(2)
    sys.exit(2)
time.sleep(2)
"""
SIZE = 3


class Processes:
    """Three processes of a run, each without an agent that would end it with the others."""

    def __init__(self, folder: Path, inside: str, before: str = "") -> None:
        script = folder / "process.py"
        script.write_text(BODY.format(inside=inside, before=before))
        shared = {"WORLD_SIZE": str(SIZE), "MASTER_ADDR": "localhost", "MASTER_PORT": str(free_port())}
        shared |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        self.each = [
            subprocess.Popen(
                [sys.executable, str(script)],
                env=os.environ | shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(SIZE)
        ]

    def ends(self, timeout: float) -> list[tuple[int, str]]:
        """Exit status and errors of each; those that do not end in time are killed."""
        deadline, found = time.monotonic() + timeout, []
        try:
            for process in self.each:
                _, errors = process.communicate(timeout=max(deadline - time.monotonic(), 0.1))
                found.append((process.returncode, errors))
        finally:
            for process in self.each:
                process.kill()
        return found


@pytest.mark.parametrize("victim", [0, 2])
@pytest.mark.parametrize("end", ["os.kill(os.getpid(), signal.SIGKILL)", "os._exit(0)"])
def test_others_end_with_a_line(victim: int, end: str, tmp_path: Path) -> None:
    inside = f"{end} if rank == {victim} else time.sleep(300)"
    found = Processes(tmp_path, inside).ends(60)
    for rank, (status, errors) in enumerate(found):
        if rank == victim:
            assert status == (-signal.SIGKILL if "KILL" in end else 0)
        else:
            assert status == 1 and errors.endswith(GONE), errors


@pytest.mark.parametrize("inside", ["time.sleep(rank)", "if rank == 1: raise InputError('mine')"])
def test_whoever_has_finished_is_not_missed(inside: str, tmp_path: Path) -> None:
    found = Processes(tmp_path, inside).ends(60)
    expected = [0, 2 if "raise" in inside else 0, 0]
    assert [status for status, _ in found] == expected
    assert not any("gone" in errors for _, errors in found), found


def test_where_no_connection_is_made_training_goes_on_with_a_warning(tmp_path: Path) -> None:
    before = """
peers.MEETING_SECONDS = 1.0
def refused(port, token):
    raise OSError("no way")
if rank == 1: peers._join = refused
"""
    found = Processes(tmp_path, "time.sleep(3)", before).ends(60)
    assert [status for status, _ in found] == [0, 0, 0]
    assert all("may wait for minutes" in errors for _, errors in found), found


def test_strangers_are_sent_away(tmp_path: Path) -> None:
    """A process with another token connects first: it is neither met nor missed."""
    before = """
import socket
join = peers._join
def with_stranger(port, token):
    stranger = socket.create_connection(("localhost", port))
    stranger.sendall(b"x" * peers.TOKEN_BYTES)
    assert stranger.recv(1) == b"", "it was met"
    return join(port, token)
if rank == 1: peers._join = with_stranger
"""
    found = Processes(tmp_path, "time.sleep(1)", before).ends(60)
    assert [status for status, _ in found] == [0, 0, 0], found
