"""Generate a video with the toy model on the CPU and say where it is.

make demo
"""

import logging
from pathlib import Path

from rich.console import Console

from pipelines.arguments import inference_parser, plan_run
from pipelines.cli import exit_on_input_error
from pipelines.generate import generate, load_pipeline, video_path
from pipelines.random_model import random_pipeline

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
    for job in run.jobs:
        console.print(f"video: {video_path(run, job).resolve()}", markup=False)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
