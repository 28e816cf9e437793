"""Building the toy world's models: what is done is skipped, if the same settings and models made it."""

import sys
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from arl2.toyworld.world.latents import (
    LatentVideos,
    load_latent_videos,
    models_of,
    save_latent_videos,
    toy_text_encoder,
)
from wan.utils.errors import InputError
from wan.utils.locks import exclusive
from wan.vae.wan_vae import TOY_VAE, WanVAE, new_vae

build_toyworld = import_module("build_toyworld")


class Built:
    """Stands in for the steps of the toy world's build: each leaves a folder of weights."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, work: Path) -> None:
        self.made: list[str] = []
        for name in build_toyworld.STEPS:
            monkeypatch.setitem(build_toyworld.STEPS, name, partial(self.step, name))
        self._work, self._patch = work, monkeypatch

    def step(self, name: str, build: object) -> dict[str, Any]:
        self.made.append(name)
        folder = self._work / name
        folder.mkdir(exist_ok=True)
        save_file({"x": torch.rand(3)}, folder / "model.safetensors")
        return {"quality": {}}

    def run(self, *flags: object) -> int:
        self.made.clear()
        fixed = ("--work", self._work, "--device", "cpu")
        self._patch.setattr(sys, "argv", ["build_toyworld.py", *map(str, (*fixed, *flags))])
        return int(build_toyworld.main())


def test_a_step_is_skipped_if_the_same_settings_and_models_made_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    build = Built(monkeypatch, tmp_path)
    assert build.run() == 0 and build.made == list(build_toyworld.STEPS)
    assert build.run() == 0 and build.made == []
    assert build.run("--videos", 4, "--steps", 1) == 2
    assert "first_vae.json was made with other settings (batch was" in " ".join(capsys.readouterr().err.split())
    assert build.run("--step", "first_teacher") == 0 and build.made == ["first_teacher"]
    assert build.run() == 2 and build.made == []
    error = " ".join(capsys.readouterr().err.split())
    assert "teacher.json was made with other settings (made_from.first_teacher was" in error
    assert "make it again with --step teacher" in error
    (tmp_path / "vae.json").write_text("{")
    assert build.run() == 2 and "vae.json is not valid JSON" in " ".join(capsys.readouterr().err.split())
    with exclusive(tmp_path / ".lock", "x"):
        assert build.run() == 2
    assert "is in use by process" in " ".join(capsys.readouterr().err.split())
    assert build.run("--videos", 0) == 2


def test_training_sets_know_the_models_that_made_them(tmp_path: Path) -> None:
    data = LatentVideos(torch.randn(2, 3, 16, 2, 2), torch.randn(2, 5, 8), torch.randn(2, 5, 8))
    file = tmp_path / "latents.safetensors"
    vae, encoder = WanVAE(new_vae(TOY_VAE | {"dim": 4})), toy_text_encoder()
    made_by = models_of(vae, encoder)
    save_latent_videos(data, file, made_by)
    assert torch.equal(load_latent_videos(file, torch.device("cpu"), made_by).text_NTD, data.text_NTD)
    vae.model.half()
    assert models_of(vae, encoder) == made_by, "as the bundle ships them"
    vae.model.register_to_config(latents_mean=[0.5] * 16)
    for now, name in ((models_of(vae, encoder), "vae"), (models_of(vae, toy_text_encoder(1)), "text_encoder")):
        with pytest.raises(InputError, match=rf"{name} was .*delete it"):
            load_latent_videos(file, torch.device("cpu"), now)
    file.write_bytes(file.read_bytes()[:100])
    with pytest.raises(InputError, match="cannot read"):
        load_latent_videos(file, torch.device("cpu"), made_by)
