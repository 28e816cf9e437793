"""Passes recorded as CUDA graphs: replaying one costs the CPU one launch instead of hundreds."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arl2.state_memory import StateView
from wan.memory import KVUpdate, SlotUpdate, SlotView
from wan.model import FlowModel, PassOutput, TextKV

MAX_GRAPHS = 64
"""Upper bound on recorded passes: two per slot of a window that divides into blocks, two per block of a full memory."""
EVICT_AFTER = 128
"""Blocks after which a recording that was not replayed may be evicted."""
MAX_KEYS = 1024
"""Upper bound on keys of passes that were met, two per block of a full memory.

Beyond it all keys are dropped, which only delays recordings.
"""

Key = tuple[Hashable, ...]


def pass_key(views: Sequence[Any]) -> Key | None:
    """Addresses, sizes and slots of the memory that a recording depends on; None if it cannot be recorded."""
    places: list[Hashable] = []
    for view in views:
        if isinstance(view, StateView):
            places.append(address(view.state_BHKV))
        elif isinstance(view, SlotView):
            places.append((address(view.keys_BMHD), address(view.values_BMHD), tuple(view.slot), view.visible))
        else:
            return None
    return tuple(places)


def recurs(views: Sequence[Any]) -> bool:
    """Returns whether later blocks of the video use the same slots; in a full memory every block has its own."""
    return all(view.recurs for view in views if isinstance(view, SlotView))


def address(x: Tensor) -> Key:
    """Address, shape and dtype of a tensor."""
    return x.data_ptr(), x.shape, x.dtype


def signature(tensors: Sequence[Tensor]) -> Key:
    """Shapes, dtypes and devices of tensors."""
    return tuple((x.shape, x.dtype, x.device) for x in tensors)


def output_tensors(output: PassOutput) -> Iterator[Tensor]:
    """Iterate over the tensors that a pass's output owns; a `SlotUpdate` owns none."""
    if output.flow is not None:
        yield output.flow
    for update in output.updates or ():
        if isinstance(update, KVUpdate):
            yield from (update.keys_BLHD, update.values_BLHD)
        elif isinstance(update, Tensor):
            yield update


def same_output(output: PassOutput, tensors: Iterator[Tensor]) -> PassOutput:
    """Copy of an output with other tensors, given in the order of `output_tensors`, and None for a `SlotUpdate`."""

    def same(update: Any) -> Any:
        if isinstance(update, KVUpdate):
            return KVUpdate(next(tensors), next(tensors))
        return next(tensors) if isinstance(update, Tensor) else None

    flow = None if output.flow is None else next(tensors)
    return PassOutput(flow, None if output.updates is None else [same(update) for update in output.updates])


def of_pass(held: PassOutput, views: Sequence[Any]) -> PassOutput:
    """Output of a replayed pass: the buffers that it wrote, and a `SlotUpdate` for what it left in the memory.

    The buffers hold no view: one would keep the memory of a finished video alive.
    """
    if held.updates is None:
        return held
    updates = [SlotUpdate(view) if update is None else update for update, view in zip(held.updates, views, strict=True)]
    return PassOutput(held.flow, updates)


