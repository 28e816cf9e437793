"""Scores of other environments: motion smoothness by a process of VBench's, and files of results that are read back.

VBench's process is the real program with a small package of the same form as VBench's in place of VBench. Where
`make vbench-env` was run, it is VBench itself, with random weights of AMT-S.
"""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from paths import ROOT

from pipelines.evaluation.scoring.clips import find_clips
from pipelines.evaluation.scoring.metric import NotMeasuredError
from pipelines.evaluation.scoring.metrics.elsewhere import note_environment
from pipelines.evaluation.scoring.metrics.smoothness import DEFAULT_PYTHON, MotionSmoothness
from pipelines.evaluation.scoring.run import measure_clip
from pipelines.evaluation.scoring.weights import AMT, WeightFolder

Folder = Callable[..., Path]
Program = Callable[..., int]
Frames = NDArray[np.uint8]
CPU = torch.device("cpu")
STAND_IN = """
import os, sys
import numpy, torch

class MotionSmoothness:
    def __init__(self, config, ckpt, device):
        assert config.endswith("third_party/amt/cfgs/AMT-S.yaml") and device.type == "cpu"
        print("Loading", ckpt)
        self.weight = torch.load(ckpt)["state_dict"]["weight"]
        self.here = {name: os.environ.get(name) for name in ("PYTHONPATH", "RANK")}

    def motion_score(self, path):
        print("progress", file=sys.stderr)
        if "two-0" in path:
            raise ValueError("no such\\ncodec")
        if "two-1" in path:
            sys.exit(3)
        return numpy.float64(self.weight.mean()) + len(os.path.basename(path)) / 100
"""


def enlarged(frames: Frames) -> Frames:
    """Frames of 132×152, large enough for AMT-S."""
    return frames.repeat(6, axis=1).repeat(4, axis=2)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture
def stand_in(tmp_path: Path) -> Path:
    """An interpreter that finds a package of the form of VBench's, and no package of this project."""
    package = tmp_path / "site" / "vbench"
    (package / "third_party" / "amt" / "cfgs").mkdir(parents=True)
    for folder in (package, package / "third_party", package / "third_party" / "amt"):
        (folder / "__init__.py").touch()
    (package / "motion_smoothness.py").write_text(STAND_IN)
    python = tmp_path / "python"
    python.write_text(
        f'#!/bin/sh\ntest -z "$PYTHONPATH$RANK" || exit 9\nPYTHONPATH={package.parent} exec {sys.executable} "$@"\n'
    )
    python.chmod(0o755)
    return python


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    folder = tmp_path / "weights"
    folder.mkdir()
    torch.save({"state_dict": {"weight": torch.tensor([0.25, 0.75])}}, folder / AMT.file)
    return folder


