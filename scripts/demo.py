"""Generate videos of the toy world on the CPU, and show what models remember. It says where everything is.

make demo

Every prompt is made twice from the same noise: by the softmax model, which keeps all keys and values, and by the hybrid
that was distilled from it, which has a state of fixed size in three of four layers.

Then models continue scenes of four times the standard length, in which an object goes behind a wall again and again,
under a caption that names nothing: memory.png has a frame for every time that it is back, green where colour and shape
are right; memory.webp moves.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import logging
import time
from pathlib import Path

import torch
from rich.console import Console

from arl2.toyworld.world.scenes import HEIGHT, WIDTH
from pipelines.cli import entry_point
from pipelines.flags import Parser
from pipelines.generation.arguments import inference_parser, plan_run
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.records import video_path
from pipelines.generation.run import generate, load_pipeline
from pipelines.media.contact_sheet import contact_sheet
from pipelines.media.video import read_video
from pipelines.toyworld.long_memory import read_model
from pipelines.toyworld.memory_demo import continue_scenes, memory_sheet, setups, write_animation
from wan.text import TextEncoder
from wan.utils.files import atomic_path
from wan.utils.locks import exclusive
from wan.vae.wan_vae import WanVAE

CONFIG, PROMPTS = Path("configs/toyworld/inference.yaml"), Path("prompts/toyworld.txt")
OUTPUT_FOLDER = Path("output/demo")
MODELS = {"softmax": None, "hybrid_75": Path("models/toyworld/hybrid_75.safetensors")}
"""Names of the models' folders, and what is put on the generator's weights."""
LONG_HYBRID = Path("models/toyworld/hybrid_75_long.safetensors")
SCENES = (0, 1, 2)
"""Scenes of the memory probe's seed 0."""


def videos_of(name: str, checkpoint: Path | None) -> dict[str, Path]:
    """The prompts' videos by one model, as inference.py makes them, made anew; empty if one failed."""
    folder = OUTPUT_FOLDER / name
    flags = ["--config", CONFIG, "--output_folder", folder, "--data_path", PROMPTS, "--device", "cpu"]
    flags += [] if checkpoint is None else ["--checkpoint_path", checkpoint]
    run = plan_run(inference_parser().parse_args(list(map(str, flags))))
    failed = generate(run, load_pipeline(run), anew=True)
    return {} if failed else {job.prompt: video_path(run, job) for job in run.jobs}


def draw_sheet(videos: dict[str, dict[str, Path]], path: Path) -> None:
    """Draw a row of frames per prompt and model."""
    rows = [
        (torch.from_numpy(read_video(videos[name][prompt])).permute(0, 3, 1, 2), f"{name}: {prompt}")
        for prompt in next(iter(videos.values()))
        for name in videos
    ]
    with atomic_path(path) as temporary:
        contact_sheet(rows).save(temporary, format="png")


def show_memory(sheet: Path, animation: Path) -> None:
    """Let models continue long scenes, and draw what comes back."""
    pipeline = CausalVideoPipeline.from_pretrained("models/toyworld")
    vae, model = WanVAE(pipeline.vae, fast=True), pipeline.transformer
    encoder = TextEncoder(pipeline.text_encoder, pipeline.tokenizer, model.config.text_len)
    hybrid = read_model(Path("models/toyworld"), LONG_HYBRID, torch.device("cpu"))
    stride = vae.spatial_compression
    tokens = model.tokens_per_frame(HEIGHT // stride, WIDTH // stride)
    rows = setups(model, hybrid, pipeline.sampler, tokens)
    scenes = continue_scenes(rows, vae, encoder, 0, list(SCENES))
    with atomic_path(sheet) as temporary:
        memory_sheet(scenes).save(temporary, format="png")
    write_animation(scenes[len(scenes) // 2], animation)


@entry_point()
def main() -> int:
    """Do what inference.py does, with both models, and draw the sheet."""
    Parser(__doc__).parse_args()
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    console = Console(highlight=False, soft_wrap=True)
    started = time.perf_counter()
    sheet = OUTPUT_FOLDER / "contact_sheet.png"
    with exclusive(OUTPUT_FOLDER / ".demo.lock", str(OUTPUT_FOLDER)):
        videos = {name: videos_of(name, checkpoint) for name, checkpoint in MODELS.items()}
        if not all(videos.values()):
            return 1
        draw_sheet(videos, sheet)
        memory, animation = OUTPUT_FOLDER / "memory.png", OUTPUT_FOLDER / "memory.webp"
        show_memory(memory, animation)
    for path in (*(path for paths in videos.values() for path in paths.values()), sheet, memory, animation):
        console.print(f"wrote {path.resolve()}", markup=False)
    console.print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
