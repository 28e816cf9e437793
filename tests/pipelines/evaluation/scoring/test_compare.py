"""Two runs are compared: verdicts, intervals, the status; what spoils the toy model's pictures fails."""

import json
import math
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from paths import ROOT

from pipelines.evaluation.scoring.compare import BETTER, CHANGED, EQUAL, NOT_COMPARED, WORSE, Tolerance, compare
from pipelines.media.video import read_video
from wan.utils.errors import InputError

evaluate, sample_suite = import_module("evaluate"), import_module("sample_suite")
Frames = NDArray[np.uint8]
Pages = Callable[..., tuple[Path, Path]]
PROMPTS = 12


def page(values: dict[str, list[float]], direction: str = "higher", **about: Any) -> dict[str, Any]:
    """Scores of one metric by prompt."""
    facts = {"num_frames": 9, "height": 8, "width": 8, "fps": 16.0}
    videos = {
        f"{prompt}-{index}.mp4": {"group": prompt, "index": index, "scores": {"it": {"value": value}}} | facts
        for prompt, group in values.items()
        for index, value in enumerate(group)
    }
    metrics = {"it": {"direction": direction, "unit": "points", "identity": {}} | about}
    return {"settings": {"format": 1}, "videos": videos, "metrics": metrics}


@pytest.fixture
def pages(tmp_path: Path) -> Pages:
    """Writes two files; values of the second are those of the first plus a shift and noise."""

    def write(shift: float, noise: float, direction: str = "higher", samples: int = 2) -> tuple[Path, Path]:
        generator = np.random.default_rng(1)
        first = {f"p{place}": list(generator.normal(10, 5, samples)) for place in range(PROMPTS)}
        second = {
            prompt: [value + shift + generator.normal(0, noise) for value in values] for prompt, values in first.items()
        }
        for name, values in (("a", first), ("b", second)):
            (tmp_path / f"{name}.json").write_text(json.dumps(page(values, direction)))
        return tmp_path / "a.json", tmp_path / "b.json"

    return write


@pytest.mark.parametrize(
    ("direction", "shift", "verdict"),
    [
        ("higher", 0.5, BETTER),
        ("higher", -0.5, WORSE),
        ("lower", 0.5, WORSE),
        ("lower", -0.5, BETTER),
        ("same", 0.5, CHANGED),
        ("same", -0.5, CHANGED),
        ("higher", 0.0, EQUAL),
    ],
)
def test_verdicts(pages: Pages, direction: str, shift: float, verdict: str) -> None:
    (row,) = compare(*pages(shift, 0.1, direction), Tolerance())
    assert row.verdict == verdict and row.fails == (verdict in (WORSE, CHANGED))
    assert row.difference is not None and row.difference.mean == pytest.approx(shift, abs=0.1)
    (lenient,) = compare(*pages(shift, 0.1, direction), Tolerance(absolute={"it": 0.7}))
    assert not lenient.fails and lenient.verdict == verdict
    assert row.first is not None
    (relative,) = compare(*pages(shift, 0.1, direction), Tolerance(fraction=0.7 / row.first))
    assert not relative.fails


def test_pairs_see_what_means_do_not(pages: Pages) -> None:
    """Prompts differ by 5 points, the runs by 0.5: the interval is that of the paired differences."""
    paths = pages(-0.5, 0.1)
    (row,) = compare(*paths, Tolerance())
    first, second = (json.loads(path.read_text())["videos"] for path in paths)
    by_prompt: dict[str, list[float]] = {}
    for name in first:
        difference = second[name]["scores"]["it"]["value"] - first[name]["scores"]["it"]["value"]
        by_prompt.setdefault(first[name]["group"], []).append(difference)
    means = np.array([np.mean(group) for group in by_prompt.values()])
    assert row.difference is not None and row.difference.low is not None and row.difference.high is not None
    width = 2 * 1.96 * means.std() / math.sqrt(PROMPTS)
    assert row.difference.high - row.difference.low == pytest.approx(width, rel=0.15)
    assert row.difference.mean == pytest.approx(means.mean())
    (noisy,) = compare(*pages(-0.5, 3.0), Tolerance())
    assert noisy.verdict == EQUAL and not noisy.fails, "the same shift in much noise"