def test_vbench_measures_motion_smoothness(
    stand_in: Path,
    weights: Path,
    program: Program,
    folder: Folder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    out, videos = tmp_path / "scores.json", folder(prompts=("one", "longer", "two"), change=enlarged)
    flags = ("--metrics", "motion_smoothness", "--vbench_python", stand_in, "--weights_folder", weights)
    assert program(videos, *flags, "--json", out, "--device", "cpu") == 0
    page = read(out)
    scores = {name: video["scores"]["motion_smoothness"] for name, video in page["videos"].items()}
    assert scores["one-0.mp4"]["value"] == pytest.approx(0.5 + 0.09)
    assert scores["longer-1.mp4"]["value"] == pytest.approx(0.5 + 0.12)
    assert "could not do it (ValueError: no such codec)" in scores["two-0.mp4"]["not_measured"]
    assert "ended with status 3 (progress)" in scores["two-1.mp4"]["not_measured"]
    about = page["metrics"]["motion_smoothness"]
    assert about["value"]["videos"] == 4 and about["videos_not_measured"] == 2
    assert about["identity"].keys() == {"weights", "vbench"} and about["origin"]["torch"] == version("torch")
    assert page["timing"]["motion_smoothness"]["frames"] == 4 * 33
    torch.save({"state_dict": {"weight": torch.zeros(1)}}, weights / AMT.file)
    assert program(videos, *flags, "--json", out, "--device", "cpu") == 2, "other weights"


class _Code:
    """What a pickle may do when it is read."""

    def __reduce__(self) -> Any:
        return (Path.touch, (Path("touched"),))


def test_what_keeps_vbench_from_measuring(
    stand_in: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = WeightFolder(weights)

    def reason(python: Path, where: WeightFolder = folder) -> str:
        with pytest.raises(NotMeasuredError) as caught:
            MotionSmoothness.load(python, where, CPU)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "no environment of VBench at none: run make vbench-env" in reason(Path("none"))
    assert "no weights amt-s.pth: fetch https://huggingface.co/" in reason(stand_in, WeightFolder(tmp_path / "x"))
    text = tmp_path / "text"
    text.write_text("no program")
    assert "text does not start (Permission denied)" in reason(text)
    assert "ModuleNotFoundError: No module named" in reason(Path(sys.executable))
    shell = tmp_path / "shell"
    shell.write_text("#!/bin/sh\necho hello; echo broken >&2; exit 4\n")
    shell.chmod(0o755)
    assert "ended with status 4 (broken)" in reason(shell)
    torch.save({"state_dict": _Code()}, weights / AMT.file)
    assert "UnpicklingError" in reason(stand_in)
    assert not (tmp_path / "touched").exists(), "code in a checkpoint is not run"


def test_videos_that_vbench_does_not_read(
    stand_in: Path, weights: Path, write: Callable[..., Path], pictures: Callable[..., Any], tmp_path: Path
) -> None:
    metric = MotionSmoothness.load(stand_in, WeightFolder(weights), CPU)
    write(tmp_path / "x" / "short.mp4", pictures(2, 132, 150))
    write(tmp_path / "x" / "low.mp4", pictures(5, 112, 150))
    write(tmp_path / "x" / "large.mp4", pictures(5, 114, 150))
    shutil.copy(tmp_path / "x" / "large.mp4", tmp_path / "x" / "other.mov")
    found = {clip.name: measure_clip(clip, {"it": metric}, 5.0)["it"] for clip in find_clips(tmp_path / "x").clips}
    assert found["short.mp4"] == {"not_measured": "it has fewer than 3 frames"}
    assert found["low.mp4"] == {"not_measured": "AMT-S takes no frames with a side of 112 pixels or less"}
    assert found["large.mp4"]["value"] > 0
    assert found["other.mov"] == {"not_measured": "VBench reads .mp4 alone"}


RANDOM_WEIGHTS = """
import sys
import torch
import vbench.third_party.amt as amt
from pathlib import Path
from omegaconf import OmegaConf
from vbench.third_party.amt.utils.build_utils import build_from_cfg
from vbench.motion_smoothness import MotionSmoothness

config, weights, video = str(Path(list(amt.__path__)[0]) / "cfgs" / "AMT-S.yaml"), sys.argv[1], sys.argv[2]
torch.manual_seed(0)
model = build_from_cfg(OmegaConf.load(config).network)
state = {name: value * 0.3 if value.is_floating_point() else value for name, value in model.state_dict().items()}
torch.save({"state_dict": state}, weights)
judge = MotionSmoothness(config, weights, torch.device("cpu"))
for height, is_finite in ((128, True), (112, False)):
    inputs = torch.rand(1, 3, height, 144)
    with torch.no_grad():
        found = judge.model(inputs, inputs.flip(3), judge.embt, eval=True)["imgt_pred"]
    assert bool(found.isfinite().all()) == is_finite
print(repr(float(judge.motion_score(video))))
"""


@pytest.mark.skipif(not (ROOT / DEFAULT_PYTHON).is_file(), reason="needs VBench: make vbench-env")
def test_vbench_itself(write: Callable[..., Path], pictures: Callable[..., Any], tmp_path: Path) -> None:
    """Its own call with random weights of AMT-S, and the process. Sides of 114 are padded to 128."""
    (tmp_path / "weights").mkdir()
    python = ROOT / DEFAULT_PYTHON
    video = write(tmp_path / "x" / "a.mp4", pictures(8, 114, 140))
    words = [python, "-c", RANDOM_WEIGHTS, tmp_path / "weights" / AMT.file, video]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    metric = MotionSmoothness.load(python, WeightFolder(tmp_path / "weights"), CPU)
    (clip,) = find_clips(video.parent).clips
    found = measure_clip(clip, {"it": metric}, 5.0)["it"]["value"]
    assert found == float(done.stdout.splitlines()[-1]) and 0 < found < 1
    assert metric.identity()["vbench"] == "0.1.5"


def results_of_vbench(folder: Path, path: Path) -> Path:
    """What VBench writes of two dimensions."""
    names = [f"/far/{file.name}" for file in sorted(folder.iterdir())]
    smooth = [{"video_path": name, "video_results": 0.1 * place} for place, name in enumerate(names)]
    page = {
        "motion_smoothness": [0.5, smooth],
        "imaging_quality": [0.6, [{"video_path": names[0], "video_results": 60}]],
    }
    path.write_text(json.dumps(page))
    return path


def test_results_of_vbench_are_read_back(
    program: Program, folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, videos = tmp_path / "scores.json", folder()
    flags = (videos, "--metrics", "vbench", "sharpness", "--json", out, "--vbench_results")
    assert program(*flags, results_of_vbench(videos, tmp_path / "a_eval_results.json")) == 0
    page = read(out)
    assert page["metrics"]["vbench_motion_smoothness"]["value"]["mean"] == pytest.approx(0.15)
    assert page["videos"]["two-1.mp4"]["scores"]["vbench_motion_smoothness"]["value"] == pytest.approx(0.3)
    assert "not measured here" in page["metrics"]["vbench_motion_smoothness"]["drift"]["not_measured"]
    assert "sharpness" in page["timing"] and "vbench_motion_smoothness" not in page["timing"]
    quality = page["metrics"]["vbench_imaging_quality"]
    assert quality["value"]["mean"] == 0.6 and quality["videos_not_measured"] == 3
    assert "has no color" in page["metrics"]["vbench_color"]["not_measured"]
    (tmp_path / "a_eval_results.json").write_text((tmp_path / "a_eval_results.json").read_text().replace("60", "61"))
    assert program(*flags, tmp_path / "a_eval_results.json") == 2
    assert "origin.vbench_results was" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "content",
    [
        "{}",
        '{"beauty": [1, []]}',
        '{"color": 0.5}',
        '{"color": [0.5, {}]}',
        '{"color": [0.5, [{"video_path": "a.mp4"}]]}',
        '{"color": [0.5, [{"video_path": "a.mp4", "video_results": 1e999}]]}',
        '{"color": [0.5, [{"video_path": "x/a", "video_results": 1}, {"video_path": "a", "video_results": 1}]]}',
    ],
)
def test_files_that_are_no_results_of_vbench(
    content: str, program: Program, folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content)
    flags = ("--metrics", "vbench", "--vbench_results", tmp_path / "results.json")
    assert program(folder(), *flags, "--json", tmp_path / "scores.json") == 2
    error = " ".join(capsys.readouterr().err.split())
    assert "give a file that VBench wrote" in error or "two values of color for a" in error


def test_results_of_vbench_long_and_fastvideo_are_read_back(
    program: Program, folder: Folder, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """VBench-Long lists clips, then videos; FastVideo lists videos, with null where a metric skipped one."""
    out, videos = tmp_path / "scores.json", folder()
    names = sorted(file.name for file in videos.iterdir())
    parts = [{"video_path": f"/x/split_clip/one-0/one-0_00{k}.mp4", "video_results": 50 + k} for k in range(2)]
    whole = [{"video_path": f"/x/{name}", "video_results": 40.0 + place} for place, name in enumerate(names)]
    still = [*({**one, "video_results": 0.5} for one in whole), {"long_video_cnt": 4}]
    page: dict[str, Any] = {"imaging_quality": [0.4, parts, whole], "temporal_flickering": [0.5, parts, still]}
    (tmp_path / "long_eval_results.json").write_text(json.dumps(page))
    scores = [
        {
            "video": f"videos/{name}",
            "scores": {
                "vbench.color": {"name": "vbench.color", "score": None, "details": {"skipped": "no prompt"}},
                "common.lpips": {"name": "common.lpips", "score": 0.1 * place, "details": {}},
                "audio.wer": {"name": "audio.wer", "score": 1.0, "details": {}},
            },
        }
        for place, name in enumerate(names)
    ]
    (tmp_path / "fast.json").write_text(json.dumps(scores))
    flags = [
        "--vbench_long_results",
        tmp_path / "long_eval_results.json",
        "--fastvideo_results",
        tmp_path / "fast.json",
    ]
    assert program(videos, "--metrics", "vbench_long", "fastvideo", "--json", out, *flags) == 0
    found = read(out)["metrics"]
    assert found["vbench_long_imaging_quality"]["value"]["mean"] == pytest.approx(0.415)
    assert found["vbench_long_temporal_flickering"]["value"]["mean"] == 0.5
    assert found["fastvideo_common_lpips"]["value"]["mean"] == pytest.approx(0.15)
    assert found["fastvideo_common_lpips"]["direction"] == "lower"
    assert "has no vbench.color" in found["fastvideo_vbench_color"]["not_measured"]
    assert "metrics that are not read back: audio.wer" in caplog.text
    assert "nothing says with which packages" in caplog.text
    assert found["fastvideo_common_lpips"]["origin"]["made_with"] == "not noted"


def test_a_note_says_what_made_results(
    program: Program, folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, videos, results = tmp_path / "scores.json", folder(), tmp_path / "a_eval_results.json"
    results_of_vbench(videos, results)
    (tmp_path / "cache" / "vbench" / "amt_model").mkdir(parents=True)
    (tmp_path / "cache" / "vbench" / "amt_model" / "amt-s.pth").write_bytes(b"weights")
    words = [sys.executable, "-I", note_environment.__file__, results, "--weights", tmp_path / "cache" / "vbench"]
    subprocess.run(words, check=True)
    assert program(videos, "--metrics", "vbench", "--json", out, "--vbench_results", results) == 0
    made_with = read(out)["metrics"]["vbench_motion_smoothness"]["origin"]["made_with"]
    assert made_with["versions"]["torch"] == version("torch")
    assert made_with["weights"].keys() == {"vbench/amt_model/amt-s.pth"}
    results.write_text(results.read_text().replace("0.5", "0.6"))
    fresh = tmp_path / "fresh.json"
    assert program(videos, "--metrics", "vbench", "--json", fresh, "--vbench_results", results) == 2
    assert "is about another file" in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize(
    "content",
    [
        "[]",
        "{}",
        "[1]",
        "nothing",
        '[{"video": "a.mp4"}]',
        '[{"video": "a.mp4", "scores": {"common.ssim": {"score": "x"}}}]',
        '[{"video": "a.mp4", "scores": {"common.ssim": 3}}]',
        '[{"scores": {"common.ssim": {"score": 1}}}]',
    ],
)
def test_files_that_are_no_results_of_fastvideo(
    content: str, program: Program, folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "results.json").write_text(content)
    flags = ("--metrics", "fastvideo", "--fastvideo_results", tmp_path / "results.json")
    assert program(folder(), *flags, "--json", tmp_path / "scores.json") == 2
    assert "give a file that FastVideo wrote" in " ".join(capsys.readouterr().err.split())
