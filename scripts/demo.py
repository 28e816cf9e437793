"""Generate videos of the toy world from prompts on the CPU, with a contact sheet, and say where they are.

make demo
"""

import logging
import time
from pathlib import Path

import torch
from rich.console import Console

from pipelines.arguments import inference_parser, plan_run
from pipelines.cli import exit_on_input_error
from pipelines.contact_sheet import contact_sheet
from pipelines.generate import generate, load_pipeline, video_path
from pipelines.video import read_video
from wan.checkpoint import atomic_path

CONFIG, PROMPTS = Path("configs/toyworld/inference.yaml"), Path("prompts/toyworld.txt")
OUTPUT_FOLDER = Path("output/demo")


@exit_on_input_error
def main() -> int:
    """Do what inference.py does, and draw the sheet."""
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    console = Console(highlight=False, soft_wrap=True)
    started = time.perf_counter()
    flags = ["--config_path", CONFIG, "--output_folder", OUTPUT_FOLDER, "--data_path", PROMPTS, "--device", "cpu"]
    for former in OUTPUT_FOLDER.glob("*.mp4"):
        former.unlink()  # a demo shows what the code does now
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
    console.print(f"{time.perf_counter() - started:.0f} s")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
