"""FVD and KVD: formulas against plain ones, frames that networks see, features that are kept, and whole runs.

The literature's I3D cannot be had here: a small random network with its interface stands for it. R3D-18 is
torchvision's with random weights, and needs the extra `eval`.
"""

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import nn

from pipelines.evaluation.scoring.clips import find_clips
from pipelines.evaluation.scoring.compare import BETTER, EQUAL, WORSE, Tolerance, compare
from pipelines.evaluation.scoring.metric import Clip, NotMeasuredError
from pipelines.evaluation.scoring.sets import networks
from pipelines.evaluation.scoring.sets.distances import (
    DRAWS,
    FrechetDistance,
    KernelDistance,
    SetDistance,
    interval,
    spread,
)
from pipelines.evaluation.scoring.sets.features import Sampling, VideoFeatures
from pipelines.evaluation.scoring.sets.networks import R3DNetwork, VideoNetwork, video_network
from pipelines.evaluation.scoring.weights import R3D, WeightFolder
from pipelines.media.video import read_video
from wan.utils.errors import InputError

evaluate: Any = import_module("evaluate")
CPU = torch.device("cpu")
NEEDS = "needs the extra eval: pip install -e '.[eval]'"
Features = NDArray[np.float64]
Program = Callable[..., int]


def two_sets(sizes: tuple[int, int] = (61, 47), width: int = 13) -> tuple[Features, Features]:
    """Features whose covariances are far from each other's, and numbers of rows that nothing divides."""
    generator = np.random.default_rng(7)
    first, second = (generator.normal(size=(size, width)) @ generator.normal(size=(width, width)) for size in sizes)
    return first + 0.3, second


def once(features: Features) -> NDArray[np.int64]:
    return np.ones(len(features), np.int64)


