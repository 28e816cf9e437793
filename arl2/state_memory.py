"""Memories of hybrid layers, and views of them: the state alone, or with a small window beside it.

With a window, softmax sees its tokens, and the state gets what leaves it. A token is written once, when its frame
leaves; until then its key, its value and the inputs of its write wait. So after frames 0 to s - 1, the window holds the
last `StateSettings.local_frames` of them, and the state all before.
"""

from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from arl2.ops.gated_delta import DeltaInputs
from wan.memory import ConcatView, MemorySpec
from wan.parallel import BlocksView, MaskedView, ParallelLayout
from wan.snapshots import Snapshot
from wan.utils.errors import InputError


@dataclass(frozen=True)
class StateView:
    """State after the earlier blocks, [B, H, key dim, value dim], float32."""

    state_BHKV: Tensor


@dataclass(frozen=True)
class BlockwiseView:
    """View when all blocks of a sequence are computed at once, and the states between them in the pass.

    Attributes:
        layout: layout of the sequence.
        state_BHKV: state after the blocks before it; None if there are none.
    """

    layout: ParallelLayout
    state_BHKV: Tensor | None = None


class StateMemory:
    """Memory of a hybrid layer: its gated-delta states, whose size does not depend on the length of the video.

    Args:
        spec: requirements shared by all memories of a model.
        shape: [B, H, key dim, value dim]; H counts the states of all heads.
        takes_noisy: whether denoising passes are written too, see `arl2.rollout.predict_flow`.
    """

    def __init__(self, spec: MemorySpec, shape: tuple[int, int, int, int], takes_noisy: bool = False) -> None:
        self.takes_noisy = takes_noisy
        self._differentiable = spec.differentiable
        dtype = torch.promote_types(spec.dtype, torch.float32)
        self._state = torch.zeros(shape, device=spec.device, dtype=dtype)

    def read(self, tokens: int) -> StateView:
        """View of the state; the size of the block does not matter."""
        return StateView(self._state)

    def commit(self, update: Tensor) -> None:
        """Replace the state by the one that the clean pass returned.

        Raises:
            ValueError: it is of another shape.
        """
        if update.shape != self._state.shape:  # a single head would be copied to all
            raise ValueError(f"a state of shape {tuple(update.shape)} in a memory of {tuple(self._state.shape)}")
        if self._differentiable:
            self._state = update
        else:  # always at the same address: recorded CUDA graphs read it there
            self._state.copy_(update.detach())

    def detach(self) -> None:
        """Cut back-propagation into earlier blocks."""
        self._state = self._state.detach()

    def reset(self) -> None:
        """Forget the video."""
        if self._differentiable:
            self._state = torch.zeros_like(self._state)
        else:
            self._state.zero_()

    def snapshot(self) -> Snapshot:
        """See `wan.memory.LayerMemory.snapshot`."""
        return Snapshot({"state": self._state})

    def restore(self, snapshot: Snapshot) -> None:
        """See `wan.memory.LayerMemory.restore`."""
        if self._differentiable:
            self._state = torch.empty_like(self._state)
        snapshot.copy_to({"state": self._state})

    @property
    def num_bytes(self) -> int:
        """Bytes of the state."""
        return self._state.numel() * self._state.element_size()


@dataclass(frozen=True)
class LocalWindow:
    """Content of a `LocalMemory`: a view of it, and the update that replaces it.

    Attributes:
        state_BHKV: state after all tokens that have left the window, as in `arl2.hybrid_attention.StateView`.
        softmax: rotated keys, and values, of the tokens in the window.
        waiting: inputs of their writes.
        capacity: tokens that the window holds at most.
    """

    state_BHKV: Tensor
    softmax: ConcatView
    waiting: DeltaInputs
    capacity: int

    def tensors(self) -> list[Tensor]:
        """The state first, then what has an axis of tokens."""
        return [self.state_BHKV, self.softmax.keys_BMHD, self.softmax.values_BMHD, *self.waiting]

    def with_tensors(self, state_BHKV: Tensor, keys: Tensor, values: Tensor, *waiting: Tensor) -> "LocalWindow":
        """Window of the same capacity with other tensors, given in the order of `tensors`."""
        return replace(self, state_BHKV=state_BHKV, softmax=ConcatView(keys, values), waiting=DeltaInputs(*waiting))

    def newest(self, state_BHKV: Tensor, softmax: ConcatView, inputs: DeltaInputs) -> "LocalWindow":
        """Window over the newest of some tokens, whose others have left.

        Args:
            state_BHKV: state after those that have left.
            softmax, inputs: of the tokens in their order.
        """
        parts = (softmax.keys_BMHD, softmax.values_BMHD, *inputs)
        left = max(0, inputs.k.shape[1] - self.capacity)
        return self.with_tensors(state_BHKV, *(part[:, left:] for part in parts))


