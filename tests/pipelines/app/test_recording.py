"""The file of a generation that goes on has all its frames, whenever it is asked for."""

from pathlib import Path

import av
import pytest
import torch

from pipelines.app.recording import Recording
from pipelines.media.video import read_video
from wan.utils.errors import InputError

FPS = 16


def grey(count: int, first: int = 0) -> torch.Tensor:
    """Frames that differ in brightness."""
    values = torch.arange(first, first + count) * 8
    return values.to(torch.uint8)[:, None, None, None].expand(count, 16, 32, 3).contiguous()


def brightness(path: Path) -> list[int]:
    return [round(float(frame.mean()) / 8) for frame in read_video(path)]


def test_every_file_has_all_frames_in_time(tmp_path: Path) -> None:
    recording, path = Recording(tmp_path / "parts", 16, 32, FPS, 100), tmp_path / "video.mp4"
    for first, count in ((0, 9), (9, 1), (10, 12)):
        recording.write(grey(count, first))
        assert brightness(recording.save(path)) == list(range(first + count))
    with av.open(str(path)) as file:
        assert [round(float(frame.time or 0) * FPS, 6) for frame in file.decode(video=0)] == list(range(22))
    recording.close()
    recording.close()
    assert [each.name for each in tmp_path.iterdir()] == ["video.mp4"]


def test_a_copy_goes_on_alone(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "first", 16, 32, FPS, 100)
    empty = recording.copy(tmp_path / "empty")
    recording.write(grey(5))
    other = recording.copy(tmp_path / "second")
    recording.write(grey(3, 5))
    other.write(grey(2, 20))
    recording.close()
    assert brightness(other.save(tmp_path / "other.mp4")) == [0, 1, 2, 3, 4, 20, 21]
    with pytest.raises(InputError, match="no frames"):
        empty.save(tmp_path / "empty.mp4")


def test_the_file_ends_at_the_limit(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "parts", 16, 32, FPS, 7)
    recording.write(grey(5))
    assert not recording.is_full
    recording.write(grey(5, 5))
    recording.write(grey(5, 10))
    assert recording.is_full and brightness(recording.save(tmp_path / "video.mp4")) == list(range(7))
    recording.close()


def test_what_is_closed_takes_no_frames_and_gives_none(tmp_path: Path) -> None:
    recording = Recording(tmp_path / "parts", 16, 32, FPS, 7)
    recording.write(grey(2))
    recording.close()
    recording.write(grey(2))
    with pytest.raises(InputError, match="no frames"):
        recording.save(tmp_path / "video.mp4")
    assert not list(tmp_path.iterdir())
