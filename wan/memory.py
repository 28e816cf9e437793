"""Memories of earlier blocks: one object per layer, all behind one protocol.

Attending is a pure read: a layer gets a *view* of its memory and returns its output. Remembering is the
only write: the clean pass returns *updates*, and the caller commits them. Layers own no memory.

Who owns a memory can take a *snapshot* of it between two blocks, and restore it, as it can reset it: both replace the
whole content, and no layer does either.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from wan.snapshots import Snapshot
from wan.utils.errors import InputError


class LayerMemory(Protocol):
    """Memory of one layer; the types of views and updates are private to the layer and its memory."""

    def read(self, tokens: int) -> Any:
        """View of everything committed, for a block of `tokens` tokens."""

    def commit(self, update: Any) -> None:
        """Commit the update that the layer returned from a clean pass."""

    def detach(self) -> None:
        """Cut back-propagation into earlier commits."""

    def reset(self) -> None:
        """Forget everything."""

    def snapshot(self) -> Snapshot:
        """Everything committed, as views that the next commit may change."""

    def restore(self, snapshot: Snapshot) -> None:
        """Hold what a memory of the same spec held when the snapshot was taken, and nothing else.

        Raises:
            InputError: the snapshot is of a memory of another spec; the content is undefined then.
        """

    @property
    def num_bytes(self) -> int:
        """Bytes allocated on the device."""


def check_window(window_frames: int | None, sink_frames: int, frames_per_block: int) -> None:
    """Check that a block fits into a window beside its sink; None for no window.

    Raises:
        InputError: the window is too small.
    """
    if window_frames is not None and window_frames - sink_frames < frames_per_block:
        raise InputError(
            f"a window of {window_frames} frames with a sink of {sink_frames} cannot hold a block of "
            f"{frames_per_block}: widen memory.window_frames"
        )


@dataclass(frozen=True)
class MemorySpec:
    """Sizes and kind of a memory.

    Attributes:
        batch_size: videos per batch.
        tokens_per_frame: tokens per latent frame.
        device, dtype: those of keys and values.
        frames: latent frames to allocate at first; full memories grow beyond it.
        window_frames: upper bound on the latent frames that a query sees, its own block included; None for all.
        sink_frames: first frames of the video that a window never drops.
        sink_decay: weight of the sink in its moving average with the frames that leave the window, see
            `wan.averaged_sink.AveragedSinkMemory`; None for a sink of the first frames as they were.
        differentiable: whether to keep the graph of committed updates, for training; otherwise commits are in place.
        head_shards: ranks that the heads are divided over; a memory holds one part.
    """

    batch_size: int
    tokens_per_frame: int
    device: torch.device
    dtype: torch.dtype
    frames: int
    window_frames: int | None = None
    sink_frames: int = 0
    differentiable: bool = False
    head_shards: int = 1
    sink_decay: float | None = None

    def __post_init__(self) -> None:
        if self.window_frames is not None and not 0 <= self.sink_frames < self.window_frames:
            raise InputError(
                f"sink of {self.sink_frames} frames does not fit a window of {self.window_frames}: "
                "the sink is part of the window and must be smaller"
            )
        if self.sink_decay is None:
            return
        if self.window_frames is None or not self.sink_frames or not 0 < self.sink_decay < 1:
            raise InputError(
                f"a moving average of decay {self.sink_decay} over a sink of {self.sink_frames} frames: it needs a "
                "window, a sink of at least one frame, and a decay between 0 and 1"
            )
        if self.differentiable:
            raise InputError("a sink that is a moving average cannot be trained with: use a sink of the first frames")

    @property
    def window_tokens(self) -> int | None:
        """Tokens of the window; None for full memory."""
        return None if self.window_frames is None else self.window_frames * self.tokens_per_frame

    @property
    def sink_tokens(self) -> int:
        """Tokens of the sink."""
        return self.sink_frames * self.tokens_per_frame


@dataclass(frozen=True)
class KVUpdate:
    """Keys and values of one finished block, [B, L, H, D], keys already rotated."""

    keys_BLHD: Tensor
    values_BLHD: Tensor


@dataclass(frozen=True)
class SlotUpdate:
    """A finished block that a pass has left in the slot of its view: to commit it copies nothing.

    It is valid until the next pass over the same memory.
    """

    view: "SlotView"

    def copied(self) -> KVUpdate:
        """The block's keys and values in tensors of their own."""
        view = self.view
        keys, values = (
            torch.cat([buffer[:, start:stop] for start, stop in view.slot], dim=1)
            for buffer in (view.keys_BMHD, view.values_BMHD)
        )
        return KVUpdate(keys, values)


