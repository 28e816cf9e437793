"""Our scores against those of VBench's own functions, from vbench 0.1.5, on real clips and the same random networks.

Needs an environment with the extra `eval`, and packages that no environment of the project holds:

    pip install --no-deps vbench==0.1.5 decord==0.6.0 easydict==1.14 scikit-video==1.1.11
"""

import importlib.util
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pipelines.evaluation.scoring.clips import find_clips
from pipelines.evaluation.scoring.metric import Clip, Metric
from pipelines.evaluation.scoring.metrics import embeddings
from pipelines.evaluation.scoring.metrics.embeddings import (
    AestheticQuality,
    BackgroundConsistency,
    ClipEncoder,
    DinoEncoder,
    SubjectConsistency,
)
from pipelines.evaluation.scoring.metrics.learned import DynamicDegree, ImagingQuality
from pipelines.evaluation.scoring.metrics.pixels import TemporalFlickering
from pipelines.evaluation.scoring.run import measure_clip
from pipelines.media.video import read_video

PACKAGES = ("vbench", "decord", "easydict", "skvideo", "torchvision", "timm", "open_clip", "pyiqa", "cv2")
missing = [name for name in PACKAGES if importlib.util.find_spec(name) is None]
pytestmark = pytest.mark.skipif(
    bool(missing), reason=f"compares with vbench 0.1.5; not installed: {', '.join(missing)}"
)
CPU = torch.device("cpu")
CLIPS = {"carphone_pristine.mp4": 9, "bikes.mp4": 7}
"""Clips of scikit-video, and how many frames of them are taken."""
ROUNDING = 2e-7
"""VBench's cosines and means are float32."""


@pytest.fixture
def clips(write: Callable[..., Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Clip, ...]:
    monkeypatch.setitem(sys.modules, "clip", ModuleType("clip"))  # VBench imports OpenAI's package to load weights
    package = importlib.util.find_spec("skvideo")
    assert package is not None and package.origin is not None
    for number, (name, num_frames) in enumerate(CLIPS.items()):
        frames = read_video(Path(package.origin).parent / "datasets" / "data" / name)[:num_frames]
        write(tmp_path / "real" / name, frames, 30 - 5 * number)
    return find_clips(tmp_path / "real").clips


def ours(metric: Metric, clips: tuple[Clip, ...]) -> Any:
    return pytest.approx([measure_clip(clip, {"it": metric}, 5.0)["it"]["value"] for clip in clips], abs=ROUNDING)


def theirs(results: tuple[Any, list[dict[str, Any]]]) -> list[float]:
    return [float(result["video_results"]) for result in results[1]]


def test_temporal_flickering(clips: tuple[Clip, ...]) -> None:
    module = import_module("vbench.temporal_flickering")
    assert theirs(module.temporal_flickering([str(clip.path) for clip in clips])) == ours(TemporalFlickering(), clips)


def test_subject_consistency(clips: tuple[Clip, ...]) -> None:
    module, timm = import_module("vbench.subject_consistency"), import_module("timm")
    sizes = {"depth": 2, "embed_dim": 48, "num_heads": 3}
    model = timm.create_model(embeddings.DINO_NAME, num_classes=0, dynamic_img_size=True, **sizes).eval()

    class Cropping(nn.Module):
        """DINO's own code drops what its patches do not cover; timm's wants it dropped."""

        def forward(self, pixels: Tensor) -> Tensor:
            height, width = (length // 16 * 16 for length in pixels.shape[-2:])
            found: Tensor = model(pixels[..., :height, :width])
            return found

    paths = [str(clip.path) for clip in clips]
    metric = SubjectConsistency(DinoEncoder(model, 224, CPU, ""))
    assert theirs(module.subject_consistency(Cropping(), paths, CPU, False)) == ours(metric, clips)


def test_background_consistency_and_aesthetic_quality(clips: tuple[Clip, ...]) -> None:
    background = import_module("vbench.background_consistency").background_consistency
    aesthetic = import_module("vbench.aesthetic_quality").laion_aesthetic
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 32, "image_size": 224}
    text = {"layers": 2, "width": 32, "heads": 2}
    model = import_module("open_clip").model.CLIP(32, vision, text, quick_gelu=True).eval()
    paths, encoder, head = [str(clip.path) for clip in clips], ClipEncoder(model, None, CPU, ""), nn.Linear(32, 1)
    with torch.no_grad():
        results = background(model, None, paths, CPU, False)
    assert theirs(results) == ours(BackgroundConsistency(encoder), clips)
    assert theirs(aesthetic(head, model, paths, CPU)) == ours(AestheticQuality(encoder, head, ""), clips)


def test_imaging_quality(clips: tuple[Clip, ...]) -> None:
    module, musiq = import_module("vbench.imaging_quality"), import_module("pyiqa.archs.musiq_arch")
    model = musiq.MUSIQ(pretrained=False, num_layers=2, hidden_size=48, mlp_dim=64).eval()
    with torch.no_grad():
        results = module.technical_quality(model, [str(clip.path) for clip in clips], CPU)
    assert [score / 100 for score in theirs(results)] == ours(ImagingQuality(model, CPU, ""), clips)


def test_dynamic_degree(clips: tuple[Clip, ...]) -> None:
    """VBench's RAFT is its authors'; torchvision's takes pixels from -1 to 1, theirs from 0 to 255."""
    module = import_module("vbench.dynamic_degree")
    model = import_module("torchvision.models.optical_flow").raft_small(weights=None).eval()
    metric = DynamicDegree(model, CPU, "")

    class Theirs(module.DynamicDegree):  # type: ignore[misc, name-defined]
        def load_model(self) -> None:
            self.model = lambda before, after, iters, test_mode: (
                None,
                model(before / 127.5 - 1, after / 127.5 - 1, num_flow_updates=iters)[-1],
            )

        def check_move(self, score_list: list[float]) -> bool:
            self.speed = sum(score_list) / len(score_list) / self.params["thres"]
            found: bool = super().check_move(score_list)
            return found

    judge = Theirs(None, CPU)
    for clip in clips:
        moves, found = judge.infer(str(clip.path)), measure_clip(clip, {"it": metric}, 5.0)["it"]
        assert float(moves) == found["value"]
        assert judge.speed == pytest.approx(found["speed_over_threshold"], rel=1e-5)
