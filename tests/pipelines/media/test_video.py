"""Writing and reading video: what is written is read, and under a video's name there is a whole one or none."""

import os
import subprocess
import sys
import threading
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from abandoned import abandoned
from paths import ROOT

from pipelines.media.video import VideoWriter, count_frames, read_video, to_uint8
from wan.utils.errors import InputError


def gradient_frames(frames: int, height: int = 32, width: int = 48) -> np.ndarray:
    """Smooth pictures that move, which H.264 keeps well."""
    t, y, x = np.meshgrid(np.arange(frames) * 3, np.arange(height) * 4, np.arange(width) * 3, indexing="ij")
    return np.stack([x + t, y + t, (x + y) // 2], axis=-1).clip(0, 255).astype(np.uint8)


def test_frames_come_back_and_the_file_grows_while_written(tmp_path: Path) -> None:
    path, frames = tmp_path / "a.mp4", gradient_frames(40)
    with VideoWriter(path, 32, 48, fps=8) as writer:
        writer.write(frames[:30])
        writer.wait()
        assert not path.exists()
        partial = next(tmp_path.iterdir())
        partial_frames = read_video(partial)
        writer.write(torch.from_numpy(frames[30:]))
    assert list(tmp_path.iterdir()) == [path]
    assert 8 <= len(partial_frames) <= 30, "a cut file plays up to its last finished fragment"
    read = read_video(path)
    assert read.shape == frames.shape
    assert np.abs(read.astype(int) - frames).mean() < 3


def test_the_caller_goes_on_while_frames_are_encoded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, may_encode, encoded = VideoWriter._encode, threading.Event(), []

    def slowly(writer: VideoWriter, frames: np.ndarray) -> None:
        assert may_encode.wait(timeout=60)
        encode(writer, frames)
        encoded.append(len(frames))

    monkeypatch.setattr(VideoWriter, "_encode", slowly)
    frames = gradient_frames(12)
    with VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(frames[:5])
        assert not encoded
        may_encode.set()
        writer.write(frames[5:])
        assert encoded[0] == 5
    assert encoded == [5, 7] and writer.seconds > 0
    assert np.abs(read_video(tmp_path / "a.mp4").astype(int) - frames).mean() < 3


def test_what_an_encoder_meets_comes_out_at_the_next_call(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(VideoWriter, "_encode", lambda *arguments: 1 / 0)
    writer = VideoWriter(tmp_path / "a.mp4", 32, 48)
    with pytest.raises(ZeroDivisionError), writer:
        writer.write(gradient_frames(5))
        with pytest.raises(ZeroDivisionError):
            writer.write(gradient_frames(5))
        writer.write(gradient_frames(5))
        with pytest.raises(ZeroDivisionError):
            writer.wait()
        writer.write(gradient_frames(5))
    assert not list(tmp_path.iterdir())


def test_an_interrupted_wait_leaves_nobody_encoding(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode, may_encode, order = VideoWriter._encode, threading.Event(), []

    def slowly(writer: VideoWriter, frames: np.ndarray) -> None:
        assert may_encode.wait(timeout=60)
        encode(writer, frames)
        order.append("encoded")

    def interrupted(writer: VideoWriter) -> None:
        threading.Timer(0.2, may_encode.set).start()
        raise KeyboardInterrupt

    monkeypatch.setattr(VideoWriter, "_encode", slowly)
    monkeypatch.setattr(VideoWriter, "wait", interrupted)
    writer = VideoWriter(tmp_path / "a.mp4", 32, 48)
    with pytest.raises(KeyboardInterrupt), writer:
        writer._encoder.submit(writer._encode, gradient_frames(5))
    assert order == ["encoded"] and not list(tmp_path.iterdir())


def test_the_container_says_what_browsers_need(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(gradient_frames(5))
    with av.open(str(tmp_path / "a.mp4")) as container:
        stream = container.streams.video[0]
        assert (stream.codec_context.name, stream.codec_context.pix_fmt) == ("h264", "yuv420p")
        assert stream.average_rate == 16
        assert next(container.decode(video=0)).pts == 0
        # ITU-T H.273: 1 is BT.709, which a player must be told, or it guesses by the height.
        assert stream.codec_context.colorspace == stream.codec_context.color_primaries == 1


def test_saturated_colours_survive(tmp_path: Path) -> None:
    colours = np.array([[255, 0, 0], [0, 255, 0], [0, 0, 255], [200, 80, 40]], np.uint8)
    frames = np.tile(np.repeat(colours, 16, axis=0), (2, 32, 1, 1))
    with VideoWriter(tmp_path / "a.mp4", 32, 64) as writer:
        writer.write(frames)
    middle = read_video(tmp_path / "a.mp4")[0, 16, 8::16].astype(int)
    assert np.abs(middle - colours).max() <= 4


def test_an_error_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(gradient_frames(5))
        raise RuntimeError
    assert not list(tmp_path.iterdir())
    with pytest.raises(RuntimeError), VideoWriter(tmp_path / "a.mp4", 32, 48, keep_partial=True) as writer:
        writer.write(gradient_frames(5))
        raise RuntimeError
    assert [len(read_video(path)) for path in tmp_path.iterdir()] == [5]
    assert not (tmp_path / "a.mp4").exists()


def test_a_crashed_runs_file_goes(tmp_path: Path) -> None:
    abandoned(tmp_path / "a.mp4").write_bytes(b"stale" * 100_000)
    with VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(gradient_frames(5))
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]
    assert len(read_video(tmp_path / "a.mp4")) == 5


def test_writers_of_one_target_do_not_meet(tmp_path: Path) -> None:
    first, second = (VideoWriter(tmp_path / "a.mp4", 32, 48) for _ in range(2))
    with pytest.raises(RuntimeError), second:
        second.write(gradient_frames(7))
        with first:
            first.write(gradient_frames(5))
        raise RuntimeError
    assert list(tmp_path.iterdir()) == [tmp_path / "a.mp4"]
    assert len(read_video(tmp_path / "a.mp4")) == 5


def test_a_finished_file_is_whole_before_it_has_its_name(tmp_path: Path) -> None:
    with VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(gradient_frames(5))
        content = writer.finish().read_bytes()
        assert not (tmp_path / "a.mp4").exists() and writer.num_frames == 5
    assert (tmp_path / "a.mp4").read_bytes() == content


@pytest.mark.parametrize("frames", [1, 2, 15, 16, 17, 40])
def test_frames_are_counted_as_a_decoder_counts_them(tmp_path: Path, frames: int) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 32, 48) as writer:
        writer.write(gradient_frames(frames))
    assert count_frames(path) == len(read_video(path)) == frames


def test_a_cut_video_never_counts_as_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 32, 48) as writer:
        writer.write(gradient_frames(40))
    content = path.read_bytes()
    # What follows the last frame is an index of fragments, which players need not have.
    for size in range(0, content.rindex(b"mfra") - 4, 97):
        path.write_bytes(content[:size])
        try:
            counted = count_frames(path)
        except InputError as error:
            assert "make it again" in str(error)
        else:
            assert counted < 40, size


@pytest.mark.parametrize("content", [b"", b"hello", bytes(5000)])
def test_what_is_no_video_has_no_count(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "a.mp4").write_bytes(content)
    for path in (tmp_path / "a.mp4", tmp_path / "none.mp4", tmp_path):
        with pytest.raises(InputError, match="cannot read"):
            count_frames(path)


def test_a_video_without_frames_does_not_get_the_name(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no frames"), VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(gradient_frames(0))
    assert not list(tmp_path.iterdir())


def conceals_damage(path: Path) -> bool:
    """Whether a plain decoder reports success and marks a frame as made up."""
    try:
        with av.open(str(path)) as container:
            corrupt = [frame.is_corrupt for frame in container.decode(video=0)]
    except av.error.InvalidDataError:
        return False
    return any(corrupt)


def test_damage_that_a_decoder_conceals_is_an_error(tmp_path: Path) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 32, 48) as writer:
        writer.write(gradient_frames(40))
    data = path.read_bytes()
    for position in range(data.index(b"mdat") + 4, len(data), 11):
        path.write_bytes(data[:position] + bytes([data[position] ^ 0xFF]) + data[position + 1 :])
        if conceals_damage(path):
            break
    else:
        pytest.fail("no byte whose damage a decoder conceals")
    with pytest.raises(InputError, match="cannot read"):
        read_video(path)


@pytest.mark.parametrize(("height", "width"), [(31, 48), (32, 47), (0, 48), (-2, 48)])
def test_sizes_that_cannot_be_encoded_are_an_error(tmp_path: Path, height: int, width: int) -> None:
    with pytest.raises(InputError, match="even"):
        VideoWriter(tmp_path / "a.mp4", height, width)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("fps", [0, -16])
def test_a_rate_that_is_not_positive_is_an_error(tmp_path: Path, fps: int) -> None:
    with pytest.raises(InputError, match="positive rate"):
        VideoWriter(tmp_path / "a.mp4", 32, 48, fps=fps)
    assert not list(tmp_path.iterdir())


def test_bad_frames_and_folders_are_an_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="the video takes"), VideoWriter(tmp_path / "a.mp4", 32, 48) as writer:
        writer.write(gradient_frames(2, 16))
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="cannot write"):
        VideoWriter(tmp_path / "file" / "a.mp4", 32, 48)
    with pytest.raises(InputError, match="cannot read"):
        read_video(tmp_path / "none.mp4")
    with pytest.raises(InputError, match="cannot read"):
        read_video(tmp_path / "file")


