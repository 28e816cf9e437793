"""Measure what generation costs: JSON, Markdown and charts.

    python scripts/benchmark.py                                  # configs/benchmark.yaml: hours on one H100; resumable
    python scripts/benchmark.py --quick                          # minutes
    python scripts/benchmark.py --rows hybrid-75-window --lengths 81 4005 --no_vae
    python scripts/benchmark.py --config configs/toyworld/benchmark.yaml --device cpu

Every row is written as soon as it is measured; the same command goes on where a killed one stopped. A row for which
memory runs out says so. What a row may leave out is a case of its own: without the VAE, or sampled.
"""

import argparse
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipelines.benchmark.cases import BenchmarkConfig, quick, select
from pipelines.benchmark.report import MARKDOWN_FILE, write_report
from pipelines.benchmark.suite import run_benchmark
from pipelines.cli import choose_device, entry_point
from pipelines.config import load_config
from pipelines.generation.arguments import DTYPES, add_speed_flags, apply_speed_flags, choose_dtype

log = logging.getLogger(__name__)


@entry_point()
def main() -> int:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--config", type=Path, default=Path("configs/benchmark.yaml"))
    add("--output_folder", type=Path, help="of the results; output/benchmark, or output/benchmark_quick with --quick")
    add("--rows", nargs="+", help="names of rows of the config; all by default")
    add("--lengths", type=int, nargs="+", help="pixel frames; those of the config by default")
    add("--repeats", type=int, help="measured runs of a case")
    add("--quick", action="store_true", help="the few short cases that the config calls quick")
    add("--no_vae", action="store_true", help="only the transformer, without decoding and mp4")
    add("--blocks_sampled", type=int, help="only the transformer, measured at so many places of the video, integrated")
    add("--again", action="store_true", help="measure also what the results have already")
    add("--device", help="cpu, cuda or cuda:N; the GPU if there is one")
    add("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU by default")
    add_speed_flags(parser)
    arguments = parser.parse_args()
    config = load_config(BenchmarkConfig, arguments.config)
    config = select(quick(config) if arguments.quick else config, arguments.rows, arguments.lengths)
    config = replace(
        config,
        repeats=config.repeats if arguments.repeats is None else arguments.repeats,
        vae=config.vae and not arguments.no_vae,
        blocks_sampled=config.blocks_sampled if arguments.blocks_sampled is None else arguments.blocks_sampled,
        speed=apply_speed_flags(config.speed, arguments),
    )
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    folder = arguments.output_folder or Path("output") / ("benchmark_quick" if arguments.quick else "benchmark")
    report = partial(write_report, folder=folder)
    run_benchmark(config, device, dtype, folder, arguments.again, report)
    log.info("results in %s", folder / MARKDOWN_FILE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