def plain_frechet(first: Features, second: Features) -> float:
    """By the eigenvalues of the product of the covariances."""
    covariances = [np.cov(one, rowvar=False) for one in (first, second)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real.sum()
    apart = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    return float(apart + sum(np.trace(one) for one in covariances) - 2 * roots)


def plain_kernel(first: Features, second: Features, places: list[int]) -> float:
    """Pair by pair; `places` are the rows of the first set, each as often as it is taken."""

    def mean(left: list[Features], right: list[Features], labels: list[int] | None) -> float:
        pairs = product(range(len(left)), range(len(right)))
        values = [
            (float(left[i] @ right[j]) / first.shape[1] + 1) ** 3
            for i, j in pairs
            if labels is None or labels[i] != labels[j]
        ]
        return float(np.mean(values))

    taken, others = [first[place] for place in places], list(second)
    within = mean(taken, taken, places) + mean(others, others, list(range(len(others))))
    return within - 2 * mean(taken, others, None)


def test_frechet_distance_is_its_formula() -> None:
    first, second = two_sets()
    found = FrechetDistance(first, second).value(once(first))
    assert found == pytest.approx(plain_frechet(first, second), rel=1e-10)
    linalg = pytest.importorskip("scipy.linalg", reason=NEEDS)
    covariances = [np.cov(one, rowvar=False) for one in (first, second)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    apart = np.square(first.mean(axis=0) - second.mean(axis=0)).sum()
    assert found == pytest.approx(apart + np.trace(covariances[0] + covariances[1] - 2 * root), rel=1e-10)


def test_torchmetrics_finds_the_same() -> None:
    kid = pytest.importorskip("torchmetrics.image.kid", reason=NEEDS)
    fid = import_module("torchmetrics.image.fid")
    first, second = two_sets()
    moments = [torch.from_numpy(m) for one in (first, second) for m in (one.mean(axis=0), np.cov(one, rowvar=False))]
    found = FrechetDistance(first, second).value(once(first))
    assert found == pytest.approx(float(fid._compute_fid(*moments)), rel=1e-10)
    first = first[: len(second)]  # torchmetrics wants as many of both
    found = KernelDistance(first, second).value(once(first))
    assert found == pytest.approx(float(kid.poly_mmd(*map(torch.from_numpy, (second, first)))), rel=1e-10)


def test_frechet_distance_of_sets_that_are_known() -> None:
    first, _ = two_sets()
    shift = np.arange(13) / 7
    assert FrechetDistance(first, first).value(once(first)) == pytest.approx(0, abs=1e-8)
    assert FrechetDistance(first + shift, first).value(once(first)) == pytest.approx(shift @ shift, rel=1e-8)
    few, many = two_sets((5, 47))
    assert FrechetDistance(few, many).value(once(few)) > 0, "fewer rows than columns, as a bootstrap may draw them"
    with pytest.raises(ValueError, match="13 and 12 columns"):
        FrechetDistance(first, first[:, :12])


def test_rows_that_are_taken_several_times() -> None:
    first, second = two_sets((11, 17), 4)
    counts = np.random.default_rng(1).integers(0, 4, 11)
    places = [place for place, count in enumerate(counts) for _ in range(count)]
    assert FrechetDistance(first, second).value(counts) == pytest.approx(plain_frechet(first[places], second), rel=1e-9)
    for taken in (counts, once(first)):
        places = [place for place, count in enumerate(taken) for _ in range(count)]
        assert KernelDistance(first, second).value(taken) == pytest.approx(
            plain_kernel(first, second, places), rel=1e-9
        )


@pytest.mark.parametrize("kind", [FrechetDistance, KernelDistance])
def test_intervals_cover(kind: type[SetDistance]) -> None:
    """They hold the mean of the estimate over new samples about as often as they say, rather more often than less."""
    generator = np.random.default_rng(5)
    reference = generator.normal(size=(60, 3))
    samples = [generator.normal(0.2, 1.2, size=(40, 3)) for _ in range(600)]
    truth = np.mean([kind(sample, reference).value(once(sample)) for sample in samples])
    names = [str(number) for number in range(40)]
    spreads = [spread(kind(sample, reference), names) for sample in samples[:60]]
    covered = 0
    for found in spreads:
        assert found.draws is not None and found.draws.mean() == pytest.approx(found.value, rel=1e-9)
        low, high = interval(found.draws)
        covered += low <= truth <= high
    assert covered >= 52, covered


def test_videos_of_a_prompt_are_drawn_together() -> None:
    first, second = two_sets((12, 17), 4)
    names = ["b", "a", "c"] * 4
    found = spread(KernelDistance(first, second), names)
    possible = set()
    for counts in product(range(4), repeat=3):
        if sum(counts) == 3:
            taken = np.array([dict(zip("abc", counts, strict=True))[name] for name in names])
            possible.add(round(KernelDistance(first, second).value(taken), 6))
    assert found.draws is not None
    values = np.array(sorted(possible))
    shifts = [value - found.draws[0] for value in values]
    distances = [np.abs(found.draws[:, None] + shift - values).min(axis=1).max() for shift in shifts]
    assert min(distances) < 1e-5, "all draws are values of whole prompts, moved alike"
    assert spread(KernelDistance(first, second), ["a"] * 12).draws is None


def test_frames_at_a_common_rate() -> None:
    clip = Clip("a.mp4", Path("a.mp4"), "", None, "a", 0, 33, 8, 8, 16.0)
    assert Sampling(5, 16.0).places(clip) == [0, 1, 2, 3, 4]
    assert Sampling(5, 8.0).places(clip) == [0, 2, 4, 6, 8]
    assert Sampling(5, 12.0).places(clip) == [0, 1, 2, 4, 5]
    assert Sampling(3, 32.0).places(clip) == [0, 0, 1], "a rate above that of the video repeats frames"
    film = replace(clip, fps=30000 / 1001)
    assert Sampling(4, 30000 / 1001).places(film) == [0, 1, 2, 3]
    Sampling(33, 16.0).check([clip])
    with pytest.raises(NotMeasuredError, match=r"1 videos are shorter than 34 frames at 16 per second, such as a\.mp4"):
        Sampling(34, 16.0).check([clip])


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch, script: Path) -> Program:
    """scripts/evaluate.py with the network of this file."""

    def call(*flags: object) -> int:
        words = ["evaluate.py", *map(str, flags), "--device", "cpu", "--fvd_network", str(script)]
        monkeypatch.setattr(sys, "argv", words)
        status: int = evaluate.main()
        return status

    return call


def names(number: int) -> tuple[str, ...]:
    return tuple(f"prompt {place}" for place in range(number))


def vectors_of(folder: Path, places: list[int], model: nn.Module) -> Features:
    """By the network itself, from all frames of the videos."""
    rows = []
    for path in sorted(folder.iterdir()):
        frames = torch.from_numpy(read_video(path)[places]).permute(3, 0, 1, 2)[None].float()
        with torch.no_grad():
            rows.append(model(frames, rescale=True, resize=True, return_features=True)[0].double().numpy())
    return np.stack(rows)


def test_both_distances_to_a_reference(
    program: Program, folder: Callable[..., Path], tiny: nn.Module, tmp_path: Path
) -> None:
    """The reference has another rate, another size, other names and another number of videos."""
    videos = folder("videos", prompts=names(7), samples=2)
    reference = folder("real", names(13), 1, change=lambda frames: frames[:, 2:, :, ::-1] // 2, fps=24)
    out = tmp_path / "scores.json"
    flags = ("--metrics", "sets", "--reference", reference, "--fvd_frames", 9, "--json", out)
    assert program(videos, *flags) == 0
    page = json.loads(out.read_text())
    first, second = (
        vectors_of(videos, list(range(9)), tiny),
        vectors_of(reference, [int(1.5 * k) for k in range(9)], tiny),
    )
    expected = {"fvd": plain_frechet(first, second), "kvd": plain_kernel(first, second, list(range(14)))}
    for name, value in expected.items():
        about = page["metrics"][name]
        assert about["value"]["mean"] == pytest.approx(value, rel=1e-4, abs=1e-9)
        low, high = about["value"]["interval"]
        assert low < about["value"]["mean"] < high
        assert about["value"]["prompts"] == 7 and about["value"]["videos"] == 14 and about["reference_videos"] == 13
        assert about["identity"]["network"] == "TorchScript i3d_torchscript.pt" and about["identity"]["weights"]
        assert about["identity"]["frames"] == 9 and about["identity"]["fps"] == 16 and len(about["draws"]) == DRAWS
        assert "no change over time" in about["drift"]["not_measured"]
    assert page["timing"]["fvd"]["frames"] == 27 * 9 and "kvd" not in page["timing"], "features are made once"


def test_features_are_kept_by_content(
    program: Program,
    folder: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    videos, reference, out = folder("videos", names(7), 2), folder("real", names(11), 1), tmp_path / "scores.json"
    flags = (videos, "--metrics", "kvd", "--reference", reference, "--json", out)
    assert program(*flags) == 0
    before = json.loads(out.read_text())
    encoded: list[int] = []
    whole = VideoNetwork.__call__

    def noted(self: VideoNetwork, frames: Any) -> Any:
        encoded.append(len(frames))
        return whole(self, frames)

    monkeypatch.setattr(VideoNetwork, "__call__", noted)
    assert program(*flags) == 0
    assert not encoded and json.loads(out.read_text())["metrics"] == before["metrics"]
    (damaged, *_) = sorted((tmp_path / "scores.json.features").glob("*/*.npy"))
    damaged.write_bytes(damaged.read_bytes()[:-8])
    assert program(*flags) == 0
    assert encoded == [16] and json.loads(out.read_text())["metrics"] == before["metrics"]
    assert "it is made again" in caplog.text
    assert program(*flags, "--fvd_frames", 8) == 2, "other frames are another measurement"
    changed = read_video(videos / "prompt 0-0.mp4") // 2
    (videos / "prompt 0-0.mp4").unlink()
    folder("more", ("x",), 1, change=lambda frames: changed)
    (tmp_path / "more" / "x-0.mp4").rename(videos / "prompt 0-0.mp4")
    assert program(videos, "--metrics", "sharpness", "--json", out) == 0
    assert "videos changed since" in json.loads(out.read_text())["metrics"]["kvd"]["not_measured"]
    encoded.clear()
    assert program(*flags) == 0
    after = json.loads(out.read_text())["metrics"]["kvd"]
    assert encoded == [16] and after["value"]["mean"] != before["metrics"]["kvd"]["value"]["mean"]


def test_two_runs_are_compared_by_their_draws(program: Program, folder: Callable[..., Path], tmp_path: Path) -> None:
    reference = folder("real", names(12), 1)
    found = {}
    runs = {
        "first": (names(12), lambda frames: frames // 3 + 90),
        "better": (names(12), lambda frames: frames),
        "other": (names(13), lambda frames: frames),
    }
    for name, (prompts, change) in runs.items():
        videos, out = folder(name, prompts, 1, change=change), tmp_path / f"{name}.json"
        flags = ("--reference", reference, "--json", out)
        assert program(videos, "--metrics", "sets", *flags) == 0
        found[name] = out

    def verdicts(first: str, second: str, common: bool = False) -> dict[str, tuple[str, bool]]:
        rows = compare(found[first], found[second], Tolerance(), ["fvd", "kvd"], common)
        return {row.name: (row.verdict, row.fails) for row in rows}

    for name in ("fvd", "kvd"):
        assert verdicts("first", "better")[name] == (BETTER, False)
        assert verdicts("better", "first")[name] == (WORSE, True)
        assert verdicts("first", "first")[name] == (EQUAL, False)
    with pytest.raises(InputError, match="is compared for the same prompts alone"):
        verdicts("better", "other", common=True)
    page = json.loads(found["first"].read_text())
    page["metrics"]["fvd"]["draws"] = [1.0]
    found["first"].write_text(json.dumps(page))
    with pytest.raises(InputError, match="does not say what fvd is"):
        verdicts("first", "better")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["fvd"],
            "5 videos and 4 of the reference are too few: covariances of 5 features have full rank from 6 videos",
        ),
        (["kvd"], "5 videos and 4 of the reference are too few: 10 of each are needed"),
    ],
)
def test_too_few_videos(
    flags: list[str], words: str, program: Program, folder: Callable[..., Path], tmp_path: Path
) -> None:
    videos, reference, out = folder("videos", names(5), 1), folder("real", names(4), 1), tmp_path / "scores.json"
    assert program(videos, "--metrics", *flags, "--reference", reference, "--json", out) == 1
    assert words in json.loads(out.read_text())["metrics"][flags[0]]["not_measured"]
    assert program(videos, "--metrics", *flags, "--json", tmp_path / "b.json") == 1
    assert (
        "give --reference FOLDER" in json.loads((tmp_path / "b.json").read_text())["metrics"][flags[0]]["not_measured"]
    )


def test_files_that_are_no_such_network(script: Path, tiny: nn.Module, tmp_path: Path) -> None:
    weights = WeightFolder(tmp_path)
    torch.save(tiny.state_dict(), tmp_path / "state.pt")
    torch.jit.script(nn.Conv3d(3, 2, 1)).save(str(tmp_path / "conv.pt"))
    for name, words in (
        ("state.pt", "is no TorchScript file"),
        ("conv.pt", "does not take 16 frames by forward"),
        ("nothing.pt", "cannot read"),
    ):
        with pytest.raises(InputError, match=words):
            video_network(tmp_path / name, weights, CPU, 16)
    with pytest.raises(InputError, match="does not take 3 frames"):
        video_network(script, weights, CPU, 3)
    assert video_network(script, weights, CPU, 16).width == 5


def test_what_is_missing_says_where_it_comes_from(tmp_path: Path) -> None:
    words = r"torchvision does not import|fetch https://.*/models/r3d"
    with pytest.raises(NotMeasuredError, match=words):
        video_network(None, WeightFolder(tmp_path), CPU, 16)


def test_r3d(tmp_path: Path, write: Callable[..., Path], pictures: Callable[..., Any]) -> None:
    """Against torchvision's own transforms and layers."""
    pytest.importorskip("torchvision", reason=NEEDS)
    video = import_module("torchvision.models.video")
    torch.manual_seed(1)
    model = video.r3d_18(weights=None).eval()
    torch.save(model.state_dict(), tmp_path / R3D.file)
    network = video_network(None, WeightFolder(tmp_path), CPU, 9)
    assert isinstance(network, R3DNetwork) and network.width == 512 and network.weights
    path = write(tmp_path / "x" / "a.mp4", pictures(20, 38, 54))
    (clip,) = find_clips(path.parent).clips
    features = VideoFeatures(network, Sampling(9, 8.0), tmp_path / "kept")
    found = features.of([clip])
    frames = torch.from_numpy(read_video(path)[:18:2]).permute(0, 3, 1, 2)
    layers = nn.Sequential(*list(model.children())[:-1])
    with torch.no_grad():
        expected = layers(video.R3D_18_Weights.DEFAULT.transforms()(frames)[None]).flatten().double().numpy()
    assert found.shape == (1, 512) and found[0] == pytest.approx(expected, abs=1e-6)
    assert networks.video_network(None, WeightFolder(tmp_path), CPU, 9) is network, "made once"