def test_a_full_disk_is_an_error_and_leaves_nothing_wherever_it_strikes(tmp_path: Path) -> None:
    # A limit on the size of files stands in for a full disk: writes beyond it fail. The last bytes are written when
    # the file is closed; a failure there must not pass for a finished video.
    program = f"""
import resource, signal, numpy as np
from pathlib import Path
from pipelines.media.video import VideoWriter
from wan.utils.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
noise = np.random.default_rng(0).integers(0, 256, (20, 32, 48, 3), dtype=np.uint8)
path = Path({str(tmp_path / "a.mp4")!r})
def write():
    with VideoWriter(path, 32, 48) as writer:
        writer.write(noise)
write()
size = path.stat().st_size
path.unlink()
for limit in (0, 100, size // 2, size - size // 8, size - 100, size - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        write()
    except InputError as error:
        assert str(error).startswith("cannot write"), error
    else:
        raise SystemExit(f"{{size}} bytes passed a limit of {{limit}}")
    assert not list(path.parent.iterdir()), limit
print("done")
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert result.stdout == "done\n", result.stderr
    assert not list(tmp_path.iterdir())


def test_pixels_become_bytes() -> None:
    pixels = torch.tensor([-1.5, -1.0, 0.0, 1.0, 2.0]).view(1, 1, 1, 5).expand(2, 3, 4, 5)
    frames = to_uint8(pixels)
    assert frames.shape == (2, 4, 5, 3)
    assert frames[0, 0, :, 0].tolist() == [0, 0, 128, 255, 255]


@pytest.mark.parametrize(("old", "new"), [(b"avc1", b"zzzz"), (b"Lavf", b"\xff\xfe\xff\xfe")])
def test_a_codec_or_a_title_that_nobody_can_read_is_an_error(tmp_path: Path, old: bytes, new: bytes) -> None:
    path = tmp_path / "a.mp4"
    with VideoWriter(path, 32, 48) as writer:
        writer.write(gradient_frames(5))
    content = path.read_bytes()
    assert old in content
    path.write_bytes(content.replace(old, new))
    with pytest.raises(InputError, match=r"decoder knows|cannot read"):
        read_video(path)
