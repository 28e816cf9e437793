"""The video file of a generation that goes on: all frames so far, whenever it is asked for."""

import shutil
import threading
from pathlib import Path
from uuid import uuid4

import av
from av.error import FFmpegError
from torch import Tensor

from pipelines.media.video import FRAGMENTED, VideoWriter
from wan.utils.errors import InputError
from wan.utils.files import atomic_path, cannot_write


class Recording:
    """Frames of a video on disk, as segments that are complete mp4 files, and one that is being written.

    A file of all frames is put together from the segments without encoding anything again. One thread may write while
    another asks for the file.

    Args:
        folder: of its own, where segments go.
        height, width, fps: of the video.
        max_frames: frames that are kept; later ones are left out, see `is_full`.
    """

    def __init__(self, folder: Path, height: int, width: int, fps: int, max_frames: int) -> None:
        self._folder, self._size, self._fps, self._max = folder, (height, width), fps, max_frames
        self._lock = threading.Lock()
        self._segments: list[Path] = []
        self._writer: VideoWriter | None = None
        self._closed = False
        self.num_frames = 0

    @property
    def is_full(self) -> bool:
        """Whether later frames are left out."""
        return self.num_frames >= self._max

    def write(self, frames_THWC: Tensor) -> None:
        """Append frames of bytes, [T, H, W, 3], up to the limit; nothing once it is closed.

        Raises:
            InputError: the disk is full, or frames of another size.
        """
        with self._lock:
            frames = frames_THWC[: self._max - self.num_frames]
            if self._closed or not len(frames):
                return
            if self._writer is None:
                path = self._folder / f"{len(self._segments):04d}-{uuid4().hex}.mp4"
                self._writer = VideoWriter(path, *self._size, self._fps)
                self._segments.append(path)
            self._writer.write(frames)
            self.num_frames += len(frames)

    def segments(self) -> list[Path]:
        """Complete files that hold all frames so far, in order.

        Raises:
            InputError: there are no frames, or the disk is full.
        """
        with self._lock:
            if self._closed or not self._segments:
                raise InputError("there are no frames yet: wait for the first ones")
            if self._writer is not None:
                writer, self._writer = self._writer, None
                with writer:
                    pass
            return list(self._segments)

    def save(self, path: Path) -> Path:
        """Write one file of all frames so far; atomic.

        Raises:
            InputError: there are no frames, or the file cannot be written.
        """
        segments = self.segments()
        try:
            with atomic_path(path) as temporary:
                _join(segments, temporary)
        except (OSError, FFmpegError) as error:
            raise cannot_write(path, error.strerror or str(error)) from error
        return path

    def copy(self, folder: Path) -> "Recording":
        """Another recording in a folder of its own that begins with the same frames."""
        other = Recording(folder, *self._size, self._fps, self._max)
        if not self.num_frames:
            return other
        folder.mkdir(parents=True, exist_ok=True)
        for path in self.segments():
            other._segments.append(Path(shutil.copy2(path, folder / path.name)))
        other.num_frames = self.num_frames
        return other

    def close(self) -> None:
        """Remove all files; closing twice does nothing."""
        with self._lock:
            self._closed = True
            writer, self._writer = self._writer, None
            if writer is not None:
                with writer:
                    pass
        shutil.rmtree(self._folder, ignore_errors=True)


def _join(segments: list[Path], path: Path) -> None:
    """Put segments behind one another: their packets with later times."""
    with path.open("wb") as file, av.open(file, "w", format="mp4", options=FRAGMENTED) as target:
        stream, begin = None, 0
        for segment in segments:
            with av.open(str(segment)) as source:
                video = source.streams.video[0]
                if stream is None:
                    stream = target.add_stream_from_template(video)
                end = 0
                for packet in source.demux(video):
                    if packet.dts is None or packet.pts is None:  # the end of the file
                        continue
                    end = max(end, packet.pts + (packet.duration or 0))
                    packet.pts, packet.dts = packet.pts + begin, packet.dts + begin
                    packet.stream = stream
                    target.mux(packet)
                begin += end
