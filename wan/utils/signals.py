"""Signals that end a program as an exception that says how to go on, or as a call for whoever can stop better.

They are Ctrl-C, SIGTERM, and the SIGHUP of a terminal that closes.
"""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress

from wan.utils.errors import Interrupted

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
EXIT_SIGNAL = 128
"""Added to the number of the signal that ended a program."""
GO_ON = "nothing is left half-written; start the same command again to go on"
REDELIVERY_SECONDS = 0.02

_current: list["Interruption"] = []


def end_on_signals() -> None:
    """Let a signal of `SIGNALS` end this process at once, with one line: for a program that still imports its parts.

    Not by an exception, which imports may lose or turn into errors of their own; nothing has begun that could be left
    half-done. A program calls it before its other imports, and an entry point takes signals from it for its time.
    What whoever started it ignores, as nohup does SIGHUP, stays ignored.
    """

    for number in SIGNALS:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, lambda number, frame: _end(number))


def _end(number: int) -> None:
    with suppress(OSError):
        os.write(2, f"interrupted: {GO_ON}\n".encode())
    os._exit(EXIT_SIGNAL + number)


@contextmanager
def on_signals(handler: Callable[[int], None]) -> Iterator[None]:
    """Let signals of `SIGNALS` call `handler` with their number inside, in the main thread; elsewhere nothing changes.

    A signal that whoever started the process chose to ignore, as nohup and shells' background jobs do, stays ignored.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    former = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        for number, was in former.items():
            if was is not signal.SIG_IGN:
                signal.signal(number, lambda number, frame: handler(number))
        yield
    finally:
        for number, was in former.items():
            signal.signal(number, signal.SIG_DFL if was is None else was)


def end_at_once_on(numbers: Iterable[int]) -> None:
    """Leave further signals to the system, which ends the process whatever it computes.

    But for those that are ignored, and SIGHUP, which is from now on: a terminal that closes sends it twice, once by its
    shell, and nobody waits for the end.
    """
    for number in numbers:
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP else signal.SIG_DFL)


@contextmanager
def end_at_once_while_waiting() -> Iterator[None]:
    """Let a signal of `SIGNALS` inside end this process with one line although its main thread waits in a library.

    Handlers in Python run in the main thread alone, and not before the library returns. Here another thread is told of
    signals by the interpreter's wakeup descriptor. For waits in which nothing can be left half-done.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    reading, writing = os.pipe()
    os.set_blocking(writing, False)

    def end() -> None:
        for number in os.read(reading, 1):  # none when the other end is closed
            _end(number)

    former = signal.set_wakeup_fd(writing, warn_on_full_buffer=False)
    thread = threading.Thread(target=end, name="signals", daemon=True)
    thread.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(former)
        os.close(writing)
        thread.join()
        os.close(reading)


@contextmanager
def interruptible(how_to_go_on: str) -> Iterator["Interruption"]:
    """Let the first of `SIGNALS` inside raise `Interrupted`, and a second one end the process at once.

    Args:
        how_to_go_on: the exception's text.

    Yields:
        what has come so far.
    """
    interruption = Interruption(how_to_go_on)
    former_hook = sys.unraisablehook

    def hook(unraisable: "sys.UnraisableHookArgs") -> None:
        if not isinstance(unraisable.exc_value, Interrupted):
            former_hook(unraisable)
            return
        # It was raised inside a destructor, which loses exceptions: raise it again in a moment.
        interruption.forget()
        number = unraisable.exc_value.signal_number
        threading.Timer(REDELIVERY_SECONDS, signal.pthread_kill, (threading.main_thread().ident, number)).start()

    with on_signals(interruption):
        sys.unraisablehook = hook
        try:
            _current.append(interruption)
            yield interruption
        finally:
            _current.pop()
            sys.unraisablehook = former_hook


def on_interruption_say(how_to_go_on: str) -> None:
    """Change the text of the `Interrupted` to come; without an `interruptible` context around this does nothing."""
    if _current:
        _current[-1].how_to_go_on = how_to_go_on


def check_interrupted() -> None:
    """Raise `Interrupted` if a signal came and its exception was lost, as imports and callbacks of libraries may do.

    Long loops call it; without an `interruptible` context around them it does nothing.
    """
    if _current and threading.current_thread() is threading.main_thread():
        _current[-1].check()


class Interruption:
    """What signals call.

    Attributes:
        how_to_go_on: text of the exception that a signal raises.
        first: the number of the first signal that came.
    """

    def __init__(self, how_to_go_on: str) -> None:
        self.how_to_go_on = how_to_go_on
        self.first: int | None = None

    def check(self) -> None:
        """Raise `Interrupted` if a signal came."""
        if self.first is not None:
            raise Interrupted(self.how_to_go_on, self.first)

    def forget(self) -> None:
        """Take the next signal for the first one."""
        self.first = None

    def __call__(self, number: int) -> None:
        if self.first is None:
            self.first = number
            raise Interrupted(self.how_to_go_on, number)
        if number == signal.SIGHUP:
            return  # a terminal that closes sends it twice, once by its shell, and nobody waits for the end
        # On Ctrl-C torchrun sends the processes that it started, which the terminal told already, a SIGTERM.
        if number == self.first or "TORCHELASTIC_RUN_ID" not in os.environ:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)
