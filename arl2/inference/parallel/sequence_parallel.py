"""One video over several ranks: tokens are divided outside of attention, heads inside of it.

Heads are independent in softmax attention, in the state and in its write. So a rank keeps the keys, values and states
of its own heads only, for all tokens; everything else works on its own tokens, with all heads. Two all-to-all
exchanges per layer lie between. Source: DeepSpeed-Ulysses, arXiv 2309.14509.

A rank's tokens are an equal part of every latent frame: modulations, which are per frame, stay as they are.
"""

from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, distributed, nn

from arl2.inference.linear import Weight
from wan.ops.rope import Rotary
from wan.utils.errors import InputError


def check_divides(num_heads: int, tokens_per_frame: int, size: int) -> None:
    """Check that heads and the tokens of a frame divide over so many processes.

    Raises:
        InputError: they do not.
    """
    if num_heads % size:
        fitting = [str(number) for number in range(1, num_heads + 1) if num_heads % number == 0]
        raise InputError(
            f"{num_heads} heads do not divide over {size} processes: start {', '.join(fitting[:-1])} or {fitting[-1]}"
        )
    if tokens_per_frame % size:
        raise InputError(
            f"{tokens_per_frame} tokens per frame do not divide over {size} processes: choose another height or width, "
            "or another number of processes"
        )


class SequenceParallel:
    """Exchanges between tokens and heads over the ranks of a group, by collectives of any backend.

    Args:
        num_heads: heads of the model.
        group: ranks that compute a video together; None for all.

    Attributes:
        can_be_recorded: whether CUDA graphs can record the exchanges. A recorded all-to-all of NCCL was seen to hang.
        symmetric_bytes: bytes of memory that other ranks can address, which PyTorch's allocator does not count.

    Raises:
        InputError: the heads do not divide over the ranks.
    """

    can_be_recorded = False
    symmetric_bytes = 0

    def __init__(self, num_heads: int, group: distributed.ProcessGroup | None = None) -> None:
        self.group = group
        self.size, self.rank = distributed.get_world_size(group), distributed.get_rank(group)
        check_divides(num_heads, self.size, self.size)

    def begin_pass(self, x_BLD: Tensor, head_dim: int) -> None:
        """Prepare for the exchanges of a pass.

        Args:
            x_BLD: this rank's tokens, for their shape, dtype and device.
            head_dim: channels per head.
        """

    def shard(self, x_BLD: Tensor, num_frames: int) -> Tensor:
        """This rank's tokens of all, [B, L / ranks, D]."""
        return x_BLD.unflatten(1, (num_frames, self.size, -1))[:, :, self.rank].flatten(1, 2)

    def shard_rotary(self, rotary: Rotary, num_frames: int) -> Rotary:
        """Rotation of this rank's tokens."""
        return tuple(self.shard(part[None], num_frames)[0] for part in rotary)

    def gather(self, x_BLD: Tensor, num_frames: int) -> Tensor:
        """All tokens from every rank's, [B, L, D]; the inverse of `shard`."""
        mine = x_BLD.contiguous()
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        distributed.all_gather(parts, mine, group=self.group)
        return torch.stack([part.unflatten(1, (num_frames, -1)) for part in parts], dim=2).flatten(1, 3)

    def to_heads(self, parts: Sequence[Tensor], num_frames: int) -> list[Tensor]:
        """Exchange all heads of this rank's tokens for all tokens of its heads.

        Args:
            parts: tensors [B, L / ranks, H, K], whose K and dtype may differ; they travel together.

        Returns:
            for each [B, L, H / ranks, K]; some may be views of one tensor. Valid until the next exchange but one.
        """
        received: dict[int, Tensor] = {}
        for dtype in dict.fromkeys(part.dtype for part in parts):
            places = [place for place, part in enumerate(parts) if part.dtype == dtype]
            got = self._to_heads(torch.cat([parts[place] for place in places], dim=-1), num_frames)
            widths = [parts[place].shape[-1] for place in places]
            received |= zip(places, got.split(widths, dim=-1), strict=True)
        return [received[place] for place in range(len(parts))]

    def _to_heads(self, x_BLHK: Tensor, num_frames: int) -> Tensor:
        # [ranks, B, F, tokens of a frame, heads of a rank, K]: the first axis is that of the exchange.
        sent = x_BLHK.unflatten(1, (num_frames, -1)).unflatten(3, (self.size, -1)).movedim(3, 0)
        return self._exchange(sent).movedim(0, 2).flatten(1, 3)

    def to_tokens(self, x_BLHK: Tensor, num_frames: int) -> Tensor:
        """Exchange all tokens of this rank's heads for all heads of its tokens; the inverse of `to_heads`."""
        sent = x_BLHK.unflatten(1, (num_frames, self.size, -1)).movedim(2, 0)
        got = self._exchange(sent)
        return got.movedim(0, 3).flatten(3, 4).flatten(1, 2)

    def _exchange(self, sent: Tensor) -> Tensor:
        """Send part i of the first axis to rank i, and receive one from each."""
        sent = sent.contiguous()
        got = torch.empty_like(sent)
        distributed.all_to_all_single(got, sent, group=self.group)
        return got


class ShardedWeights(Protocol):
    """Interface of `arl2.inference.parallel.weight_sharding.ShardedWeights`, which needs GPUs."""

    @property
    def symmetric_bytes(self) -> int:
        """Bytes of this rank's shards."""

    def keep(self) -> None:
        """Add a layer that every rank keeps whole."""

    def add(self, weights: Sequence[Weight], owner: nn.Module) -> None:
        """Add a layer whose weights are sharded."""

    def finish(self) -> None:
        """Prepare for passes."""

    def before(self, index: int) -> None:
        """Let the current stream have a layer's weights when it comes to it."""

    def release(self) -> None:
        """Give the model its parameters back."""
