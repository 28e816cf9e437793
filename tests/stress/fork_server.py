"""Entry points started within milliseconds: a process that has imported everything forks one child per command.

    python fork_server.py        # reads requests from standard input, one JSON object per line; see `Server`

A child runs the script as `python script …` would: as `__main__`, and afterwards what is registered for the end. Exit
status and standard error are those that a user gets. The child notes every change of a file (a file opened for writing,
a rename, a removal, a lock), and can be told to signal itself just before change number n.
"""

import atexit
import gc
import json
import os
import runpy
import select
import signal
import sys
import threading
import time
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
FOLDERS = (ROOT, ROOT / "scripts")
PRELOADED = (
    *("inference", "train_stage1", "train_stage2"),
    *("generate_latents", "encode_videos", "convert_checkpoint", "select_layers", "sample_suite", "evaluate"),
    # What these import only when they are called.
    *("transformers.models.umt5.modeling_umt5", "transformers.models.t5.tokenization_t5", "torch._dynamo"),
    *("diffusers.models.autoencoders.autoencoder_kl_wan", "torch.utils._sympy.functions", "PIL.PngImagePlugin"),
)
CHANGES = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "shutil.rmtree", "fcntl.flock")
POLL_SECONDS = 0.004
BEGIN, END = "# begin", "# end"
"""Lines of the log of changes: the script's first statement comes now; its last one is done."""


class Changes:
    """An audit hook that counts the changes of files below a folder.

    Args:
        folder: the folder; what happens elsewhere does not count.
        log: descriptor of a file that gets one line per change.
        strike: None, or {"change": number of the change, "signal": number, "delay": seconds after it}. Without a delay
            the signal comes just before the change.
    """

    def __init__(self, folder: str, log: int, strike: dict[str, Any] | None) -> None:
        self._folder, self._log, self._strike = folder, log, strike
        self._count, self._has_begun = 0, False

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        """Called by the interpreter before whatever may change a file."""
        if event == "exec" and not self._has_begun:
            self._has_begun = True
            self._note(BEGIN)
            return
        if event == "open":
            path, _, flags = arguments
            if not flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
                return
        elif event in CHANGES:
            path = arguments[0]
        else:
            return
        if not self._is_ours(event, path, arguments):
            return
        self._count += 1
        self._note(f"{event} {path if not isinstance(path, int) else ''}")
        if self._strike is not None and self._count == self._strike["change"]:
            self._send()

    def _note(self, text: str) -> None:
        os.write(self._log, (text + "\n").encode(errors="replace"))

    def end(self) -> None:
        """Note that the program has ended; what follows is the interpreter's own."""
        self._note(END)

    def _is_ours(self, event: str, path: object, arguments: tuple[Any, ...]) -> bool:
        if event == "fcntl.flock":
            return True
        if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
            return True  # relative to a folder that is being removed
        if not isinstance(path, str | bytes | os.PathLike):
            return False
        return os.path.abspath(os.fsdecode(path)).startswith(self._folder)

    def _send(self) -> None:
        assert self._strike is not None
        number, delay = self._strike["signal"], self._strike["delay"]
        if delay:
            threading.Thread(target=kill_self, args=(number, delay), daemon=True).start()
        else:
            kill_self(number)


def kill_self(number: int, delay: float = 0.0) -> None:
    """Send this process a signal after some seconds."""
    time.sleep(delay)
    os.kill(os.getpid(), number)


def say(message: dict[str, Any]) -> None:
    """Answer whoever started this process."""
    os.write(1, (json.dumps(message) + "\n").encode())


def serve() -> dict[str, Any]:
    """Start and signal children until standard input ends; returns in children only, with what to run."""
    children: dict[int, int] = {}
    buffer = b""
    while True:
        ready, _, _ = select.select([0], [], [], POLL_SECONDS if children else None)
        for pid in list(children):
            found, status = os.waitpid(pid, os.WNOHANG)
            if found:
                say({"id": children.pop(pid), "ended": os.waitstatus_to_exitcode(status)})
        if not ready:
            continue
        received = os.read(0, 65536)
        if not received:
            break
        *lines, buffer = (buffer + received).split(b"\n")
        for line in lines:
            request = json.loads(line)
            if "signal" in request:
                _signal(request, children)
                continue
            pid = os.fork()
            if not pid:
                return dict(request)
            children[pid] = request["id"]
            say({"id": request["id"], "pid": pid})
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    raise SystemExit


def _signal(request: dict[str, Any], children: dict[int, int]) -> None:
    """Signal a child that was not waited for: its number cannot belong to another process."""
    for pid, number in children.items():
        if number == request["id"]:
            os.kill(pid, request["signal"])


def become(request: dict[str, Any]) -> Changes:
    """Turn a child into a process that was started with the command of a request; returns what notes its changes."""
    os.setsid()
    os.chdir(request["folder"])
    for descriptor, path in ((1, request["stdout"]), (2, request["stderr"])):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666), descriptor)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    log = os.open(request["changes"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)
    sys.argv = [request["script"], *request["arguments"]]
    sys.path[0] = str(Path(request["script"]).parent)
    changes = Changes(request["folder"], log, request["strike"])
    sys.addaudithook(changes)
    return changes


def run(request: dict[str, Any]) -> None:
    """Run a child's script to its end; what it does not catch goes to the interpreter, which ends as it always does."""
    changes, status = become(request), None
    try:
        runpy.run_path(request["script"], run_name="__main__")
    except SystemExit as exit:
        status = exit.code
    finally:
        changes.end()
    if isinstance(status, str):
        sys.stderr.write(f"{status}\n")
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    # Without clearing thousands of modules, for which every page that the children share would be copied.
    os._exit(1 if isinstance(status, str) else int(status or 0))


if __name__ == "__main__":
    sys.path[1:1] = [str(folder) for folder in FOLDERS]
    for module in PRELOADED:
        import_module(module)
    gc.collect()
    gc.freeze()
    say({"id": -1, "pid": os.getpid()})
    _request = serve()
    run(_request)
