"""Measure how long training takes to its first step, and the memory that it takes on the way.

    python scripts/profiling/benchmark_loading.py --config configs/stage2_14b.yaml  # two GPUs
    python scripts/profiling/benchmark_loading.py --config configs/stage2.yaml --size toy --height 64 --width 96 \\
        --device cpu --set device=cpu hybrid_layers=[0,1] shard=true

Writes random weights and a random video per process, reads the weights once so that they are in the page cache, and
starts the stage under torchrun with the config's settings.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from pathlib import Path

from rich.console import Console

from pipelines.benchmark.loading import JSON_FILE, LoadingBenchmark, run_loading_benchmark
from pipelines.cli import choose_device, entry_point
from pipelines.flags import Parser, as_input, as_path

OUTPUT_FOLDER = Path("output/benchmark_loading")
FORMER = {"--frames": "--num_output_frames", "--stage_settings": "--set"}
"""Former names of flags."""
FLAGS = {
    "stage": "to start",
    "size": "of the transformer",
    "height": "in pixels",
    "width": "in pixels",
    "processes": "started by torchrun",
    "steps": "training steps to run",
    "timeout": "in seconds, until the run is ended",
    "seed": "of weights and videos",
}


@entry_point()
def main() -> int:
    """Parse, measure, report."""
    parser = Parser(__doc__, LoadingBenchmark, aliases=FORMER)
    add = parser.add_argument
    add("--config", type=as_input, required=True, metavar="FILE", help="YAML file of the stage, see configs/")
    parser.add_setting("--num_output_frames", "frames", "latent frames of a video")
    for name, about in FLAGS.items():
        parser.add_setting(f"--{name}", name, about)
    about = f"of all files (default {OUTPUT_FOLDER})"
    add("--output_folder", type=as_path, default=OUTPUT_FOLDER, metavar="PATH", help=about)
    add("--device", help="where weights are drawn: cpu, cuda or cuda:N; by default the GPU if there is one")
    add("--set", nargs="+", default=[], metavar="key=value", help="of the stage; they go before the config's")
    arguments = parser.parse_args()
    benchmark, folder, console = LoadingBenchmark(**arguments.flags), arguments.output_folder, Console()
    device = choose_device(arguments.device)
    page = run_loading_benchmark(benchmark, arguments.config, arguments.set, device, folder)
    console.print(f"{page['seconds_to_first_step']:.1f} s to the first step, which took {page['seconds'][0]:.1f} s")
    loading, steps = page["host_peak_bytes_before_first_step"], page["host_peak_bytes"]
    ratio = loading / page["file_bytes"]
    console.print(f"{loading / 1e9:.1f} GB of host memory before the first step, {ratio:.2f} times the file of weights")
    console.print(f"{steps / 1e9:.1f} GB of host memory in all")
    console.print(f"GPUs: {', '.join(f'{size / 1e9:.1f} GB' for size in page['gpu_peak_bytes']) or 'none'}")
    console.print(f"results in {folder / JSON_FILE}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
