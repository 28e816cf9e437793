"""What every entry point does alike: devices, and errors that a person can act on."""

import functools
import logging
import os
from collections.abc import Callable

import torch
from rich.console import Console
from rich.logging import RichHandler

from wan.errors import InputError

EXIT_INPUT_ERROR = 2


def exit_on_input_error(main: Callable[[], int]) -> Callable[[], int]:
    """Let an entry point answer bad input with one line on standard error and status 2, without a traceback."""

    @functools.wraps(main)
    def run() -> int:
        logging.basicConfig(level=logging.INFO, format="%(message)s", handlers=[RichHandler(show_path=False)])
        try:
            return main()
        except InputError as error:
            message = " ".join(str(error).split())
            Console(stderr=True, soft_wrap=True, highlight=False).print(f"error: {message}", style="red", markup=False)
            return EXIT_INPUT_ERROR

    return run


def choose_device(name: str | None) -> torch.device:
    """The device called `name`; the GPU if there is one and no name is given. Under torchrun "cuda" is the rank's own.

    Raises:
        InputError: no such device, or no GPU for a CUDA device.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if name is None:
        return torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise InputError(f"unknown device {name!r}: give cpu, cuda or cuda:N") from error
    if device.type not in ("cpu", "cuda"):
        raise InputError(f"device {name!r} is not supported: give cpu, cuda or cuda:N")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", local_rank)
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise InputError(f"no GPU for device {name!r}: {torch.cuda.device_count()} found; give --device cpu")
    return device


def rank_and_world_size() -> tuple[int, int]:
    """This process's place among those that torchrun started; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
