"""Window memory whose sink is a moving average of what has left the window."""

import torch
from torch import Tensor

from wan.memory import KVMemory, KVUpdate, MemorySpec, SlotUpdate, SlotView
from wan.ops.rope import Rotary, rotary_angles, rotate
from wan.snapshots import Snapshot


class AveragedSinkMemory(KVMemory):
    """`KVMemory` whose sink is a moving average of all frames that have left the window.

    With a sink of S frames, decay α, and R the rotation of a key by S frames, when frame f leaves the window:

        K[f mod S] ← α · R · K[f mod S] + (1 - α) · K_f,    V[f mod S] ← α · V[f mod S] + (1 - α) · V_f

    So every sink frame takes the position of the last frame that it took in, and the sink always stands right before
    the window. That is the average of keys before their rotation, with positions counted from the start of the sink:
    attention depends on differences of positions only. Frames leave when a block is committed, to make room for the
    next one, so all blocks of a video have one size. Averages are kept in float32 at least: rounding to half precision
    is coarser than a step of 1 - α = 0.001.

    Source: EMA-Sink of Reward Forcing (arXiv 2512.04678, section 3.2); α = 0.999 and the positions are those of its
    public code. The paper's average, as here, is of frames that leave the window.
    """

    def __init__(self, spec: MemorySpec, num_heads: int, head_dim: int) -> None:
        super().__init__(spec, num_heads, head_dim)
        assert spec.sink_decay is not None
        self._frame = spec.tokens_per_frame
        self._decay = spec.sink_decay
        self._block = 0
        shape = (spec.batch_size, self._sink, num_heads, head_dim)
        wide = torch.promote_types(spec.dtype, torch.float32)
        self._average = [torch.zeros(shape, device=spec.device, dtype=wide) for _ in range(2)]
        # At row and column 0 only the pairs of the frame axis turn.
        advance = rotary_angles(torch.tensor([spec.sink_frames], device=spec.device), 1, 1, head_dim)
        self._advance: Rotary = advance

    def read(self, tokens: int) -> SlotView:
        """See `KVMemory.read`.

        Raises:
            ValueError: the block has another size than those before.
        """
        if self._block not in (0, tokens):
            raise ValueError(f"a block of {tokens} tokens after blocks of {self._block}: all must have one size")
        return super().read(tokens)

    def commit(self, update: KVUpdate | SlotUpdate) -> None:
        """Append a block, and let the sink take in what must leave the window for the next one."""
        assert self._window is not None
        before = self._written
        super().commit(update)
        self._block = self._written - before
        # The window is full of what it keeps and the next block; a frame leaves once.
        left, leaving = (max(0, written + self._block - self._window) for written in (before, self._written))
        if left == leaving:
            return
        buffers = (self._keys, self._values)
        if not left:
            for average, buffer in zip(self._average, buffers, strict=True):
                average.copy_(buffer[:, : self._sink])
        position = self._sink + left
        while position < self._sink + leaving:
            position += self._take_in(position, self._sink + leaving)
        for average, buffer in zip(self._average, buffers, strict=True):
            buffer[:, : self._sink].copy_(average)

    def _take_in(self, position: int, end: int) -> int:
        """Average tokens from `position` of the video into the sink, as many as lie in a row on both sides.

        Returns:
            their number, which is a multiple of a frame's.
        """
        into = position % self._sink
        start, stop = self._places(position, min(end, position + self._sink - into))[0]
        keys, values = (average[:, into : into + stop - start] for average in self._average)
        cos, sin = (part.expand(stop - start, -1) for part in self._advance)
        keys.copy_(rotate(keys, (cos, sin)).lerp_(self._keys[:, start:stop].to(keys.dtype), 1 - self._decay))
        values.lerp_(self._values[:, start:stop].to(values.dtype), 1 - self._decay)
        return stop - start

    def reset(self) -> None:
        """Forget everything; the buffers stay allocated."""
        super().reset()
        self._block = 0

    def _averages(self) -> dict[str, Tensor]:
        return dict(zip(("average_keys", "average_values"), self._average, strict=True))

    def snapshot(self) -> Snapshot:
        """See `LayerMemory.snapshot`; with the averages, which are kept wider than the buffer."""
        buffer = super().snapshot()
        return Snapshot({**buffer.tensors, **self._averages()}, {**buffer.counters, "block": self._block})

    def restore(self, snapshot: Snapshot) -> None:
        """See `LayerMemory.restore`."""
        super().restore(snapshot)
        averages = self._averages()
        Snapshot({name: snapshot.tensor(name) for name in averages}).copy_to(averages)
        self._block = snapshot.counter("block", most=self._keys.shape[1])

    @property
    def num_bytes(self) -> int:
        """Bytes of the buffer and of the averages."""
        return super().num_bytes + sum(average.numel() * average.element_size() for average in self._average)
