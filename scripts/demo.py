"""Generate a video with the toy model on the CPU and say where it is.

make demo
"""

import logging
import sys
from pathlib import Path

from rich.console import Console

import inference
from pipelines.random_model import random_pipeline

MODEL_FOLDER = Path("models/random-toy")
OUTPUT_FOLDER = Path("output/demo")
PROMPT = "a red shape rolls"


def main() -> int:
    """Draw a random toy model if there is none yet, and run inference.py with it."""
    console = Console(highlight=False)
    logging.getLogger("diffusers").setLevel(logging.ERROR)
    if not (MODEL_FOLDER / "model_index.json").is_file():
        random_pipeline("toy").save_pretrained(MODEL_FOLDER)
    console.print("This toy model has RANDOM weights: it shows that everything runs, the pictures mean nothing.")
    sys.argv = ["inference.py", "--config_path", "configs/random_toy.yaml"]
    sys.argv += ["--output_folder", str(OUTPUT_FOLDER), "--prompt", PROMPT, "--device", "cpu"]
    status = inference.main()
    if status == 0:
        for video in sorted(OUTPUT_FOLDER.glob("*.mp4")):
            console.print(f"video: {video.resolve()}")
    return status


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    raise SystemExit(main())
