"""Presets of published models: settings, sources and toy runs."""

import json
import re
from importlib import import_module
from pathlib import Path

import pytest
import torch
from inference_world import SIZE, run_inference
from paths import ROOT
from published import pickled, wrapped
from tiny_models import new_memory, tiny_model, tiny_video

from arl2.model import HybridSettings
from arl2.rollout import FewStepSampler, denoise_block, remember_block, rollout
from pipelines.config import InferenceConfig, MemoryKind
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from pipelines.settings import load_config
from wan.utils.errors import InputError
from wan.vae.wan_vae import TOY_VAE

SOURCES = import_module("download_weights").SOURCES
PRESETS = sorted((ROOT / "configs" / "presets").glob("*.yaml"))
FOUR, FOUR_WARPED = [1000, 750, 500, 250], (1000.0, 937.5, 833.3333129882812, 625.0)
WINDOWS = {"longlive": (12, 3), "reward_forcing": (9, 3), "krea_14b": (6, 0), "streamdiffusionv2": (6, 3)}
STEPS = {
    "causvid": (1000.0, 757.0, 522.0),
    "krea_14b": (1000.0, 937.0, 833.0, 625.0),
    "streamdiffusionv2": (1000.0, 750.0, 500.0, 250.0),
    "causal_forcing_1step": (1000.0,),
    "causal_forcing_2step": (1000.0, 833.3333129882812),
}


def preset(name: str) -> InferenceConfig:
    return load_config(InferenceConfig, ROOT / "configs" / "presets" / f"{name}.yaml")


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_names_the_files_that_are_fetched_for_it(path: Path) -> None:
    config, source, text = load_config(InferenceConfig, path), SOURCES[path.stem], path.read_text(encoding="utf-8")
    named = [config.checkpoint_path, *(each.partition(":")[0] for each in config.lora)]
    assert named == [f"{source.folder}/{file}" for file in source.patterns]
    assert f"https://huggingface.co/{source.repository}\n" in text and "# Licence: " in text
    fetched = re.search(r"download_weights.py --what (\S+) (\S+)\n", text)
    assert fetched is not None and fetched[2] == path.stem
    assert config.model_folder == SOURCES[fetched[1]].folder
    assert (config.height, config.width) == (480, 832)


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_has_the_settings_of_its_model(path: Path) -> None:
    config = load_config(InferenceConfig, path)
    sampler = config.sampler()
    if path.stem == "causvid_14b":
        assert len(sampler.timesteps) == 9 and config.timestep_shift == 8
    else:
        assert sampler.timesteps == STEPS.get(path.stem, FOUR_WARPED)
    first = path.stem in ("causal_forcing_1step", "causal_forcing_2step")
    assert sampler.for_block(0).timesteps == (FOUR_WARPED if first else sampler.timesteps)
    assert config.frames_per_block == (1 if first or path.stem == "streamdiffusionv2" else 3)
    memory = config.memory
    assert memory.kind is (MemoryKind.window if path.stem in WINDOWS else MemoryKind.full)
    assert memory.window == WINDOWS.get(path.stem, (None, 0))
    assert memory.decay_for(None) == (0.999 if path.stem == "reward_forcing" else None)
    assert memory.recomputed_for(None, config.frames_per_block) == (3 if path.stem == "krea_14b" else 0)
    assert (config.caveat is not None) is (path.stem in ("reward_forcing", "krea_14b", "streamdiffusionv2"))


