"""Runs of inference.py as processes of their own that start at once: forked from one that has imported everything."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from paths import ROOT

SERVER = """
import json, os, resource, signal, sys
import inference
import pipelines.generation.arguments, pipelines.generation.run
def child(order):
    for descriptor, path in ((1, order["out"]), (2, order["err"])):
        file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(file, descriptor)
    if order["file_limit"] is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (order["file_limit"], resource.RLIM_INFINITY))
    sys.argv = order["argv"]
    status = 1
    try:
        status = inference.main()
    except SystemExit as error:
        status = error.code
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
        os._exit(status)
print("ready", flush=True)
for line in sys.stdin:
    order = json.loads(line)
    if "wait" in order:
        print(os.waitstatus_to_exitcode(os.waitpid(order["wait"], 0)[1]), flush=True)
        continue
    process = os.fork()
    if process == 0:
        child(order)
    print(process, flush=True)
"""
DEADLINE_SECONDS = 120.0


class ForkServer:
    """Starts runs of inference.py by forking.

    Args:
        folder: for what the runs print.
    """

    def __init__(self, folder: Path) -> None:
        environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "COLUMNS": "1000"}
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
            cwd=ROOT,
        )
        self._folder, self._started = folder, 0
        assert self._answer() == "ready"

    def _answer(self) -> str:
        assert self._server.stdout is not None
        return self._server.stdout.readline().strip()

    def ask(self, order: dict[str, Any]) -> int:
        """Send an order; the answer is a number."""
        assert self._server.stdin is not None
        self._server.stdin.write(json.dumps(order) + "\n")
        self._server.stdin.flush()
        return int(self._answer())

    def start(self, *flags: object, file_limit: int | None = None) -> "ForkedRun":
        """Start inference.py with some flags.

        Args:
            file_limit: bytes that a file of the process may have, in the place of a full disk.
        """
        self._started += 1
        out, err = (self._folder / f"{self._started}.{name}" for name in ("out", "err"))
        argv = ["inference.py", *map(str, flags)]
        order = {"argv": argv, "out": str(out), "err": str(err), "file_limit": file_limit}
        return ForkedRun(self, self.ask(order), out, err)

    def close(self) -> None:
        """End the server."""
        self._server.kill()
        self._server.wait()


class ForkedRun:
    """A run of inference.py.

    Attributes:
        pid: of its process.
    """

    def __init__(self, server: ForkServer, pid: int, out: Path, err: Path) -> None:
        self.pid, self._server, self._out, self._err = pid, server, out, err

    @property
    def printed(self) -> str:
        """What it printed so far, line ends as spaces."""
        return " ".join(self._out.read_text().split()) if self._out.exists() else ""

    @property
    def errors(self) -> list[str]:
        """Lines on standard error so far."""
        return self._err.read_text().splitlines()

    def wait(self) -> int:
        """The exit status, minus the signal's number if one ended it."""
        return self._server.ask({"wait": self.pid})

    def send(self, number: signal.Signals) -> None:
        """Send a signal."""
        os.kill(self.pid, number)


def wait_until(condition: Callable[[], object]) -> None:
    """Wait for something that happens within seconds."""
    deadline = time.monotonic() + DEADLINE_SECONDS
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.01)


def partial_of(folder: Path, run: ForkedRun) -> Sequence[Path]:
    """Temporary videos of a run that have content."""
    return [path for path in folder.glob(f".*-{run.pid}-*.part") if ".mp4." in path.name and path.stat().st_size]
