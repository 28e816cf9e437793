"""Writing H.264 as blocks of frames arrive, and reading it back."""

import time
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
import torch
from av.error import FFmpegError
from av.video.reformatter import ColorRange, Colorspace
from numpy.typing import NDArray
from torch import Tensor

from wan.utils.errors import InputError

# A fragmented file has its index in pieces among the data: what was written so far plays, even if the run dies.
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}

ENCODER_THREADS = 8
"""Frames that x264 works on at a time; always so many, since the file depends on it."""


def to_uint8(pixels_TCHW: Tensor) -> Tensor:
    """Pixels in [-1, 1], [T, 3, H, W], as bytes [T, H, W, 3]; computed on the tensor's device."""
    return ((pixels_TCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class VideoWriter:
    """An mp4 that grows frame by frame: H.264 in yuv420p, which every browser plays.

    The frames go to a hidden file beside the target, which takes the target's name when the context ends well and
    is removed when it does not: under its name there is a whole video or none. They are encoded in a thread beside the
    caller's, who may see to the next frames meanwhile.

    Args:
        path: the target.
        height, width: of the frames; even, as yuv420p demands, and at least 2.
        fps: frames a second.
        crf: x264's quality, lower is better.
        preset: x264's speed.
        keep_partial: whether the hidden file, which plays, stays when the context ends badly.

    Attributes:
        seconds: that encoding took, in the thread and, of what the encoder held back, at the end.

    Raises:
        InputError: an odd or empty size, a file that cannot be written, or a context that ends without a frame.
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
        self._path = Path(path)
        self._partial = self._path.with_name(f".{self._path.name}.part")
        self._keep_partial = keep_partial
        self._shape = (height, width, 3)
        self._num_frames = 0
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            # A file of our own: what PyAV opens by name loses errors of the last write, and a full disk goes unseen.
            self._file = self._partial.open("wb")
            self._container = av.open(self._file, "w", format="mp4", options=FRAGMENTED)
        except (OSError, FFmpegError) as error:
            raise self._cannot_write(error) from error
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps))
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        # A key frame a second, so that a fragment is finished, and safe, every second. No B-frames: a fragmented file
        # cannot say that their reordering delays the first frame, and would start 2 frames late.
        self._stream.options = {"crf": str(crf), "preset": preset, "g": str(fps), "bf": "0"}
        # Players guess the colours of a video that does not name them, by its height: BT.709 is used, and named.
        codec = self._stream.codec_context
        codec.colorspace = codec.color_primaries = codec.color_trc = Colorspace.ITU709
        codec.color_range = ColorRange.MPEG
        codec.thread_type, codec.thread_count = "FRAME", ENCODER_THREADS
        self._encoder = ThreadPoolExecutor(1, "video")
        self._encoding: Future[None] | None = None
        self.seconds = 0.0

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
                self._num_frames += 1
            self._file.flush()
        except (OSError, FFmpegError) as error:
            raise self._cannot_write(error) from error
        finally:
            self.seconds += time.perf_counter() - begin

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            with self._file, self._container:
                # Whatever happens while it is waited for, nobody may be encoding when the container is closed.
                with self._encoder:
                    if error is None:
                        self.wait()
                begin = time.perf_counter()
                if error is None or self._keep_partial:
                    self._container.mux(self._stream.encode())
                self.seconds += time.perf_counter() - begin
            if error is None and not self._num_frames:
                raise InputError(f"no frames were written to {self._path}: a video needs at least one")
            if error is None:
                self._partial.replace(self._path)
        except (OSError, FFmpegError) as failure:
            if error is None:
                raise self._cannot_write(failure) from failure
        finally:
            if not self._keep_partial:
                self._partial.unlink(missing_ok=True)

    def _cannot_write(self, error: OSError | FFmpegError) -> InputError:
        return InputError(f"cannot write {self._path} ({error.strerror or error}): free space or choose another folder")


def read_video(path: Path) -> NDArray[np.uint8]:
    """All frames of a video, [T, H, W, 3].

    Raises:
        InputError: missing, without frames, or damaged so that the decoder notices.
    """
    frames = []
    try:
        with av.open(str(path)) as container:
            for stream in container.streams.video[:1]:
                if stream.codec_context is None:
                    raise InputError(f"{path} has pictures that no decoder knows: make it again")
                # Without this the decoder makes up pixels where it notices damage, and reports success.
                stream.codec_context.options = {"err_detect": "explode"}
                frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(stream)]
    except (OSError, FFmpegError) as error:
        raise InputError(f"cannot read {path} as a video ({error.strerror or error}): make it again") from error
    except UnicodeDecodeError as error:  # PyAV decodes titles and the like as it opens a file
        raise InputError(f"cannot read {path} as a video ({error}): make it again") from error
    if not frames:
        raise InputError(f"{path} holds no frames: give a video that does")
    return np.stack(frames)
