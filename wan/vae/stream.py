"""What every decoder of latents that come in parts has in common."""

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from wan.snapshots import Snapshot
from wan.utils.errors import InputError

SETTLING_LATENTS = 2
"""Latents after which what a decoder remembers has the shapes that it keeps."""


def shape_error(what: str, x: Tensor, channels: int) -> InputError:
    """The error for frames of another shape than [batch, frames, channels, height, width]."""
    return InputError(
        f"{what} of shape {tuple(x.shape)} do not fit: expected [batch, frames, {channels}, height, width]"
    )


class LatentStream(ABC):
    """Decodes the latents of one video (or batch) in order, any number at a time.

    Args:
        channels: of a latent.
    """

    def __init__(self, channels: int) -> None:
        self._channels = channels

    @torch.no_grad()
    def decode(self, latents_BFCHW: Tensor, clamp: bool = True) -> Tensor:
        """Frames of the next latents: 1 for the video's first latent, 4 for every other.

        Args:
            latents_BFCHW: normalised latents.
            clamp: to [-1, 1].

        Returns:
            [B, T, 3, H, W] in the decoder's dtype.

        Raises:
            InputError: another shape, another size than before, or no latent at all.
        """
        if latents_BFCHW.ndim != 5 or latents_BFCHW.shape[2] != self._channels or not latents_BFCHW.shape[1]:
            raise shape_error("latents", latents_BFCHW, self._channels)
        pixels = self._pixels(latents_BFCHW)
        return pixels.clamp_(-1, 1) if clamp else pixels

    @abstractmethod
    def _pixels(self, latents_BFCHW: Tensor) -> Tensor:
        """The frames, not clamped; a tensor that nobody else holds."""

    @abstractmethod
    def snapshot(self) -> Snapshot:
        """What it remembers of the video, as its own tensors, which decoding changes."""

    @abstractmethod
    def _set_counters(self, snapshot: Snapshot) -> None:
        """Take over the whole numbers of a snapshot."""

    @torch.no_grad()
    def restore(self, snapshot: Snapshot, latents_BFCHW: Tensor) -> None:
        """Go on where another stream of the same decoder was; for a new stream.

        It decodes some latents first, so that it remembers tensors of the right shapes, which the snapshot overwrites.

        Args:
            snapshot: of the other stream.
            latents_BFCHW: as many as the other stream had decoded, `SETTLING_LATENTS` at most; values do not matter.

        Raises:
            InputError: the snapshot is of another decoder or size.
        """
        if latents_BFCHW.shape[1]:
            self.decode(latents_BFCHW)
        snapshot.copy_to(self.snapshot().tensors)
        self._set_counters(snapshot)
