"""Scoring by several processes: the same file as by one, also after some were killed."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from paths import ROOT

from pipelines.evaluation.scoring import run as scoring_run
from pipelines.evaluation.scoring.ranks.shares import share_path
from pipelines.evaluation.scoring.ranks.team import Timing, summed

Folder = Callable[..., Path]
Program = Callable[..., int]
SLOW = """
import os, sys, time
from pathlib import Path
from wan.utils.signals import end_on_signals
import evaluate
from pipelines.evaluation.scoring import run

whole, run.SAVE_SECONDS = run.measure_clip, 0.0

def slowly(*given):
    time.sleep(0.5)
    return whole(*given)

run.measure_clip = slowly
Path(__file__).with_name(f"process-{os.getpid()}").touch()
raise SystemExit(evaluate.main())
"""
NAMES = tuple("abcdefg")


def read(path: Path) -> Any:
    return json.loads(path.read_text())


def launched(processes: int, program: Path, *words: object) -> "subprocess.Popen[str]":
    """A program under torchrun, in a session of its own."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(processes)]
    environment = os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT / 'scripts'}", "OMP_NUM_THREADS": "1"}
    line = [*launcher, str(program), *map(str, words), "--device", "cpu"]
    pipe = subprocess.PIPE
    return subprocess.Popen(
        line, env=environment, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True, cwd=ROOT
    )


def assert_same_scores(first: Path, second: Path) -> None:
    """All but the time that it took, and where."""
    pages = [read(path) for path in (first, second)]
    assert list(pages[0]["videos"]) == list(pages[1]["videos"])
    for key in ("settings", "videos", "metrics", "made_with", "folder"):
        assert pages[0][key] == pages[1][key], key


