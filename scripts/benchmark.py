"""Measure what generation costs: JSON, Markdown and charts.

    python scripts/benchmark.py                                  # configs/benchmark.yaml: hours on one H100; resumable
    python scripts/benchmark.py --quick                          # minutes
    python scripts/benchmark.py --rows hybrid-75-window --lengths 81 4005 --no_vae
    python scripts/benchmark.py --config configs/toyworld/benchmark.yaml --device cpu
    torchrun --standalone --nproc_per_node 2 scripts/benchmark.py --quick       # two GPUs compute every video together

Every row is written as soon as it is measured; the same command goes on where a killed one stopped. A row for which
memory runs out says so. What a row may leave out is a case of its own: without the VAE, or sampled.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
from dataclasses import replace
from functools import partial
from pathlib import Path

from pipelines.benchmark.cases import BenchmarkConfig, plan_cases, quick, select
from pipelines.benchmark.report import MARKDOWN_FILE, write_report
from pipelines.benchmark.suite import follow_benchmark, run_benchmark
from pipelines.cli import choose_device, end_together, entry_point, rank_and_world_size
from pipelines.dtypes import choose_dtype
from pipelines.feasibility import check_speed
from pipelines.flags import Parser, as_path
from pipelines.generation.arguments import add_speed_flags
from pipelines.generation.lockstep import Lockstep, join_processes
from pipelines.settings import load_config
from wan.config import wan_size

log = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, BenchmarkConfig, reads_config=True, config=Path("configs/benchmark.yaml"))
    add, setting, group = parser.add_argument, parser.add_setting, parser.add_argument_group("what is measured")
    results = "of the results; output/benchmark, or output/benchmark_quick with --quick"
    add("--output_folder", type=as_path, metavar="PATH", help=results)
    group.add_argument("--rows", nargs="+", help="names of rows of the config; all by default")
    setting("--lengths", "lengths", "pixel frames; by default those of the config", group=group)
    setting("--repeats", "repeats", "measured runs of a case", group=group)
    group.add_argument("--quick", action="store_true", help="the few short cases that the config calls quick")
    setting("--no_vae", "vae", "only the transformer, without decoding and mp4", group=group, const=False)
    sampled = "only the transformer, measured at so many places of the video, integrated"
    setting("--blocks_sampled", "blocks_sampled", sampled, group=group)
    group.add_argument("--again", action="store_true", help="measure also what the results have already")
    add_speed_flags(parser)
    parser.add_device()
    return parser.parse_args()


@end_together
@entry_point()
def main() -> int:
    """Parse, measure, report."""
    arguments = parse()
    config = load_config(BenchmarkConfig, arguments.config, arguments.settings, arguments.flags)
    rows, lengths = arguments.rows, arguments.flags.get("lengths")
    if arguments.quick:
        config = replace(quick(config), repeats=arguments.flags.get("repeats", config.quick.repeats))
    config = select(config, rows, lengths)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    size = wan_size(config.size)
    check_speed(config.speed, device, dtype, size["dim"], size["ffn_dim"])
    folder = arguments.output_folder or Path("output") / ("benchmark_quick" if arguments.quick else "benchmark")
    lockstep, ranks = None, rank_and_world_size()[1]
    if ranks > 1:
        plan_cases(config, ranks)  # what is wrong with it is said before any process waits for another
        join_processes(device)
        lockstep = Lockstep(device)
    if lockstep is not None and not lockstep.leads:
        follow_benchmark(config, device, dtype, folder, lockstep)
        return 0
    report = partial(write_report, folder=folder)
    run_benchmark(config, device, dtype, folder, arguments.again, report, lockstep)
    log.info("results in %s", folder / MARKDOWN_FILE)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
