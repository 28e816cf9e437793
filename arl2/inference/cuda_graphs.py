"""Passes recorded as CUDA graphs: a pass that comes again costs the CPU one launch instead of hundreds."""

from collections.abc import Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from arl2.hybrid_attention import StateView
from wan.memory import KVUpdate, SlotView
from wan.model import FlowModel, PassOutput, TextKV

MAX_GRAPHS = 64
"""Recorded passes kept at a time. A window whose ring divides into blocks takes two a slot, full memory two a block."""
FORGOTTEN_AFTER = 128
"""Blocks after which a recording that was not replayed may go for another."""
MAX_KEYS = 1024
"""Passes remembered as met, two a block of a full memory; beyond, all are forgotten, and recorded a little later."""

Key = tuple[Hashable, ...]


def pass_key(views: Sequence[Any]) -> Key | None:
    """What a recorded pass is bound to of its memory: addresses, sizes and slots. None: it cannot be recorded."""
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
    """Whether later blocks of the video find the same places: in a full memory every block has a slot of its own."""
    return all(view.recurs for view in views if isinstance(view, SlotView))


def address(x: Tensor) -> Key:
    """Where a tensor lies, and what it is."""
    return x.data_ptr(), x.shape, x.dtype


def signature(tensors: Sequence[Tensor]) -> Key:
    """Sizes and types of some tensors."""
    return tuple((x.shape, x.dtype, x.device) for x in tensors)


def output_tensors(output: PassOutput) -> Iterator[Tensor]:
    """All tensors of a pass's output, in order."""
    if output.flow is not None:
        yield output.flow
    for update in output.updates or ():
        yield from (update.keys_BLHD, update.values_BLHD) if isinstance(update, KVUpdate) else (update,)


def same_output(output: PassOutput, tensors: Iterator[Tensor]) -> PassOutput:
    """An output like `output` with other tensors, given in the order of `output_tensors`."""
    flow = None if output.flow is None else next(tensors)
    if output.updates is None:
        return PassOutput(flow, None)
    updates = [
        KVUpdate(next(tensors), next(tensors)) if isinstance(update, KVUpdate) else next(tensors)
        for update in output.updates
    ]
    return PassOutput(flow, updates)


class GraphedModel:
    """A model whose passes are recorded when they come again, and then replayed.

    A pass comes again if its sizes, and the addresses and slots of its memory, are those of a pass before. Over states
    and the ring of a window that is a pass of an earlier block, where blocks end with something remembered; the first
    blocks of a window run unrecorded. In a full memory every block has a slot of its own: its second denoising pass is
    recorded for it and the ones after, and all its passes for the next video in the same memory. If there is no room
    for them, only a block's denoising is, until the next block.

    What a call returns is valid until the next call. Not for several threads.

    Args:
        model: its forward neither waits for the GPU nor has gradients. Its memories must not be differentiable.
        device: the GPU that it computes on.
        launched: computes the passes over a full memory that are not recorded, if another is to: what is best recorded
            may not be what is launched the quickest.
    """

    def __init__(self, model: FlowModel, device: torch.device, launched: FlowModel | None = None) -> None:
        self._model = model
        self._launched = model if launched is None else launched
        # With the block that replayed each last, the longest ago first.
        self._graphs: dict[Key, tuple[torch.cuda.CUDAGraph, int]] = {}
        # The one of them for which there was no room: only the current block replays it.
        self._passing: Key | None = None
        self._first_met: dict[Key, int] = {}
        self._blocks = 0
        # Kinds of pass that `model` has computed, so that its kernels are compiled and tuned.
        self._tried: set[Key] = set()
        # By kind of pass: what all its recordings read from and write to.
        self._inputs: dict[Key, list[Tensor]] = {}
        self._outputs: dict[Key, PassOutput] = {}
        # By size of the text: the one last given, and the copy that recordings read.
        self._texts: dict[Key, tuple[TextKV, TextKV]] = {}
        self._pool, self._stream = torch.cuda.graph_pool_handle(), torch.cuda.Stream(device)

    @property
    def num_graphs(self) -> int:
        """Recorded passes."""
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
        """See `wan.model.CausalWanModel.forward`; the text as `embed_text` made it."""
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
            self._forget_all_passing_but(key)
        graph.replay()
        return self._outputs[kind]

    def _comes_again(self, key: Key, block: int, later: bool, remember: bool) -> bool:
        """Whether a pass is worth recording.

        Args:
            later: whether later blocks of the video find the same places in their memory.
        """
        if len(self._first_met) > MAX_KEYS:
            self._first_met.clear()
        first = self._first_met.get(key)
        self._first_met.setdefault(key, block)
        if first is None:
            return False
        if later:
            return first < block and self._has_room(block)
        # Without room a block's denoising is recorded in passing: it is replayed at once.
        return self._has_room(block) or not remember

    def _forget_all_passing_but(self, key: Key) -> None:
        """Of the recordings for which there was no room keep one. It is there already: what recordings share lives as
        long as there is one of them."""
        if self._passing not in (None, key):
            self._graphs.pop(self._passing, None)
        self._passing = key

    def _has_room(self, block: int) -> bool:
        """Whether another pass may be recorded. What is in use stays: a ring of many slots must not push itself out."""
        if len(self._graphs) < MAX_GRAPHS:
            return True
        oldest, (_, last_replayed) = next(iter(self._graphs.items()))
        if block - last_replayed <= FORGOTTEN_AFTER:
            return False
        del self._graphs[oldest]
        return True

    def _hold_inputs(self, kind: Key, given: list[Tensor]) -> list[Tensor]:
        """Put a pass's inputs where the recordings of its kind look for them."""
        if kind not in self._inputs:
            self._inputs[kind] = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in given]
        for held, value in zip(self._inputs[kind], given, strict=True):
            held.copy_(value)
        return self._inputs[kind]

    def _hold_text(self, text: TextKV) -> TextKV:
        """Put the text where recordings look for it, when it is another than before."""
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
        """Put a pass's output where the caller finds that of all recordings of its kind."""
        if kind not in self._outputs:
            self._outputs[kind] = same_output(output, (x.clone() for x in output_tensors(output)))
        else:
            for held, value in zip(output_tensors(self._outputs[kind]), output_tensors(output), strict=True):
                held.copy_(value)

    def _record(
        self, kind: Key, inputs: list[Tensor], text: TextKV, views: Sequence[Any], remember: bool
    ) -> torch.cuda.CUDAGraph:
        """Record one pass over `views`, computing nothing. Its kernels were compiled and tuned when it was met first.

        All recordings share the memory of their intermediate tensors, which is safe because they run one at a time.
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
