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
from wan.snapshots import Snapshot, require_alike
from wan.vae.stream import SETTLING_LATENTS
from wan.vae.wan_vae import WanVAE

Phase = Callable[[str], AbstractContextManager[None]]


def no_phase(name: str) -> nullcontext[None]:
    """A phase that nobody times."""
    return nullcontext()


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

    def check_too(self, given: Mapping[str, Tensor]) -> None:
        """Check more of what blocks are made from, with the next one."""
        self._unchecked |= given

    def snapshot(self) -> Snapshot:
        """What the decoder remembers, and what is to be handed out with the next block."""
        tensors = {"pixels": torch.cat(self._head, dim=1)} if self._head else {}
        if self._given is not None:
            tensors["given"] = self._given
        return Snapshot.joined({"stream": self._stream.snapshot(), "head": Snapshot(tensors)})

    def restore(self, snapshot: Snapshot, latents_BFCHW: Tensor, head_frames: int) -> None:
        """Go on where another decoder was; for a new one.

        Args:
            latents_BFCHW: of the shape of what that one had decoded, see `LatentStream.restore`.
            head_frames: frames that are to be handed out with the next block beside its own.

        Raises:
            InputError: the snapshot is of another decoder or size.
        """
        head = snapshot.part("head").tensors
        with self._aside():
            latents = latents_BFCHW.to(self._vae.device, self._vae.dtype)
            self._stream.restore(snapshot.part("stream"), latents[:, :SETTLING_LATENTS])
        if head_frames:
            batch, _, _, height, width = latents_BFCHW.shape
            scale = self._vae.spatial_compression
            pixels = latents.new_empty(batch, head_frames, 3, height * scale, width * scale, device="meta")
            given = latents_BFCHW.to("meta")
            require_alike(head, {"pixels": pixels, "given": given})
            self._head, self._given = [head["pixels"].to(self._vae.device)], head["given"]
