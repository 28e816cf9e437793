"""Suites become videos: names, manifest, seeds; resumed, refused, divided over processes."""

import hashlib
import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from inference_world import flags_of, planned

from pipelines.evaluation.sampling import Manifest, plan_videos
from pipelines.evaluation.suites import Suite, SuiteEntry
from pipelines.media.reader import read_clip
from pipelines.media.video import count_frames
from pipelines.prompts.jobs import prompt_seed
from wan.utils.errors import InputError

sample_suite = import_module("sample_suite")
Sample = Callable[..., int]
LINES: list[dict[str, Any]] = [
    {"prompt": "A red ring, turning.", "extended": "A thin red ring turns slowly in front of a grey wall."},
    {"prompt": "up/../../down", "dimensions": ["paths"]},
]


@pytest.fixture
def suite(tmp_path: Path) -> Path:
    path = tmp_path / "mine.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in LINES))
    return path


@pytest.fixture
def sample(monkeypatch: pytest.MonkeyPatch, config: Path, suite: Path) -> Sample:
    def run(*flags: object) -> int:
        chosen = () if "--suite" in flags else ("--suite", suite)
        monkeypatch.setattr(sys, "argv", ["sample_suite.py", *flags_of(config, *map(str, (*chosen, *flags)))])
        status: int = sample_suite.main()
        return status

    return run


def manifest(folder: Path) -> dict[str, Any]:
    page: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    return page


