"""Measure how long training takes to its first step, and the memory that it takes on the way.

    python scripts/profiling/benchmark_loading.py --config configs/stage2_14b.yaml  # two GPUs
    python scripts/profiling/benchmark_loading.py --config configs/stage2.yaml --size toy --height 64 --width 96 \\
        --device cpu --stage_settings device=cpu hybrid_layers=[0,1] shard=true

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
FLAGS = {
    "stage": "to start",
    "size": "of the transformer",
    "height": "in pixels",
    "width": "in pixels",
    "frames": "latent frames per video",
    "processes": "started by torchrun",
    "steps": "to run",
    "timeout": "in seconds, until the run is ended",
    "seed": "of weights and videos",
}


@entry_point()
def main() -> int:
    """Parse, measure, report."""
    parser = Parser(__doc__, LoadingBenchmark)
    add = parser.add_argument
    add("--config", type=as_input, required=True, metavar="PATH", help="YAML file of the stage, see configs/")
    for name, about in FLAGS.items():
        parser.add_setting(f"--{name}", name, about)
    add("--output_folder", type=as_path, default=OUTPUT_FOLDER, metavar="PATH", help=f"of all files ({OUTPUT_FOLDER})")
    add("--device", help="where weights are drawn: cpu, cuda or cuda:N (default: the GPU if there is one)")
    add(
        "--stage_settings", nargs="+", default=[], metavar="key=value", help="of the stage; they go before the config's"
    )
    arguments = parser.parse_args()
    benchmark, folder, console = LoadingBenchmark(**arguments.flags), arguments.output_folder, Console()
    device = choose_device(arguments.device)
    page = run_loading_benchmark(benchmark, arguments.config, arguments.stage_settings, device, folder)
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
