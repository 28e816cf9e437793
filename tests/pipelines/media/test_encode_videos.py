"""Real videos to training data: which frames are taken, what is skipped, and a run that is killed and resumed."""

import json
import os
import shutil
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from arl2.distillation.data import LatentDataset
from arl2.distillation.latent_writer import INDEX, LOCK
from pipelines.generation.random_model import random_pipeline
from pipelines.media.reader import UnusableVideoError, centre_crop, encode_frames, find_videos, read_clip
from pipelines.media.video import VideoWriter
from wan.utils.errors import InputError
from wan.utils.locks import exclusive
from wan.vae.wan_vae import TOY_VAE, WanVAE, new_vae

encode_videos = import_module("encode_videos")


def grey_video(path: Path, frames: int, fps: int = 16, size: tuple[int, int] = (32, 48)) -> None:
    """Frame n is grey 10·n."""
    pictures = np.broadcast_to(np.arange(frames, dtype=np.uint8)[:, None, None, None] * 10, (frames, *size, 3))
    with VideoWriter(path, *size, fps=fps, crf=1) as writer:
        writer.write(np.ascontiguousarray(pictures))


def greys(path: Path, fps: int) -> list[int]:
    """Numbers of the frames that a reader takes at a rate."""
    return [round(float(frame.mean()) / 10) for frame in read_clip(path, 32, 48, fps)]


