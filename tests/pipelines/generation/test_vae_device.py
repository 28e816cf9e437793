"""The VAE on a device of its own: the same frames; what moves where; what is refused."""

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from inference_world import planned, run_inference, videos_in
from torch import Tensor

import inference
from pipelines.config import SpeedConfig
from pipelines.feasibility import Estimate
from pipelines.generation.decoding import BlockDecoder
from pipelines.generation.mixins import loading as module
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from pipelines.generation.streaming import FiniteCheck
from pipelines.generation.timing import PhaseTimer
from wan.utils.errors import InputError
from wan.vae.wan_vae import WanVAE

CPU, FIRST, SECOND = torch.device("cpu"), torch.device("cuda", 0), torch.device("cuda", 1)


@pytest.fixture
def two_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine that says it has two GPUs; nothing may compute there."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)


@pytest.fixture
def moved(monkeypatch: pytest.MonkeyPatch) -> list[torch.device]:
    """Where VAEs are said to be, the last place last; they stay on the CPU."""
    places = [CPU]
    monkeypatch.setattr(WanVAE, "device", property(lambda self: places[-1]))
    monkeypatch.setattr(WanVAE, "to", lambda self, device=None, dtype=None: places.append(device) or self)
    return places


def test_the_transformers_own_device_changes_nothing(
    monkeypatch: pytest.MonkeyPatch, config: Path, tmp_path: Path
) -> None:
    assert run_inference(monkeypatch, config, "--prompt", "red") == 0
    made = videos_in(tmp_path / "out")
    again = ("--prompt", "red", "--output_folder", tmp_path / "again")
    assert run_inference(monkeypatch, config, *again, "--vae_device", "cpu") == 0
    assert videos_in(tmp_path / "again") == made
    (record,) = (tmp_path / "again").glob("*.json")
    assert "vae" not in json.loads(record.read_text())


def test_videos_are_the_same_ones_wherever_they_were_decoded(monkeypatch: pytest.MonkeyPatch, config: Path) -> None:
    assert run_inference(monkeypatch, config, "--prompt", "red") == 0
    monkeypatch.setattr(CausalVideoPipeline, "stream", lambda *_, **__: pytest.fail("made again"))
    assert run_inference(monkeypatch, config, "--prompt", "red", "speed.vae_device=cpu") == 0


def test_names_of_devices(two_gpus: None) -> None:
    assert SpeedConfig().vae_on(FIRST) == SpeedConfig(vae_device="cuda").vae_on(CPU) == FIRST
    assert SpeedConfig(vae_device="cuda:1").vae_on(FIRST) == SECOND
    assert SpeedConfig(vae_device="cpu").vae_on(FIRST) == CPU
    with pytest.raises(InputError, match=r"vae_device: no GPU for cuda:2, 2 found: give another one, or leave it out"):
        SpeedConfig(vae_device="cuda:2").vae_on(FIRST)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "cuda:1"])
def test_a_device_that_is_not_there(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    with pytest.raises(InputError, match=f"no GPU for {name}, 0 found"):
        SpeedConfig(vae_device=name).vae_on(CPU)


def refusal(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, *flags: str) -> str:
    """The one line that inference.py says before it loads anything."""
    monkeypatch.setattr(CausalVideoPipeline, "from_pretrained", lambda *_, **__: pytest.fail("the model was loaded"))
    arguments = ["--config", config, "--output_folder", config.parent / "out", "--prompt", "red", "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["inference.py", *map(str, arguments), *flags])
    assert inference.main() == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_what_is_refused_before_models_load(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path
) -> None:
    assert "no GPU for cuda:99" in refusal(monkeypatch, capsys, config, "--vae_device", "cuda:99")
    assert "cpu, cuda or cuda:N" in refusal(monkeypatch, capsys, config, "--vae_device", "toaster")


def test_processes_do_not_share_it(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], config: Path, two_gpus: None
) -> None:
    monkeypatch.setenv("RANK", "0")
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "2")
    flags = ("--vae_device", "cuda:1")
    said = refusal(monkeypatch, capsys, config, *flags, "--parallel", "video")
    assert "does not go with --parallel video" in said and "leave --vae_device out" in said
    assert "2 processes cannot share --vae_device cuda:1" in refusal(monkeypatch, capsys, config, *flags)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    planned(config, "--prompt", "red", "--vae_device", "cpu", "--output_folder", config.parent / "out")


