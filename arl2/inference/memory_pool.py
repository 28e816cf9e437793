"""Reuse of memories between videos, so that recorded passes stay valid."""

import weakref
from collections.abc import Callable
from dataclasses import replace

from arl2.model import HybridWanModel
from wan.memory import LayerMemory, Memory, MemorySpec


class MemoryPool:
    """Reuses the previous memory if its spec matches and nothing references it.

    Between videos the last memory stays allocated. It is released if another spec is asked for, or if it has grown.

    Args:
        model: model whose layers read the memories; its switches must not change.
    """

    def __init__(self, model: HybridWanModel) -> None:
        self._model = model
        self._spec: MemorySpec | None = None
        self._layers: list[LayerMemory] = []
        self._num_bytes = 0
        self._last: Callable[[], Memory | None] = lambda: None

    def new_memory(self, spec: MemorySpec) -> Memory:
        """See `wan.model.CausalWanModel.new_memory`."""
        # The size of a window does not depend on the length of the video.
        like = spec if spec.window_frames is None else replace(spec, frames=spec.window_frames)
        memory = Memory(self._layers)
        if like == self._spec and self._last() is None and memory.num_bytes == self._num_bytes:
            memory.reset()
        else:
            memory.layers, self._layers = [], []  # released before the next is made
            memory = self._model.new_memory(spec)
        self._spec, self._layers, self._last = like, memory.layers, weakref.ref(memory)
        self._num_bytes = memory.num_bytes
        return memory