def test_a_suite_is_sampled_and_gone_on_with(
    sample: Sample, tmp_path: Path, suite: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert sample("--limit", 1, "--dimensions", "paths") == 0
    (first,) = (out / "videos").iterdir()
    assert first.name.startswith("up-down-") and first.name.endswith("-0.mp4")
    before = first.stat().st_mtime_ns
    assert sample("--samples", 2) == 0
    assert first.stat().st_mtime_ns == before, "what is whole is kept"
    names = {path.name for path in (out / "videos").iterdir()}
    assert {"A red ring, turning.-0.mp4", "A red ring, turning.-1.mp4"} < names and len(names) == 4
    page = manifest(out)
    assert set(page["videos"]) == names and page["settings"]["suite"] == "mine"
    assert page["settings"]["weights"]["transformer"] and page["settings"]["num_output_frames"] == 6
    for name, entry in page["videos"].items():
        content = (out / "videos" / name).read_bytes()
        assert entry["sha256"] == hashlib.sha256(content).hexdigest()
        assert entry["seed"] == prompt_seed(0, entry["prompt"], entry["index"]) and entry["frames"] == 21
        record = json.loads((out / "records" / name).with_suffix(".json").read_text())
        assert record["prompt"] == entry.get("extended", entry["prompt"]) and record["seed"] == entry["seed"]
    entry = page["videos"]["A red ring, turning.-1.mp4"]
    assert entry["extended"] == LINES[0]["extended"] and entry["index"] == 1
    assert page["videos"][first.name]["prompt"] == "up/../../down" and page["videos"][first.name]["dimensions"]
    assert count_frames(first) == 21 and {path.name for path in out.iterdir()} == {"videos", "records", "manifest.json"}
    _refusals(sample, suite, capsys)
    first.write_bytes(b"damaged")
    assert sample("--samples", 2) == 0 and manifest(out) == page, "the same video is made again"


def _refusals(sample: Sample, suite: Path, capsys: pytest.CaptureFixture[str]) -> None:
    capsys.readouterr()
    for flags, words in (
        (("--seed", 1), "seed was 0, is 1"),
        (("fps=8",), "fps was 16, is 8"),
    ):
        assert sample(*flags) == 2
        error = capsys.readouterr().err
        assert "manifest.json was made with other settings" in error and words in error, error
    text = suite.read_text()
    suite.write_text(text.replace("grey wall", "white wall"))
    assert sample() == 2
    error = capsys.readouterr().err
    assert "prompt was A thin red ring" in error and "white wall" in error, error
    suite.write_text(text)


def test_ranks_share_the_videos_and_the_manifest(
    sample: Sample, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert sample("--output_folder", tmp_path / "alone") == 0
    shares = []
    for rank in range(2):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", "2")
        before = len(list((tmp_path / "both" / "videos").glob("*.mp4")))
        assert sample("--output_folder", tmp_path / "both") == 0
        shares.append(len(list((tmp_path / "both" / "videos").glob("*.mp4"))) - before)
    assert shares == [1, 1] and manifest(tmp_path / "both") == manifest(tmp_path / "alone")


def test_videos_of_the_other_length_are_warned_of(config: Path, caplog: pytest.LogCaptureFixture) -> None:
    """81 frames take 5.06 s."""
    for suite, frames, warned in (
        ("vbench", 20, False),
        ("vbench", 21, True),
        ("vbench-long", 20, True),
        ("vbench-long", 21, False),
        ("moviegen", 21, False),
    ):
        caplog.clear()
        run = planned(config, "--prompt", "x", f"num_output_frames={frames}", "frames_per_block=1")
        sample_suite.warn_of_length(run, suite)
        assert ("VBench-Long" in caplog.text) == warned, (suite, frames)


def test_what_a_video_of_several_prompts_leaves_out_is_written_down(sample: Sample, tmp_path: Path) -> None:
    (tmp_path / "several.jsonl").write_text('{"prompts": ["a fox", "it leaps"]}')
    assert sample("--suite", tmp_path / "several.jsonl", "--first_prompt", "num_output_frames=3") == 0
    assert manifest(tmp_path / "out")["videos"]["a fox-0.mp4"]["left_out"] == ["it leaps"]


def test_a_suite_of_several_prompts_per_video_is_sampled(
    sample: Sample, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Up to the switch a video is that of its first prompt; after it, another."""
    several = tmp_path / "several.jsonl"
    several.write_text('{"prompts": ["a red shape", {"prompt": "a blue shape"}]}')
    assert sample("--suite", several) == 0
    (entry,) = manifest(tmp_path / "out")["videos"].values()
    assert entry["prompts"] == [{"prompt": "a red shape"}, {"prompt": "a blue shape"}] and "left_out" not in entry
    record = json.loads((tmp_path / "out" / "records" / "a red shape-0.json").read_text())
    assert record["prompts"] == entry["prompts"]
    capsys.readouterr()
    assert sample("--suite", several, "--first_prompt") == 2, "one folder holds no mix of both"
    assert "prompts was" in capsys.readouterr().err
    assert sample("--suite", several, "--first_prompt", "--output_folder", tmp_path / "first") == 0
    clips = [
        list(read_clip(tmp_path / folder / "videos" / "a red shape-0.mp4", 32, 48, 16)) for folder in ("out", "first")
    ]
    errors = [np.abs(a.astype(int) - b).mean() for a, b in zip(*clips, strict=True)]
    assert len(errors) == 21 and max(errors[:9]) < 1 < np.mean(errors[9:]), "the second of two blocks is another"


def test_seeds_and_names_do_not_depend_on_the_part() -> None:
    entries = tuple(SuiteEntry(prompt, samples=2) for prompt in ("A", "a", "b"))
    whole = Suite("x", entries)
    everything = {video.job.name: video for video in plan_videos(whole, whole, 3, ignores_case=True)}
    some = plan_videos(whole, Suite("x", entries[1:2]), 3, ignores_case=True)
    assert [everything[video.job.name] for video in some] == some and len(everything) == 6
    assert [video.index for video in everything.values()] == [0, 0, 0, 1, 1, 1], "a stopped run has every prompt"
    assert len({video.job.seed for video in everything.values()}) == 6
    extended = tuple(SuiteEntry(entry.prompt, "long " + entry.prompt) for entry in entries)
    (first, *_) = plan_videos(Suite("x", extended), Suite("x", extended), 3, ignores_case=True)
    assert first.job.seed == everything["A-0"].job.seed and first.job.prompt == "long A"


def test_a_damaged_manifest_is_refused(tmp_path: Path) -> None:
    (tmp_path / "manifest.json").write_text('{"settings": {}, "videos": []}')
    with pytest.raises(InputError, match="holds no such results"):
        Manifest(tmp_path, "x", 0, ()).begin({"fps": 16})
    (tmp_path / "manifest.json").write_text("{")
    with pytest.raises(InputError, match="not valid JSON"):
        Manifest(tmp_path, "x", 0, ()).begin({"fps": 16})


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--suite", "nothing"), "no suite nothing: give vbench, vbench-long"),
        (("--suite", "vbench"), "run scripts/download_suites.py --suite vbench"),
        (("--dimensions", "size"), "--dimensions size: mine has paths"),
        (("--suite", "interactive"), "3 prompts for 2 blocks: make the video longer"),
        (("--on_switch", "recompute"), "on_switch is of a prompt that changes"),
        (("--samples", 0), "--videos_per_prompt 0 is out of range"),
        (("strength=0.5",), "strength is of a video"),
    ],
)
def test_what_cannot_be_sampled_is_one_line(
    flags: tuple[object, ...],
    words: str,
    sample: Sample,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(sample_suite, "load_pipeline", lambda run: pytest.fail("it began"))
    assert sample(*flags, "--suites_folder", tmp_path / "none") == 2
    error = capsys.readouterr().err
    assert words in error and error.count("\n") == 1, error