def test_the_vae_moves_and_comes_back(two_gpus: None, moved: list[torch.device]) -> None:
    pipeline = random_pipeline("toy", words=["a"])
    pipeline.optimize_for_inference(SpeedConfig(vae_device="cuda:1"))
    assert moved == [CPU, SECOND] and pipeline.vae_is_apart and pipeline.device == CPU
    assert pipeline._side is None and not pipeline.overlaps_decoding, "the transformer's device is no GPU"
    pipeline.optimize_for_inference(SpeedConfig(vae_device="cuda:1", fast_vae=False))
    assert moved[2:] == [CPU, SECOND]
    pipeline.optimize_for_inference(SpeedConfig())
    assert moved[4:] == [CPU] and not pipeline.vae_is_apart


def test_one_that_was_loaded_elsewhere_stays_there(
    folder: Path, two_gpus: None, moved: list[torch.device], monkeypatch: pytest.MonkeyPatch
) -> None:
    load, asked = module.load_vae, []
    monkeypatch.setattr(
        module, "load_vae", lambda path, *, dtype, device: asked.append(device) or load(path, dtype=dtype)
    )
    pipeline = CausalVideoPipeline.from_pretrained(folder, vae_device=SECOND)
    CausalVideoPipeline.from_pretrained(folder)
    assert asked == [SECOND, CPU]
    moved[:] = [SECOND]
    for speed in (SpeedConfig(), SpeedConfig(vae_device="cuda:1"), SpeedConfig()):
        pipeline.optimize_for_inference(speed)
        assert moved == [SECOND]


def test_what_moves_parts_itself_is_refused(two_gpus: None, moved: list[torch.device]) -> None:
    pipeline = random_pipeline("toy", words=["a"])
    pipeline.vae._hf_hook = None  # as accelerate leaves it
    with pytest.raises(InputError, match="vae_device goes neither with parallelize nor with CPU offloading"):
        pipeline.optimize_for_inference(SpeedConfig(vae_device="cuda:1"))
    del pipeline.vae._hf_hook
    moved.append(SECOND)
    for method in (pipeline.enable_model_cpu_offload, pipeline.enable_sequential_cpu_offload, pipeline.parallelize):
        with pytest.raises(InputError, match="needs all parts on cpu, the VAE is on cuda:1: leave vae_device out"):
            method()


def test_each_device_needs_its_own_part() -> None:
    estimate = Estimate({"weights": 5, "decoding": 2})
    assert estimate.divided(CPU, CPU) == {CPU: estimate}
    assert estimate.divided(CPU, SECOND) == {CPU: Estimate({"weights": 5}), SECOND: Estimate({"decoding": 2})}
    assert Estimate({"weights": 5}).divided(CPU, SECOND)[SECOND].total == 0


def test_latents_go_to_the_vae_before_its_time_is_measured() -> None:
    """And given frames, which are the transformer's too."""
    copied: list[tuple[Any, ...]] = []

    class Latents:
        def to(self, *where: Any) -> Tensor:
            copied.append(where)
            assert not timed, "waiting for latents is no decoding"
            return torch.zeros(1, 1, 16, 2, 2)

    timed: list[str] = []

    class Timed:
        def __init__(self, name: str) -> None:
            timed.append(name)

        def __enter__(self) -> None: ...

        def __exit__(self, *error: object) -> None:
            timed.clear()

    vae = random_pipeline("toy", words=["a"]).wan_vae
    decoder = BlockDecoder(vae, (2, 2), None, Latents(), {}, Timed, None)  # type: ignore[arg-type]
    decoder._decode(Latents())  # type: ignore[arg-type]
    assert copied == [(CPU, torch.float32)] * 2


