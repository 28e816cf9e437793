"""What every entry point does alike: one line for what a person can act on, devices, and ranks.

Signals that come before, while a program imports what it needs, are for `wan.utils.signals.end_on_signals`.
"""

from __future__ import annotations

import errno
import functools
import logging
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from typing import TYPE_CHECKING, TextIO

from rich.console import Console
from rich.logging import RichHandler

from pipelines.console.commands import in_words_of_console
from wan.utils.errors import InputError, Interrupted, lost_peer, out_of_memory
from wan.utils.signals import EXIT_SIGNAL, GO_ON, Interruption, end_at_once_while_waiting, interruptible

if TYPE_CHECKING:
    import torch

EXIT_FAILURE = 1
EXIT_INPUT_ERROR = 2
LESS_MEMORY = "fewer frames, window memory (memory.kind), a smaller batch or picture, or bfloat16 take less"
START_ALL_AGAIN = "start the same command again, on all nodes, to go on"
_LOST_WRITES = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


def entry_point(how_to_go_on: str = GO_ON) -> Callable[[Callable[[], int]], Callable[[], int]]:
    """Let an entry point answer what a person can act on with one line on standard error, without a traceback.

    The status is 2 for bad input and a full disk, 1 where memory ran out or nobody reads the output, 130 after Ctrl-C,
    143 after SIGTERM and 129 after SIGHUP. A second signal ends the process at once.

    Args:
        how_to_go_on: what to say after a signal; an `Interrupted` with a text of its own goes before, and so
            does what `on_interruption_say` said.
    """

    def decorate(main: Callable[[], int]) -> Callable[[], int]:
        @functools.wraps(main)
        def run() -> int:
            # PyTorch quiets its loggers at the end of its import; one that a signal breaks off logs at Python's end.
            if not logging.getLogger("torch").level:
                logging.getLogger("torch").setLevel(logging.WARNING)
            handler = _LogHandler(show_path=False)
            logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[handler])
            with interruptible(how_to_go_on) as interruption:
                try:
                    return _flushed(_status_of(main, interruption), handler.lost)
                except BaseException as error:
                    # Imports and callbacks of libraries that a signal breaks off end in errors of their own.
                    if interruption.first is None and not isinstance(error, KeyboardInterrupt):
                        _flushed(0)  # argparse's help
                        raise
                    return _interrupted(error, interruption.first or signal.SIGINT, interruption.how_to_go_on)

        return run

    return decorate


def _interrupted(error: BaseException, number: int, how_to_go_on: str) -> int:
    """Say that a signal ended the program, in the words of the error if it has some."""
    text = str(error) if isinstance(error, KeyboardInterrupt) else ""
    _tell(f"interrupted: {text or how_to_go_on}")
    return EXIT_SIGNAL + (error.signal_number if isinstance(error, Interrupted) else number)


def _status_of(main: Callable[[], int], interruption: Interruption) -> int:
    """What `main` answers, or the status of the error that ended it, which has been told."""
    try:
        rank_and_world_size()  # first of all, since what follows relies on it
        return main()
    except InputError as error:
        if interruption.first is not None:
            raise
        _tell(f"error: {error}")
        return error.exit_status
    except (RuntimeError, MemoryError, OSError, SystemExit) as error:
        # First, since torchrun sends the processes of a node that is left alone a signal, too.
        if rank_and_world_size()[1] > 1 and lost_peer(error):
            _tell(f"error: another process of this run is gone ({_summary(error)}): {START_ALL_AGAIN}")
            return EXIT_FAILURE
        if interruption.first is not None:
            raise
        # A progress bar that ends on a closed terminal.
        if isinstance(error, OSError) and isinstance(error.__context__, Interrupted):
            raise error.__context__ from None
        if out_of_memory(error):
            _tell(f"error: out of memory ({_summary(error)}): {LESS_MEMORY}")
            return EXIT_FAILURE
        # Rich answers a broken pipe with an exit of its own.
        if isinstance(error.__context__ if isinstance(error, SystemExit) else error, BrokenPipeError):
            _discard(sys.stdout)
            _tell(f"error: nobody reads the output any more (broken pipe): {interruption.how_to_go_on}")
            return EXIT_FAILURE
        # The project's own writes name their file; this is for caches of libraries.
        if isinstance(error, OSError) and error.errno in _LOST_WRITES:
            where = f" {error.filename}" if error.filename else ""
            _tell(f"error: cannot write{where} ({error.strerror}): free space, also for temporary files")
            return EXIT_INPUT_ERROR
        raise


def _flushed(status: int, lost: OSError | None = None) -> int:
    """The status, once what was printed is out; a failure if it was lost.

    Args:
        lost: why a part of it could not be written before.
    """
    try:
        if lost is not None:
            raise lost
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError as error:
        _discard(sys.stdout)
        _tell(f"error: the output was lost ({error.strerror}): everything else was done")
        return max(status, EXIT_FAILURE)
    except ValueError:  # closed
        pass
    return status


def _summary(error: BaseException) -> str:
    """The first two sentences of an error."""
    first_line = (str(error).splitlines() or [type(error).__name__])[0]
    return ". ".join(first_line.split(". ")[:2]).rstrip(".")


