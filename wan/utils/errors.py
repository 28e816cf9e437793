"""Errors that a person can act on."""

import errno
import signal


class InputError(ValueError):
    """Something the user gave cannot work: a file, a flag, a setting, a checkpoint.

    The message is one line that names the cause and the cure. Entry points print it without a
    traceback and exit with `exit_status`; libraries just raise it.
    """

    exit_status = 2


class CheckpointError(InputError):
    """A checkpoint cannot be read, is of another family, or does not fit the model."""


class Interrupted(KeyboardInterrupt):
    """Work stopped by a signal; the text says how to go on.

    Attributes:
        signal_number: the signal; entry points exit with 128 plus its number.
    """

    def __init__(self, how_to_go_on: str = "", signal_number: int = signal.SIGINT) -> None:
        super().__init__(how_to_go_on)
        self.signal_number = signal_number


_OUT_OF_MEMORY_WORDS = ("out of memory", "alloc_failed", "defaultcpuallocator")


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out, a GPU's or the machine's; libraries say it in words of their own."""
    text = str(error).lower()
    in_words = isinstance(error, RuntimeError) and any(words in text for words in _OUT_OF_MEMORY_WORDS)
    return in_words or isinstance(error, MemoryError) or (isinstance(error, OSError) and error.errno == errno.ENOMEM)


_LOST_PEER_WORDS = (
    *("connection closed by peer", "connection reset by peer", "connection refused", "broken pipe"),
    *("failed to recv", "remote process exited", "peer process", "nccl communicator was aborted", "timed out waiting"),
)


def lost_peer(error: BaseException) -> bool:
    """Whether an error says that another process of a distributed run is gone or does not answer."""
    from torch import distributed

    if distributed.is_available() and isinstance(error, distributed.DistError):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and any(words in text for words in _LOST_PEER_WORDS)
