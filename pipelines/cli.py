"""What every entry point does alike: devices, and errors that a person can act on."""

import functools
import logging
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path

import torch
from rich.console import Console
from rich.logging import RichHandler
from torch import distributed

from wan.utils.errors import InputError

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

    A GPU becomes the current one: events, and libraries that take no device, mean that.

    Raises:
        InputError: no such device, no GPU for a CUDA device, or one GPU for all ranks.
    """
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
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
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

    A process that ends badly before the others makes torchrun kill them, whatever they were doing.
    """
    if not distributed.is_torchelastic_launched() or rank_and_world_size()[1] == 1:
        return status
    # The others may have hours of work left.
    distributed.init_process_group("gloo", timeout=timedelta(days=30))
    worst = torch.tensor(status)
    distributed.all_reduce(worst, distributed.ReduceOp.MAX)
    distributed.destroy_process_group()
    return int(worst)


def rank_and_world_size() -> tuple[int, int]:
    """This process's place among those that torchrun started; (0, 1) without it."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def own_folder(folder: Path) -> tuple[Path, str]:
    """Where this process of several writes, and which part that is in words: `rank-<n>` below `folder`.

    `folder` itself, and "whole", for a process that works alone.
    """
    rank, world_size = rank_and_world_size()
    return (folder / f"rank-{rank}", f"rank {rank} of {world_size}") if world_size > 1 else (folder, "whole")
