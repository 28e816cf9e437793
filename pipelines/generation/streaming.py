"""Handing out what a GPU computes without making it wait for who takes it."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
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
        self._value, self._device, self._arrived = value, value.device, None
        if value.is_cuda:
            self._value = torch.empty_like(value, device="cpu", pin_memory=True)
            self._value.copy_(value, non_blocking=True)
            self._arrived = torch.cuda.current_stream(value.device).record_event()

    def wait(self) -> Tensor:
        """The tensor on the CPU, as soon as it is there; work that was asked for later is not waited for."""
        if self._arrived is not None:
            self._arrived.synchronize()
        return self._value

    def join(self) -> None:
        """Let all that its device's current stream is asked for from now on wait for it, but not the CPU."""
        if self._arrived is not None:
            torch.cuda.current_stream(self._device).wait_event(self._arrived)


class FiniteCheck:
    """Whether tensors are free of NaN and infinity: asked for now, in one transfer per device, and answered later.

    Args:
        tensors: by what they are, causes before effects; on any devices.
    """

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._names = tuple(tensors)
        devices: dict[torch.device, list[tuple[str, Tensor]]] = {value.device: [] for value in tensors.values()}
        for name, value in tensors.items():
            devices[value.device].append((name, torch.isfinite(value).all()))
        self._transfers = [
            (tuple(name for name, _ in answers), Transfer(torch.stack([answer for _, answer in answers])))
            for answers in devices.values()
        ]

    def wait(self) -> bool:
        """Whether all of them are finite, as soon as it is known."""
        return self.first_broken() is None

    def first_broken(self) -> str | None:
        """What the first tensor that is not finite is, as soon as it is known; None if all are finite."""
        answers: dict[str, bool] = {}
        for names, transfer in self._transfers:
            answers |= zip(names, transfer.wait().tolist(), strict=True)
        return next((name for name in self._names if not answers[name]), None)


class SideStream:
    """A stream of its own, for work that a GPU may do beside what it is asked for meanwhile.

    Both share the GPU's units and fill each other's gaps. What is done here may use whatever was computed before. Who
    uses its results calls `Transfer.join` first, and keeps what they are computed from until then: so memory that one
    stream gives back is never given to the other while it is read.

    Args:
        device: a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    @contextmanager
    def work(self) -> Iterator[None]:
        """What is asked for inside begins when all that was asked for before is done."""
        self._stream.wait_stream(torch.cuda.current_stream(self._stream.device))
        with torch.cuda.stream(self._stream):
            yield


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
