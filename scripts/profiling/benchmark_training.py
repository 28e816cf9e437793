"""Measure what a training step costs: speed, operations, memory by phase, and the hours of a whole run.

    python scripts/profiling/benchmark_training.py  # Wan 1.3B, 21 latents of 480×832: one H100
    python scripts/profiling/benchmark_training.py --rows stage2-checkpointed --steps 5
    torchrun --standalone --nproc_per_node 2 scripts/profiling/benchmark_training.py \\
        --size 14B --num_hybrid_layers 30 --shard
    python scripts/profiling/benchmark_training.py --size toy --height 64 --width 96 --num_hybrid_layers 6 --device cpu

Weights and data are random. Every row is written as soon as it is measured, and the same command goes on where a killed
one stopped; a row for which memory runs out says so.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from pipelines.benchmark.training import JSON_FILE, ROWS, TrainingBenchmark, run_training_benchmark
from pipelines.cli import choose_device, end_together, entry_point, rank_and_world_size
from pipelines.dtypes import choose_dtype
from pipelines.flags import Parser, as_path

OUTPUT_FOLDER = Path("output/benchmark_training")
FORMER = {"--hybrid_layers": "--num_hybrid_layers", "--frames": "--num_output_frames"}
"""Former names of flags."""
FLAGS = {
    "size": "of the transformer",
    "height": "in pixels",
    "width": "in pixels",
    "frames_per_block": "latent frames per block",
    "num_hybrid_layers": "how many of the first layers are hybrid in stage 2",
    "lora_rank": "of stage 2",
    "steps": "measured training steps",
    "seed": "of weights, data and noise",
}


def table(results: dict[str, Any]) -> Table:
    """The rows, for people."""
    page = Table("row", "s/step", "TFLOP/s", "of matmul", "peak GB", "bars", caption="of the model / of the hardware")
    for name, row in results["rows"].items():
        peak = f"{row['memory']['step_peak'] / 1e9:.1f}"
        if row["status"] != "ok":
            page.add_row(name, row["status"], "", "", peak)
            continue
        kinds = [row[kind] for kind in ("model", "hardware")]
        rates = " / ".join(f"{kind['flops_per_second'] / 1e12:.3g}" for kind in kinds)
        shares = " / ".join(f"{kind['share_of_matmul']:.0%}" for kind in kinds)
        bars = ", ".join(f"{bar} {'met' if row[f'bar_{bar}'] else 'missed'}" for bar in ("memory", "speed"))
        page.add_row(name, f"{1 / row['steps_per_second']:.3g}", rates, shares, peak, bars)
    return page


@entry_point()
@end_together
def main() -> int:
    """Parse, measure, report."""
    parser = Parser(__doc__, TrainingBenchmark, aliases=FORMER)
    add = parser.add_argument
    names = [row.name for row in ROWS]
    add("--rows", nargs="+", choices=names, default=names, help="which ones (default all)")
    parser.add_setting("--num_output_frames", "frames", "latent frames of a video")
    for name, about in FLAGS.items():
        parser.add_setting(f"--{name}", name, about)
    parser.add_setting("--shard", "shard", "divide the frozen weights over the ranks")
    about = f"of results (default {OUTPUT_FOLDER})"
    add("--output_folder", type=as_path, default=OUTPUT_FOLDER, metavar="PATH", help=about)
    parser.add_device()
    arguments = parser.parse_args()
    config = TrainingBenchmark(**arguments.flags)
    device, folder, console = choose_device(arguments.device), arguments.output_folder, Console()
    dtype = choose_dtype(arguments.dtype, device)
    rows = tuple(row for row in ROWS if row.name in arguments.rows)
    results = run_training_benchmark(config, rows, device, dtype, folder)
    if rank_and_world_size()[0] > 0:
        return 0
    console.print(table(results))
    for stage in ("stage1", "stage2"):
        for videos, hours in results["cost"].get(stage, {}).get("hours_by_videos_per_step", {}).items():
            console.print(f"{stage}, {videos} videos a step: {hours:.1f} GPU-hours")
    console.print(f"results in {folder / JSON_FILE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
