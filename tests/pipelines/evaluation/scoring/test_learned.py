"""Metrics of networks: their formulas on networks made here, and on small random ones of the real architectures.

The latter need the libraries of the extra `eval`, and are compared with the libraries' own calls.
"""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from pipelines.evaluation.scoring.clips import find_clips
from pipelines.evaluation.scoring.metric import Clip
from pipelines.evaluation.scoring.metrics import embeddings
from pipelines.evaluation.scoring.metrics.embeddings import (
    AestheticQuality,
    BackgroundConsistency,
    ClipEncoder,
    DinoEncoder,
    Encoder,
    SubjectConsistency,
    TextAlignment,
)
from pipelines.evaluation.scoring.metrics.learned import DynamicDegree, ImagingQuality
from pipelines.evaluation.scoring.registry import ENTRIES, LEARNED, Resources
from pipelines.evaluation.scoring.run import measure_clip
from pipelines.evaluation.scoring.weights import SOURCES, WeightFolder
from pipelines.media.video import read_video

Frames = NDArray[np.uint8]
CPU = torch.device("cpu")
NEEDS = "needs the extra eval: pip install -e '.[eval]'"


@pytest.fixture
def clip(write: Callable[..., Path], pictures: Callable[..., Frames], tmp_path: Path) -> Clip:
    """19 frames at 16 per second, wider than high."""
    (found,) = find_clips(write(tmp_path / "clip" / "a red cat-0.mp4", pictures(19, 150, 234)).parent, None, True).clips
    return found


def value(metric: Any, clip: Clip) -> float:
    found: float = measure_clip(clip, {"it": metric}, 5.0)["it"]["value"]
    return found


def pixels_of(clip: Clip) -> Tensor:
    """What VBench's `load_video` gives: floats from 0 to 255, [T, 3, H, W]."""
    return torch.from_numpy(read_video(clip.path)).permute(0, 3, 1, 2).float()


def consistency(features: list[Tensor]) -> float:
    """VBench's formula, frame by frame."""
    total = 0.0
    for place in range(1, len(features)):
        before = max(0.0, float(F.cosine_similarity(features[place - 1], features[place], dim=-1)))
        first = max(0.0, float(F.cosine_similarity(features[0], features[place], dim=-1)))
        total += (before + first) / 2
    return total / (len(features) - 1)


class Means(Encoder):
    """Means of nine parts of a frame, less their mean: the likeness of two frames may be negative."""

    def prepare(self, frames: Frames) -> Tensor:
        return torch.from_numpy(frames).permute(0, 3, 1, 2).float()

    def encode(self, pixels_TCHW: Tensor) -> Tensor:
        parts = F.adaptive_avg_pool2d(pixels_TCHW, 3).flatten(2)
        return (parts - parts.mean(dim=2, keepdim=True)).flatten(1)


def test_consistency_is_its_formula(clip: Clip) -> None:
    encoder = Means(CPU, "")
    expected = consistency(list(encoder.encode(encoder.prepare(read_video(clip.path)))))
    assert 0 < expected < 0.99
    assert value(SubjectConsistency(encoder), clip) == pytest.approx(expected, abs=1e-6)


def test_consistency_within_a_window_starts_with_its_first_frame(clip: Clip) -> None:
    encoder = Means(CPU, "")
    found = measure_clip(clip, {"it": SubjectConsistency(encoder)}, 0.5)["it"]
    features = list(encoder.encode(encoder.prepare(read_video(clip.path))))
    assert found["per_second"] == [pytest.approx(consistency(features[:16]), abs=1e-6)]
    assert found["drift"] == pytest.approx(consistency(features[:8]) - consistency(features[-8:]), abs=1e-6)


