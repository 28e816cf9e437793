"""Entry points: signals, lost memory and lost output end in one line and a status that says which."""

import errno
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
import torch
from paths import ROOT

from pipelines.cli import GO_ON, end_together, entry_point, rank_and_world_size
from wan.utils.errors import InputError, Interrupted, out_of_memory
from wan.utils.signals import SIGNALS, check_interrupted, on_signals


def send(number: int) -> Callable[[], int]:
    """A program that gets a signal."""

    def main() -> int:
        signal.raise_signal(number)
        return 0

    return main


def raises(error: BaseException) -> Callable[[], int]:
    """A program that ends in an error."""

    def main() -> int:
        raise error

    return main


def swallows() -> int:
    """A program that loses the exception of a signal."""
    with suppress(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
    check_interrupted()
    return 0


def turns_into_another_error() -> int:
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        raise ImportError("cannot load module more than once per process") from None
    return 0


def ends_in_an_input_error() -> int:
    try:
        signal.raise_signal(signal.SIGTERM)
    except KeyboardInterrupt:
        raise InputError("cannot write") from None
    return 0


def loses_its_terminal() -> int:
    try:
        raise Interrupted("step 3 is saved", signal.SIGHUP)
    finally:
        raise OSError(errno.EIO, "Input/output error")


CUDA = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB. GPU 0 has 80 GiB.\nSee documentation")
CPU = RuntimeError("[enforce fail] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes.")
ANSWERS = {
    "Ctrl-C": (send(signal.SIGINT), 130, f"interrupted: {GO_ON}"),
    "SIGTERM": (send(signal.SIGTERM), 143, f"interrupted: {GO_ON}"),
    "a closed terminal": (send(signal.SIGHUP), 129, f"interrupted: {GO_ON}"),
    "a bar on a closed terminal": (loses_its_terminal, 129, "interrupted: step 3 is saved"),
    "a text of its own": (raises(Interrupted("step 3 is saved", signal.SIGTERM)), 143, "interrupted: step 3 is saved"),
    "Python's own": (raises(KeyboardInterrupt()), 130, f"interrupted: {GO_ON}"),
    "a lost one": (swallows, 130, f"interrupted: {GO_ON}"),
    "one that became another error": (turns_into_another_error, 143, f"interrupted: {GO_ON}"),
    "one that became bad input": (ends_in_an_input_error, 143, f"interrupted: {GO_ON}"),
    "bad input": (raises(InputError("no\nsuch file")), 2, "error: no such file"),
    "GPU memory": (
        raises(CUDA),
        1,
        "error: out of memory (CUDA out of memory. Tried to allocate 20 GiB): fewer frames",
    ),
    "memory": (raises(CPU), 1, "error: out of memory ([enforce fail]"),
    "Python's memory": (raises(MemoryError()), 1, "error: out of memory (MemoryError): fewer frames"),
    "no process": (raises(OSError(errno.ENOMEM, "Cannot allocate memory")), 1, "error: out of memory"),
    "a pipe": (raises(BrokenPipeError(errno.EPIPE, "Broken pipe")), 1, "error: nobody reads the output any more"),
    "a cache on a full disk": (
        raises(OSError(errno.ENOSPC, "No space left", "/tmp/c")),
        2,
        "error: cannot write /tmp/c",
    ),
}


@pytest.mark.parametrize("case", ANSWERS)
def test_one_line_and_a_status(case: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipelines.cli._discard", lambda stream: None)
    main, status, line = ANSWERS[case]
    before = [signal.getsignal(number) for number in SIGNALS]
    assert entry_point()(main)() == status
    error = capsys.readouterr().err
    assert error.startswith(line) and error.count("\n") == 1, error
    assert [signal.getsignal(number) for number in SIGNALS] == before
    check_interrupted()  # nothing is left of it


@pytest.mark.parametrize("error", [ValueError("a bug"), RuntimeError("another"), OSError(errno.ENOENT, "none")])
def test_bugs_keep_their_traceback(error: Exception) -> None:
    with pytest.raises(type(error)):
        entry_point()(raises(error))()
    with pytest.raises(SystemExit):
        entry_point()(raises(SystemExit(2)))()


def test_a_script_says_how_it_goes_on(capsys: pytest.CaptureFixture[str]) -> None:
    assert entry_point("the index is whole")(send(signal.SIGINT))() == 130
    assert capsys.readouterr().err == "interrupted: the index is whole\n"


def test_an_ignored_signal_stays_ignored() -> None:
    former = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        assert entry_point()(send(signal.SIGINT))() == 0
    finally:
        signal.signal(signal.SIGINT, former)


def test_a_second_hangup_does_not_end_what_ends_already(capsys: pytest.CaptureFixture[str]) -> None:
    def main() -> int:
        try:
            signal.raise_signal(signal.SIGHUP)
        finally:
            signal.raise_signal(signal.SIGHUP)  # would end the tests
        return 0

    assert entry_point()(main)() == 129


def test_torch_is_quiet_even_if_its_import_was_broken_off() -> None:
    command = (
        "import logging; from pipelines.cli import entry_point; "
        "entry_point()(lambda: logging.getLogger('torch._subclasses.fake_tensor').info('cache stats') or 0)()"
    )
    done = subprocess.run([sys.executable, "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and done.stdout + done.stderr == ""


def test_others_may_take_signals_for_a_while() -> None:
    heard = list[int]()

    def main() -> int:
        with on_signals(heard.append):
            signal.raise_signal(signal.SIGTERM)
            signal.raise_signal(signal.SIGINT)
        assert heard == [signal.SIGTERM, signal.SIGINT]
        signal.raise_signal(signal.SIGINT)
        return 0

    assert entry_point()(main)() == 130


def test_outside_of_the_main_thread_signals_are_left_alone() -> None:
    def main() -> int:
        with on_signals(lambda number: None):
            return 7 if signal.getsignal(signal.SIGINT) is signal.default_int_handler else 0

    with ThreadPoolExecutor(1) as executor:
        assert executor.submit(entry_point()(main)).result() == 7


def test_a_signal_inside_a_destructor_is_heard(capsys: pytest.CaptureFixture[str]) -> None:
    class Late:
        def __del__(self) -> None:
            signal.raise_signal(signal.SIGTERM)

    def main() -> int:
        late = Late()
        del late
        threading.Event().wait(60)
        return 0

    assert entry_point()(main)() == 143
    assert capsys.readouterr().err == f"interrupted: {GO_ON}\n"


def test_an_interrupted_rank_waits_for_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "x")
    monkeypatch.setattr("torch.distributed.init_process_group", lambda *_, **__: pytest.fail("it waits"))
    assert end_together(entry_point()(send(signal.SIGTERM)))() == 143


@pytest.mark.parametrize(("error", "answer"), [(CUDA, True), (CPU, True), (RuntimeError("shapes"), False)])
def test_memory_that_ran_out_is_known_by_its_words(error: RuntimeError, answer: bool) -> None:
    assert out_of_memory(error) is answer


def program(body: str, *, stdout: int | None = subprocess.PIPE, **environment: str) -> "subprocess.Popen[str]":
    """A process whose `main` is `body`."""
    lines = ["import logging, os, signal, sys, time", "from pipelines.cli import entry_point", "@entry_point('go on')"]
    lines += ["def main():", *(f"    {line}" for line in body.splitlines()), "    return 0", "raise SystemExit(main())"]
    return subprocess.Popen(
        [sys.executable, "-c", "\n".join(lines)],
        stdout=stdout,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"PYTHONPATH": str(ROOT)} | environment,
    )


STUBBORN = """
try:
    signal.raise_signal(signal.SIGINT)
finally:
    print("cleaning", flush=True)
    time.sleep({seconds})
    print("clean", flush=True)
"""


def test_a_second_signal_ends_at_once() -> None:
    process = program(STUBBORN.format(seconds=60))
    assert process.stdout is not None and process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate()[0] == "" and process.returncode == -signal.SIGTERM


def test_the_second_signal_of_torchrun_is_the_same_event() -> None:
    process = program(STUBBORN.format(seconds=1), TORCHELASTIC_RUN_ID="x")
    assert process.stdout is not None and process.stdout.readline() == "cleaning\n"
    process.send_signal(signal.SIGTERM)
    assert process.communicate() == ("clean\n", "interrupted: go on\n") and process.returncode == 130


SPEAKS = "for number in range(3):\n    {speak}\n    time.sleep(0.01)"


@pytest.mark.parametrize("speak", ["print(number, flush=True)", "logging.info(number)", "print(number)"])
def test_nobody_reads(speak: str) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    process = program(SPEAKS.format(speak=speak), stdout=writer)
    os.close(writer)
    error = process.communicate()[1]
    assert process.returncode == 1 and error.count("\n") == 1 and "output" in error, error


@pytest.mark.parametrize("speak", ["logging.info(number)", "print(number)"])
@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_to_a_full_disk(speak: str) -> None:
    with Path("/dev/full").open("w") as full:
        process = program(SPEAKS.format(speak=speak), stdout=full.fileno())
        error = process.communicate()[1]
    assert process.returncode in (1, 2) and error.count("\n") == 1 and "No space left" in error, error


def test_nobody_listens_to_errors() -> None:
    process = program("os.close(2)\nraise KeyboardInterrupt")
    process.communicate()
    assert process.returncode == 130


@pytest.mark.parametrize(
    ("rank", "world_size"), [("1", None), (None, "2"), ("2", "2"), ("-1", "2"), ("first", "2"), ("0", "0")]
)
def test_an_environment_that_is_no_place_among_processes_is_refused(
    rank: str | None, world_size: str | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A process that took it for one would make another part of the videos, or none, and end well."""
    for name, value in {"RANK": rank, "WORLD_SIZE": world_size}.items():
        if value is not None:
            monkeypatch.setenv(name, value)
    assert end_together(entry_point()(lambda: 0))() == 2
    assert capsys.readouterr().err.startswith(f"error: the environment has RANK={rank or ''} and WORLD_SIZE=")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert rank_and_world_size() == (1, 2)
    monkeypatch.delenv("RANK")
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rank_and_world_size() == (0, 1)
