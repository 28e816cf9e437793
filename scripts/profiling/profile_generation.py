"""Tell where the time of generating a video goes: GPU seconds by kernel, and by what the kernels do.

    python scripts/profiling/profile_generation.py --row hybrid-75-window --num_frames 249 --no_vae --json profile.json
    python scripts/profiling/profile_generation.py --config configs/toyworld/benchmark.yaml --row hybrid-100 \\
        --num_frames 21

Weights are random, as in scripts/benchmark.py, whose configs and rows these are. While the GPU is not busy, it waits:
for launches, copies, the CPU. On a CPU it is operations and not kernels.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import tempfile
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from pipelines.benchmark.cases import BenchmarkConfig, PixelFrames, plan_cases, select
from pipelines.benchmark.measure import Trace, build_stage, warm_up, whole_run
from pipelines.benchmark.profile import profiled, summary
from pipelines.cli import choose_device, entry_point
from pipelines.dtypes import choose_dtype
from pipelines.feasibility import check_speed
from pipelines.flags import Parser, as_path
from pipelines.generation.arguments import add_speed_flags
from pipelines.provenance import environment
from pipelines.settings import load_config
from wan.config import wan_size
from wan.utils.files import check_target, write_json

FORMER = {"--frames": "--num_frames"}
"""Former names of flags."""
SHOWN = 25
"""Kernels in the table; the JSON has all."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, BenchmarkConfig, reads_config=True, config=Path("configs/benchmark.yaml"), aliases=FORMER)
    parser.add_argument("--row", required=True, help="name of a row of the config")
    parser.add_value("--num_frames", PixelFrames, "pixel frames of the video", default=249)
    parser.add_setting("--no_vae", "vae", "only the transformer", const=False)
    parser.add_argument("--json", type=as_path, metavar="PATH", help="where to write everything")
    add_speed_flags(parser)
    parser.add_device()
    return parser.parse_args()


def measure(config: BenchmarkConfig, device: torch.device, dtype: torch.dtype, folder: Path) -> dict[str, Any]:
    """Profile the config's only case."""
    (case,) = plan_cases(config)
    stage = build_stage(config, case, device, dtype, folder)
    warm_up(stage, case)
    trace = Trace()
    kernels = profiled(partial(whole_run(case), stage, case, case.frames, trace), device)
    return {
        "row": case.row,
        "frames": case.frames,
        "vae": case.vae,
        "blocks": config.blocks(case.frames),
        "seconds": sum(kernel["seconds"] for kernel in kernels),
        "seconds_until_last_block": trace.arrivals[-1],
        "kinds": summary(kernels),
        "kernels": kernels,
        "environment": environment(device),
    }


def pages(result: dict[str, Any]) -> list[Table]:
    """What people look at: by kind, and the longest kernels."""
    blocks, total = result["blocks"], result["seconds"]
    busy = total / result["seconds_until_last_block"]
    title = (
        f"{result['row']}, {result['frames']} frames: {total:.2f} s of kernels, {busy:.0%} of that to the last block"
    )
    by_kind, by_kernel = Table("kind", title=title), Table("kernel")
    kinds = list(result["kinds"].items())
    kernels = [(kernel["name"], kernel) for kernel in result["kernels"][:SHOWN]]
    for page, parts in ((by_kind, kinds), (by_kernel, kernels)):
        for header in ("a block", "ms a block", "share"):
            page.add_column(header, justify="right")
        for name, part in parts:
            milliseconds = 1000 * part["seconds"] / blocks
            page.add_row(name, f"{part['count'] / blocks:.1f}", f"{milliseconds:.2f}", f"{part['seconds'] / total:.1%}")
    return [by_kind, by_kernel]


@entry_point()
def main() -> int:
    """Parse, profile, report."""
    arguments = parse()
    config = load_config(BenchmarkConfig, arguments.config, arguments.settings, arguments.flags)
    config = replace(select(config, [arguments.row], [arguments.num_frames]), blocks_sampled=None)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    if arguments.json is not None:
        check_target(arguments.json)
    size = wan_size(config.size)
    check_speed(config.speed, device, dtype, size["dim"], size["ffn_dim"])
    with tempfile.TemporaryDirectory() as folder:
        result = measure(config, device, dtype, Path(folder))
    console = Console()
    console.print(*pages(result), sep="\n")
    if arguments.json is not None:
        write_json(arguments.json, result)
        console.print(f"all figures are in {arguments.json}", soft_wrap=True, markup=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
