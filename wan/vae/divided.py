"""Decoding a video, or a band of its rows, after the other: less memory at a time, the same frames up to rounding."""

from collections.abc import Callable

import torch
from torch import Tensor

from wan.snapshots import Snapshot
from wan.vae.bands import Band
from wan.vae.stream import LatentStream


class DividedStream(LatentStream):
    """Decodes every part of a batch by a stream of its own.

    What streams remember is the same in sum, but for rows that neighbouring bands both compute; the largest tensors
    inside the decoder are those of one part.

    Args:
        channels: of a latent.
        new_stream: begins to decode a band of the rows, or whole frames.
        by_video: whether every video of a batch is a part.
        max_rows: rows of latents per band at most; None for whole frames.
        band: of the rows, the only one to decode, in place of several.
    """

    def __init__(
        self,
        channels: int,
        new_stream: Callable[[Band | None], LatentStream],
        *,
        by_video: bool,
        max_rows: int | None = None,
        band: Band | None = None,
    ) -> None:
        super().__init__(channels)
        self._new_stream, self._by_video, self._max_rows, self._band = new_stream, by_video, max_rows, band
        self._streams: list[list[LatentStream]] = []

    def _pixels(self, latents_BFCHW: Tensor) -> Tensor:
        videos = list(latents_BFCHW.split(1)) if self._by_video else [latents_BFCHW]
        if not self._streams:
            bands = self._bands(latents_BFCHW.shape[3])
            self._streams = [[self._new_stream(band) for band in bands] for _ in videos]
        parts = [
            torch.cat([stream.decode(video, clamp=False) for stream in streams], dim=3)
            for video, streams in zip(videos, self._streams, strict=True)
        ]
        return torch.cat(parts)

    def _by_part(self) -> dict[str, LatentStream]:
        """Streams by the numbers of their video and band."""
        return {
            f"{video}.{band}": stream
            for video, streams in enumerate(self._streams)
            for band, stream in enumerate(streams)
        }

    def snapshot(self) -> Snapshot:
        """See `LatentStream.snapshot`: what the streams of all parts remember."""
        return Snapshot.joined({part: stream.snapshot() for part, stream in self._by_part().items()})

    def _set_counters(self, snapshot: Snapshot) -> None:
        for part, stream in self._by_part().items():
            stream._set_counters(snapshot.part(part))

    def _bands(self, rows: int) -> list[Band | None]:
        if self._max_rows is None or self._band is not None:
            return [self._band]
        count = -(-rows // max(self._max_rows, 1))
        return [None] if count == 1 else [Band(index, count) for index in range(count)]