def test_the_steps_of_the_first_block_are_those_of_a_sampler_of_their_own() -> None:
    model, video = tiny_model(), tiny_video(frames=3)
    text = model.embed_text(video.text)
    sampler = FewStepSampler.from_steps([1000], 5.0, first_block=FOUR)
    first, later = FewStepSampler.from_steps(FOUR, 5.0), FewStepSampler.from_steps([1000], 5.0)
    assert sampler.for_block(0) == first and sampler.for_block(1) is sampler and later.for_block(0) is later
    drawn = torch.randn(3, 4, *video.clean[:, :1].shape, dtype=torch.float64)
    with torch.no_grad():
        made = rollout(model, sampler, lambda block, step: drawn[block, step], text, new_memory(model), 3)
        found = [block.latents_BFCHW for block in made]
        memory = new_memory(model)
        for number, steps in enumerate((first, later, later)):
            expected = denoise_block(model, steps, lambda step: drawn[number, step], text, memory, number)  # noqa: B023
            assert torch.equal(found[number], expected)
            remember_block(model, expected, text, memory, number)
        # A block after given frames is not the first of its video.
        memory = new_memory(model)
        remember_block(model, video.clean[:, :1], text, memory, 0)
        (block,) = rollout(model, sampler, lambda block, step: drawn[block, step], text, memory, 1, start_frame=1)
        expected = denoise_block(model, later, lambda step: drawn[0, step], text, memory, 1)
    assert torch.equal(block.latents_BFCHW, expected)


@pytest.mark.parametrize("steps", [[], [250, 500], [1001], [0]])
def test_steps_of_the_first_block_are_checked(steps: list[int]) -> None:
    with pytest.raises(InputError):
        FewStepSampler.from_steps([1000], 5.0, first_block=steps)
    with pytest.raises(InputError, match="first_block_denoising_steps"):
        random_pipeline("toy", first_block_denoising_steps=steps)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A toy model in a folder, its softmax weights as a training's file, and a picture-sized VAE."""
    folder = tmp_path_factory.mktemp("presets")
    pipeline = random_pipeline("toy", HybridSettings(), vae_config=TOY_VAE | {"dim": 4}, **_first_block())
    pipeline.save_pretrained(folder / "model")
    pickled({"generator_ema": wrapped(pipeline.transformer.state_dict())}, folder / "weights.pt")
    return folder


def _first_block() -> dict[str, list[int]]:
    return {"denoising_steps": [1000], "first_block_denoising_steps": FOUR}


def test_a_stored_pipeline_keeps_the_steps_of_its_first_block(world: Path) -> None:
    assert json.loads((world / "model" / "model_index.json").read_text())["first_block_denoising_steps"] == FOUR
    pipeline = CausalVideoPipeline.from_pretrained(world / "model")
    assert len(pipeline.sampler.timesteps) == 1 and len(pipeline.sampler.for_block(0).timesteps) == 4
    replaced = CausalVideoPipeline.from_pretrained(world / "model", first_block_denoising_steps=None)
    assert len(replaced.sampler.for_block(0).timesteps) == 1


def toy_flags(world: Path, config: InferenceConfig) -> list[str]:
    slides = config.memory.kind is MemoryKind.window
    frames = config.memory.window_frames + config.frames_per_block if slides else 2 * config.frames_per_block
    small = [f"{name}={value}" for name, value in SIZE.items()]
    weights = [f"model_folder={world / 'model'}", "--checkpoint_path", str(world / "weights.pt")]
    return [*small, *weights, f"num_output_frames={frames}", "--prompt", "a red ball"]


@pytest.mark.parametrize("path", PRESETS, ids=lambda path: path.stem)
def test_a_preset_runs_at_toy_size(
    path: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    config = load_config(InferenceConfig, path)
    lora = ["lora=[]"] if config.lora else []
    flags = toy_flags(world, config)
    assert run_inference(monkeypatch, path, "--output_folder", tmp_path, *flags, *lora) == 0
    (record,) = (json.loads(file.read_text()) for file in tmp_path.glob("*.json"))
    settings = record["settings"]
    assert settings.get("first_block_denoising_steps") == config.first_block_denoising_steps
    assert "caveat" not in settings and "checkpoint_path" not in settings
    assert sum(config.caveat in line for line in caplog.messages if config.caveat) == (config.caveat is not None)
    if config.first_block_denoising_steps:  # a video of other steps is another video
        again = [*flags, "first_block_denoising_steps=[1000, 500]"]
        assert run_inference(monkeypatch, path, "--output_folder", tmp_path, *again) == 2
