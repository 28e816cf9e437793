"""All blocks of a video in one forward: what replaces a memory when the latents are known beforehand.

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
"""Of a block; longer ones attend one by one. A mask hides at least half of the work, wants [L, L] bytes, and keeps the
fastest kernels away."""


@dataclass(frozen=True)
class ParallelLayout:
    """How a sequence divides into halves, blocks, frames and tokens.

    Attributes:
        num_frames: latent frames of the video (of one half).
        frames_per_block, tokens_per_frame: sizes of a block and a frame.
        halves: 2 where clean latents stand before the noisy ones, 1 where the latents remember themselves.
        device: where the mask is needed.
        window_frames, sink_frames: as in `wan.memory.MemorySpec`; only softmax layers heed them.
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
        """Blocks of the video."""
        return self.num_frames // self.frames_per_block

    @property
    def tokens_per_block(self) -> int:
        """Tokens of one block."""
        return self.frames_per_block * self.tokens_per_frame

    @cached_property
    def mask(self) -> Tensor:
        """True where a token sees another, [L, L]: its own block in its half, and earlier blocks of the first half."""
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
        """Which tokens of the sequence a block of a half sees, in order: the rows of `mask` as slices."""
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
        """What a softmax layer needs to know of it."""
        return MaskedView(self.mask) if self.tokens_per_block <= MAX_MASKED_TOKENS else BlocksView(self)


@dataclass(frozen=True)
class MaskedView:
    """A softmax layer's view when all blocks are in the sequence: the mask says who sees whom.

    Attributes:
        mask_LM: of a `ParallelLayout`.
    """

    mask_LM: Tensor

    def with_block(self, k_BLHD: Tensor, v_BLHD: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
        """The keys and values given, and the mask."""
        return k_BLHD, v_BLHD, self.mask_LM


@dataclass(frozen=True)
class BlocksView:
    """The same without a mask: the blocks attend one after the other.

    Keys and values that do not lie together, those of a noisy block and of the clean ones before it, are copied; where
    gradients are taken and nothing is checkpointed, all these copies are kept.

    Attributes:
        layout: of the sequence.
    """

    layout: ParallelLayout

    def attention(self, q_BLHD: Tensor, k_BLHD: Tensor, v_BLHD: Tensor, backend: AttentionBackend) -> Tensor:
        """Softmax attention of all tokens; see `wan.ops.attention.attention`."""
        out = []
        for place, queries in enumerate(q_BLHD.split(self.layout.tokens_per_block, dim=1)):
            seen = self.layout.seen_tokens(*divmod(place, self.layout.num_blocks))
            keys, values = (
                x[:, seen[0]] if len(seen) == 1 else torch.cat([x[:, part] for part in seen], dim=1)
                for x in (k_BLHD, v_BLHD)
            )
            out.append(attention(queries, keys, values, backend=backend))
        return torch.cat(out, dim=1)
