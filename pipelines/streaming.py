"""Handing out what a GPU computes without making it wait for who takes it."""

from collections.abc import Callable, Iterable, Iterator
from typing import TypeVar

import torch
from torch import Tensor

Item = TypeVar("Item")
Result = TypeVar("Result")


class Transfer:
    """A tensor on its way to the CPU: asked for now, behind what was asked for before, and waited for later.

    Args:
        value: on any device; from a GPU it is copied to pinned memory.
    """

    def __init__(self, value: Tensor) -> None:
        self._value, self._arrived = value, None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.current_stream(value.device).record_event()

    def wait(self) -> Tensor:
        """The tensor on the CPU, as soon as it is there; work that was asked for later is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value


def finished(finish: Callable[[Item], Result], items: Iterable[Item], device: torch.device) -> Iterator[Result]:
    """`map(finish, items)`, on a GPU by `one_ahead`."""
    return one_ahead(finish, items) if device.type == "cuda" else map(finish, items)


def one_ahead(finish: Callable[[Item], Result], items: Iterable[Item]) -> Iterator[Result]:
    """As `map(finish, items)`, but each result is handed out only when the item after it has been asked for.

    A GPU works on what it was asked for while the CPU goes on: so it has the next item to work on while the last result
    is waited for, written and thought about. Finishing the next item is asked for only then, in time for a GPU that is
    busy with the item itself. The first result comes at once, because somebody is waiting for it.
    """
    remaining = iter(items)
    for first in remaining:
        yield finish(first)
        break
    waiting: list[Result] = []
    try:
        for item in remaining:
            if waiting:
                yield waiting.pop()
            waiting.append(finish(item))
    except Exception:
        yield from waiting  # finished before, and as good as ever
        raise
    yield from waiting
