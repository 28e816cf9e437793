"""Given frames: a picture or a video to start with, or a video to go through again, as pixels and then as latents."""

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from pipelines.media.frames import UnusableVideoError
from pipelines.media.images import Picture, first_frames
from pipelines.media.reader import encode_frames, read_clip
from pipelines.prompts.names import is_file, shown
from wan.utils.errors import InputError
from wan.vae.wan_vae import WanVAE

log = logging.getLogger(__name__)

Video = str | Path | Sequence[Image.Image | NDArray[np.uint8]] | NDArray[np.uint8] | Tensor
"""A video: a file, pictures, uint8 [T, H, W, 3], or a tensor [T, 3, H, W] or [B, T, 3, H, W]."""
FRAMES_PER_SECOND = 16
"""Rate of Wan 2.1's videos, at which files are read."""


@dataclass(frozen=True)
class GivenFrames:
    """Latents of given frames, by what is done with them.

    A block is remembered as a whole. So given frames that fill blocks are remembered block by block before anything is
    generated. What is left of them takes the first places of the first generated block and stays clean, at timestep 0,
    while the rest of that block is denoised beside it, as Wan 2.2 keeps a given frame; the block is remembered when it
    is complete. So a chunk-wise model starts from one picture, and its blocks lie where they lay in training.

    Attributes:
        context_BFCHW: whole blocks, to be remembered first; None for none.
        kept_BFCHW: of the first frames of the first generated block; None for none.
        source_BFCHW: of a whole video that is taken through the last steps again; None for none.
    """

    context_BFCHW: Tensor | None = None
    kept_BFCHW: Tensor | None = None
    source_BFCHW: Tensor | None = None

    @classmethod
    def to_continue(cls, latents_BFCHW: Tensor, frames_per_block: int) -> "GivenFrames":
        """Latents that a video starts with."""
        whole = latents_BFCHW.shape[1] // frames_per_block * frames_per_block
        context, kept = latents_BFCHW[:, :whole], latents_BFCHW[:, whole:]
        return cls(context if whole else None, kept if kept.shape[1] else None)

    @property
    def context_frames(self) -> int:
        """Latent frames that are remembered before anything is generated."""
        return 0 if self.context_BFCHW is None else self.context_BFCHW.shape[1]

    def all(self) -> list[Tensor]:
        """All latents."""
        given = (self.context_BFCHW, self.kept_BFCHW, self.source_BFCHW)
        return [latents for latents in given if latents is not None]


def encode_image(vae: WanVAE, image: Picture | Sequence[Picture], batch: int, height: int, width: int) -> Tensor:
    """Latents [B, F, C, h, w] of pictures; see `pipelines.media.images.first_frames`."""
    given_BTCHW = first_frames(image, batch, height, width, vae.temporal_compression)
    return vae.encode(given_BTCHW.to(vae.device, vae.dtype))


@dataclass(frozen=True)
class GivenVideo:
    """A video that a call is given, its length known and its pixels read as they are needed.

    Args:
        video: see `Video`; a file is read at `FRAMES_PER_SECOND`, its middle cropped to the aspect and resized, as
            pictures and arrays are. Tensors have the size of the video and values in [-1, 1].
        height, width: of the videos that are generated.
    """

    video: Video
    height: int
    width: int
    fps: int = FRAMES_PER_SECOND

    def pictures(self) -> Iterator[NDArray[np.uint8]]:
        """The frames of a file or of pictures, [height, width, 3] each."""
        if isinstance(self.video, str | Path):
            path = Path(self.video)
            if not is_file(path):
                raise InputError(f"no video at {shown(path)}: check the path")
            with _named(path):
                yield from read_clip(path, self.height, self.width, self.fps)
            return
        for picture in self.video:
            pixels = first_frames(picture, 1, self.height, self.width)[0, 0]
            yield ((pixels + 1) * 127.5).round().to(torch.uint8).permute(1, 2, 0).numpy()

    @cached_property
    def num_frames(self) -> int:
        """Frames that there are.

        Raises:
            InputError: it cannot be read, or has none.
        """
        if isinstance(self.video, Tensor):
            if self.video.ndim not in (4, 5) or tuple(self.video.shape[-3:]) != (3, self.height, self.width):
                raise InputError(
                    f"a video tensor has the shape {list(self.video.shape)}: give [T, 3, {self.height}, {self.width}]"
                )
            if not self.video.shape[-4]:
                raise InputError("the video has no frames: give another one")
            return self.video.shape[-4]
        if isinstance(self.video, np.ndarray) and self.video.ndim != 4:  # of one picture, rows would be frames
            raise InputError(f"a video array has the shape {list(self.video.shape)}: give [T, H, W, 3]")
        if not isinstance(self.video, str | Path | Sequence | np.ndarray):
            raise InputError(
                f"a video is a {type(self.video).__name__}: give a file, a list of pictures, a uint8 array "
                "[T, H, W, 3] or a tensor [T, 3, H, W]"
            )
        count = sum(1 for _ in self.pictures()) if isinstance(self.video, str | Path) else len(self.video)
        if not count:
            name = f"the video {shown(self.video)}" if isinstance(self.video, str | Path) else "the video"
            raise InputError(f"{name} has no frames, or is damaged: give another one")
        other = [] if isinstance(self.video, str | Path) else [each for each in self.video if not _is_picture(each)]
        if other:
            raise InputError(
                f"a video holds a {type(other[0]).__name__}: give pictures of PIL, uint8 arrays [H, W, 3], tensors or "
                "files, one per frame"
            )
        return count

    def encode(self, vae: WanVAE, batch: int, first: int, latent_frames: int) -> Tensor:
        """Latents [B, F, C, h, w] of a stretch of the video.

        Args:
            batch: videos that are generated, all from this one.
            first: frame at which the stretch begins.
            latent_frames: F.
        """
        if isinstance(self.video, Tensor):
            count = (latent_frames - 1) * vae.temporal_compression + 1
            frames = (self.video if self.video.ndim == 5 else self.video[None])[:, first : first + count]
            return encode_image(vae, frames, batch, self.height, self.width)
        named = _named(Path(self.video)) if isinstance(self.video, str | Path) else nullcontext()
        with torch.no_grad(), named:
            latents = encode_frames(vae, islice(self.pictures(), first, None), latent_frames)
        return latents[None].expand(batch, -1, -1, -1, -1)


def _is_picture(given: object) -> bool:
    return isinstance(given, Image.Image | np.ndarray | Tensor | str | Path)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Name the file in what the reader says of it."""
    try:
        yield
    except UnusableVideoError as error:
        if str(error).startswith("the video "):
            raise
        raise UnusableVideoError(
            f"the video {shown(path)} {error}: check that it is a video, or give another"
        ) from error


def frames_to_continue(total: int, stride: int, *, quiet: bool = False) -> tuple[int, int]:
    """The stretch of a video that is continued: all of it, but for first frames that would not fill a latent.

    Args:
        total: frames of the video.
        stride: frames per latent frame.
        quiet: do not warn of frames that are left out.

    Returns:
        the first frame, and the latent frames.
    """
    dropped = (total - 1) % stride
    if dropped and not quiet:
        log.warning(
            "of the given video the first %d of %d frames are left out: latents hold 1 plus a multiple of %d",
            dropped,
            total,
            stride,
        )
    return dropped, (total - 1 - dropped) // stride + 1
