"""Memories that are used again, so that passes recorded over one video fit the next."""

import weakref
from collections.abc import Callable
from dataclasses import replace

from arl2.hybrid_attention import StateMemory
from arl2.model import HybridWanModel
from wan.memory import LayerMemory, Memory, MemorySpec


class MemoryPool:
    """Makes memories of one model; one of the kind made last that nobody holds any more is emptied and used again.

    Only memories of a fixed size are kept; the others would hold what the longest video took.

    Args:
        model: whose layers read the memories; its switches must not change.
    """

    def __init__(self, model: HybridWanModel) -> None:
        self._model = model
        self._spec: MemorySpec | None = None
        self._layers: list[LayerMemory] = []
        self._last: Callable[[], Memory | None] = lambda: None

    def new_memory(self, spec: MemorySpec) -> Memory:
        """See `wan.model.CausalWanModel.new_memory`."""
        # A window takes the same room whatever the length of the video.
        like = spec if spec.window_frames is None else replace(spec, frames=spec.window_frames)
        if self._layers and like == self._spec and self._last() is None:
            memory = Memory(self._layers)
            memory.reset()
        else:
            self._layers = []
            memory = self._model.new_memory(spec)
        if spec.window_frames is not None or all(isinstance(layer, StateMemory) for layer in memory.layers):
            self._spec, self._layers, self._last = like, memory.layers, weakref.ref(memory)
        return memory