class Flow(nn.Module):
    """Moves a tenth of the pixels, by as much as the first pixel brightened."""

    def forward(self, before: Tensor, after: Tensor, num_flow_updates: int) -> list[Tensor]:
        assert before.shape == after.shape and before.shape[-1] % 8 == before.shape[-2] % 8 == 0
        flow = torch.zeros(1, 2, *before.shape[-2:])
        speed = (after - before)[0, 0, 0, 0] * 127.5
        flow[0, 0, : before.shape[-2] // 10] = speed * 0.6
        flow[0, 1, : before.shape[-2] // 10] = speed * 0.8
        return [flow * 0, flow]


@pytest.mark.parametrize("fast_pairs", range(5))
def test_dynamic_degree_counts_fast_pairs(fast_pairs: int, tmp_path: Path) -> None:
    """21 frames at 16 per second: every other one is measured, and of 11 frames round(4 · 11 / 16) pairs must move."""
    clip = Clip("a.mp4", tmp_path / "a.mp4", "", None, "a", 0, 21, 256, 264, 16.0)
    metric = DynamicDegree(Flow(), CPU, "")
    assert metric.stride(clip) == 2
    levels = np.cumsum([100, *[7] * fast_pairs, *[5] * (10 - fast_pairs)])  # 6 pixels are the threshold at 256
    frames = np.broadcast_to(levels[:, None, None, None], (11, 256, 264, 3)).astype(np.uint8)
    rows = metric.begin(clip)(frames)
    assert rows[:, 0] == pytest.approx(np.diff(levels) / 6, abs=1e-4)
    assert metric.summarise(rows) == float(fast_pairs >= 3)
    assert metric.summarise(rows[:8]) == float(fast_pairs >= 2), "9 frames: round(4 · 9 / 16)"


def test_every_other_frame_over_chunks(
    write: Callable[..., Path], pictures: Callable[..., Frames], tmp_path: Path
) -> None:
    (clip,) = find_clips(write(tmp_path / "x" / "a.mp4", pictures(37, 136, 144), fps=24).parent).clips
    metric = DynamicDegree(Flow(), CPU, "")
    assert metric.stride(clip) == 3
    frames = read_video(clip.path)[::3].astype(float)
    first = frames[:, 0, 0, 0]
    found = measure_clip(clip, {"it": metric}, 5.0)["it"]["speed_over_threshold"]
    assert found == pytest.approx(np.mean(np.abs(np.diff(first))) / (6 * 136 / 256), abs=1e-4)
    (small,) = find_clips(write(tmp_path / "y" / "a.mp4", pictures(3, 64, 96)).parent).clips
    assert "below 128 pixels" in measure_clip(small, {"it": metric}, 5.0)["it"]["not_measured"]


def test_numbers_that_are_not_finite_are_no_score(clip: Clip) -> None:
    metric = ImagingQuality(_Nothing(), CPU, "")
    assert measure_clip(clip, {"it": metric}, 5.0)["it"] == {"not_measured": "it gives numbers that are not finite"}


class _Nothing(nn.Module):
    def forward(self, picture: Tensor) -> Tensor:
        return picture.mean() * float("nan")


def test_what_is_missing_says_where_it_comes_from(tmp_path: Path) -> None:
    """Either the library is missing, or the weights are."""
    resources = Resources(CPU, WeightFolder(tmp_path))
    for name in LEARNED:
        with pytest.raises(embeddings.NotMeasuredError) as caught:
            ENTRIES[name].make(resources)
        text = str(caught.value)
        assert "\n" not in text
        assert any(words in text for words in ("does not import", "fetch https://", "run make vbench-env"))


@pytest.fixture
def transforms() -> Any:
    pytest.importorskip("torchvision", reason=NEEDS)
    return import_module("torchvision.transforms")


def test_dino(transforms: Any, clip: Clip) -> None:
    timm = pytest.importorskip("timm", reason=NEEDS)
    model = timm.create_model(
        embeddings.DINO_NAME, num_classes=0, dynamic_img_size=True, depth=2, embed_dim=48, num_heads=3
    ).eval()
    metric = SubjectConsistency(DinoEncoder(model, 224, CPU, ""))
    steps = [
        transforms.Resize(size=224, antialias=False),
        transforms.Lambda(lambda pixels: pixels / 255),
        transforms.Normalize((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    ]
    pixels = transforms.Compose(steps)(pixels_of(clip))
    assert pixels.shape[-2:] == (224, 349)
    with torch.no_grad():
        features = [model(frame[None, :, :, :336])[0] for frame in pixels]
    assert value(metric, clip) == pytest.approx(consistency(features), abs=1e-6)


@pytest.fixture
def small_clip(transforms: Any) -> ClipEncoder:
    open_clip = pytest.importorskip("open_clip", reason=NEEDS)
    vision = {"layers": 2, "width": 64, "head_width": 32, "patch_size": 32, "image_size": 224}
    text = {"layers": 2, "width": 32, "heads": 2}
    model = open_clip.model.CLIP(24, vision, text, quick_gelu=True).eval()
    return ClipEncoder(model, open_clip.get_tokenizer(embeddings.CLIP_B_NAME), CPU, "")


def test_clip(small_clip: ClipEncoder, transforms: Any, clip: Clip) -> None:
    model: Any = small_clip._model
    steps = [
        transforms.Resize(224, interpolation=transforms.InterpolationMode.BICUBIC, antialias=False),
        transforms.CenterCrop(224),
        transforms.Lambda(lambda pixels: pixels / 255),
        transforms.Normalize((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    ]
    open_clip = import_module("open_clip")
    head = nn.Linear(24, 1)
    with torch.no_grad():
        features = model.encode_image(transforms.Compose(steps)(pixels_of(clip)), normalize=True)
        text = model.encode_text(open_clip.get_tokenizer(embeddings.CLIP_B_NAME)(["a red cat"]), normalize=True)
        beauty = float(head(features).mean()) / 10
    assert value(BackgroundConsistency(small_clip), clip) == pytest.approx(consistency(list(features)), abs=1e-6)
    assert value(TextAlignment(small_clip), clip) == pytest.approx(float((features @ text.T).mean()), abs=1e-6)
    assert value(AestheticQuality(small_clip, head, ""), clip) == pytest.approx(beauty, abs=1e-6)
    (nameless,) = find_clips(clip.path.parent).clips
    assert (
        "--prompts_from_names" in measure_clip(nameless, {"it": TextAlignment(small_clip)}, 5.0)["it"]["not_measured"]
    )


def test_musiq(transforms: Any, write: Callable[..., Path], pictures: Callable[..., Frames], tmp_path: Path) -> None:
    musiq = pytest.importorskip("pyiqa.archs.musiq_arch", reason=NEEDS)
    (clip,) = find_clips(write(tmp_path / "x" / "a.mp4", pictures(3, 150, 570)).parent).clips
    model = musiq.MUSIQ(pretrained=False, num_layers=2, hidden_size=48, mlp_dim=64).eval()
    pixels = transforms.Resize(size=(int(150 * 512 / 570), 512), antialias=False)(pixels_of(clip)) / 255
    with torch.no_grad():
        expected = np.mean([float(model(frame[None])) for frame in pixels]) / 100
    assert value(ImagingQuality(model, CPU, ""), clip) == pytest.approx(expected, abs=1e-7)


def test_raft(transforms: Any, clip: Clip) -> None:
    flow = import_module("torchvision.models.optical_flow")
    model = flow.raft_small(weights=None).eval()
    pixels = F.pad(pixels_of(clip)[:5:2], (3, 3, 1, 1), mode="replicate")
    with torch.no_grad():
        flows = model(pixels[:-1] / 127.5 - 1, pixels[1:] / 127.5 - 1, num_flow_updates=20)[-1]
    lengths = flows.square().sum(dim=1).sqrt().flatten(1).sort(dim=1, descending=True).values
    fastest = lengths[:, : int(152 * 240 * 0.05)].mean(dim=1)
    rows = DynamicDegree(model, CPU, "").begin(clip)(read_video(clip.path)[:5:2])
    assert rows[:, 0] == pytest.approx((fastest / (6 * 150 / 256)).numpy(), rel=1e-4)


def test_files_of_weights_are_read(
    transforms: Any,
    clip: Clip,
    write: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """All metrics by the command line, on smaller models of the same families with random weights."""
    open_clip, timm = (pytest.importorskip(name, reason=NEEDS) for name in ("open_clip", "timm"))
    musiq = pytest.importorskip("pyiqa.archs.musiq_arch", reason=NEEDS)
    names = {"CLIP_B_NAME": "ViT-S-32-alt", "CLIP_L_NAME": "ViT-S-16-alt", "DINO_NAME": "vit_tiny_patch16_224"}
    for constant, name in names.items():
        monkeypatch.setattr(embeddings, constant, name)
    clip_b, clip_l = (
        open_clip.create_model(names[one], force_quick_gelu=True) for one in ("CLIP_B_NAME", "CLIP_L_NAME")
    )
    models = {
        "clip_b": clip_b,
        "clip_l": clip_l,
        "dino": timm.create_model(names["DINO_NAME"], num_classes=0),
        "aesthetic": nn.Linear(clip_l.visual.output_dim, 1),
        "musiq": musiq.MUSIQ(pretrained=False),
        "raft": import_module("torchvision.models.optical_flow").raft_large(weights=None),
    }
    folder = tmp_path / "weights"
    folder.mkdir()
    for name, model in models.items():
        file = folder / SOURCES[name].file
        if file.suffix == ".safetensors":
            import_module("safetensors.torch").save_model(model, file)
        else:
            torch.save(model.state_dict(), file)
    out = tmp_path / "scores.json"
    videos = write(tmp_path / "short" / "a red cat-0.mp4", read_video(clip.path)[:4]).parent
    flags = [videos, "--metrics", "learned", "--json", out, "--weights_folder", folder, "--prompts_from_names"]
    evaluate: Any = import_module("evaluate")
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *map(str, flags), "--device", "cpu"])
    assert evaluate.main() == 0
    page = json.loads(out.read_text())["metrics"]
    measured = {name for name in LEARNED if "value" in page[name]}
    assert measured == set(LEARNED) - {"motion_smoothness"}
    assert page["aesthetic_quality"]["identity"].keys() == {"weights", "head"}
    assert page["dynamic_degree"]["versions"]["torchvision"]
    torch.save({"weight": torch.zeros(3)}, folder / SOURCES["aesthetic"].file)
    assert evaluate.main() == 2
    assert "does not fit Linear" in " ".join(capsys.readouterr().err.split())
