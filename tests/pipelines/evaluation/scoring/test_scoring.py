"""A folder becomes one JSON: what it holds, how a run goes on, and what is refused before any work."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pipelines.evaluation.scoring import run as scoring_run
from pipelines.evaluation.scoring.clips import find_clips
from pipelines.evaluation.scoring.metric import Blocks
from pipelines.evaluation.scoring.registry import ENTRIES, GROUPS, OWN
from pipelines.evaluation.scoring.statistics import estimate
from wan.utils.errors import InputError

Folder = Callable[..., Path]
Program = Callable[..., int]


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, tuple[str, ...]]]:
    """What is measured: video and metrics."""
    calls: list[tuple[str, tuple[str, ...]]] = []
    whole = scoring_run.measure_clip

    def noted(clip: Any, metrics: Any, *rest: Any) -> Any:
        calls.append((clip.name, tuple(metrics)))
        return whole(clip, metrics, *rest)

    monkeypatch.setattr(scoring_run, "measure_clip", noted)
    return calls


def read(path: Path) -> dict[str, Any]:
    page: dict[str, Any] = json.loads(path.read_text())
    return page


def test_what_a_run_says(program: Program, folder: Folder, tmp_path: Path) -> None:
    out = tmp_path / "scores.json"
    assert program(folder(), "--metrics", "all", "--drift_seconds", 1, "--json", out) == 0
    page = read(out)
    assert set(page["videos"]) == {"one-0.mp4", "one-1.mp4", "two-0.mp4", "two-1.mp4"}
    assert set(page["metrics"]) == set(OWN)
    video = page["videos"]["two-1.mp4"]
    assert (video["group"], video["index"], video["num_frames"], video["prompt"]) == ("two", 1, 33, None)
    flicker = page["metrics"]["temporal_flickering"]
    assert flicker["direction"] == "higher" and "vbench" in flicker["source"] and flicker["versions"]["torch"]
    values = [entry["scores"]["temporal_flickering"]["value"] for entry in page["videos"].values()]
    assert flicker["value"]["mean"] == pytest.approx(np.mean(values))
    assert flicker["value"]["prompts"] == 2 and flicker["value"]["videos"] == 4
    low, high = flicker["value"]["interval"]
    assert low == pytest.approx(np.mean(values[:2])) or high == pytest.approx(np.mean(values[:2]))
    assert flicker["drift"]["videos"] == 4 and "drift" in video["scores"]["temporal_flickering"]
    assert "--blocks" in page["metrics"]["seam_jumps"]["not_measured"]
    assert "--reference" in page["metrics"]["psnr"]["not_measured"]
    reason = page["metrics"]["motion_smoothness"]["not_measured"]
    assert "make vbench-env" in reason or "amt-s.pth" in reason
    assert page["environment"]["versions"]["torch"] and page["settings"]["drift_seconds"] == 1.0


def test_a_run_goes_on_by_video_and_metric(
    program: Program, folder: Folder, tmp_path: Path, measured: list[Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    out, videos = tmp_path / "scores.json", folder()
    counted = scoring_run.measure_clip

    def until_second(*given: Any) -> Any:
        if len(measured) == 2:
            raise KeyboardInterrupt
        return counted(*given)

    monkeypatch.setattr(scoring_run, "measure_clip", until_second)
    assert program(videos, "--metrics", "temporal_flickering", "--json", out) == 130
    assert len(read(out)["videos"]) == 2
    monkeypatch.setattr(scoring_run, "measure_clip", counted)
    measured.clear()
    assert program(videos, "--metrics", "temporal_flickering", "--json", out) == 0
    assert [name for name, _ in measured] == ["two-0.mp4", "two-1.mp4"]
    measured.clear()
    assert program(videos, "--metrics", "temporal_flickering", "sharpness", "--json", out) == 0
    assert {names for _, names in measured} == {("sharpness",)} and len(measured) == 4
    before = read(out)
    folder("other", prompts=("one",), samples=1, change=lambda frames: frames // 2)
    (videos / "one-0.mp4").write_bytes((tmp_path / "other" / "one-0.mp4").read_bytes())
    measured.clear()
    assert program(videos, "--metrics", "sharpness", "temporal_flickering", "--json", out) == 0
    assert [name for name, _ in measured] == ["one-0.mp4"], "the video that changed"
    after = read(out)
    assert after["metrics"]["sharpness"]["value"] != before["metrics"]["sharpness"]["value"]
    fresh = tmp_path / "fresh.json"
    assert program(videos, "--metrics", "sharpness", "temporal_flickering", "--json", fresh) == 0
    assert read(fresh)["videos"] == after["videos"], "as in one go"


def test_sums_are_of_the_videos_that_are_there(program: Program, folder: Folder, tmp_path: Path) -> None:
    out, videos = tmp_path / "scores.json", folder()
    assert program(videos, "--metrics", "sharpness", "dynamic_range", "--json", out) == 0
    folder("other", prompts=("one",), samples=1, change=lambda frames: frames // 2)
    (videos / "one-0.mp4").write_bytes((tmp_path / "other" / "one-0.mp4").read_bytes())
    assert program(videos, "--metrics", "sharpness", "--json", out) == 0
    page = read(out)["metrics"]
    assert page["sharpness"]["value"]["videos"] == 4 and page["dynamic_range"]["value"]["videos"] == 3


def test_other_blocks_or_prompts_are_measured_again(
    program: Program, folder: Folder, tmp_path: Path, measured: list[Any]
) -> None:
    out, fresh, videos = tmp_path / "scores.json", tmp_path / "fresh.json", folder()
    for blocks in ((9, 12), (4, 4)):
        assert program(videos, "--blocks", *blocks, "--json", out) == 0
    assert len(measured) == 8
    assert program(videos, "--blocks", 4, 4, "--json", fresh) == 0
    assert read(out)["videos"] == read(fresh)["videos"] and read(out)["metrics"] == read(fresh)["metrics"]
    measured.clear()
    assert program(videos, "--blocks", 4, 4, "--json", out) == 0
    assert not measured
    assert program(videos, "--blocks", 4, 4, "--prompts_from_names", "--json", out) == 0
    assert len(measured) == 4 and read(out)["videos"]["one-0.mp4"]["prompt"] == "one"


def test_other_settings_are_refused(
    program: Program, folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, videos, reference = tmp_path / "scores.json", folder(), folder("reference")
    other = folder("other", change=lambda frames: frames // 2)
    assert program(videos, "--metrics", "psnr", "--reference", reference, "--json", out) == 0
    before = out.read_bytes()
    for flags, words in (
        (("--metrics", "psnr", "--reference", reference, "--drift_seconds", 2), "drift_seconds was 5.0, is 2.0"),
        (("--metrics", "psnr", "--reference", other), "psnr of"),
        (("--metrics", "psnr"), "which cannot be measured now (no reference"),
    ):
        assert program(videos, *flags, "--json", out) == 2
        assert words in " ".join(capsys.readouterr().err.split())
    (videos / "two-1.mp4").unlink()
    assert program(videos, "--metrics", "psnr", "--reference", reference, "--json", out) == 2
    assert "scores of 1 videos that" in " ".join(capsys.readouterr().err.split())
    assert out.read_bytes() == before


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--metrics", "beauty"], "--metrics beauty: no such metric; there are temporal_flickering"),
        (["--weights", "dino"], "--weights dino: give NAME=FILE"),
        (["--weights", "dino=no/file"], "--weights dino: no file no/file; it comes from https://"),
        (["--reference", "nowhere"], "no folder nowhere"),
        (["--blocks", "9"], "--blocks"),
        (["--blocks", "9", "0"], "--blocks"),
        (["--tolerance", "1"], "--tolerance and --common are for --compare"),
    ],
)
def test_bad_flags(
    flags: list[str],
    words: str,
    program: Program,
    folder: Folder,
    tmp_path: Path,
    measured: list[Any],
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert program(folder(), *flags, "--json", tmp_path / "scores.json") == 2
    assert words in " ".join(capsys.readouterr().err.split())
    assert not measured and not (tmp_path / "scores.json").exists()


def test_bad_folders(
    program: Program, folder: Folder, tmp_path: Path, measured: list[Any], capsys: pytest.CaptureFixture[str]
) -> None:
    out, empty, videos = tmp_path / "scores.json", tmp_path / "empty", folder()
    empty.mkdir()
    whole = (videos / "two-0.mp4").read_bytes()
    for content, target, words in (
        (None, tmp_path / "none", "no folder"),
        (None, empty, "no videos in"),
        (b"text", videos, "two-0.mp4 as a video"),
        (whole[: len(whole) // 2], videos, "two-0.mp4"),
    ):
        if content is not None:
            (videos / "two-0.mp4").write_bytes(content)
        assert program(target, "--json", out) == 2
        error = capsys.readouterr().err
        assert words in " ".join(error.split()) and "Traceback" not in error
    assert not out.exists() and not measured
    assert program("--json", out) == 2 and program(videos) == 2


@pytest.fixture
def suite(folder: Folder, tmp_path: Path) -> Path:
    """What scripts/sample_suite.py writes of blocks of 3 latent frames, the first of which is one frame of video."""
    folder("suite/videos")
    settings = {"suite": "mine", "num_output_frames": 9, "frames_per_block": 3}
    videos = {
        clip.name: {"prompt": f"{clip.group}, in colour", "index": clip.index, "sha256": clip.sha256}
        for clip in find_clips(tmp_path / "suite" / "videos").clips
    }
    (tmp_path / "suite" / "manifest.json").write_text(json.dumps({"settings": settings, "videos": videos}))
    return tmp_path / "suite"


def test_a_manifest_tells_prompts_and_blocks(suite: Path, program: Program, tmp_path: Path) -> None:
    for place in (suite, suite / "videos"):
        found = find_clips(place)
        assert found.settings is not None and found.settings["suite"] == "mine"
        assert {clip.prompt for clip in found.clips} == {"one, in colour", "two, in colour"}
        assert {clip.blocks for clip in found.clips} == {Blocks(9, 12)}
    assert find_clips(suite, Blocks(4, 4)).clips[0].blocks == Blocks(4, 4)
    assert program(suite, "--json", tmp_path / "scores.json") == 0
    page = read(tmp_path / "scores.json")
    assert page["made_with"]["suite"] == "mine" and page["metrics"]["seam_jumps"]["value"]["videos"] == 4


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda page: page["videos"].pop("one-0.mp4"), "1 videos it does not name, such as one-0.mp4"),
        (lambda page: page["videos"].update({"x.mp4": {}}), "1 videos are not there, such as x.mp4"),
        (lambda page: page["videos"]["one-0.mp4"].update(sha256="0"), "one-0.mp4 is not the video that"),
        (lambda page: page["videos"]["one-0.mp4"].pop("prompt"), "lacks prompt, index or hash of one-0.mp4"),
        (lambda page: page["videos"].update({"one-0.mp4": 3}), "lacks prompt, index or hash of one-0.mp4"),
        (lambda page: page.pop("settings"), "is no manifest"),
        (lambda page: page["videos"].clear(), "names no videos"),
        (lambda page: page["videos"].update({"../x.mp4": {}}), "are not there"),
    ],
)
def test_a_manifest_that_does_not_fit(change: Callable[[Any], object], words: str, suite: Path) -> None:
    page = read(suite / "manifest.json")
    change(page)
    (suite / "manifest.json").write_text(json.dumps(page))
    with pytest.raises(InputError, match=words.replace("(", r"\(")):
        find_clips(suite)


def test_two_videos_of_one_name(folder: Folder, suite: Path) -> None:
    videos = folder()
    (videos / "one-0.mp4").rename(videos / "one.mp4")
    assert {clip.group for clip in find_clips(videos).clips} == {"one", "two"}
    (videos / "one-00.mp4").write_bytes((videos / "one-1.mp4").read_bytes())
    with pytest.raises(InputError, match=r"one-00\.mp4 and one\.mp4 are both number 0 of 'one'"):
        find_clips(videos)
    page = read(suite / "manifest.json")
    page["videos"]["one-1.mp4"]["index"] = 0
    (suite / "manifest.json").write_text(json.dumps(page))
    with pytest.raises(InputError, match="are both number 0"):
        find_clips(suite)


def test_prompts_of_names(folder: Folder) -> None:
    assert {clip.prompt for clip in find_clips(folder(), prompts_from_names=True).clips} == {"one", "two"}


def test_damage_that_only_the_decoder_sees_ends_the_run_in_one_line(
    program: Program,
    folder: Folder,
    damage_frames: Callable[[Path], None],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    videos = folder(samples=1, num_frames=64)
    damage_frames(videos / "two-0.mp4")
    assert program(videos, "--json", tmp_path / "scores.json") == 2
    assert "two-0.mp4" in " ".join(capsys.readouterr().err.split())
    assert list(read(tmp_path / "scores.json")["videos"]) == ["one-0.mp4"], "what was scored is kept"


def test_memory_does_not_grow_with_the_video(write: Callable[..., Path], tmp_path: Path) -> None:
    chunks = []
    frames = np.zeros((70, 16, 16, 3), np.uint8)
    (clip,) = find_clips(write(tmp_path / "x" / "a.mp4", frames).parent).clips
    chunks = [len(chunk) for chunk in scoring_run._chunks(clip)]
    assert sum(chunks) == 70 and max(chunks) == scoring_run.MAX_FRAMES


def test_intervals() -> None:
    generator = np.random.default_rng(3)
    values = {str(place): list(generator.normal(5, 1, 4)) for place in range(50)}
    found = estimate(values)
    means = np.array([np.mean(group) for group in values.values()])
    error = means.std() / np.sqrt(50)
    assert found.low is not None and found.high is not None and found.mean == pytest.approx(means.mean())
    assert found.low == pytest.approx(found.mean - 1.96 * error, abs=0.1 * error)
    assert found.high == pytest.approx(found.mean + 1.96 * error, abs=0.1 * error)
    uneven = estimate({"a": [0.0] * 9, "b": [1.0]})
    assert uneven.mean == 0.5 and (uneven.low, uneven.high) == (0, 1), "a prompt counts once"
    assert estimate({"a": [1.0, 2.0]}).low is None


def test_groups_name_metrics() -> None:
    named = [name for group in ("pixels", "reference", "learned", "sets") for name in GROUPS[group]]
    others = [name for group in ("vbench", "vbench_long", "fastvideo") for name in GROUPS[group]]
    assert set(GROUPS["all"]) == set(named) and set(ENTRIES) == {*named, *others}