def test_three_processes_score_as_one_does(folder: Folder, script: Path, program: Program, tmp_path: Path) -> None:
    """Eleven videos are no multiple of three."""
    names = (*NAMES, "hh", "ii", "jj", "kk")
    videos, reference = folder("videos", names, 1), folder("real", names, 1, change=lambda frames: frames // 2)
    flags = (videos, "--metrics", "pixels", "psnr", "sets", "--reference", reference, "--blocks", 5, 4)
    flags += ("--fvd_network", script, "--json")
    alone, together = tmp_path / "alone.json", tmp_path / "together.json"
    assert program(*flags, alone, "--device", "cpu") == 0
    process = launched(3, ROOT / "scripts" / "evaluate.py", *flags, together)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 0, said
    assert " ".join(said.split()).count("the scores of 11 videos are in") == 1, "one process speaks"
    assert_same_scores(alone, together)
    assert {path.name for path in tmp_path.iterdir()} == {
        "alone.json",
        "alone.json.features",
        "together.json",
        "together.json.features",
        "videos",
        "real",
    }
    timing = read(together)["timing"]["sharpness"]
    assert timing["processes"] == 3 and timing["frames"] == 11 * 33
    assert timing["frames_per_second"] == pytest.approx(timing["frames"] / timing["seconds"])


def test_a_killed_run_goes_on(
    folder: Folder, program: Program, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes are killed after both have saved something; one process finishes, and measures nothing twice."""
    videos, out, fresh = folder("videos", NAMES, 1), tmp_path / "scores.json", tmp_path / "fresh.json"
    flags = (videos, "--metrics", "sharpness", "dynamic_range", "--json")
    (tmp_path / "slow.py").write_text(SLOW)
    process = launched(2, tmp_path / "slow.py", *flags, out)
    share = share_path(out, 1)
    try:
        until = time.monotonic() + 120
        while not all(path.exists() and read(path)["videos"] for path in (out, share)):
            assert time.monotonic() < until and process.poll() is None, process.communicate()[0]
            time.sleep(0.05)
    finally:
        # torchrun gives each process a session of its own.
        for path in tmp_path.glob("process-*"):
            with suppress(ProcessLookupError):
                os.kill(int(path.name.removeprefix("process-")), signal.SIGKILL)
    process.communicate(timeout=60)
    kept = read(out)["videos"].keys() | read(share)["videos"].keys()
    assert 2 <= len(kept) < 7
    measured = []
    whole = scoring_run.measure_clip

    def noted(clip: Any, *rest: Any) -> Any:
        measured.append(clip.name)
        return whole(clip, *rest)

    monkeypatch.setattr(scoring_run, "measure_clip", noted)
    assert program(*flags, out, "--device", "cpu") == 0
    assert sorted([*measured, *kept]) == [f"{name}-0.mp4" for name in NAMES] and not share.exists()
    assert program(*flags, fresh, "--device", "cpu") == 0
    assert_same_scores(out, fresh)


def test_a_damaged_video_ends_all_and_loses_nothing(
    folder: Folder, damage_frames: Callable[[Path], None], tmp_path: Path
) -> None:
    videos, out = folder("videos", NAMES[:4], 1, num_frames=64), tmp_path / "scores.json"
    damage_frames(videos / "d-0.mp4")
    process = launched(2, ROOT / "scripts" / "evaluate.py", videos, "--metrics", "sharpness", "--json", out)
    said, _ = process.communicate(timeout=180)
    assert process.returncode == 1 and "d-0.mp4" in " ".join(said.split())
    share = share_path(out, 1)
    kept = read(out)["videos"].keys() | (read(share)["videos"].keys() if share.exists() else set())
    assert kept == {"a-0.mp4", "b-0.mp4", "c-0.mp4"}


@pytest.fixture
def parted(folder: Folder, program: Program, tmp_path: Path) -> tuple[Path, Path, Path]:
    """A folder of four videos, a file with the scores of two of them, and a share with the others."""
    videos, out = folder("videos", NAMES[:4], 1), tmp_path / "scores.json"
    assert program(videos, "--metrics", "sharpness", "dynamic_range", "--json", out) == 0
    page, share = read(out), share_path(out, 3)
    others = {name: page["videos"].pop(name) for name in ("c-0.mp4", "d-0.mp4")}
    out.write_text(json.dumps(page))
    share.write_text(json.dumps(page | {"videos": others}))
    return videos, out, share


@pytest.mark.parametrize(
    ("change", "left"),
    [
        (lambda page: page, 0),
        (lambda page: page["settings"].update(drift_seconds=3.0), 2),
        (lambda page: page["metrics"]["sharpness"].update(identity={"weights": "others"}), 2),
        (lambda page: page["metrics"].pop("sharpness"), 2),
        (lambda page: page["videos"]["c-0.mp4"].update(sha256="0"), 1),
        (lambda page: page["videos"].update({"c-0.mp4": 3}), 2),
        (lambda page: page.clear(), 2),
    ],
)
def test_shares_are_taken_if_they_fit(
    change: Callable[[Any], object],
    left: int,
    parted: tuple[Path, Path, Path],
    program: Program,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    videos, out, share = parted
    page = read(share)
    change(page)
    share.write_text(json.dumps(page))
    measured: list[str] = []
    whole = scoring_run.measure_clip

    def noted(clip: Any, *rest: Any) -> Any:
        measured.append(clip.name)
        return whole(clip, *rest)

    monkeypatch.setattr(scoring_run, "measure_clip", noted)
    assert program(videos, "--metrics", "sharpness", "dynamic_range", "--json", out) == 0
    assert len(measured) == left and not share.exists()
    fresh = tmp_path / "fresh.json"
    assert program(videos, "--metrics", "sharpness", "dynamic_range", "--json", fresh) == 0
    assert_same_scores(out, fresh)


def test_shares_of_a_file_that_is_gone_count_for_nothing(parted: tuple[Path, Path, Path], program: Program) -> None:
    videos, out, share = parted
    out.unlink()
    assert program(videos, "--metrics", "dynamic_range", "--json", out) == 0
    assert not share.exists() and read(out)["videos"]["c-0.mp4"]["scores"].keys() == {"dynamic_range"}


def test_comparing_is_work_for_one(program: Program, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert program("--compare", "a", "b") == 2
    assert "start it without torchrun" in " ".join(capsys.readouterr().err.split())


def test_frames_per_second_of_several_processes() -> None:
    parts = [Timing({"a": 2.0, "b": 1.0}, {"a": 30}), Timing({"a": 1.0}, {"a": 30})]
    assert summed(parts) == {"a": {"frames_per_second": 20.0, "frames": 60, "seconds": 3.0, "processes": 2}}
