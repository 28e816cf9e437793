"""From generated blocks to frames: on which device and stream, by which process, and checked."""

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from arl2.rollout import GeneratedBlock
from pipelines.generation.blocks import LATENTS, PIXELS, VideoBlock
from pipelines.generation.lockstep import Lockstep
from pipelines.generation.streaming import FiniteCheck, SideStream, Transfer
from pipelines.media.video import to_uint8
from wan.vae.wan_vae import WanVAE

Phase = Callable[[str], AbstractContextManager[None]]


class BlockDecoder:
    """Gives the generated blocks of one video, in order, their frames; waits for nothing, if the VAE is on a GPU.

    Latents are copied to the VAE's device if they are on another. If both are GPUs, a block is decoded beside the next
    one's denoising without a stream of its own.

    Processes that compute a video together decode a band of its rows each, with the fast decoder. Diffusers' decoder
    and the tiny one work on whole frames, on the leading process alone. Only that process gets whole frames.

    Args:
        vae: decodes, with its weights as they are now.
        latent_size: height and width of the latents.
        side: stream to decode on; None for the current one of the VAE's device.
        context_BFCHW: latents of given frames, decoded at once and handed out with the first block's.
        given: what all blocks are made from, checked with the first of them. Held by the caller until then.
        phase: entered as "vae" around decoding.
        lockstep: of processes that compute the video together.

    Attributes:
        divided: whether every process decodes a band; then they must all decode the same blocks.
    """

    def __init__(
        self,
        vae: WanVAE,
        latent_size: tuple[int, int],
        side: SideStream | None,
        context_BFCHW: Tensor | None,
        given: Mapping[str, Tensor],
        phase: Phase,
        lockstep: Lockstep | None,
    ) -> None:
        self._vae, self._phase, self._lockstep = vae, phase, lockstep
        self._aside = nullcontext if side is None else side.work
        self._unchecked = dict(given)
        self._height = latent_size[0] * vae.spatial_compression
        self._band = lockstep.band(latent_size[0]) if lockstep is not None and vae.decodes_bands else None
        self.divided = self._band is not None
        self._head, self._given = list[Tensor](), context_BFCHW
        with self._aside():
            self._stream = vae.decode_stream(self._band)
            if context_BFCHW is not None and (self.divided or lockstep is None or lockstep.leads):
                self._head.append(self._decode(context_BFCHW))

    def __call__(self, block: GeneratedBlock) -> VideoBlock:
        """The block's frames and checks. On a process that follows: of its band, which nobody needs."""
        with self._aside():
            latents = block.latents_BFCHW
            pixels = torch.cat([*self._head, self._decode(latents)], dim=1)
            if self._band is not None and self._lockstep is not None:
                with self._phase("vae"):
                    pixels = self._lockstep.gather(pixels, self._band, self._height)
            # Before clamping, which makes a number of infinity. What a process sent was not clamped either.
            finite = FiniteCheck({**self._unchecked, LATENTS: latents, PIXELS: pixels})
            pixels.clamp_(-1, 1)
            self._head.clear()
            self._unchecked.clear()
            frames = Transfer(to_uint8(pixels.flatten(0, 1)).unflatten(0, pixels.shape[:2]))
            given, self._given = self._given, None
        return VideoBlock(block.index, pixels, latents, frames, finite, given)

    def _decode(self, latents_BFCHW: Tensor) -> Tensor:
        latents = latents_BFCHW.to(self._vae.device, self._vae.dtype)
        with self._phase("vae"):
            return self._stream.decode(latents, clamp=False)
