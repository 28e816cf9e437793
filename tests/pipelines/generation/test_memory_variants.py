"""Sinks that are averages, and memories made anew, from the settings to the video; what cannot be is refused."""

import json
import sys
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from inference_world import SIZE, planned, run_inference
from paths import ROOT

from arl2.model import HybridSettings
from arl2.rollout import FewStepSampler, SeededNoise, remember_block, rollout
from arl2.trained_memory import TrainedMemory
from pipelines.config import InferenceConfig, MemoryConfig, MemoryKind, SinkKind, SpeedConfig
from pipelines.feasibility import TransformerSizes, room_for_generation
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from pipelines.training.config import Stage2Config
from wan.checkpoints.formats import transformer_config
from wan.utils.errors import InputError
from wan.utils.settings import differences
from wan.vae.wan_vae import TOY_VAE

AVERAGE = MemoryConfig(MemoryKind.window, 7, 2, SinkKind.average, 0.7)
ANEW = MemoryConfig(MemoryKind.window, 6, 0, recompute=True)


@pytest.fixture(scope="module")
def softmax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("softmax") / "model"
    random_pipeline("toy", HybridSettings(), vae_config=TOY_VAE | {"dim": 4}).save_pretrained(folder)
    return folder


@pytest.fixture
def softmax_config(softmax: Path, tmp_path: Path) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(f"model_folder: {softmax}\nnum_output_frames: 12\nheight: 32\nwidth: 48\ndenoising_steps: [1000]\n")
    return path


def streamed(pipeline: CausalVideoPipeline, memory: MemoryConfig, blocks: int = 5) -> torch.Tensor:
    stream = pipeline.stream("a red shape", None, **SIZE, seeds=[3], memory=memory)
    return torch.cat([next(stream).latents_BFCHW for _ in range(blocks)], dim=1)


def rolled(pipeline: CausalVideoPipeline, memory: MemoryConfig, decay: float | None, recomputed: int) -> torch.Tensor:
    model, like = pipeline.transformer, torch.empty(1, 3, 16, 4, 6)
    text = model.embed_text(pipeline.encode_prompt(["a red shape"]))
    state = model.memory_for(like, *memory.window, sink_decay=decay)
    noise = SeededNoise([3], (3, 16, 4, 6), torch.device("cpu"))
    sampler = FewStepSampler.from_steps([1000, 750, 500, 250], 5.0)
    with torch.no_grad():
        made = rollout(model, sampler, noise, text, state, 5, recomputed_frames=recomputed)
        return torch.cat([block.latents_BFCHW for block in made], dim=1)


