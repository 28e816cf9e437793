"""Writing H.264 as blocks of frames arrive, and reading it back."""

from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Self

import av
import numpy as np
import torch
from av.error import FFmpegError
from numpy.typing import NDArray
from torch import Tensor

from wan.errors import InputError

# A fragmented file has its index in pieces among the data: what was written so far plays, even if the run dies.
FRAGMENTED = {"movflags": "frag_keyframe+empty_moov+default_base_moof", "flush_packets": "1"}


def to_uint8(pixels_TCHW: Tensor) -> Tensor:
    """Pixels in [-1, 1], [T, 3, H, W], as bytes [T, H, W, 3]; computed on the tensor's device."""
    return ((pixels_TCHW.float().clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


class VideoWriter:
    """An mp4 that grows frame by frame: H.264 in yuv420p, which every browser plays.

    The frames go to a hidden file beside the target, which takes the target's name when the context ends well and
    is removed when it does not: under its name there is a whole video or none.

    Args:
        path: the target.
        height, width: of the frames; even, as yuv420p demands.
        fps: frames a second.
        crf: x264's quality, lower is better.
        preset: x264's speed.

    Raises:
        InputError: an odd size, or a file that cannot be written.
    """

    def __init__(
        self, path: Path, height: int, width: int, fps: int = 16, crf: int = 18, preset: str = "veryfast"
    ) -> None:
        if height % 2 or width % 2:
            raise InputError(f"a video of {height}×{width} pixels cannot be encoded: both must be even")
        self._path = Path(path)
        self._partial = self._path.with_name(f".{self._path.name}.part")
        self._shape = (height, width, 3)
        try:
            self._partial.parent.mkdir(parents=True, exist_ok=True)
            self._container = av.open(str(self._partial), "w", format="mp4", options=FRAGMENTED)
        except (OSError, FFmpegError) as error:
            raise self._cannot_write(error) from error
        self._stream = self._container.add_stream("libx264", rate=Fraction(fps))
        self._stream.height, self._stream.width = height, width
        self._stream.pix_fmt = "yuv420p"
        # A key frame a second, so that a fragment is finished, and safe, every second.
        self._stream.options = {"crf": str(crf), "preset": preset, "g": str(fps)}

    def write(self, frames_THWC: Tensor | NDArray[np.uint8]) -> None:
        """Append frames of bytes, [T, H, W, 3].

        Raises:
            InputError: frames of another size or type, or a full disk.
        """
        frames = frames_THWC.numpy() if isinstance(frames_THWC, Tensor) else frames_THWC
        if frames.dtype != np.uint8 or frames.shape[1:] != self._shape:
            raise InputError(f"frames are {frames.dtype} {frames.shape[1:]}, the video takes uint8 {self._shape}")
        try:
            for frame in frames:
                self._container.mux(self._stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        except (OSError, FFmpegError) as error:
            raise self._cannot_write(error) from error

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        try:
            if error is None:
                self._container.mux(self._stream.encode())
            self._container.close()
            if error is None:
                self._partial.replace(self._path)
        except (OSError, FFmpegError) as failure:
            if error is None:
                raise self._cannot_write(failure) from failure
        finally:
            self._partial.unlink(missing_ok=True)

    def _cannot_write(self, error: OSError | FFmpegError) -> InputError:
        return InputError(f"cannot write {self._path} ({error.strerror or error}): free space or choose another folder")


def read_video(path: Path) -> NDArray[np.uint8]:
    """All frames of a video, [T, H, W, 3].

    Raises:
        InputError: missing or damaged.
    """
    try:
        with av.open(str(path)) as container:
            frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    except (OSError, FFmpegError, IndexError) as error:
        raise InputError(f"cannot read {path} as a video: {error}") from error
    if not frames:
        raise InputError(f"{path} holds no frames")
    return np.stack(frames)
