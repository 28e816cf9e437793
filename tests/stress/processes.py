"""Starting, signalling and waiting for commands that a fork server runs."""

import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from fork_server import BEGIN, END

ROOT = Path(__file__).parents[2]
START_SECONDS = 180.0
BEGIN_SECONDS = 0.03
"""From a script's first statement until it has come to its `main`, on a busy machine."""


@dataclass(frozen=True)
class Command:
    """A script of the project and its arguments.

    Attributes:
        script: relative to the repository.
        arguments: paths of results are relative to the folder of a trial.
    """

    script: str
    arguments: tuple[str, ...]


@dataclass(frozen=True)
class Moment:
    """When a signal comes.

    Attributes:
        signal: its number.
        seconds: after the start, or, with `change`, after the change.
        change: number of a change of a file, counted from 1; None for a moment by the clock.
    """

    signal: signal.Signals
    seconds: float
    change: int | None = None

    def __str__(self) -> str:
        if self.change is None:
            return f"{self.signal.name} after {self.seconds:.3f} s"
        when = f"{1000 * self.seconds:.1f} ms after" if self.seconds else "before"
        return f"{self.signal.name} {when} change {self.change}"


@dataclass
class Process:
    """A command that runs or has run.

    Attributes:
        status: its exit status, negative for a signal; None while it runs.
        seconds: that it took.
        stderr: what it said.
        changes: what it changed, one line each.
        has_begun: whether the script itself had begun.
        was_over: whether the script was over when a signal by the clock was sent.
        hung: whether it was killed because it did not end.
    """

    id: int
    files: Path
    started: float
    pid: int = 0
    status: int | None = None
    seconds: float = 0.0
    stderr: str = ""
    changes: list[str] = field(default_factory=list)
    has_begun: bool = False
    was_over: bool = False
    hung: bool = False
    known: threading.Event = field(default_factory=threading.Event)
    ended: threading.Event = field(default_factory=threading.Event)


class Server:
    """A fork server; safe to use from several threads.

    Raises:
        RuntimeError: it does not start.
    """

    def __init__(self) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT)}
        environment |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
        environment |= {"TOKENIZERS_PARALLELISM": "false", "COLUMNS": "200"}
        self._server = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("fork_server.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=environment,
            start_new_session=True,  # Ctrl-C is for the program that kills, not for those that it kills
        )
        self._lock, self._processes, self._number = threading.Lock(), dict[int, Process](), 0
        self._ready = threading.Event()
        threading.Thread(target=self._listen, name="fork server", daemon=True).start()
        if not self._ready.wait(START_SECONDS) or self._server.poll() is not None:
            raise RuntimeError("the fork server does not start: run tests/stress/fork_server.py by hand")

    def start(self, command: Command, folder: Path, strike: Moment | None = None) -> Process:
        """Start a command in a folder.

        Args:
            strike: a moment by a change of a file, at which the process signals itself.
        """
        with self._lock:
            self._number += 1
            number = self._number
            files = folder.with_name(f"{folder.name}.{number}")
            process = self._processes[number] = Process(number, files, time.monotonic())
        by_change = None
        if strike is not None and strike.change is not None:
            by_change = {"change": strike.change, "signal": int(strike.signal), "delay": strike.seconds}
        self._send(
            {
                "id": number,
                "script": str(ROOT / command.script),
                "arguments": command.arguments,
                "folder": str(folder),
                "stdout": f"{files}.stdout",
                "stderr": f"{files}.stderr",
                "changes": f"{files}.changes",
                "strike": by_change,
            }
        )
        process.known.wait(30)
        return process

    def signal(self, process: Process, number: int) -> None:
        """Send a signal to a process, if it has not ended."""
        process.was_over = END in self._noted(process)
        self._send({"id": process.id, "signal": int(number)})

    def strike(self, process: Process, moment: Moment) -> None:
        """Wait for a moment by the clock, and signal a process that has not ended by then.

        A signal that is to end in words waits until the program has begun.
        """
        if moment.signal is not signal.SIGKILL:
            while BEGIN not in self._noted(process) and not process.ended.wait(0.005):
                pass
            process.ended.wait(BEGIN_SECONDS)
        if not process.ended.wait(max(0.0, process.started + moment.seconds - time.monotonic())):
            self.signal(process, moment.signal)

    def wait_for_change(self, process: Process, change: int, timeout: float) -> bool:
        """Wait until a process is about to make a change; returns whether it is."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline and not process.ended.is_set():
            if sum(not line.startswith("#") for line in self._noted(process)) >= change:
                return True
            time.sleep(0.005)
        return False

    def wait(self, process: Process, timeout: float) -> Process:
        """Wait until a process has ended, and kill it if it does not end in time."""
        if not process.ended.wait(timeout):
            process.hung = True
            self.signal(process, signal.SIGKILL)
            process.ended.wait(30)
        noted = self._noted(process)
        process.changes = [line for line in noted if not line.startswith("#")]
        process.has_begun = BEGIN in noted
        stderr = Path(f"{process.files}.stderr")
        process.stderr = stderr.read_text(errors="replace") if stderr.is_file() else ""
        for suffix in ("stdout", "stderr", "changes"):
            Path(f"{process.files}.{suffix}").unlink(missing_ok=True)
        return process

    def _noted(self, process: Process) -> list[str]:
        path = Path(f"{process.files}.changes")
        return path.read_text(errors="replace").splitlines() if path.is_file() else []

    def run(self, command: Command, folder: Path, timeout: float, moment: Moment | None = None) -> Process:
        """Run a command to its end, or signal it at a moment and wait until it has ended."""
        process = self.start(command, folder, moment)
        if moment is not None and moment.change is None:
            self.strike(process, moment)
        return self.wait(process, timeout)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        assert self._server.stdin is not None
        self._server.stdin.close()
        self._server.wait(30)

    def _send(self, request: dict[str, Any]) -> None:
        assert self._server.stdin is not None
        with self._lock:
            self._server.stdin.write((json.dumps(request) + "\n").encode())
            self._server.stdin.flush()

    def _listen(self) -> None:
        assert self._server.stdout is not None
        for line in self._server.stdout:
            message = json.loads(line)
            process = self._processes.get(message["id"])
            if process is None:
                self._ready.set()
            elif "pid" in message:
                process.pid, process.started = message["pid"], time.monotonic()
                process.known.set()
            else:
                process.status, process.seconds = message["ended"], time.monotonic() - process.started
                process.ended.set()
        self._ready.set()