@pytest.mark.parametrize(("memory", "decay", "recomputed"), [(AVERAGE, 0.7, 0), (ANEW, None, 3)])
def test_a_pipeline_has_them(softmax: Path, memory: MemoryConfig, decay: float | None, recomputed: int) -> None:
    pipeline = CausalVideoPipeline.from_pretrained(softmax)
    found = streamed(pipeline, memory)
    assert torch.equal(found, rolled(pipeline, memory, decay, recomputed))
    plain = streamed(pipeline, MemoryConfig(MemoryKind.window, *memory.window))
    seen = memory.window_frames // 3 * 3  # as long as no frame has left the window, nothing differs
    torch.testing.assert_close(found[:, :seen], plain[:, :seen], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(found, plain, rtol=1e-3, atol=1e-3)
    pipeline.optimize_for_inference(SpeedConfig(compile=False, cuda_graphs=False, kernels=False))
    pipeline.warm_up(*SIZE.values(), memory)
    for _ in range(2):  # the second video is in the memory of the first
        torch.testing.assert_close(streamed(pipeline, memory), found, rtol=1e-4, atol=1e-4)


def test_given_frames_are_made_anew_too(softmax: Path) -> None:
    pipeline = CausalVideoPipeline.from_pretrained(softmax)
    video = torch.rand(1, 33, 3, 32, 48) * 2 - 1  # 9 latent frames: three blocks
    options = {"video": video, **SIZE, "num_frames": 57, "seeds": [5]}
    found = [block.latents_BFCHW for block in pipeline.stream("x", **options, memory=ANEW)]
    given = pipeline.wan_vae.encode(video)
    model, noise = pipeline.transformer, SeededNoise([5], (3, 16, 4, 6), torch.device("cpu"))
    text = model.embed_text(pipeline.encode_prompt(["x"]))
    last, latents = given[:, -3:], []
    with torch.no_grad():
        for index in range(2):
            memory = model.memory_for(given, 6)
            remember_block(model, last, text, memory, 6 + 3 * index)
            at = (lambda block, step, index=index: noise(index, step), text, memory, 1)
            (made,) = rollout(model, pipeline.sampler, *at, start_frame=9 + 3 * index)
            last = made.latents_BFCHW
            latents.append(last)
    torch.testing.assert_close(torch.cat(found, dim=1)[:, -6:], torch.cat(latents, dim=1), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(("memory", "frames"), [(AVERAGE, 12), (AVERAGE, 6), (ANEW, 12)])
def test_the_estimate_of_a_run_counts_them(softmax: Path, memory: MemoryConfig, frames: int) -> None:
    config = InferenceConfig(model_folder=str(softmax), num_output_frames=frames, memory=memory, **SIZE)
    sizes = TransformerSizes.of(transformer_config(softmax))
    pipeline = CausalVideoPipeline.from_pretrained(softmax)
    needed = room_for_generation(config, sizes, torch.float32).parts["memory of layers"]
    assert needed == pipeline.new_memory(1, *SIZE.values(), frames, memory).num_bytes
    plain = pipeline.transformer.memory_bytes(frames, 4, 6, torch.float32, *memory.window_for(frames))
    averaged = plain // 7 * 2 if memory is AVERAGE and frames > 7 else 0
    assert needed == plain + averaged


@pytest.mark.parametrize("memory", [AVERAGE, ANEW])
def test_rollouts_that_become_data_have_them(softmax: Path, softmax_config: Path, memory: MemoryConfig) -> None:
    config = InferenceConfig(model_folder=str(softmax), num_output_frames=15, memory=memory, **SIZE)
    teacher = import_module("generate_latents").Teacher(config, False, torch.float32, torch.device("cpu"))
    with torch.no_grad():
        found = teacher.roll_out(3, teacher.encoder.encode(["a red shape"]))
    pipeline = CausalVideoPipeline.from_pretrained(softmax)
    torch.testing.assert_close(found, streamed(pipeline, memory), rtol=1e-4, atol=1e-4)


FLAGS = ("--memory", "window", "--window_frames", "6")


def test_records_say_it_and_videos_of_another_memory_are_others(
    softmax_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    base = ("--prompt", "x", *FLAGS, "--sink_frames", "3")
    assert run_inference(monkeypatch, softmax_config, *base, "--sink", "average", "--sink_decay", "0.5") == 0
    (record,) = (json.loads(path.read_text()) for path in (softmax_config.parent / "out").glob("*.json"))
    memory = {"kind": "window", "window_frames": 6, "sink_frames": 3, "sink": "average", "sink_decay": 0.5}
    assert record["settings"]["memory"] == memory
    assert run_inference(monkeypatch, softmax_config, *base, "--sink", "average", "--sink_decay", "0.5") == 0
    assert run_inference(monkeypatch, softmax_config, *base) == 2
    assert "memory.sink was average" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "reason"),
    [
        (("--sink", "average"), "sink needs a window"),
        (("--recompute",), "recompute needs a window"),
        (("--memory", "full", "--sink", "average"), "sink needs a window"),
        ((*FLAGS, "--sink", "average", "--sink_frames", "0"), "averages nothing"),
        ((*FLAGS, "--sink", "average", "--sink_decay", "1"), "averages nothing"),
        ((*FLAGS, "--sink_decay", "0.5"), "give memory.sink=average"),
        ((*FLAGS, "--recompute", "--sink_frames", "3"), "without a sink"),
        (("--memory", "window", "--window_frames", "7", "--sink_frames", "0", "--recompute"), "whole blocks of 3"),
        (("--memory", "window", "--window_frames", "3", "--sink_frames", "0", "--recompute"), "whole blocks of 3"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_line(
    softmax_config: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], flags: Any, reason: str
) -> None:
    assert run_inference(monkeypatch, softmax_config, "--prompt", "x", *flags) == 2
    error = capsys.readouterr().err
    assert reason in error and error.count("\n") == 1
    assert not (softmax_config.parent / "out").exists()


def test_a_config_s_own_settings_are_checked_too(softmax_config: Path, tmp_path: Path) -> None:
    softmax_config.write_text(softmax_config.read_text() + "memory: {sink: average}\n")
    with pytest.raises(InputError, match="sink needs a window, the memory is trained"):
        planned(softmax_config, "--prompt", "x", "--output_folder", tmp_path / "o")


def test_hybrid_layers_have_no_state_to_make_anew(config: Path, tmp_path: Path) -> None:
    """The toy model of these tests has three hybrid layers."""
    flags = ("--prompt", "x", "--output_folder", tmp_path / "o", *FLAGS, "--sink_frames", "0")
    with pytest.raises(InputError, match="3 layers of this model are hybrid"):
        planned(config, *flags, "--recompute")
    whole = random_pipeline("toy", HybridSettings(tuple(range(8))), vae_config=TOY_VAE | {"dim": 4})
    for memory, reason in ((AVERAGE, "no layer of this model is a softmax layer"), (ANEW, "8 layers")):
        with pytest.raises(InputError, match=reason):
            whole.stream("x", 9, **SIZE, memory=memory)


def test_a_model_that_was_trained_without_is_warned_of(softmax: Path, caplog: pytest.LogCaptureFixture) -> None:
    pipeline = CausalVideoPipeline.from_pretrained(softmax)
    pipeline.transformer.set_trained_memory(TrainedMemory(7, 2))
    pipeline.resolve_memory(MemoryConfig(MemoryKind.window, 7, 2))
    assert not caplog.messages
    pipeline.resolve_memory(AVERAGE)
    assert "a moving average of decay 0.7" in caplog.text


def test_records_and_runs_of_earlier_versions_stay_valid() -> None:
    earlier = {"kind": "window", "window_frames": 6, "sink_frames": 0}
    memory = MemoryConfig(MemoryKind.window, 6, 0, sink_decay=0.5)
    assert not differences({"memory": earlier}, {"memory": memory.identity()})
    assert not differences({"memory": earlier}, {"memory": InferenceConfig(memory=memory).identity()["memory"]})
    for other in (ANEW, MemoryConfig(MemoryKind.window, 6, 2, SinkKind.average)):
        assert differences({"memory": earlier}, {"memory": other.identity()})


@pytest.mark.parametrize("memory", [AVERAGE, ANEW])
@pytest.mark.parametrize("name", ["memory", "teacher_memory"])
def test_training_and_probes_refuse_them(
    memory: MemoryConfig, name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"{name}\.(sink|recompute) is built for generating"):
        Stage2Config(**{name: memory}).objective_settings()
    settings = [f"memory.{field}={value}" for field, value in asdict(memory).items()]
    config = str(ROOT / "configs" / "toyworld" / "inference.yaml")
    output = ["--json", str(tmp_path / "probe.json")]
    monkeypatch.setattr(sys, "argv", ["probe_memory", "--config", config, *output, *settings])
    assert import_module("probe_memory").main() == 2
    assert "is built for generating videos alone" in capsys.readouterr().err
