"""Inputs of the stress test: tiny models with random weights, prompts, clips, configs, training data."""

from pathlib import Path

import numpy as np
import torch
from processes import Command, Server

from arl2.model import HybridSettings, HybridWanModel
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from pipelines.media.video import VideoWriter
from wan.vae.wan_vae import TOY_VAE

SIZES = {
    "dim": 48,
    "ffn_dim": 96,
    "num_heads": 2,
    "num_layers": 3,
    "freq_dim": 16,
    "text_dim": 64,
    "text_len": 32,
    "in_dim": 16,
    "out_dim": 16,
}
PROMPTS = ("a red shape rolls", "a blue shape", "red rolls", "blue rolls", "a shape", "rolls")
INFERENCE = """
model_folder: {world}/{model}
num_output_frames: {frames}
height: 32
width: 48
memory: {{window_frames: 6, sink_frames: 3}}
"""
TRAINING = """
model_folder: {world}/model
data: [{world}/data]
run_folder: run
steps: {steps}
batch: 2
save_every: 2
report_every: 4
tracker: none
device: cpu
optimizer: {{lr: 0.01, warmup_steps: 2}}
"""
STAGE2 = """
init_from: {world}/stage1/run
hybrid_layers: [0, 2]
lora_rank: 4
lora_alpha: 8.0
ema_decay: 0.9
sample_every: 4
sample_frames: 3
"""
SETUP_SECONDS = 240.0


def build_world(world: Path) -> None:
    """Write models, prompts, clips and configs."""
    world.mkdir(parents=True)
    _models(world)
    _prompts_and_clips(world)
    (world / "data.yaml").write_text(INFERENCE.format(world=world, model="model", frames=9))
    (world / "inference.yaml").write_text(INFERENCE.format(world=world, model="hybrid", frames=9))
    (world / "many.yaml").write_text(INFERENCE.format(world=world, model="model", frames=3))
    (world / "stage1.yaml").write_text(TRAINING.format(world=world, steps=10))
    (world / "stage2.yaml").write_text(TRAINING.format(world=world, steps=8) + STAGE2.format(world=world))
    (world / "gates.yaml").write_text(TRAINING.format(world=world, steps=10) + f"init_from: {world}/stage1/run\n")


def build_training(world: Path, server: Server) -> None:
    """Run what later commands start from: training data and stage 1.

    Raises:
        RuntimeError: a command fails.
    """
    data = ("--config", f"{world}/data.yaml", "--data_path", f"{world}/prompts.txt", "--device", "cpu")
    _run(server, world, Command("scripts/generate_latents.py", (*data, "--folder", "data")))
    (world / "stage1").mkdir()
    _run(server, world / "stage1", Command("train_stage1.py", ("--config", f"{world}/stage1.yaml")))


def _models(world: Path) -> None:
    """A softmax model, and one that is hybrid in all layers."""
    parts = random_pipeline("toy", vae_config=TOY_VAE | {"dim": 4})
    for name, layers in (("model", ()), ("hybrid", (0, 1, 2))):
        torch.manual_seed(1)
        hybrid = HybridSettings(layers)
        transformer = HybridWanModel(**SIZES, hybrid_layers=list(layers), ffn_lora=hybrid.ffn_lora.value)
        transformer.eval().requires_grad_(False)
        pipeline = CausalVideoPipeline(transformer, parts.vae, parts.text_encoder, parts.tokenizer)
        pipeline.save_pretrained(world / name)


def _prompts_and_clips(world: Path) -> None:
    (world / "prompts.txt").write_text("\n".join(PROMPTS[:3]) + "\n")
    (world / "others.txt").write_text("\n".join(PROMPTS[3:]) + "\n")
    random = np.random.default_rng(0)
    for number, prompt in enumerate(PROMPTS):
        start = random.integers(0, 200, (1, 32, 48, 3))
        frames = (start + 6 * np.arange(9)[:, None, None, None]).astype(np.uint8)
        with VideoWriter(world / "clips" / f"clip-{number}.mp4", 32, 48) as video:
            video.write(frames)
        line = f"clips/clip-{number}.mp4\t{prompt}\n"
        for name, chosen in (("clips", True), ("first", number < 3), ("last", number >= 3)):
            if chosen:
                with (world / f"{name}.tsv").open("a") as file:
                    file.write(line)


def _run(server: Server, folder: Path, command: Command) -> None:
    process = server.run(command, folder, SETUP_SECONDS)
    if process.status != 0:
        raise RuntimeError(f"{command.script} ended with {process.status}: {process.stderr}")