class GraphedModel:
    """Model whose passes are recorded when they repeat, and then replayed.

    A pass repeats if its sizes, and the addresses and slots of its memory, equal those of an earlier pass. Over states
    and over the ring of a window, the earlier pass belongs to an earlier block. The first blocks of a window run
    unrecorded. In a full memory every block has its own slot. There the second denoising pass is recorded for the rest
    of the block, and all passes for the next video in the same memory. If there is no space for them, only the
    denoising of the current block is recorded, until the next block.

    The result of a call is valid until the next call. Not thread-safe.

    Args:
        model: its forward must neither wait for the GPU nor need gradients. Its memories must not be differentiable.
        device: GPU on which it computes.
        launched: model for passes over a full memory that are not recorded; None for `model`. The fastest model in a
            recording need not be the fastest to launch.
    """

    def __init__(self, model: FlowModel, device: torch.device, launched: FlowModel | None = None) -> None:
        self._model = model
        self._launched = model if launched is None else launched
        # Each with the block that last replayed it; least recently used first.
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, int]] = {}
        # The one recorded beyond the limit: only the current block replays it.
        self._passing: Key | None = None
        self._first_met: dict[Key, int] = {}
        self._blocks = 0
        # Kinds of pass that `model` has computed: their kernels are compiled and tuned.
        self._tried: set[Key] = set()
        # Per kind of pass: input and output buffers shared by all its recordings.
        self._inputs: dict[Key, list[Tensor]] = {}
        self._outputs: dict[Key, PassOutput] = {}
        # Per size of the text: the last one given, and the copy that recordings read.
        self._texts: dict[Key, tuple[TextKV, TextKV]] = {}
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    @property
    def num_graphs(self) -> int:
        """Number of recorded passes."""
        return len(self._graphs)

    def tokens_per_frame(self, height: int, width: int) -> int:
        """See `wan.model.CausalWanModel.tokens_per_frame`."""
        return self._model.tokens_per_frame(height, width)

    @torch.no_grad()
    def __call__(
        self,
        latents_BFCHW: Tensor,
        timesteps_BF: Tensor,
        text: TextKV,
        views: Sequence[Any],
        frames_F: Tensor,
        remember: bool = False,
    ) -> PassOutput:
        """See `wan.model.CausalWanModel.forward`; the text comes from `embed_text`."""
        block = self._blocks
        self._blocks += remember
        given, memory = [latents_BFCHW, timesteps_BF, frames_F], pass_key(views)
        later = memory is not None and recurs(views)
        kind = (remember, signature(given), signature(text[0]))
        key = (kind, memory)
        recorded = key in self._graphs
        if not (recorded or (memory is not None and self._comes_again(key, block, later, remember))):
            unrecorded = self._model if later or kind not in self._tried else self._launched
            self._tried.add(kind)
            return unrecorded(latents_BFCHW, timesteps_BF, text, views, frames_F, remember)
        inputs, held_text = self._hold_inputs(kind, given), self._hold_text(text)
        graph = self._graphs.pop(key)[0] if recorded else self._record(kind, inputs, held_text, views, remember)
        self._graphs[key] = graph, block
        if not recorded and len(self._graphs) > MAX_GRAPHS:
            self._evict_passing_except(key)
        graph.replay()
        return of_pass(self._outputs[kind], views)

    def _comes_again(self, key: Key, block: int, later: bool, remember: bool) -> bool:
        """Returns whether a pass is worth recording.

        Args:
            later: whether later blocks of the video use the same slots of the memory.
        """
        if len(self._first_met) > MAX_KEYS:
            self._first_met.clear()
        first = self._first_met.get(key)
        self._first_met.setdefault(key, block)
        if first is None:
            return False
        if later:
            return first < block and self._has_room(block)
        # Beyond the limit, the denoising of a block is recorded for this block only, since it is replayed at once.
        return self._has_room(block) or not remember

    def _evict_passing_except(self, key: Key) -> None:
        """Evict the recording beyond the limit, unless it is the given one.

        The new one exists already: the memory pool shared by recordings lives as long as one of them does.
        """
        if self._passing not in (None, key):
            self._graphs.pop(self._passing, None)
        self._passing = key

    def _has_room(self, block: int) -> bool:
        """Returns whether another pass may be recorded, after evicting one that is not in use.

        Graphs in use are never evicted; a window with many slots would thrash.
        """
        if len(self._graphs) < MAX_GRAPHS:
            return True
        oldest, (_, last_replayed) = next(iter(self._graphs.items()))
        if block - last_replayed <= EVICT_AFTER:
            return False
        del self._graphs[oldest]
        return True

    def _hold_inputs(self, kind: Key, given: list[Tensor]) -> list[Tensor]:
        """Copy a pass's inputs to the buffers that the recordings of its kind read."""
        if kind not in self._inputs:
            self._inputs[kind] = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]
        for held, value in zip(self._inputs[kind], given, strict=True):
            held.copy_(value)
        return self._inputs[kind]

    def _hold_text(self, text: TextKV) -> TextKV:
        """Copy the text to the buffers that recordings read, if it is not the last one given."""
        size = signature(text[0])
        former, held = self._texts.get(size, (None, None))
        if held is None:
            held = [(torch.empty_like(k), torch.empty_like(v)) for k, v in text]
        if former is not text:
            for (held_k, held_v), (k, v) in zip(held, text, strict=True):
                held_k.copy_(k)
                held_v.copy_(v)
        self._texts[size] = text, held
        return held

    def _hold_output(self, kind: Key, output: PassOutput) -> None:
        """Copy a pass's output to the buffers that all recordings of its kind return."""
        if kind not in self._outputs:
            self._outputs[kind] = same_output(output, (x.clone() for x in output_tensors(output)))
        else:
            for held, value in zip(output_tensors(self._outputs[kind]), output_tensors(output), strict=True):
                held.copy_(value)

    def _record(
        self, kind: Key, inputs: list[Tensor], text: TextKV, views: Sequence[Any], remember: bool
    ) -> torch.cuda.CUDAGraph:
        """Record one pass over `views` without computing it. Its kernels were compiled and tuned in its first run.

        All recordings share one pool for intermediate tensors, which is safe because they run one at a time.
        """
        graph = torch.cuda.CUDAGraph()
        latents, timesteps, frames = inputs
        # Not `torch.cuda.graph`, which waits for the GPU and empties the allocator's cache.
        with torch.cuda.stream(self._stream):
            graph.capture_begin(self._pool, capture_error_mode="thread_local")
            try:
                self._hold_output(kind, self._model(latents, timesteps, text, views, frames, remember))
            finally:
                graph.capture_end()
        return graph
