"""Measure speed and GPU memory of generation with parts in host memory, as diffusers offloads them.

    python scripts/profiling/benchmark_offloading.py    # Wan 1.3B with UMT5-XXL, 81 frames of 480×832
    python scripts/profiling/benchmark_offloading.py --size 14B --num_hybrid_layers 30 --rows group-offload
    python scripts/profiling/benchmark_offloading.py --size toy --num_hybrid_layers 2 --height 64 --width 64 \\
        --device cpu --rows plain model-offload

Weights are random. Each row generates one video to warm up and one that is measured, and compares its frames with those
of the row plain, whose parts are all on the device.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

from pathlib import Path

from rich.console import Console
from rich.table import Table

from pipelines.benchmark.offloading import JSON_FILE, ROWS, OffloadingBenchmark, run_offloading_benchmark
from pipelines.cli import choose_device, entry_point
from pipelines.dtypes import choose_dtype
from pipelines.flags import Parser, as_path
from wan.utils.files import check_writable

OUTPUT_FOLDER = Path("output/benchmark_offloading")
FLAGS = {
    "size": "of the transformer",
    "num_hybrid_layers": "how many of the first layers are hybrid",
    "height": "in pixels",
    "width": "in pixels",
    "window_frames": "latent frames of the window of softmax layers",
    "sink_frames": "of which these first ones are kept",
    "seed": "of weights and noise",
}


@entry_point()
def main() -> int:
    """Parse, measure, report."""
    parser = Parser(__doc__, OffloadingBenchmark, aliases={"--latent_frames": "--num_output_frames"})
    parser.add_setting("--num_output_frames", "latent_frames", "latent frames of the video")
    for name, about in FLAGS.items():
        parser.add_setting(f"--{name}", name, about)
    parser.add_argument("--rows", nargs="+", choices=tuple(ROWS), default=list(ROWS), help="by default all")
    folder = f"of {JSON_FILE} (default {OUTPUT_FOLDER})"
    parser.add_argument("--output_folder", type=as_path, default=OUTPUT_FOLDER, metavar="PATH", help=folder)
    parser.add_device()
    arguments = parser.parse_args()
    check_writable(arguments.output_folder)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    benchmark = OffloadingBenchmark(**arguments.flags)
    page = run_offloading_benchmark(benchmark, arguments.rows, device, dtype, arguments.output_folder)
    table = Table("row", "fps", "first frame, s", "peak GB", "mean difference", "greatest, grey levels")
    for name, row in page["rows"].items():
        if row["status"] != "ok":
            table.add_row(name, row["status"])
            continue
        peak = "–" if row["peak_bytes"] is None else f"{row['peak_bytes'] / 1e9:.2f}"
        differences = (f"{row[key]:.3g}" if key in row else "–" for key in ("mean_difference", "greatest_difference"))
        table.add_row(name, f"{row['fps']:.2f}", f"{row['first_frame_seconds']:.2f}", peak, *differences)
    console = Console()
    console.print(table)
    console.print(f"results in {arguments.output_folder / JSON_FILE}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
