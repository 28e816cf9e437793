"""Forward over all blocks of a video at once: views that replace a memory when all latents are known.

The block loop is the specification; this computes the same numbers with far fewer and larger kernels.
The sequence is one half, or two: the clean latents that are remembered, then the noisy ones that attend. It may be a
segment of a longer video: then a memory holds what is seen of the blocks before it.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from wan.memory import ConcatView
from wan.ops.attention import AttentionBackend, attention
from wan.utils.errors import InputError

MAX_MASKED_TOKENS = 512
"""Upper bound on tokens per block for masked attention; longer blocks attend one by one.

A mask hides at least half of the work, takes [L, L] bytes, and excludes the fastest kernels.
"""


@dataclass(frozen=True)
class ParallelLayout:
    """Division of a sequence into halves, blocks, frames and tokens.

    Attributes:
        num_frames: latent frames of the video (of one half).
        frames_per_block, tokens_per_frame: sizes of a block and a frame.
        halves: 2 if clean latents precede the noisy ones, 1 if the latents themselves are remembered.
        device: device of the mask.
        window_frames, sink_frames: as in `wan.memory.MemorySpec`; only softmax layers use them.
        start_frame: index in the video of the sequence's first latent frame; a whole number of blocks.
    """

    num_frames: int
    frames_per_block: int
    tokens_per_frame: int
    halves: int
    device: torch.device
    window_frames: int | None = None
    sink_frames: int = 0
    start_frame: int = 0

    def __post_init__(self) -> None:
        if self.num_frames % self.frames_per_block:
            raise InputError(f"{self.num_frames} latent frames do not divide into blocks of {self.frames_per_block}")
        if self.start_frame % self.frames_per_block:
            raise ValueError(f"frame {self.start_frame} is not the first of a block of {self.frames_per_block}")

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the video."""
        return self.num_frames // self.frames_per_block

    @property
    def tokens_per_block(self) -> int:
        """Number of tokens per block."""
        return self.frames_per_block * self.tokens_per_frame

    @property
    def clean_tokens(self) -> int:
        """Number of tokens of the first half, which are remembered."""
        return self.num_frames * self.tokens_per_frame

    @property
    def past_frames(self) -> list[int]:
        """Frames before the sequence that the memory of a softmax layer holds, in its order."""
        return [frame for first, end in self._earlier_frames(self.start_frame) for frame in range(first, end)]

    def _earlier_frames(self, start: int) -> list[tuple[int, int]]:
        """Ranges [first, end) of earlier frames that the block beginning with frame `start` sees."""
        if self.window_frames is None:
            return [(0, start)]
        sink = min(self.sink_frames, start)
        oldest = start + self.frames_per_block - self.window_frames + self.sink_frames
        return [(0, sink), (max(sink, oldest), start)]

    @cached_property
    def mask(self) -> Tensor:
        """Mask [L, past + L], True where a token sees another: own block in its half, and earlier clean blocks."""
        frame = torch.arange(self.start_frame, self.start_frame + self.num_frames, device=self.device)
        frame = frame.repeat(self.halves)
        half = torch.arange(self.halves, device=self.device).repeat_interleave(self.num_frames)
        past = torch.tensor(self.past_frames, device=self.device, dtype=frame.dtype)
        key_frame, key_half = torch.cat([past, frame]), torch.cat([torch.zeros_like(past), half])
        block, key_block = frame // self.frames_per_block, key_frame // self.frames_per_block
        own = (block[:, None] == key_block) & (half[:, None] == key_half)
        earlier = (block[:, None] > key_block) & (key_half == 0)
        if self.window_frames is not None:
            block_end = (block + 1) * self.frames_per_block
            oldest = block_end - self.window_frames + self.sink_frames
            earlier &= (key_frame >= oldest[:, None]) | (key_frame < self.sink_frames)
        visible = own | earlier
        return visible.repeat_interleave(self.tokens_per_frame, 0).repeat_interleave(self.tokens_per_frame, 1)

    def seen_tokens(self, half: int, block: int) -> list[slice]:
        """Ranges of the keys, those of the past first, that a block of a half sees: the rows of `mask` as slices."""
        start, past = self.start_frame + block * self.frames_per_block, self.past_frames
        earlier = [(first, end) for first, end in self._earlier_frames(start) if first < end]
        places = [(self._place(first, past), self._place(end - 1, past) + 1) for first, end in earlier]
        own = len(past) + half * self.num_frames + block * self.frames_per_block
        joined: list[tuple[int, int]] = []
        for first, end in [*places, (own, own + self.frames_per_block)]:
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], end)
            elif first < end:
                joined.append((first, end))
        return [slice(first * self.tokens_per_frame, end * self.tokens_per_frame) for first, end in joined]

    def _place(self, frame: int, past: list[int]) -> int:
        """Place of an earlier clean frame among the frames of the keys."""
        return past.index(frame) if frame < self.start_frame else len(past) + frame - self.start_frame

    def view(self, past: ConcatView | None = None) -> "MaskedView | BlocksView":
        """View of a softmax layer: masked for short blocks, block by block for long ones.

        Args:
            past: memory of the blocks before the sequence; None if there are none.

        Raises:
            ValueError: the memory does not hold `past_frames`.
        """
        tokens = 0 if past is None else past.keys_BMHD.shape[1]
        if tokens != len(self.past_frames) * self.tokens_per_frame:
            raise ValueError(f"a memory of {tokens} tokens before frame {self.start_frame}, not {self.past_frames}")
        masked = self.tokens_per_block <= MAX_MASKED_TOKENS
        return MaskedView(self, past, self.mask) if masked else BlocksView(self, past)


@dataclass(frozen=True)
class MaskedView:
    """View of a softmax layer when all blocks are in the sequence, as a mask.

    Attributes:
        layout: layout of the sequence.
        past: memory of the blocks before it.
        mask_LM: mask of the layout.
    """

    layout: ParallelLayout
    past: ConcatView | None
    mask_LM: Tensor

    def with_block(self, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Keys and values of the past and those given, and the mask."""
        return *after_past(self.past, k_BLHD, v_BLHD), self.mask_LM


@dataclass(frozen=True)
class BlocksView:
    """View of a softmax layer when all blocks are in the sequence, which attend one after the other.

    Keys and values of a noisy block and of the clean ones before it are not contiguous, and are copied. With gradients
    and without checkpointing all these copies are kept.

    Attributes:
        layout: layout of the sequence.
        past: memory of the blocks before it.
    """

    layout: ParallelLayout
    past: ConcatView | None = None

    def attention(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, backend: AttentionBackend) -> Tensor:
        """Compute softmax attention of all tokens; see `wan.ops.attention.attention`."""
        k_BLHD, v_BLHD = after_past(self.past, k_BLHD, v_BLHD)
        out = []
        for place, queries in enumerate(q_BLHD.split(self.layout.tokens_per_block, dim=1)):
            seen = self.layout.seen_tokens(*divmod(place, self.layout.num_blocks))
            keys, values = (
                x[:, seen[0]] if len(seen) == 1 else torch.cat([x[:, part] for part in seen], dim=1)
                for x in (k_BLHD, v_BLHD)
            )
            out.append(attention(queries, keys, values, backend=backend))
        return torch.cat(out, dim=1)


def after_past(past: ConcatView | None, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor]:
    """Keys and values of a sequence behind those that are remembered."""
    if past is None or not past.keys_BMHD.shape[1]:
        return k_BLHD, v_BLHD
    keys, values, _ = past.with_block(k_BLHD, v_BLHD)
    return keys, values