def changed(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


def test_what_the_second_file_lacks_is_not_passed_over(pages: Pages) -> None:
    first, second = pages(0.0, 0.1)
    changed(second, lambda page: page["videos"].pop("p3-1.mp4"))
    for paths in ((first, second), (second, first)):
        with pytest.raises(InputError, match=r"lacks 1 videos of .*number 1 of 'p3'.*--common"):
            compare(*paths, Tolerance())
    (row,) = compare(first, second, Tolerance(), common=True)
    assert row.difference is not None and row.difference.num_values == 2 * PROMPTS - 1
    first, second = pages(0.0, 0.1)
    changed(second, lambda page: page["videos"]["p3-1.mp4"]["scores"].update(it={"not_measured": "no"}))
    (row,) = compare(first, second, Tolerance())
    assert row.verdict == EQUAL and row.fails and row.reason == "1 of 24 videos have no value in one of the files"
    assert not compare(second, first, Tolerance())[0].fails
    changed(first, lambda page: page["metrics"].update(more=page["metrics"]["it"]))
    for video in ("p1-0.mp4", "p2-0.mp4"):
        changed(first, lambda page, video=video: page["videos"][video]["scores"].update(more={"value": 1.0}))  # type: ignore[misc]
    changed(second, lambda page: page["metrics"].update(more={"direction": "higher", "not_measured": "no weights"}))
    more = compare(first, second, Tolerance())[1]
    assert more.verdict == NOT_COMPARED and more.fails and more.reason == f"in {second}: no weights"
    assert not compare(second, first, Tolerance())[1].fails, "the first file has no value to fall behind"
    with pytest.raises(InputError, match="no values of the same metric: more"):
        compare(first, second, Tolerance(), ["more"])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda page: page["settings"].update(drift_seconds=3), "drift_seconds was nothing, is 3"),
        (lambda page: page["metrics"]["it"].update(identity={"weights": "ab"}), "weights was nothing, is ab"),
        (lambda page: page.pop("videos"), "holds no scores"),
        (lambda page: page["videos"].update(x=3), "holds no scores of x"),
        (lambda page: page["videos"]["p1-0.mp4"].update(index="0"), "holds no scores of p1-0.mp4"),
        (lambda page: page["videos"]["p1-0.mp4"]["scores"].update(it=[1.0]), "holds no scores of p1-0.mp4"),
        (lambda page: page["metrics"].update(it=3), "does not say what it is"),
        (lambda page: page["metrics"]["it"].update(identity=3), "does not say what it is"),
        (lambda page: page["metrics"].clear(), "no values of the same metric"),
    ],
)
def test_files_that_cannot_be_compared(pages: Pages, change: Callable[[dict[str, Any]], object], words: str) -> None:
    first, second = pages(0.0, 0.1)
    changed(second, change)
    with pytest.raises(InputError, match=words):
        compare(first, second, Tolerance())


def test_too_few_prompts(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps(page({"only": [1.0, 2.0]})))
    with pytest.raises(InputError, match="fewer than 2 prompts"):
        compare(tmp_path / "a.json", tmp_path / "a.json", Tolerance())


def run(monkeypatch: pytest.MonkeyPatch, program: Any, *flags: object) -> int:
    monkeypatch.setattr(sys, "argv", [program.__name__, *map(str, flags)])
    status: int = program.main()
    return status


@pytest.fixture(scope="module")
def toy_videos(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Frames]:
    """A few videos of the toy bundle."""
    out = tmp_path_factory.mktemp("toy")
    torch.set_num_threads(1)  # small products: threads that wait for one another cost more, on a machine that is busy
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        flags = ("--suite", "prompts/toyworld.txt", "--config", "configs/toyworld/inference.yaml", "--device", "cpu")
        assert run(patch, sample_suite, *flags, "--output_folder", out, "--limit", 4, "num_output_frames=6") == 0
    return {path.name: read_video(path) for path in (out / "videos").iterdir()}


def noisy(frames: Frames) -> Frames:
    added = np.random.default_rng(0).normal(0, 8, frames.shape)
    return np.clip(frames + added, 0, 255).astype(np.uint8)


def blurred(frames: Frames) -> Frames:
    wide = np.pad(frames.astype(np.float32), ((0, 0), (1, 1), (1, 1), (0, 0)), mode="edge")
    rows = (wide[:, :-2] + 2 * wide[:, 1:-1] + wide[:, 2:]) / 4
    both: Frames = ((rows[:, :, :-2] + 2 * rows[:, :, 1:-1] + rows[:, :, 2:]) / 4).astype(np.uint8)
    return both


def frozen(frames: Frames) -> Frames:
    still = frames.copy()
    still[9:] = frames[8]
    return still


@pytest.mark.parametrize(
    ("spoil", "noticed_by"),
    [
        (lambda frames: frames, set()),
        (noisy, {"temporal_flickering", "sharpness"}),
        (blurred, {"sharpness"}),
        (frozen, {"frozen_share"}),
    ],
    ids=["equal", "noise", "blur", "frozen"],
)
def test_what_spoils_the_toy_model_s_pictures_fails(
    spoil: Callable[[Frames], Frames],
    noticed_by: set[str],
    toy_videos: dict[str, Frames],
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for folder, change in (("before", lambda frames: frames), ("after", spoil)):
        for name, frames in toy_videos.items():
            write(tmp_path / folder / name, change(frames))
        flags = ("--blocks", 9, 12, "--json", tmp_path / f"{folder}.json")
        assert run(monkeypatch, evaluate, tmp_path / folder, *flags) == 0
    files = tmp_path / "before.json", tmp_path / "after.json"
    result = tmp_path / "comparison.json"
    status = run(monkeypatch, evaluate, "--compare", *files, "--tolerance", 0.001, "frozen_share=0.1", "--json", result)
    assert status == (1 if noticed_by else 0)
    rows = json.loads(result.read_text())["metrics"]
    failing = {name for name, row in rows.items() if row["fails"]}
    assert noticed_by <= failing and (noticed_by or not failing)
    for row in rows.values():
        low, high = row["difference"]["interval"]
        assert low <= row["difference"]["mean"] <= high
    assert ("FAILS" in capsys.readouterr().out) == bool(noticed_by)


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--tolerance", "-1"], "--tolerance -1: give a number of at least 0"),
        (["--tolerance", "it=x"], "--tolerance it=x"),
        (["--tolerance", "=1"], "--tolerance =1"),
        (["--tolerance", "nan"], "--tolerance nan"),
        (["--tolerance", "beauty=1"], "neither file has beauty: they have it"),
        (["--metrics", "sharpness"], "neither file has sharpness"),
        (["--metrics", "beauty"], "no such metric"),
        (["folder"], "not both"),
    ],
)
def test_bad_flags_of_a_comparison(
    flags: list[str], words: str, pages: Pages, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, evaluate, "--compare", *pages(0.0, 0.1), *flags) == 2
    assert words in " ".join(capsys.readouterr().err.split())
