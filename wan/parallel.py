"""Forward over all blocks of a video at once: views that replace a memory when all latents are known.

The block loop is the specification; this computes the same numbers with far fewer and larger kernels.
The sequence is one half, or two: the clean latents that are remembered, then the noisy ones that attend.
"""

from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

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
    """

    num_frames: int
    frames_per_block: int
    tokens_per_frame: int
    halves: int
    device: torch.device
    window_frames: int | None = None
    sink_frames: int = 0

    def __post_init__(self) -> None:
        if self.num_frames % self.frames_per_block:
            raise InputError(f"{self.num_frames} latent frames do not divide into blocks of {self.frames_per_block}")

    @property
    def num_blocks(self) -> int:
        """Number of blocks of the video."""
        return self.num_frames // self.frames_per_block

    @property
    def tokens_per_block(self) -> int:
        """Number of tokens per block."""
        return self.frames_per_block * self.tokens_per_frame

    @cached_property
    def mask(self) -> Tensor:
        """Mask [L, L], True where a token sees another: own block in its half, and earlier blocks of the first half."""
        frame = torch.arange(self.num_frames, device=self.device).repeat(self.halves)
        half = torch.arange(self.halves, device=self.device).repeat_interleave(self.num_frames)
        block = frame // self.frames_per_block
        own = (block[:, None] == block) & (half[:, None] == half)
        earlier = (block[:, None] > block) & (half == 0)
        if self.window_frames is not None:
            block_end = (block + 1) * self.frames_per_block
            oldest = block_end - self.window_frames + self.sink_frames
            earlier &= (frame >= oldest[:, None]) | (frame < self.sink_frames)
        visible = own | earlier
        return visible.repeat_interleave(self.tokens_per_frame, 0).repeat_interleave(self.tokens_per_frame, 1)

    def seen_tokens(self, half: int, block: int) -> list[slice]:
        """Ranges of tokens that a block of a half sees, in order: the rows of `mask` as slices."""
        start = block * self.frames_per_block
        frames = [(0, start)]
        if self.window_frames is not None:
            sink = min(self.sink_frames, start)
            oldest = start + self.frames_per_block - self.window_frames + self.sink_frames
            frames = [(0, sink), (max(sink, oldest), start)]
        own = half * self.num_frames + start
        joined: list[tuple[int, int]] = []
        for first, end in [*frames, (own, own + self.frames_per_block)]:
            if joined and joined[-1][1] == first:
                joined[-1] = (joined[-1][0], end)
            elif first < end:
                joined.append((first, end))
        return [slice(first * self.tokens_per_frame, end * self.tokens_per_frame) for first, end in joined]

    @property
    def view(self) -> "MaskedView | BlocksView":
        """View of a softmax layer: masked for short blocks, block by block for long ones."""
        return MaskedView(self.mask) if self.tokens_per_block <= MAX_MASKED_TOKENS else BlocksView(self)


@dataclass(frozen=True)
class MaskedView:
    """View of a softmax layer when all blocks are in the sequence, as a mask.

    Attributes:
        mask_LM: mask of a `ParallelLayout`.
    """

    mask_LM: Tensor

    def with_block(self, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """Given keys and values, and the mask."""
        return k_BLHD, v_BLHD, self.mask_LM


@dataclass(frozen=True)
class BlocksView:
    """View of a softmax layer when all blocks are in the sequence, which attend one after the other.

    Keys and values of a noisy block and of the clean ones before it are not contiguous, and are copied. With gradients
    and without checkpointing all these copies are kept.

    Attributes:
        layout: layout of the sequence.
    """

    layout: ParallelLayout

    def attention(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, backend: AttentionBackend) -> Tensor:
        """Compute softmax attention of all tokens; see `wan.ops.attention.attention`."""
        out = []
        for place, queries in enumerate(q_BLHD.split(self.layout.tokens_per_block, dim=1)):
            seen = self.layout.seen_tokens(*divmod(place, self.layout.num_blocks))
            keys, values = (
                x[:, seen[0]] if len(seen) == 1 else torch.cat([x[:, part] for part in seen], dim=1)
                for x in (k_BLHD, v_BLHD)
            )
            out.append(attention(queries, keys, values, backend=backend))
        return torch.cat(out, dim=1)
