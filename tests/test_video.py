"""Writing and reading video: what is written is read, and under a video's name there is a whole one or none."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pipelines.video import VideoWriter, read_video, to_uint8
from wan.errors import InputError


def gradient_frames(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Smooth pictures that move, which H.264 keeps well."""
    t, y, x = np.meshgrid(np.arange(frames) * 3, np.arange(height) * 4, np.arange(width) * 3, indexing="ij")
    return np.stack([x + t, y + t, (x + y) // 2], axis=-1).clip(0, 255).astype(np.uint8)


def test_frames_come_back_and_the_file_grows_while_written(tmp_path: Path) -> None:
    path, frames = tmp_path / "a.mp4", gradient_frames(40)
    with VideoWriter(path, 32, 48, fps=8) as writer:
        writer.write(frames[:30])
        assert not path.exists()
        partial = next(tmp_path.iterdir())
        partial_frames = read_video(partial)
        writer.write(torch.from_numpy(frames[30:]))
    assert list(tmp_path.iterdir()) == [path]
    assert 8 <= len(partial_frames) <= 30, "a cut file plays up to its last finished fragment"
    read = read_video(path)
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 3


def test_the_container_says_what_browsers_need(tmp_path: Path) -> None:
    import av

    with VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(gradient_frames(5))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(gradient_frames(5))
        raise RuntimeError
    assert not list(tmp_path.iterdir())


def test_bad_frames_sizes_and_folders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="even"):
        VideoWriter(tmp_path / "a.mp4", 31, 48)
    with pytest.raises(InputError, match="the video takes"), VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(gradient_frames(2, 16))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        VideoWriter(tmp_path / "file" / "a.mp4", 32, 48)
    with pytest.raises(InputError, match="cannot read"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="cannot read"):
        read_video(tmp_path / "file")


def test_a_full_disk_is_an_error_and_leaves_nothing(tmp_path: Path) -> None:
    # A limit on the size of files stands in for a full disk: writes beyond it fail.
    program = f"""
import resource, signal, numpy as np
from pathlib import Path
from pipelines.video import VideoWriter
from wan.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20000, 20000))
noise = np.random.default_rng(0).integers(0, 256, (200, 64, 96, 3), dtype=np.uint8)
try:
    with VideoWriter(Path({str(tmp_path / "a.mp4")!r}), 64, 96) as writer:
        writer.write(noise)
except InputError as error:
    raise SystemExit(str(error))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stderr.startswith("cannot write"), result.stderr
    assert not list(tmp_path.iterdir())


def test_pixels_become_bytes() -> None:
    pixels = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(2, 3, 4, 5)
    frames = to_uint8(pixels)
    assert frames.shape == (2, 4, 5, 3)
    assert frames[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]