def test_checks_of_several_devices_are_answered_in_the_order_of_causes(monkeypatch: pytest.MonkeyPatch) -> None:
    sent: list[torch.device] = []

    def value(device: torch.device, finite: bool) -> Any:
        answer = SimpleNamespace(all=lambda: (device, finite))
        return SimpleNamespace(device=device, answer=answer)

    def stack(answers: list[tuple[torch.device, bool]]) -> Tensor:
        assert len({device for device, _ in answers}) == 1, "what is stacked is on one device"
        sent.append(answers[0][0])
        return torch.tensor([finite for _, finite in answers])

    monkeypatch.setattr(torch, "isfinite", lambda tensor: tensor.answer)
    monkeypatch.setattr(torch, "stack", stack)
    pixels = value(SECOND, False)
    assert FiniteCheck({"text": value(CPU, True), "pixels": pixels, "latents": value(CPU, True)}).first_broken() == (
        "pixels"
    )
    assert sent == [CPU, SECOND], "one transfer per device"
    assert FiniteCheck({"latents": value(CPU, False), "pixels": pixels}).first_broken() == "latents"
    assert FiniteCheck({"pixels": pixels, "after": value(CPU, False)}).first_broken() == "pixels"


def videos(pipeline: CausalVideoPipeline, **options: Any) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Pixels, latents and bytes of two videos, pixels read before anything has been waited for."""
    made = []
    for seed in (0, 1):
        for block in pipeline.stream("a", 33, 32, 48, seeds=[seed], **options):
            pixels = block.pixels_BTCHW * 1
            made.append((pixels.cpu(), block.latents_BFCHW.cpu(), block.frames_BTHWC.wait()))
    return made


CLOSE = {"cuda:1": (1e-3, 1), "cpu": (0.05, 8)}
"""How far pixels, and bytes, may be from those of one GPU, whose convolutions round to TF32."""


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("vae_device", CLOSE)
def test_frames_decoded_elsewhere_are_those_of_one_gpu(vae_device: str, fast: bool) -> None:
    speed = SpeedConfig(compile=False, kernels=False, fast_vae=fast)
    for frames_per_block, frames in ((3, None), (1, torch.rand(1, 5, 3, 32, 48) * 2 - 1)):
        pipeline = random_pipeline("toy", words=["a"], device=FIRST, frames_per_block=frames_per_block)
        pipeline.optimize_for_inference(speed)
        wanted = videos(pipeline, image=frames)
        pipeline.optimize_for_inference(replace(speed, vae_device=vae_device))
        assert pipeline.overlaps_decoding is (vae_device == "cuda:1")
        for parts in zip(wanted, videos(pipeline, image=frames), strict=True):
            (pixels, latents, shown), found = parts
            assert (pixels - found[0]).abs().max() <= CLOSE[vae_device][0]
            assert (latents - found[1]).abs().max() <= (0 if frames is None else CLOSE[vae_device][0])
            assert (shown.int() - found[2].int()).abs().max() <= CLOSE[vae_device][1]
        pipeline.optimize_for_inference(speed)
        assert pipeline.wan_vae.device == FIRST


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_neither_gpu_waits_for_later_work() -> None:
    here, there = torch.randn(1000, device=FIRST), torch.randn(1000, device=SECOND)
    FiniteCheck({"here": here, "there": there}).wait()  # loads kernels and takes pinned memory
    timer = PhaseTimer(FIRST, {"vae": SECOND})
    with timer.phase("vae"), torch.cuda.device(SECOND):
        torch.cuda._sleep(300_000_000)  # a sixth of a second or so
    check, later = FiniteCheck({"here": here, "there": there}), []
    for device in (FIRST, SECOND):
        with torch.cuda.device(device):
            torch.cuda._sleep(2_000_000_000)
            later.append(torch.cuda.current_stream().record_event())
    assert check.wait()
    assert not any(event.query() for event in later)
    assert timer.seconds()["vae"] > 0.05