def _tell(message: str) -> None:
    """Say one line on standard error, if somebody listens."""
    console = Console(stderr=True, soft_wrap=True, highlight=False)
    # Rich answers a broken pipe with SystemExit.
    with suppress(OSError, ValueError, SystemExit):
        console.print(" ".join(in_words_of_console(message).split()), style="red", markup=False)


def _discard(stream: TextIO) -> None:
    """Let a stream that cannot be written lead to nowhere, so that nothing tries again when Python ends."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())
        os.close(nowhere)


class _LogHandler(RichHandler):
    """A handler that lets work go on when the output cannot be written.

    Attributes:
        lost: why something could not be written.
    """

    lost: OSError | None = None

    def format(self, record: logging.LogRecord) -> str:
        """As logging's; under `arl2` messages name commands in the place of scripts."""
        return in_words_of_console(super().format(record))

    def handleError(self, record: logging.LogRecord) -> None:
        """As logging's, but quiet for errors of the output."""
        error = sys.exc_info()[1]
        if isinstance(error, OSError):
            self.lost = error
        else:
            super().handleError(record)


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; the GPU if there is one and no name is given. Under torchrun "cuda" is the rank's own.

    A GPU becomes the current one: events, and libraries that take no device, mean that.

    Raises:
        InputError: no such device, no GPU for a CUDA device, or one GPU for all ranks.
    """
    import torch

    if name is None:
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: give cpu, cuda or cuda:N")
    if device.type == "cpu":
        return device
    processes = local_processes()
    if device.index is None:
        device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    elif processes > 1:
        raise InputError(f"{processes} processes cannot share {name}: give cuda, and each takes a GPU of its own")
    if device.index >= torch.cuda.device_count():
        raise InputError(
            f"no GPU for {device}: {torch.cuda.device_count()} found; start fewer processes, or give --device cpu"
        )
    torch.cuda.set_device(device)
    return device


def end_together(main: Callable[[], int]) -> Callable[[], int]:
    """Let an entry point whose ranks work apart answer with `agreed_status`, whatever it answers of its own."""

    @functools.wraps(main)
    def run() -> int:
        return agreed_status(main())

    return run


def agreed_status(status: int) -> int:
    """The worst exit status of all processes that torchrun started, as soon as the last of them has one.

    A process that ends badly before the others makes torchrun kill them, whatever they were doing. One that a signal
    ended does not wait for them: the signal is for all. Nor does one that worked together with the others: they cannot
    go on without it.
    """
    if status > EXIT_SIGNAL or "TORCHELASTIC_RUN_ID" not in os.environ or rank_and_world_size()[1] == 1:
        return status
    import torch
    from torch import distributed

    if distributed.is_initialized():  # by work that all did together
        if status == 0:  # otherwise others may be waiting for an exchange that never comes
            distributed.destroy_process_group()
        return status
    with end_at_once_while_waiting():  # the others may have hours of work left
        distributed.init_process_group("gloo", timeout=timedelta(days=30))
        worst = torch.tensor(status)
        distributed.all_reduce(worst, distributed.ReduceOp.MAX)
        distributed.destroy_process_group()
    return int(worst)


def rank_and_world_size() -> tuple[int, int]:
    """This process's place among those that torchrun started; (0, 1) without it.

    Raises:
        InputError: the environment says one half of it, or what cannot be.
    """
    rank, world_size = os.environ.get("RANK"), os.environ.get("WORLD_SIZE")
    with suppress(ValueError):
        place = int(rank or 0), int(world_size or 1)
        if 0 <= place[0] < place[1] and (rank or place[1] == 1):
            return place
    raise InputError(
        f"the environment has RANK={rank or ''} and WORLD_SIZE={world_size or ''}, which is no place among processes: "
        "start with torchrun, which sets both, or unset them"
    )


def local_processes() -> int:
    """Processes that torchrun started on this machine; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def own_folder(folder: Path) -> tuple[Path, str]:
    """Where this process of several writes, and which part that is in words: `rank-<n>` below `folder`.

    `folder` itself, and "whole", for a process that works alone.

    Raises:
        InputError: a process alone, or more processes, have filled the folder: what they made would be made again.
    """
    from arl2.distillation.latent_writer import INDEX, WHOLE
    from wan.utils.files import read_json

    rank, world_size = rank_and_world_size()
    own = {folder} if world_size == 1 else {folder / f"rank-{number}" for number in range(world_size)}
    filled = {index.parent for index in (folder / INDEX, *folder.glob(f"rank-*/{INDEX}")) if index.exists()}
    # A folder of this rank's name may be a part of another division.
    parts = {path: str(read_json(path / INDEX).get("part", WHOLE)) for path in filled & own}
    others = sorted(path for path in filled if not parts.get(path, "").endswith((WHOLE, f" of {world_size}")))
    if others:
        raise InputError(
            f"{others[0]} was filled by another number of processes, now {world_size}: start as many as before, or "
            "choose another folder"
        )
    return (folder / f"rank-{rank}", f"rank {rank} of {world_size}") if world_size > 1 else (folder, "whole")
