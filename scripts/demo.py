"""Generate a video with the toy model on the CPU, with a contact sheet, and say where they are.

make demo
"""

import logging
from pathlib import Path

import torch
from rich.console import Console

from pipelines.arguments import inference_parser, plan_run
from pipelines.cli import exit_on_input_error
from pipelines.contact_sheet import contact_sheet
from pipelines.generate import generate, load_pipeline, video_path
from pipelines.random_model import random_pipeline
from pipelines.video import read_video
from wan.checkpoint import atomic_path

CONFIG = Path(__file__).parent.parent / "configs" / "random_toy.yaml"
MODEL_FOLDER = Path("models/random-toy")  # as the config has it
OUTPUT_FOLDER = Path("output/demo")
PROMPT = "a red shape rolls"


@exit_on_input_error
def main() -> int:
    """Draw a random toy model if there is none yet, and do with it what inference.py does."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    console = Console(highlight=False, soft_wrap=True)
    console.print("This toy model has RANDOM weights: it shows that everything runs, the pictures mean nothing.")
    if not (MODEL_FOLDER / "model_index.json").is_file():
        random_pipeline("toy").save_pretrained(MODEL_FOLDER)
    flags = ["--config_path", CONFIG, "--output_folder", OUTPUT_FOLDER, "--prompt", PROMPT, "--device", "cpu"]
    run = plan_run(inference_parser().parse_args(list(map(str, flags))))
    failed = generate(run, load_pipeline(run))
    if failed:
        return 1
    videos = {job.prompt: video_path(run, job) for job in run.jobs}
    samples = [(torch.from_numpy(read_video(path)).permute(0, 3, 1, 2), prompt) for prompt, path in videos.items()]
    sheet = OUTPUT_FOLDER / "contact_sheet.png"
    with atomic_path(sheet) as temporary:
        contact_sheet(samples).save(temporary, format="png")
    for path in (*videos.values(), sheet):
        console.print(f"wrote {path.resolve()}", markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
