"""What ships of the toy world: weights that are what the documents say they are."""

import json

import torch
from paths import ROOT

from arl2.toyworld.training.vae_quality import vae_quality
from arl2.toyworld.world.reader import read_generated
from arl2.toyworld.world.scenes import COLOURS, SHAPES
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.vae.wan_vae import load_vae

BUNDLE = ROOT / "models" / "toyworld"
MAX_BYTES = 20e6


def test_it_is_small_and_holds_nothing_that_is_unpickled() -> None:
    files = [file for file in BUNDLE.rglob("*") if file.is_file()]
    assert {file.suffix for file in files} <= {".safetensors", ".json"}
    configs = [json.loads(file.read_text()) for file in files if file.name == "config.json"]
    assert len(configs) == 3 and not any(config.get("_name_or_path") for config in configs)
    assert 16e6 < sum(file.stat().st_size for file in files) <= MAX_BYTES


def test_the_hybrid_comes_out_from_behind_the_wall_with_what_went_in() -> None:
    hybrid = BUNDLE / "hybrid_75.safetensors"
    pipe = CausalVideoPipeline.from_pretrained(BUNDLE, checkpoint_path=hybrid)
    assert len(pipe.transformer.hybrid.layers) == 6 and pipe.transformer.hybrid.lora_rank == 16
    prompt = "a shape slides behind the brown wall and comes out on the other side"
    video = pipe(prompt, 81, 64, 96, generator=torch.Generator().manual_seed(0), output_type="pt").frames
    reading = read_generated(2 * video - 1, torch.tensor([False]))
    assert bool(reading.same_object()["both"][0, 0])


def test_the_vae_keeps_what_the_probe_reads() -> None:
    quality = vae_quality(load_vae(BUNDLE / "vae"), torch.device("cpu"), videos=2, batch=2)
    assert quality["psnr"] > 30 and quality["psnr_objects"] > 24
    assert quality["both"] == quality["both_truth"] == 1.0


PROMPTS = (
    "a red ring rolls behind the wall and comes out again",
    "a green cross slides behind the wall and appears again",
)


def test_two_blocks_show_what_the_prompt_names_and_the_same_again() -> None:
    pipe = CausalVideoPipeline.from_pretrained(BUNDLE)
    for prompt in PROMPTS:
        seeds = (torch.Generator().manual_seed(3) for _ in range(2))
        first, again = (pipe(prompt, 21, 64, 96, generator=seed, output_type="pt").frames for seed in seeds)
        assert first.shape == (1, 21, 3, 64, 96) and torch.equal(first, again)
        reading = read_generated(2 * first - 1, torch.tensor([False]))
        colour, shape = list(COLOURS)[reading.colour[0, 0, 0]], SHAPES[reading.shape[0, 0, 0]]
        assert prompt.startswith(f"a {colour} {shape} ")