def test_frames_are_those_that_a_player_would_show(tmp_path: Path) -> None:
    grey_video(tmp_path / "a.mp4", 12)
    assert greys(tmp_path / "a.mp4", 16) == list(range(12))
    assert greys(tmp_path / "a.mp4", 8) == [0, 2, 4, 6, 8, 10]
    assert greys(tmp_path / "a.mp4", 32) == [number // 2 for number in range(24)]
    assert greys(tmp_path / "a.mp4", 12) == [0, 1, 2, 4, 5, 6, 8, 9, 10]


def test_times_that_the_container_rounds_skip_and_repeat_no_frame(tmp_path: Path) -> None:
    with av.open(str(tmp_path / "a.mkv"), "w") as container:
        stream = container.add_stream("libx264", rate=24)
        stream.height, stream.width, stream.pix_fmt = 32, 48, "yuv420p"
        pictures = (np.full((32, 48, 3), 10 * number, dtype=np.uint8) for number in range(12))
        packets = [packet for one in pictures for packet in stream.encode(av.VideoFrame.from_ndarray(one))]
        container.mux([*packets, *stream.encode()])
    assert greys(tmp_path / "a.mkv", 24) == list(range(12))


def test_the_middle_is_cropped_to_the_aspect() -> None:
    assert centre_crop(100, 50, 1.0) == (25, 0, 75, 50)
    assert centre_crop(50, 100, 1.0) == (0, 25, 50, 75)
    assert centre_crop(96, 64, 1.5) == (0, 0, 96, 64)


def test_frames_are_cropped_and_resized(tmp_path: Path) -> None:
    picture = np.zeros((1, 64, 192, 3), dtype=np.uint8)
    picture[:, :, 64:128] = 200  # the middle third, all that a square shows
    with VideoWriter(tmp_path / "a.mp4", 64, 192, crf=1) as writer:
        writer.write(picture)
    (frame,) = read_clip(tmp_path / "a.mp4", 32, 32, 16)
    assert frame.shape == (32, 32, 3) and np.abs(frame[2:-2, 2:-2].astype(int) - 200).max() < 6


def test_videos_that_lie_on_their_side_are_turned(tmp_path: Path) -> None:
    picture = np.zeros((32, 64, 3), dtype=np.uint8)
    picture[:, :32] = 200  # the left half, which becomes the upper one when turned clockwise
    with av.open(str(tmp_path / "a.mp4"), "w") as container:
        stream = container.add_stream("libx264", rate=16)
        stream.height, stream.width, stream.pix_fmt = 32, 64, "yuv420p"
        stream.set_display_rotation(-90)
        for packet in [*stream.encode(av.VideoFrame.from_ndarray(picture)), *stream.encode()]:
            container.mux(packet)
    (frame,) = read_clip(tmp_path / "a.mp4", 64, 32, 16)
    assert frame[:28].mean() > 180 and frame[36:].mean() < 20


def test_damage_is_found_whatever_it_strikes(tmp_path: Path) -> None:
    grey_video(tmp_path / "a.mp4", 12)
    whole = (tmp_path / "a.mp4").read_bytes()
    for damaged in (
        whole[: len(whole) // 2],
        whole.replace(b"avc1", b"xxxx"),  # a codec that nobody knows
        whole.replace(b"vide", b"soun"),
        whole.replace(b"VideoHandler", b"VideoHandl\xff\xfe"),  # a name that is no text
        b"",
    ):
        (tmp_path / "b.mp4").write_bytes(damaged)
        with pytest.raises(UnusableVideoError):
            assert len(greys(tmp_path / "b.mp4", 16)) < 12
            raise UnusableVideoError("fewer frames")


def test_latents_are_those_of_the_whole_clip_and_short_clips_are_refused(tmp_path: Path) -> None:
    vae = WanVAE(new_vae(TOY_VAE | {"dim": 4}))
    grey_video(tmp_path / "a.mp4", 12)
    pictures = list(read_clip(tmp_path / "a.mp4", 32, 48, 16))
    whole = torch.from_numpy(np.stack(pictures[:9])).permute(0, 3, 1, 2)[None] / 127.5 - 1
    torch.testing.assert_close(encode_frames(vae, iter(pictures), 3), vae.encode(whole)[0], rtol=1e-4, atol=1e-5)
    with pytest.raises(UnusableVideoError, match="12 frames at this rate, 13 are needed"):
        encode_frames(vae, iter(pictures), 4)


def test_lists_and_folders(tmp_path: Path) -> None:
    for name in "abc":
        grey_video(tmp_path / f"{name}.mp4", 1)
    (tmp_path / "a.txt").write_text("a shape\nrolls\n")
    (tmp_path / "b.txt").write_text("\n")
    (video,) = find_videos(tmp_path)
    assert (video.source, video.prompt) == ("a.mp4", "a shape rolls")
    listed = tmp_path / "list.tsv"
    listed.write_text("a.mp4\ta shape\n\nsub/none.mp4\tred\n")
    assert [(one.source, one.path.is_file()) for one in find_videos(listed)] == [
        ("a.mp4", True),
        ("sub/none.mp4", False),
    ]
    for text, message in (
        ("a.mp4 a shape\n", "a tab"),
        ("a.mp4\t \n", "a tab"),
        ("a.mp4\tx\na.mp4\ty\n", "twice"),
        ("x.mp4\tx\n", "none of the 1"),
        ("", "no prompts"),
    ):
        listed.write_text(text)
        with pytest.raises(InputError, match=message):
            find_videos(listed)
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="no captioned videos"):
        find_videos(tmp_path / "empty")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    random_pipeline("toy", vae_config=TOY_VAE | {"dim": 4}).save_pretrained(folder)
    return folder


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, model_folder: Path) -> Callable[..., int]:
    """Calls the script on the videos of a folder."""
    (tmp_path / "config.yaml").write_text(
        f"model_folder: {model_folder}\nheight: 32\nwidth: 48\nnum_output_frames: 3\n"
    )
    monkeypatch.chdir(tmp_path)

    def call(*settings: str, videos: str = "videos", folder: str = "data") -> int:
        flags = ["--config", "config.yaml", "--videos", videos, "--folder", folder, "--device", "cpu"]
        monkeypatch.setattr(sys, "argv", ["encode_videos.py", *flags, *settings])
        return encode_videos.main()

    return call


def make_videos(folder: Path) -> None:
    """Three good videos, one of them with the caption of another, one too short, one broken."""
    folder.mkdir()
    for name, caption, frames in (("a", "red", 9), ("b", "blue", 12), ("c", "red", 20), ("short", "red", 8)):
        grey_video(folder / f"{name}.mp4", frames)
        (folder / f"{name}.txt").write_text(caption)
    (folder / "broken.mp4").write_bytes((folder / "c.mp4").read_bytes()[:300])
    (folder / "broken.txt").write_text("red")