class KVView(Protocol):
    """Interface of a softmax layer's view of its memory."""

    def with_block(self, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys, values and mask (None if all are visible) for queries of the block with the given keys and values."""


@dataclass(frozen=True)
class SlotView:
    """Remembered keys and values in a preallocated buffer, with a slot among them for the current block.

    The slot is scratch: its content means nothing before `with_block`, and after the pass only to a `SlotUpdate`.

    Attributes:
        keys_BMHD, values_BMHD: the whole buffer.
        slot: buffer ranges [start, stop) of the current block; two where a ring wraps around.
        visible: number of leading buffer tokens that a query sees once the block is in its slot.
        position: tokens that were committed before the block.
        recurs: whether later blocks of the video will use the same slot.
    """

    keys_BMHD: Tensor
    values_BMHD: Tensor
    slot: list[tuple[int, int]]
    visible: int
    position: int
    recurs: bool = False

    @property
    def slot_tokens(self) -> int:
        """Tokens that the slot takes."""
        return sum(stop - start for start, stop in self.slot)

    def is_same_slot(self, other: "SlotView") -> bool:
        """Returns whether the slot of another view is this one."""
        same_buffer = self.keys_BMHD.data_ptr() == other.keys_BMHD.data_ptr()
        return same_buffer and (self.position, self.slot) == (other.position, other.slot)

    def write(self, k_BLHD: Tensor, v_BLHD: Tensor) -> None:
        """Copy a block into the slot.

        Raises:
            ValueError: the block has other heads than the memory.
        """
        if k_BLHD.shape[2] != self.keys_BMHD.shape[2]:  # a single head would be copied to all
            raise ValueError(f"a block of {k_BLHD.shape[2]} heads in a memory of {self.keys_BMHD.shape[2]}")
        sizes = [stop - start for start, stop in self.slot]
        for buffer, block in ((self.keys_BMHD, k_BLHD), (self.values_BMHD, v_BLHD)):
            for (start, stop), piece in zip(self.slot, block.split(sizes, dim=1), strict=True):
                buffer[:, start:stop].copy_(piece)

    def with_block(self, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Remembered tokens and the block's own, without a copy of the past; softmax needs no order of keys."""
        self.write(k_BLHD, v_BLHD)
        return self.keys_BMHD[:, : self.visible], self.values_BMHD[:, : self.visible], None


class KVMemory:
    """Keys and values of all earlier blocks, or of a sink and a sliding window, in a preallocated buffer.

    The current block overwrites the oldest frames after the sink. So a window is a ring in which nothing is moved, and
    a commit only advances a counter. Not differentiable.
    """

    def __init__(self, spec: MemorySpec, num_heads: int, head_dim: int) -> None:
        self._window = spec.window_tokens
        self._sink = spec.sink_tokens
        self._written = 0
        capacity = self._window or spec.frames * spec.tokens_per_frame
        shape = (spec.batch_size, capacity, num_heads, head_dim)
        self._keys, self._values = (torch.zeros(shape, device=spec.device, dtype=spec.dtype) for _ in range(2))

    def read(self, tokens: int) -> SlotView:
        """View of the committed tokens, with a slot for a block of `tokens` tokens.

        Raises:
            InputError: the window is too small for such a block.
        """
        end = self._written + tokens
        if self._window is None:
            self._reserve(end)
            return SlotView(self._keys, self._values, [(self._written, end)], end, self._written)
        visible = min(end, self._window)
        return SlotView(self._keys, self._values, self._ring_slot(tokens), visible, self._written, recurs=True)

    def _ring_slot(self, tokens: int) -> list[tuple[int, int]]:
        """Buffer ranges of the next `tokens` tokens: first the whole window in order, then around the ring."""
        assert self._window is not None
        ring = self._window - self._sink
        if tokens > (ring if self._written else self._window):
            raise InputError(
                f"a block of {tokens} tokens does not fit a window of {self._window} with a sink of {self._sink}: "
                "widen it"
            )
        return self._places(self._written, self._written + tokens)

    def _places(self, position: int, end: int) -> list[tuple[int, int]]:
        """Buffer ranges of the tokens from `position` to `end` of the video, as long as they are in the window."""
        assert self._window is not None
        ring, ranges = self._window - self._sink, []
        while position < end:
            start = position if position < self._window else self._sink + (position - self._sink) % ring
            length = min(end - position, self._window - start)
            ranges.append((start, start + length))
            position += length
        return ranges

    def commit(self, update: KVUpdate | SlotUpdate) -> None:
        """Append a block; a window drops its oldest tokens.

        Raises:
            ValueError: the block is in another slot than the next one of this memory.
        """
        if isinstance(update, SlotUpdate):
            tokens = update.view.slot_tokens
            if not update.view.is_same_slot(self.read(tokens)):
                raise ValueError("the block is not in the next slot of this memory: it belongs to another, or is old")
        else:
            tokens = update.keys_BLHD.shape[1]
            self.read(tokens).write(update.keys_BLHD, update.values_BLHD)
        self._written += tokens

    def _reserve(self, tokens: int) -> None:
        """Grow the buffer to at least `tokens` tokens, by doubling so that copies stay rare."""
        capacity = self._keys.shape[1]
        if tokens <= capacity:
            return
        extra = self._keys.new_zeros(self._keys.shape[0], max(tokens - capacity, capacity), *self._keys.shape[2:])
        self._keys, self._values = (torch.cat([buffer, extra], dim=1) for buffer in (self._keys, self._values))

    def remembered(self, tokens: int) -> KVUpdate:
        """Copy of the earlier tokens visible to a next block of `tokens` tokens, in no particular order."""
        view = self.read(tokens)
        kept = torch.ones(view.visible, dtype=torch.bool, device=self._keys.device)
        for start, stop in view.slot:
            kept[start:stop] = False
        return KVUpdate(self._keys[:, : view.visible][:, kept], self._values[:, : view.visible][:, kept])

    def detach(self) -> None:
        """Do nothing: commits are copies, so there is no graph to cut."""

    def reset(self) -> None:
        """Forget everything; the buffer stays allocated."""
        self._written = 0

    def _content(self, held: int) -> dict[str, Tensor]:
        """The first tokens of the buffer."""
        return {"keys": self._keys[:, :held], "values": self._values[:, :held]}

    def snapshot(self) -> Snapshot:
        """See `LayerMemory.snapshot`: the part of the buffer that was written, in its order."""
        return Snapshot(self._content(min(self._written, self._keys.shape[1])), {"written": self._written})

    def restore(self, snapshot: Snapshot) -> None:
        """See `LayerMemory.restore`."""
        written, keys = snapshot.counter("written"), snapshot.tensor("keys")
        held = min(written, self._window or written)
        # Before the buffer grows: a number must not allocate more than the tensors fill.
        if keys.ndim != 4 or keys.shape[1] != held:
            raise InputError(f"keys are {list(keys.shape)}: they must hold {held} tokens")
        if self._window is None:
            self._reserve(held)
        Snapshot({name: snapshot.tensor(name) for name in ("keys", "values")}).copy_to(self._content(held))
        self._written = written

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer."""
        return sum(buffer.numel() * buffer.element_size() for buffer in (self._keys, self._values))


@dataclass(frozen=True)
class ConcatView:
    """View of remembered keys and values; the current block is concatenated behind them."""

    keys_BMHD: Tensor
    values_BMHD: Tensor

    def with_block(self, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Remembered tokens and the block's own, in new tensors."""
        return torch.cat([self.keys_BMHD, k_BLHD], dim=1), torch.cat([self.values_BMHD, v_BLHD], dim=1), None


class ConcatKVMemory:
    """Differentiable counterpart of `KVMemory` and its specification: everything by concatenation."""

    def __init__(self, spec: MemorySpec, num_heads: int, head_dim: int) -> None:
        self._window = spec.window_tokens
        self._sink = spec.sink_tokens
        self._empty = torch.zeros(spec.batch_size, 0, num_heads, head_dim, device=spec.device, dtype=spec.dtype)
        self._keys, self._values = self._empty, self._empty

    def read(self, tokens: int) -> ConcatView:
        """View of the committed tokens visible to a block of `tokens` tokens."""
        if self._window is None:
            return ConcatView(self._keys, self._values)
        most = self._window - tokens
        return ConcatView(self._newest(self._keys, most), self._newest(self._values, most))

    def _newest(self, x_BMHD: Tensor, most: int) -> Tensor:
        """Sink and newest tokens after it, `most` in total."""
        if x_BMHD.shape[1] <= most:
            return x_BMHD
        return torch.cat([x_BMHD[:, : self._sink], x_BMHD[:, x_BMHD.shape[1] - (most - self._sink) :]], dim=1)

    def commit(self, update: KVUpdate) -> None:
        """Append a block with its graph."""
        self._keys, self._values, _ = ConcatView(self._keys, self._values).with_block(
            update.keys_BLHD, update.values_BLHD
        )
        if self._window is not None:
            self._keys, self._values = (self._newest(x, self._window) for x in (self._keys, self._values))

    def detach(self) -> None:
        """Cut back-propagation into earlier blocks."""
        self._keys, self._values = self._keys.detach(), self._values.detach()

    def reset(self) -> None:
        """Forget everything."""
        self._keys = self._values = self._empty

    def snapshot(self) -> Snapshot:
        """See `LayerMemory.snapshot`."""
        return Snapshot({"keys": self._keys, "values": self._values})

    def restore(self, snapshot: Snapshot) -> None:
        """See `LayerMemory.restore`."""
        held = snapshot.tensor("keys").shape[1]
        keys, values = (self._empty.new_empty(len(x), held, *x.shape[2:]) for x in (self._empty, self._empty))
        snapshot.copy_to({"keys": keys, "values": values})
        self._keys, self._values = keys, values

    @property
    def num_bytes(self) -> int:
        """Bytes of the committed tokens."""
        return sum(x.numel() * x.element_size() for x in (self._keys, self._values))


class Memory:
    """Memories of all layers of one model, for one batch of videos."""

    def __init__(self, layers: Sequence[LayerMemory]) -> None:
        self.layers = list(layers)

    def read(self, tokens: int) -> list[Any]:
        """Views for a block of `tokens` tokens, one per layer."""
        return [layer.read(tokens) for layer in self.layers]

    def commit(self, updates: Sequence[Any]) -> None:
        """Commit the updates that the layers returned from a clean pass."""
        for layer, update in zip(self.layers, updates, strict=True):
            layer.commit(update)

    def detach(self) -> None:
        """Cut back-propagation into earlier blocks.

        Call it before remembering a block: between remembering and the next read it would cut the write's gradient.
        """
        for layer in self.layers:
            layer.detach()

    def reset(self) -> None:
        """Forget the video."""
        for layer in self.layers:
            layer.reset()

    def snapshot(self) -> Snapshot:
        """Snapshots of all layers, by their numbers."""
        return Snapshot.joined({str(number): layer.snapshot() for number, layer in enumerate(self.layers)})

    def restore(self, snapshot: Snapshot) -> None:
        """Hold what a memory of the same spec held when the snapshot was taken.

        Raises:
            InputError: it is of a memory of another spec; the content is undefined then.
        """
        for number, layer in enumerate(self.layers):
            try:
                layer.restore(snapshot.part(str(number)))
            except InputError as error:
                raise InputError(f"the memory of layer {number} does not fit: {error}") from error

    @property
    def num_bytes(self) -> int:
        """Bytes allocated by all layers."""
        return sum(layer.num_bytes for layer in self.layers)
