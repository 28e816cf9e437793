"""Writing H.264 as blocks of frames arrive, and reading it back."""

import time
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from av.video.stream import VideoStream
from numpy.typing import NDArray
from torch import Tensor

from wan.utils.errors import InputError
from wan.utils.files import cannot_write, remove, remove_abandoned, temporary_path

# A fragmented file has its index in pieces among the data: what was written so far plays, even if the run dies.
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}

ENCODER_THREADS = 8
"""Frames that x264 works on at a time; always so many, since the file depends on it."""


def to_uint8(pixels_TCHW: Tensor) -> Tensor:
    """Pixels in [-1, 1], [T, 3, H, W], as bytes [T, H, W, 3]; computed on the tensor's device."""
    return ((pixels_TCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class VideoWriter:
    """An mp4 that grows frame by frame: H.264 in yuv420p, which every browser plays.

    The frames go to a hidden file of the process's own beside the target, which takes the target's name when the
    context ends well and is removed when it does not: under its name there is a whole video or none. They are encoded
    in a thread beside the caller's, who may see to the next frames meanwhile.

    Args:
        path: the target.
        height, width: of the frames; even, as yuv420p demands, and at least 2.
        fps: frames a second.
        crf: x264's quality, lower is better.
        preset: x264's speed.
        keep_partial: whether the hidden file, which plays, stays when the context ends badly, until the next writer of
            the same target starts.

    Attributes:
        num_frames: encoded so far.
        seconds: that encoding took, in the thread and, of what the encoder held back, at the end.

    Raises:
        InputError: an odd or empty size, no positive rate, a file that cannot be written, or a context that ends
            without a frame.
    """

    def __init__(
        self,
        path: Path,
        height: int,
        width: int,
        fps: int = 16,
        crf: int = 18,
        preset: str = "veryfast",
        keep_partial: bool = False,
    ) -> None:
        if height % 2 or width % 2 or min(height, width) < 2:
            raise InputError(f"a video of {height}×{width} pixels cannot be encoded: both must be even, and at least 2")
        if fps <= 0:
            raise InputError(f"a video of {fps} frames per second cannot be encoded: give a positive rate")
        self._path = Path(path)
        self._partial = temporary_path(self._path)
        self._keep_partial = keep_partial
        self._shape = (height, width, 3)
        self.num_frames = 0
        self.seconds = 0.0
        self._closed = False
        self._encoding: Future[None] | None = None
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            remove_abandoned(self._path)
            # A file of our own: what PyAV opens by name loses errors of the last write, and a full disk goes unseen.
            self._file = self._partial.open("wb")
            self._container = av.open(self._file, "w", format="mp4", options=FRAGMENTED)
            self._stream = self._new_stream(height, width, fps, crf, preset)
        except (OSError, FFmpegError) as error:
            remove(self._partial)
            raise self._cannot_write(error) from error
        except BaseException:
            remove(self._partial)
            raise
        self._encoder = ThreadPoolExecutor(1, "video")

    def _new_stream(self, height: int, width: int, fps: int, crf: int, preset: str) -> VideoStream:
        stream = self._container.add_stream("libx264", rate=Fraction(fps))
        stream.height, stream.width = height, width
        stream.pix_fmt = "yuv420p"
        # A key frame a second, so that a fragment is finished, and safe, every second. No B-frames: a fragmented file
        # cannot say that their reordering delays the first frame, and would start 2 frames late.
        stream.options = {"crf": str(crf), "preset": preset, "g": str(fps), "bf": "0"}
        # Players guess the colours of a video that does not name them, by its height: BT.709 is used, and named.
        codec = stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = Colorspace.ITU709
        codec.color_range = ColorRange.MPEG
        codec.thread_type, codec.thread_count = "FRAME", ENCODER_THREADS
        return stream

    def write(self, frames_THWC: Tensor | NDArray[np.uint8]) -> None:
        """Append frames of bytes, [T, H, W, 3], as soon as those given before are encoded.

        Args:
            frames_THWC: not to be changed afterwards.

        Raises:
            InputError: frames of another size or type, or a disk that was full when those before were written.
        """
        frames = frames_THWC.cpu().numpy() if isinstance(frames_THWC, Tensor) else frames_THWC
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            raise InputError(f"frames are {frames.dtype} {frames.shape[1:]}, the video takes uint8 {self._shape}")
        self.wait()
        self._encoding = self._encoder.submit(self._encode, frames)

    def wait(self) -> None:
        """Wait until the encoder has taken all frames given. It holds the last of them back until the context ends.

        Raises:
            InputError: the disk was full.
        """
        encoding, self._encoding = self._encoding, None
        if encoding is not None:
            encoding.result()

    def _encode(self, frames: NDArray[np.uint8]) -> None:
        begin = time.perf_counter()
        try:
            for frame in frames:
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24").reformat(
                    format="yuv420p", dst_colorspace=Colorspace.ITU709, dst_color_range=ColorRange.MPEG
                )
                self._container.mux(self._stream.encode(picture))
                self.num_frames += 1
            self._file.flush()
        except (OSError, FFmpegError) as error:
            raise self._cannot_write(error) from error
        finally:
            self.seconds += time.perf_counter() - begin

    def finish(self) -> Path:
        """Complete the file before the context ends.

        Returns:
            the hidden file, whole now; nothing may be written any more.

        Raises:
            InputError: no frames were written, or the disk was full.
        """
        try:
            self._close(encode_rest=True)
        except (OSError, FFmpegError) as error:
            raise self._cannot_write(error) from error
        if not self.num_frames:
            raise InputError(f"no frames were written to {self._path}: a video needs at least one")
        return self._partial

    def _close(self, encode_rest: bool) -> None:
        """Close the file, once; what the encoder holds back goes into it if `encode_rest`."""
        if self._closed:
            return
        self._closed = True
        with self._file, self._container:
            try:
                if encode_rest:
                    self.wait()
            finally:
                self._stop_encoding()
            begin = time.perf_counter()
            if encode_rest or self._keep_partial:
                self._container.mux(self._stream.encode())
            self.seconds += time.perf_counter() - begin

    def _stop_encoding(self) -> None:
        """Let the thread end. Whatever happens meanwhile, nobody may be encoding when the container is closed."""
        try:
            self._encoder.shutdown(wait=True)
        except BaseException:  # a signal
            self._encoder.shutdown(wait=True)
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self.finish().replace(self._path)
            else:
                with suppress(OSError, FFmpegError):  # the first error counts
                    self._close(encode_rest=False)
        except OSError as failure:
            raise self._cannot_write(failure) from failure
        finally:
            if not self._keep_partial:
                remove(self._partial)

    def _cannot_write(self, error: OSError | FFmpegError) -> InputError:
        return cannot_write(self._path, error.strerror or str(error))


@dataclass(frozen=True)
class VideoFacts:
    """Size, length and rate of a video, as its container states them.

    Attributes:
        num_frames: packets of the stream of pictures.
        height, width: in pixels.
        fps: mean frame rate; 0.0 if the container does not state one.
    """

    num_frames: int
    height: int
    width: int
    fps: float


def video_facts(path: Path) -> VideoFacts:
    """Read size, length and rate of a video; nothing is decoded.

    Raises:
        InputError: missing, empty, not a video, without pictures, or damaged so that the container shows it.
    """
    with reading(path), av.open(str(path)) as container:
        packets = [packet for packet in container.demux(container.streams.video[:1]) if packet.size]
        damaged = sum(packet.is_corrupt for packet in packets)
        stream = container.streams.video[0]
        codec = stream.codec_context
        if codec is None:
            raise InputError(f"{path} has pictures that no decoder knows: make it again")
        facts = VideoFacts(len(packets), codec.height, codec.width, float(stream.average_rate or 0))
    if damaged:
        raise InputError(f"{path} is damaged in {damaged} of {len(packets)} frames: make it again")
    return facts


def count_frames(path: Path) -> int:
    """Count the frames of a video of `VideoWriter` by its packets; nothing is decoded.

    Raises:
        InputError: missing, empty, not a video, or damaged so that the container shows it.
    """
    return video_facts(path).num_frames


def iterate_video(path: Path) -> Iterator[NDArray[np.uint8]]:
    """Decode a video frame by frame, [H, W, 3] each. Memory does not grow with the video.

    RGB comes from PyAV's plain conversion, which gives the same bytes as OpenCV 5.

    Raises:
        InputError: missing, without frames, or damaged so that the decoder notices.
    """
    is_empty = True
    with reading(path), av.open(str(path)) as container:
        for stream in container.streams.video[:1]:
            if stream.codec_context is None:
                raise InputError(f"{path} has pictures that no decoder knows: make it again")
            # Without this the decoder makes up pixels where it notices damage, and reports success.
            stream.codec_context.options = {"err_detect": "explode"}
            for frame in container.decode(stream):
                is_empty = False
                yield frame.to_ndarray(format="rgb24")
    if is_empty:
        raise InputError(f"{path} holds no frames: give a video that does")


def read_video(path: Path) -> NDArray[np.uint8]:
    """Decode all frames of a video, [T, H, W, 3].

    Raises:
        InputError: missing, without frames, or damaged so that the decoder notices.
    """
    return np.stack(list(iterate_video(path)))


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn the errors of a file that cannot be read as a video into one line.

    Raises:
        InputError: `path` cannot be read.
    """
    try:
        yield
    except InputError:
        raise
    except (OSError, FFmpegError) as error:
        raise InputError(f"cannot read {path} as a video ({error.strerror or error}): make it again") from error
    except (UnicodeDecodeError, ValueError, IndexError) as error:  # PyAV decodes titles and the like as it opens a file
        raise InputError(f"cannot read {path} as a video ({error}): make it again") from error
