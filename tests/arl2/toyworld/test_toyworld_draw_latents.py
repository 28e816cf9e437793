"""Training data of the worlds: what the command says is drawn, encoded and captioned, and made once."""

import json
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
from torch import Tensor

from arl2.distillation.data import LatentDataset
from arl2.toyworld.world.captions import names_answer
from arl2.toyworld.world.latents import encode_pixels, encode_scenes
from arl2.toyworld.world.long_scenes import sample_long_scenes
from arl2.toyworld.world.render import as_pixels, frames_of, render
from arl2.toyworld.world.scenes import SceneBatch
from arl2.toyworld.world.worlds import World
from pipelines.generation.random_model import random_pipeline
from pipelines.toyworld import draw
from wan.vae.wan_vae import TOY_VAE, WanVAE, load_vae, new_vae

draw_latents = import_module("draw_latents")
SMALL = TOY_VAE | {"dim": 2, "num_res_blocks": 1}


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., int]:
    random_pipeline("toy", vae_config=SMALL).save_pretrained(tmp_path / "model")

    def call(*flags: object) -> int:
        fixed = ("--model_folder", tmp_path / "model", "--output_folder", tmp_path / "data", "--device", "cpu")
        monkeypatch.setattr(sys, "argv", ["draw_latents.py", *map(str, (*fixed, *flags))])
        return int(draw_latents.main())

    return call


def test_pieces_are_encoded_as_the_whole_is() -> None:
    torch.manual_seed(0)
    vae, scenes = WanVAE(new_vae(SMALL)), sample_long_scenes(torch.arange(2), 1)
    whole = encode_pixels(vae, as_pixels(render(scenes, frames_of(0, 8))))
    torch.testing.assert_close(encode_scenes(vae, scenes, 8), whole, atol=1e-4, rtol=1e-4)


def test_what_is_there_is_not_drawn_again(
    run: Callable[..., int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    drawn: list[int] = []

    def noted(vae: WanVAE, scenes: SceneBatch, latents: int) -> Tensor:
        drawn.extend(scenes.seed.tolist())
        return encode_scenes(vae, scenes, latents)

    monkeypatch.setattr(draw, "encode_scenes", noted)
    both = ("--world", "standard", "long", "--latent_frames", 6, "--seed", 7, "--batch", 2)
    assert run(*both, "--videos", 5) == 0 and sorted(drawn) == [7, 8, 9, 10, 11]
    data = LatentDataset([tmp_path / "data"])
    assert len(data) == 5 and data.latents_shape == (6, 16, 8, 12)
    assert data.settings["world"] == ["standard", "long"]
    index = json.loads((tmp_path / "data" / "index.json").read_text())
    keys = [sample["key"] for sample in index["samples"]]
    assert keys == ["standard-7", "standard-9", "standard-11", "long-8", "long-10"]
    vae = load_vae(tmp_path / "model")
    expected = encode_scenes(vae, sample_long_scenes(torch.tensor([10]), 1), 6)[0]
    torch.testing.assert_close(data[4][0].float(), expected, atol=1e-2, rtol=1e-2)
    assert run(*both, "--videos", 7) == 0 and sorted(drawn[5:]) == [12, 13]
    assert run(*both, "--videos", 5) == 0 and len(drawn) == 7 and len(LatentDataset([tmp_path / "data"])) == 5
    for flags, message in (
        ((*both, "--informative", 1), "informative was 0.5, is 1"),
        ((*both[3:],), "world was"),
        (("--latent_frames", 7), "do not divide into blocks of 3"),
    ):
        assert run(*flags) == 2
        assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.parametrize("fraction", [0, 0.5, 1])
def test_captions_tell_as_often_as_is_said(fraction: float) -> None:
    for samples in draw.DrawSettings(tuple(World), 2000, informative=fraction).samples().values():
        told = sum(names_answer(sample.prompt) for sample in samples)
        assert len(samples) == 1000 and abs(told / 1000 - fraction) < 0.05