def test_a_folder_becomes_a_data_set_and_a_second_run_adds_nothing(
    run: Callable[..., int], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    make_videos(tmp_path / "videos")
    assert run() == 0
    warnings = [record for record in caplog.records if record.levelname == "WARNING" and "skipped" in record.msg]
    assert [record.args[0] for record in warnings] == ["broken.mp4", "short.mp4"]
    data = LatentDataset([tmp_path / "data"])
    assert [data[number][0].shape for number in range(3)] == [(3, 16, 4, 6)] * 3
    index = json.loads((tmp_path / "data" / INDEX).read_text())
    assert [(one["key"], one["prompt"], one["seed"]) for one in index["samples"]] == [
        ("a.mp4", "red", 0),
        ("b.mp4", "blue", 0),
        ("c.mp4", "red", 0),
    ]
    assert data.settings["fps"] == 16 and len(list((tmp_path / "data" / "text").iterdir())) == 2
    before = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*") if file.is_file()}
    assert run() == 0
    assert {file: file.stat().st_mtime_ns for file in (tmp_path / "data").rglob("*") if file.is_file()} == before


def test_a_killed_run_goes_on(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_videos(tmp_path / "videos")
    real, seen = encode_videos.encode_frames, []

    def killed_at_the_second(*arguments: object) -> torch.Tensor:
        seen.append(arguments)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return real(*arguments)

    monkeypatch.setattr(encode_videos, "encode_frames", killed_at_the_second)
    assert run() == 130
    assert [sample["key"] for sample in json.loads((tmp_path / "data" / INDEX).read_text())["samples"]] == ["a.mp4"]
    assert run() == 0
    assert len(seen) == 2 + 4, "all but the first are tried, one of them again"
    assert len(LatentDataset([tmp_path / "data"])) == 3


def same_samples(folder: Path, other: Path) -> bool:
    """Whether two data sets hold equal samples in the same order."""
    data, fresh = LatentDataset([folder]), LatentDataset([other])
    pairs = ((data[number], fresh[number]) for number in range(len(fresh)))
    return data.fingerprint() == fresh.fingerprint() and all(
        torch.equal(a, b) for one, same in pairs for a, b in zip(one, same, strict=True)
    )


def test_a_data_set_follows_its_list(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    make_videos(tmp_path / "videos")
    encoded, real = [], encode_videos.encode_frames
    monkeypatch.setattr(encode_videos, "encode_frames", lambda *a: encoded.append(a) or real(*a))
    videos = tmp_path / "videos"
    (videos / "short.txt").unlink()
    (videos / "broken.txt").unlink()

    def follow(counts: str, encodings: int) -> None:
        encoded.clear()
        caplog.clear()
        assert run() == 0
        assert counts in caplog.text and len(encoded) == encodings, (caplog.text, len(encoded))
        assert run(folder=f"fresh {counts}") == 0 and same_samples(tmp_path / "data", tmp_path / f"fresh {counts}")

    follow("0 kept, 3 new, 0 replaced, 0 removed", 3)
    (videos / "a.txt").write_text("navy")
    follow("2 kept, 0 new, 1 replaced, 0 removed", 0)
    status = (videos / "b.mp4").stat()
    content = bytearray((videos / "b.mp4").read_bytes())
    content[-20] ^= 255  # in the index behind the pictures or in its text: another file of the same size and time
    (videos / "b.mp4").write_bytes(content)
    os.utime(videos / "b.mp4", ns=(status.st_atime_ns, status.st_mtime_ns))
    assert (videos / "b.mp4").stat().st_size == status.st_size
    follow("2 kept, 0 new, 1 replaced, 0 removed", 1)
    (videos / "c.txt").unlink()
    follow("2 kept, 0 new, 0 replaced, 1 removed", 0)
    (videos / "b.mp4").rename(videos / "z.mp4")
    (videos / "b.txt").rename(videos / "z.txt")
    (videos / "c.txt").write_text("red")
    follow("1 kept, 2 new, 0 replaced, 1 removed", 1)
    assert [one["key"] for one in index_of(tmp_path)] == ["a.mp4", "c.mp4", "z.mp4"]


def index_of(root: Path) -> list[dict[str, object]]:
    return list(json.loads((root / "data" / INDEX).read_text())["samples"])


def test_only_a_file_whose_times_and_size_are_the_same_is_not_read_again(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_videos(tmp_path / "videos")
    hashed, real = [], encode_videos.content_hash
    monkeypatch.setattr(encode_videos, "content_hash", lambda path: hashed.append(path.name) or real(path))
    assert run() == 0
    hashed.clear()
    assert run() == 0 and hashed == ["broken.mp4", "short.mp4"], "what became no sample is tried again"
    hashed.clear()
    (tmp_path / "videos" / "a.mp4").touch()
    assert run() == 0 and hashed == ["a.mp4", "broken.mp4", "short.mp4"]


def test_weights_count_by_their_content(
    run: Callable[..., int], tmp_path: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_videos(tmp_path / "videos")
    assert run() == 0
    copy = tmp_path / "copy"
    shutil.copytree(model_folder, copy)
    assert run(f"model_folder={copy}") == 0, "the same weights at another path"
    tokenizer = copy / "tokenizer" / "tokenizer.json"
    statistics = copy / "vae" / "config.json"
    weights = {name: next((copy / name).glob("*.safetensors")) for name in ("vae", "text_encoder")}
    for file, name in ((weights["vae"], "vae"), (weights["text_encoder"], "text_encoder")):
        before = file.read_bytes()
        save_file({key: value * 1.5 for key, value in load_file(file).items()}, file, metadata={"format": "pt"})
        assert run(f"model_folder={copy}") == 2
        assert f"({name} was" in " ".join(capsys.readouterr().err.split())
        file.write_bytes(before)
    for file, old, new, name in (
        (statistics, '"latents_mean": [\n    0.0', '"latents_mean": [\n    0.5', "vae"),
        (tokenizer, '"shape"', '"shapes"', "text_encoder"),
    ):
        before = file.read_text()
        assert old in before, before[:3000]
        file.write_text(before.replace(old, new))
        assert run(f"model_folder={copy}") == 2
        assert f"({name} was" in " ".join(capsys.readouterr().err.split())
        file.write_text(before)
    assert run(f"model_folder={copy}") == 0
    assert run("fps=8") == 2 and "fps was 16, is 8" in " ".join(capsys.readouterr().err.split())


def test_a_second_process_is_refused_by_name(
    run: Callable[..., int], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_videos(tmp_path / "videos")
    monkeypatch.setattr(encode_videos, "load_vae", lambda *args, **kwargs: pytest.fail("a model was loaded"))
    with exclusive(tmp_path / "data" / LOCK, "x"):
        assert run() == 2
    assert f"data is in use by process {os.getpid()}" in " ".join(capsys.readouterr().err.split())


def test_nothing_is_lost_when_no_video_can_be_used(run: Callable[..., int], tmp_path: Path) -> None:
    make_videos(tmp_path / "videos")
    assert run() == 0
    before = (tmp_path / "data" / INDEX).read_text()
    for file in (tmp_path / "videos").glob("*.mp4"):
        file.write_bytes(b"")
    assert run() == 2 and (tmp_path / "data" / INDEX).read_text() == before
    assert len(LatentDataset([tmp_path / "data"])) == 3


def test_latents_that_are_not_finite_are_left_out(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make_videos(tmp_path / "videos")
    real, calls = encode_videos.encode_frames, []
    monkeypatch.setattr(encode_videos, "encode_frames", lambda *a: calls.append(a) or real(*a) / (len(calls) - 1))
    assert run() == 1 and [one["key"] for one in index_of(tmp_path)] == ["b.mp4", "c.mp4"]


def test_ranks_divide_the_videos(run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    make_videos(tmp_path / "videos")
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        assert run() == 0
    assert len(LatentDataset([tmp_path / "data" / f"rank-{rank}" for rank in range(2)])) == 3


def test_what_cannot_work_fails_before_models_load(
    run: Callable[..., int], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make_videos(tmp_path / "videos")
    with monkeypatch.context() as patch:
        patch.setattr(encode_videos, "load_vae", lambda *args, **kwargs: pytest.fail("a model was loaded"))
        for settings, message in (
            (("height=30",), "do not divide"),
            (("fps=0",), "fps 0"),
            (("num_output_frames=4",), "do not divide into blocks"),
            (("frames=4",), "frames"),
        ):
            assert run(*settings) == 2
            assert message in capsys.readouterr().err
        assert run(videos="nowhere") == 2
        for file in (tmp_path / "videos").glob("*.txt"):
            file.rename(file.with_suffix(".caption"))
        assert run(folder="new/data") == 2 and "no captioned videos" in capsys.readouterr().err
        for file in (tmp_path / "videos").glob("*.caption"):
            file.rename(file.with_suffix(".txt"))
    assert run("num_output_frames=6", folder="new/data") == 2 and not (tmp_path / "new").exists()
    capsys.readouterr()
    assert run("num_output_frames=6") == 2
    assert "none of 5 videos" in capsys.readouterr().err and not (tmp_path / "data" / INDEX).exists()