@dataclass(frozen=True)
class LocalBlocksView:
    """View when all blocks of a sequence are computed at once.

    Attributes:
        layout: of the sequence.
        softmax: layout whose window is that of the layer.
        past: memory of the blocks before; None if there are none.
    """

    layout: ParallelLayout
    softmax: ParallelLayout
    past: LocalWindow | None

    @classmethod
    def of(cls, layout: ParallelLayout, past: LocalWindow | None, frames: int) -> "LocalBlocksView":
        """View with a window of so many latent frames before every block."""
        return cls(layout, replace(layout, window_frames=layout.frames_per_block + frames, sink_frames=0), past)

    def of_softmax(self) -> MaskedView | BlocksView:
        """View of the softmax."""
        return self.softmax.view(None if self.past is None else self.past.softmax)


def joined(*parts: DeltaInputs) -> DeltaInputs:
    """Inputs of writes, one after the other."""
    return DeltaInputs(*(torch.cat(tensors, dim=1) for tensors in zip(*parts, strict=True)))


def padded_in_front(inputs: DeltaInputs, tokens: int) -> DeltaInputs:
    """Inputs of a longer sequence, whose first tokens change no state: key, write strength and log decay are 0."""
    return DeltaInputs(*(F.pad(part, (0, 0) * (part.ndim - 2) + (tokens - part.shape[1], 0)) for part in inputs))


class LocalMemory:
    """State and window of a hybrid layer; its size does not depend on the length of the video.

    Args:
        spec: requirements shared by all memories of a model.
        state_shape: [B, H, key dim, value dim]; H counts the states of all heads.
        num_heads, head_dim: of the softmax.
        frames: latent frames of the window.
    """

    def __init__(
        self, spec: MemorySpec, state_shape: tuple[int, int, int, int], num_heads: int, head_dim: int, frames: int
    ) -> None:
        batch, states, key_dim, value_dim = state_shape
        capacity, wide = frames * spec.tokens_per_frame, torch.promote_types(spec.dtype, torch.float32)

        def zeros(*shape: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(batch, capacity, *shape, device=spec.device, dtype=dtype)

        keys, values = (zeros(num_heads, head_dim, dtype=spec.dtype) for _ in range(2))
        written = (zeros(states, width, dtype=spec.dtype) for width in (key_dim, value_dim))
        gates = (zeros(states, dtype=wide) for _ in range(2))
        state = torch.zeros(state_shape, device=spec.device, dtype=wide)
        self._differentiable = spec.differentiable
        self._buffers = LocalWindow(state, ConcatView(keys, values), DeltaInputs(*written, *gates), capacity)
        self._held = self._first(0)

    def _first(self, tokens: int) -> LocalWindow:
        """The state, and the first tokens of the buffers."""
        state, *parts = self._buffers.tensors()
        return self._buffers.with_tensors(state, *(part[:, :tokens] for part in parts))

    def read(self, tokens: int) -> LocalWindow:
        """View of everything committed; the size of the block does not matter."""
        return self._held

    def commit(self, update: LocalWindow) -> None:
        """Replace the content by that which the clean pass returned.

        Raises:
            ValueError: it is of another shape.
        """
        for held, value in zip(self._buffers.tensors(), update.tensors(), strict=True):
            is_state = held is self._buffers.state_BHKV
            shapes = [(len(x), *x.shape[1 if is_state else 2 :]) for x in (held, value)]
            if shapes[0] != shapes[1] or (not is_state and value.shape[1] > update.capacity):
                raise ValueError(f"an update of shape {tuple(value.shape)} in a memory of {tuple(held.shape)}")
        if self._differentiable:
            self._held = update
            return
        tokens = update.waiting.k.shape[1]
        for held, value in zip(self._first(tokens).tensors(), update.tensors(), strict=True):
            held.copy_(value.detach())
        self._held = self._first(tokens)

    def detach(self) -> None:
        """Cut back-propagation into earlier blocks."""
        self._held = self._held.with_tensors(*(part.detach() for part in self._held.tensors()))

    def reset(self) -> None:
        """Forget the video."""
        if self._differentiable:
            state = torch.zeros_like(self._buffers.state_BHKV)
            self._buffers = replace(self._buffers, state_BHKV=state)
        else:
            self._buffers.state_BHKV.zero_()
        self._held = self._first(0)

    def snapshot(self) -> Snapshot:
        """See `wan.memory.LayerMemory.snapshot`."""
        held = {str(place): tensor for place, tensor in enumerate(self._held.tensors())}
        return Snapshot(held, {"tokens": self._held.waiting.k.shape[1]})

    def restore(self, snapshot: Snapshot) -> None:
        """See `wan.memory.LayerMemory.restore`."""
        if self._differentiable:
            raise InputError("a memory that is trained through cannot be restored")
        held = self._first(snapshot.counter("tokens", most=self._buffers.capacity))
        snapshot.copy_to({str(place): tensor for place, tensor in enumerate(held.tensors())})
        self._held = held

    @property
    def num_bytes(self) -> int:
        """Bytes of the state and of a full window."""
        return sum(part.numel() * part.element_size() for part in self._buffers.tensors())
