"""Generate videos of the toy world from prompts on the CPU, with a contact sheet, and say where they are.

make demo

Every prompt is made twice from the same noise: by the softmax model, which keeps all keys and values, and by the hybrid
that was distilled from it, which has a state of fixed size in three of four layers.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import logging
import time
from pathlib import Path

import torch
from rich.console import Console

from pipelines.cli import entry_point
from pipelines.flags import Parser
from pipelines.generation.arguments import inference_parser, plan_run
from pipelines.generation.records import video_path
from pipelines.generation.run import generate, load_pipeline
from pipelines.media.contact_sheet import contact_sheet
from pipelines.media.video import read_video
from wan.utils.files import atomic_path
from wan.utils.locks import exclusive

CONFIG, PROMPTS = Path("configs/toyworld/inference.yaml"), Path("prompts/toyworld.txt")
OUTPUT_FOLDER = Path("output/demo")
MODELS = {"softmax": None, "hybrid_75": Path("models/toyworld/hybrid_75.safetensors")}
"""Names of the models' folders, and what is put on the generator's weights."""


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
    for path in (*(path for paths in videos.values() for path in paths.values()), sheet):
        console.print(f"wrote {path.resolve()}", markup=False)
    console.print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
