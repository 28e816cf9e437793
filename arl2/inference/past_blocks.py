"""The last blocks of a video, from which its memory can be made anew under another text.

A memory holds keys, values and states that were computed under the text of their time. When the text changes, the
blocks that softmax layers still see can be remembered again under the new one. A state cannot be taken back to an
earlier block, so one is kept from before each of these blocks: the states go on from the oldest, which still holds
what came before under the former text.
"""

from collections import deque
from dataclasses import dataclass

import torch
from torch import Tensor

from arl2.rollout import remember_block
from wan.memory import KVMemory, Memory
from wan.model import FlowModel, TextKV
from wan.snapshots import Snapshot
from wan.utils.errors import InputError


@dataclass(frozen=True)
class _Past:
    """A remembered block.

    Attributes:
        start_frame: absolute index of its first latent frame.
        latents_BFCHW: its clean latents.
        states: of the layers with states, before it was remembered.
    """

    start_frame: int
    latents_BFCHW: Tensor
    states: Snapshot


def recomputed_frames(frames_per_block: int, window_frames: int | None, sink_frames: int) -> int | None:
    """Latent frames after the sink that are remembered anew; None for all.

    Args:
        frames_per_block, window_frames, sink_frames: see `PastBlocks`.

    Raises:
        InputError: window or sink do not consist of whole blocks.
    """
    recent = None if window_frames is None else window_frames - sink_frames - frames_per_block
    if sink_frames % frames_per_block or (recent is not None and recent % frames_per_block):
        raise InputError(
            f"on_switch=recompute needs a window and a sink of whole blocks of {frames_per_block} frames, not "
            f"{window_frames} with a sink of {sink_frames}: change memory.window_frames or memory.sink_frames, or "
            "give on_switch=keep"
        )
    return recent


class PastBlocks:
    """Latents of the blocks that softmax layers see, and the states before each; see the module.

    Args:
        memory: the video's.
        frames_per_block: latent frames per block.
        window_frames, sink_frames: of the memory, as in `wan.memory.MemorySpec`. Without a window all blocks are kept.

    Raises:
        InputError: the window does not consist of whole blocks.
    """

    def __init__(self, memory: Memory, frames_per_block: int, window_frames: int | None, sink_frames: int) -> None:
        recent = recomputed_frames(frames_per_block, window_frames, sink_frames)
        self._memory, self._frames, self._sink_frames = memory, frames_per_block, sink_frames
        self._sink = list[Tensor]()
        self._recent = deque[_Past](maxlen=None if recent is None else recent // frames_per_block)
        self._keeps_states = recent is not None
        self._with_state = {
            str(number): layer for number, layer in enumerate(memory.layers) if not isinstance(layer, KVMemory)
        }

    def note(self, latents_BFCHW: Tensor, start_frame: int) -> None:
        """Take note of a block right before it is remembered.

        Args:
            latents_BFCHW: its clean latents.
            start_frame: absolute index of its first latent frame.
        """
        if start_frame < self._sink_frames:
            self._sink.append(latents_BFCHW)
        self._recent.append(_Past(start_frame, latents_BFCHW, self._states()))

    def _states(self) -> Snapshot:
        """The states as they are now; none where every block is kept, since they then start from nothing."""
        if not self._keeps_states:
            return Snapshot()
        return Snapshot.joined({name: layer.snapshot() for name, layer in self._with_state.items()}).clone()

    def recompute(self, model: FlowModel, text: TextKV, timestep: float) -> None:
        """Make the memory anew of the blocks that it holds, under another text.

        The sink's blocks come first, then the recent ones, each at the frames where it was. States take no part in the
        first: they go on from what they were before the oldest of the recent ones.

        Args:
            model, text, timestep: as in `arl2.rollout.remember_block`.
        """
        past = list(self._recent)
        states = past[0].states if past else self._states()
        self._memory.reset()
        begin = past[0].start_frame if past else None
        for number, latents in enumerate(self._sink):
            start = number * self._frames
            if begin is None or start < begin:
                remember_block(model, latents, text, self._memory, start, timestep)
        if self._keeps_states:
            for name, layer in self._with_state.items():
                layer.restore(states.part(name))
        self._recent.clear()
        for block in past:
            self._recent.append(_Past(block.start_frame, block.latents_BFCHW, self._states()))
            remember_block(model, block.latents_BFCHW, text, self._memory, block.start_frame, timestep)

    def snapshot(self) -> Snapshot:
        """Everything held, for `restore`."""
        tensors: dict[str, Tensor] = {}
        if self._sink:
            tensors["sink"] = torch.cat(self._sink, dim=1)
        if self._recent:
            tensors["recent"] = torch.cat([block.latents_BFCHW for block in self._recent], dim=1)
        whole = Snapshot.joined({str(number): block.states for number, block in enumerate(self._recent)})
        return Snapshot({**tensors, **whole.tensors}, whole.counters)

    def restore(self, snapshot: Snapshot, end_frame: int) -> None:
        """Hold what another object of the same arguments held. The memory is to be restored after it, not before.

        Args:
            end_frame: absolute index of the frame after the last remembered block.

        Raises:
            InputError: the snapshot is of other blocks or states.
        """
        counts = {"sink": min(self._sink_frames, end_frame)}
        most = end_frame if self._recent.maxlen is None else self._recent.maxlen * self._frames
        counts["recent"] = min(most, end_frame)
        for name, count in counts.items():
            if (0 if name not in snapshot.tensors else snapshot.tensors[name].shape[1]) != count:
                raise InputError(f"{name} must hold {count} latent frames")
        sink, recent = (
            list(snapshot.tensors[name].split(self._frames, dim=1)) if count else [] for name, count in counts.items()
        )
        self._sink = sink
        begin = end_frame - counts["recent"]
        self._recent.clear()
        for number, latents in enumerate(recent):
            states = snapshot.part(str(number))
            if self._keeps_states:
                for name, layer in self._with_state.items():
                    layer.restore(states.part(name))  # which checks it
            self._recent.append(_Past(begin + number * self._frames, latents, states))

    @property
    def num_bytes(self) -> int:
        """Bytes of all latents and states."""
        return sum(value.numel() * value.element_size() for value in self.snapshot().tensors.values())
