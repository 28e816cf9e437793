"""Where the seconds of a generation go, measured without making the GPU wait."""

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager

import torch


class PhaseTimer:
    """Seconds spent in named phases. On a GPU, the time between events in the stream; else wall time.

    Args:
        device: where phases compute.
        elsewhere: by name, the devices of phases that compute on others.
    """

    def __init__(self, device: torch.device, elsewhere: Mapping[str, torch.device] = {}) -> None:
        self._device, self._elsewhere = device, dict(elsewhere)
        self._spans: dict[str, list[Callable[[], float]]] = defaultdict(list)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Count what runs inside towards `name`."""
        device = self._elsewhere.get(name, self._device)
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record(torch.cuda.current_stream(device))
            yield
            end.record(torch.cuda.current_stream(device))
            self._spans[name].append(lambda: begin.elapsed_time(end) / 1000)
        else:
            start = time.perf_counter()
            yield
            seconds = time.perf_counter() - start
            self._spans[name].append(lambda: seconds)

    def seconds(self) -> dict[str, float]:
        """Total seconds of every phase; waits for the GPUs."""
        self.synchronize()
        return {name: sum(span() for span in spans) for name, spans in self._spans.items()}

    def synchronize(self) -> None:
        """Wait for all that was asked for of the devices."""
        for device in {self._device, *self._elsewhere.values()}:
            if device.type == "cuda":
                torch.cuda.synchronize(device)
