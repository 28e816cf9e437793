"""Results of the pipeline: blocks of frames, whole videos, and the error of a block that is not finite."""

from dataclasses import dataclass
from typing import Any

from diffusers.utils import BaseOutput
from torch import Tensor

from pipelines.generation.streaming import FiniteCheck, Transfer

TEXT, GIVEN, LATENTS, PIXELS = "text embedding", "latents of the given frames", "latents", "pixels"
_NON_FINITE_CURES = {
    TEXT: "check the text encoder's weights, or the embeddings that were given",
    GIVEN: "check the image and the VAE's weights",
    LATENTS: "check the weights",
    PIXELS: "check the weights and the statistics of the VAE",
}
"""What of a block may be not finite, causes before effects, and what to do then."""


class NonFiniteBlockError(RuntimeError):
    """A generated block holds NaN or infinity; its video cannot go on.

    Attributes:
        block: index of the block.
        what: what of it is not finite: one of `TEXT`, `GIVEN`, `LATENTS` and `PIXELS`.
    """

    def __init__(self, block: int, what: str = LATENTS) -> None:
        cure = f"{_NON_FINITE_CURES[what]}, or use float32 or bfloat16 (--dtype)"
        super().__init__(f"block {block} is not finite ({what}): {cure}")
        self.block = block
        self.what = what


@dataclass(frozen=True)
class VideoBlock:
    """Some frames of a video, as soon as they exist.

    Attributes:
        index: of the block, from 0; given frames come first, as block 0 of the stream has them before its own.
        pixels_BTCHW: decoded frames in [-1, 1], on the VAE's device.
        latents_BFCHW: the block's latents, normalised.
        frames_BTHWC: the frames as bytes, on their way to the CPU.
        finite: whether latents and pixels are, and for the first block what they were made from; likewise.
        given_BFCHW: for the first block, latents of the given frames before it, whose pixels it brings; None for none.
    """

    index: int
    pixels_BTCHW: Tensor
    latents_BFCHW: Tensor
    frames_BTHWC: Transfer
    finite: FiniteCheck
    given_BFCHW: Tensor | None = None


@dataclass
class VideoOutput(BaseOutput):
    """Result of a call.

    Attributes:
        frames: by output type: "pt" [B, T, 3, H, W] in [0, 1]; "np" [B, T, H, W, 3]; "pil" lists of images;
            "latent" [B, F, C, h, w]. Given frames are among them.
    """

    frames: Any
