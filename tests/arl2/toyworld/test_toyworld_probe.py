"""The probe: its statistics, its safeguards, and a run from end to end on untrained models."""

import json
import math
import sys
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch

from arl2.toyworld.probe import memory_probe as probe_module
from arl2.toyworld.probe.leakage import hidden_blocks, leakage_by_block
from arl2.toyworld.probe.memory_probe import ceilings, interval, judge_obeyed, make_probe_set
from arl2.toyworld.world.latents import toy_text_encoder
from arl2.toyworld.world.reader import read_generated
from arl2.toyworld.world.render import as_pixels, render, visible_fraction
from arl2.toyworld.world.scenes import sample_scenes
from pipelines.generation.random_model import random_pipeline
from wan.utils.errors import InputError
from wan.vae.wan_vae import TOY_VAE, WanVAE, new_vae


@pytest.fixture(scope="module")
def vae() -> WanVAE:
    torch.manual_seed(0)
    return WanVAE(new_vae(TOY_VAE | {"dim": 4}))


def test_intervals_are_wilsons() -> None:
    low, high = interval(8, 10)
    assert math.isclose(low, 0.4901, abs_tol=1e-3) and math.isclose(high, 0.9433, abs_tol=1e-3)
    assert interval(0, 0) == (0.0, 1.0)
    assert interval(10, 10)[0] < 0.75


def test_captions_that_tell_make_the_probe_void(vae: WanVAE, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(probe_module, "caption_world", lambda scenes, informative: ["a red ring"] * len(scenes))
    with pytest.raises(InputError, match="names the answer"):
        make_probe_set(vae, toy_text_encoder(), 1, 0, 27)


def test_the_truth_scores_one_and_noise_through_an_untrained_vae_does_not(vae: WanVAE) -> None:
    probe = make_probe_set(vae, toy_text_encoder(), 6, 0, 27)
    result = ceilings(vae, probe)
    assert result["ground_truth"]["accuracy"] == 1.0
    assert result["ground_truth_through_vae"]["accuracy"] < 0.5
    groups = result["ground_truth"]["continued"]["groups"]
    both = [groups[name]["both"]["objects"] for name in ("one object", "two objects")]
    assert sum(both) == result["ground_truth"]["objects"] > 0


def test_real_videos_obey_their_own_captions_and_not_those_of_others(vae: WanVAE) -> None:
    scenes = sample_scenes(torch.arange(24), mix=probe_module.PROBE_MIX)
    shown = read_generated(as_pixels(render(scenes)), scenes.exists[:, 1])
    assert judge_obeyed(shown, scenes)["both"]["accuracy"] == 1.0
    others = replace(scenes, colour=(scenes.colour + 1) % 8)
    assert judge_obeyed(shown, others)["both"]["accuracy"] == 0.0


def test_hidden_blocks_show_nothing() -> None:
    scenes = sample_scenes(torch.arange(6), mix={"occlusion": 1.0})
    hidden, visible = hidden_blocks(scenes), visible_fraction(scenes)[:, 0]
    assert hidden.shape == (6, 7) and hidden[:, 3].all() and not hidden[:, 0].any()
    for block in range(1, 7):
        frames = visible[hidden[:, block], 9 + 12 * (block - 1) : 9 + 12 * block]
        assert not frames.any()


def test_a_leak_is_found_and_its_absence_too() -> None:
    scenes = sample_scenes(torch.arange(400), mix={"occlusion": 1.0})
    latents = torch.randn(400, 21, 2, 1, 1)
    blind = {row["block"]: row for row in leakage_by_block(latents, scenes, steps=100)}
    latents[:, 9:12, 0, 0, 0] = scenes.colour[:, :1].float()
    telling = {row["block"]: row for row in leakage_by_block(latents, scenes, steps=300)}
    assert blind[3]["colour"] < 0.25 and telling[3]["colour"] > 0.6
    assert telling[3]["videos"] == 200


def test_the_script_writes_what_it_promises(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    pipeline = random_pipeline("toy", vae_config=TOY_VAE | {"dim": 4})
    pipeline.save_pretrained(tmp_path / "model")
    config = tmp_path / "config.yaml"
    config.write_text(f"model_folder: {tmp_path / 'model'}\nheight: 64\nwidth: 96\ndenoising_steps: [1000]\n")
    page = tmp_path / "probe.json"
    flags = ["--config", config, "--videos", 2, "--json", page, "--device", "cpu"]
    monkeypatch.setattr(sys, "argv", ["probe_memory.py", *map(str, flags)])
    assert import_module("probe_memory").main() == 0
    models = json.loads(page.read_text())["models"]
    assert set(models) == {"teacher", "local_only", "window_sink", "ground_truth", "ground_truth_through_vae"}
    assert models["teacher"]["obeyed"]["both"]["objects"] > 0
    for row in models.values():
        assert 0 <= row["accuracy"] <= 1 and 0 < row["chance"] < 0.05
    assert models["ground_truth"]["accuracy"] == 1.0
    monkeypatch.setattr(sys, "argv", ["probe_memory.py", *map(str, flags), "--only", "nobody"])
    assert import_module("probe_memory").main() == 2
    assert "--rows nobody: no such row; there are teacher, local_only, window_sink" in capsys.readouterr().err
    rows = dict.fromkeys(("teacher", "local_only"), Mock())
    chosen = import_module("probe_memory").chosen
    assert set(chosen(rows, None)) == set(rows) and set(chosen(rows, ["local_only"])) == {"local_only"}


def test_the_world_does_not_change_unnoticed() -> None:
    """A trained bundle fits the world it was trained on: change this figure only together with the bundle."""
    video = render(sample_scenes(torch.tensor([123])), torch.tensor([0, 40, 80]))
    assert video.long().sum().item() == WORLD_SUM


WORLD_SUM = 12975582
