"""Training data: written whole or not at all, resumed, divided over ranks, and refused when damaged."""

import json
import math
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from abandoned import abandoned

from arl2.distillation.data import INDEX, LatentDataset, LatentWriter
from arl2.rollout import GeneratedBlock
from pipelines.config import MemoryConfig, MemoryKind
from pipelines.generation.random_model import random_pipeline
from wan.utils.errors import InputError
from wan.vae.wan_vae import TOY_VAE

SETTINGS = {"steps": [1000, 500], "name": "x"}


def fill(folder: Path, keys: list[str], per_shard: int = 2) -> None:
    with LatentWriter(folder, SETTINGS, per_shard) as writer:
        for key in keys:
            if key not in writer.keys:
                seed = int(key)
                writer.add(
                    key, torch.full((3, 2, 4, 4), float(seed)), f"prompt {seed % 2}", seed, torch.ones(5, 6) * seed
                )


def test_what_is_written_is_read_and_prompts_are_embedded_once(tmp_path: Path) -> None:
    fill(tmp_path, ["0", "1", "2", "3", "4"])
    data = LatentDataset([tmp_path])
    assert len(data) == 5 and len(list(tmp_path.glob("shard-*"))) == 3 and len(list((tmp_path / "text").iterdir())) == 2
    for index in range(5):
        latents, text = data[index]
        assert latents.shape == (3, 2, 4, 4) and (latents == index).all() and (text == index % 2).all()


def test_a_writer_that_was_killed_goes_on(tmp_path: Path) -> None:
    writer = LatentWriter(tmp_path, SETTINGS, samples_per_shard=2)
    for seed in range(3):
        writer.add(str(seed), torch.zeros(3, 2, 4, 4), "p", seed, torch.ones(1, 1))
    del writer  # killed: the third sample waited in memory
    abandoned(tmp_path / "shard-00001.safetensors").write_bytes(b"half")
    assert LatentWriter(tmp_path, SETTINGS).keys == {"0", "1"}
    fill(tmp_path, ["0", "1", "2", "3"])
    assert [sample["key"] for sample in json.loads((tmp_path / INDEX).read_text())["samples"]] == ["0", "1", "2", "3"]
    assert not list(tmp_path.glob(".*"))


def test_fingerprints_tell_data_apart(tmp_path: Path) -> None:
    for name, keys in (("a", ["0", "1"]), ("b", ["0", "1"]), ("c", ["0", "2"])):
        fill(tmp_path / name, keys)
    a, b, c = (LatentDataset([tmp_path / name]).fingerprint() for name in "abc")
    assert a == b != c
    assert len(LatentDataset([tmp_path / "a", tmp_path / "c"])) == 4


def test_bad_data_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no training data"):
        LatentDataset([tmp_path])
    fill(tmp_path, ["0", "1"])
    with pytest.raises(InputError, match="other settings"):
        LatentWriter(tmp_path, {"steps": [1]})
    with pytest.raises(InputError, match="already"):
        LatentWriter(tmp_path, SETTINGS).add("0", torch.zeros(1), "p", 0, torch.zeros(1))
    with pytest.raises(InputError, match="not finite"):
        LatentWriter(tmp_path, SETTINGS).add("9", torch.full((1,), torch.nan), "p", 0, torch.zeros(1))
    data, shard = LatentDataset([tmp_path]), next(tmp_path.glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:50])
    with pytest.raises(InputError, match="cannot be read"):
        data[0]
    shard.unlink()
    with pytest.raises(InputError, match="missing"):
        LatentDataset([tmp_path])
    (tmp_path / INDEX).write_text("{}")
    with pytest.raises(InputError, match="no index of latents"):
        LatentDataset([tmp_path])


@pytest.mark.parametrize("memory", [MemoryConfig(), MemoryConfig(MemoryKind.window, 3, 0)], ids=["full", "window"])
def test_the_script_makes_what_inference_would_make(
    memory: MemoryConfig, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    pipeline = random_pipeline("toy", vae_config=TOY_VAE | {"dim": 4})
    pipeline.save_pretrained(tmp_path / "model")
    sizes = "height: 32\nwidth: 48\nnum_output_frames: 6\ndenoising_steps: [1000, 500]\n"
    sizes += (
        f"memory: {{kind: {memory.kind}, window_frames: {memory.window_frames}, sink_frames: {memory.sink_frames}}}\n"
    )
    (tmp_path / "config.yaml").write_text(f"model_folder: {tmp_path / 'model'}\n{sizes}")
    (tmp_path / "prompts.txt").write_text("a red shape\nblue\n")
    flags = ["--config", "config.yaml", "--data_path", "prompts.txt", "--folder", "data", "--device", "cpu"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["generate_latents.py", *flags])
    script = import_module("generate_latents")
    whole, calls = script.rollout, []

    def broken_once(*arguments: Any, **options: Any) -> Iterator[GeneratedBlock]:
        calls.append(arguments)
        for block in whole(*arguments, **options):
            yield replace(block, latents_BFCHW=block.latents_BFCHW * (math.nan if len(calls) == 1 else 1))

    monkeypatch.setattr(script, "rollout", broken_once)
    assert script.main() == 1 and len(LatentDataset([tmp_path / "data"])) == 1, "the other sample is kept"
    assert script.main() == 0 and script.main() == 0 and len(calls) == 3
    data = LatentDataset([tmp_path / "data"])
    assert len(data) == 2 and data.settings["num_output_frames"] == 6
    sample = json.loads((tmp_path / "data" / INDEX).read_text())["samples"][0]
    pipeline.sampler = type(pipeline.sampler).from_steps([1000, 500], 5.0)
    stream = pipeline.stream(sample["prompt"], 21, 32, 48, seeds=[sample["seed"]], memory=memory)
    expected = torch.cat([block.latents_BFCHW for block in stream], dim=1)[0]
    torch.testing.assert_close(data[0][0], expected.bfloat16(), rtol=2e-2, atol=2e-2)
