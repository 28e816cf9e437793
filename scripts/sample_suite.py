"""Sample the videos that a benchmark wants: VBench, VBench-Long, MovieGenVideoBench, or a suite of your own.

    python scripts/download_suites.py --suite vbench
    torchrun --nproc_per_node 8 scripts/sample_suite.py --suite vbench --output_folder output/vbench \\
        --config configs/causal_forcing_dmd_chunkwise.yaml --checkpoint_path checkpoints/chunkwise/causal_forcing.pt
    python scripts/sample_suite.py --suite hundred --videos_per_prompt 1 --limit 12 …    # a part of our own prompts

Short prompts name the videos, extended ones condition the model. manifest.json says of every video its prompt, index,
seed and hash, and what made them all. A run that is started again goes on; other settings are refused.
docs/evaluation.md says what a run of each suite takes.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
from pathlib import Path
from typing import Annotated

from pipelines.cli import end_together, entry_point, rank_and_world_size
from pipelines.config import InferenceConfig
from pipelines.evaluation.names import MAX_SAMPLES, ignores_case
from pipelines.evaluation.sampling import RECORDS, VIDEOS, Manifest, SuiteVideo, plan_videos
from pipelines.evaluation.suite_files import KNOWN, read_suite
from pipelines.evaluation.suites import SHORT_SECONDS, Suite, limited, of_dimensions, with_samples
from pipelines.flags import Parser, as_path
from pipelines.generation.arguments import InferenceRun, add_generation_flags, plan_run
from pipelines.generation.run import generate, load_pipeline
from wan.utils.files import check_writable
from wan.utils.ranges import Bounds
from wan.vae.wan_vae import temporal_stride

log = logging.getLogger(__name__)

FORMER = {"--samples": "--videos_per_prompt"}
"""Former names of flags."""


def suite_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__, InferenceConfig, reads_config=True, config_help="as for inference.py", aliases=FORMER)
    add = parser.add_argument
    add("--suite", required=True, metavar="NAME", help=f"{', '.join(KNOWN)}, or a file (docs/evaluation.md)")
    add("--output_folder", type=as_path, required=True, metavar="PATH", help="where videos and manifest go")
    downloads = "what scripts/download_suites.py filled (default data/suites)"
    add("--suites_folder", type=as_path, default=Path("data/suites"), metavar="PATH", help=downloads)
    lines = "extended prompts, one a line, in place of the suite's own"
    add("--extended", type=as_path, metavar="PATH", help=lines)
    samples = (
        "videos per prompt; by default what the suite asks for: 5 for VBench (25 where it tests flickering), else 1"
    )
    parser.add_value("--videos_per_prompt", Annotated[int, Bounds(1, MAX_SAMPLES)], samples)
    add("--dimensions", nargs="+", metavar="NAME", help="prompts that test one of these alone")
    limit = "so many prompts at most, spread evenly over the dimensions"
    parser.add_value("--limit", Annotated[int, Bounds(1, 10**6)], limit)
    add("--first_prompt", action="store_true", help="make videos of several prompts from their first one alone")
    add_generation_flags(parser)
    # inference.py has these; a suite's videos begin with nothing, and nobody chooses where their records go.
    parser.set_defaults(i2v=False, image=None, video=None)
    return parser


def plan(arguments: argparse.Namespace) -> tuple[Suite, list[SuiteVideo]]:
    """The part of the suite that the command line names, and its videos.

    Raises:
        InputError: a suite that is missing, damaged or cannot be made, or no prompt is left of it.
    """
    whole = read_suite(arguments.suite, arguments.suites_folder, arguments.extended)
    part = whole
    if arguments.dimensions is not None:
        part = of_dimensions(part, arguments.dimensions)
    if arguments.limit is not None:
        part = limited(part, arguments.limit)
    if arguments.videos_per_prompt is not None:
        part = with_samples(part, arguments.videos_per_prompt)
    videos: Path = arguments.output_folder / VIDEOS
    check_writable(videos)
    return part, plan_videos(whole, part, arguments.seed, ignores_case(videos), arguments.first_prompt)


def warn_of_length(run: InferenceRun, suite: str) -> None:
    """Warn of videos that the suite's scores are not meant for."""
    stride = temporal_stride(Path(run.config.model_folder))
    frames = (run.config.num_output_frames - 1) * stride + 1
    seconds = frames / run.config.fps
    if suite in ("vbench", "vbench-long") and (seconds < SHORT_SECONDS) == (suite == "vbench-long"):
        log.warning(
            "videos of %d frames take %.2f s: VBench is for less than %g s, VBench-Long for the others; say in results "
            "which one was used",
            frames,
            seconds,
            SHORT_SECONDS,
        )


@end_together
@entry_point()
def main() -> int:
    """Parse, read the suite, load, generate. Status 1 if some videos failed, 2 for bad input."""
    arguments = suite_parser().parse_args()
    folder: Path = arguments.output_folder
    suite, videos = plan(arguments)
    arguments.output_folder, arguments.metrics_folder = folder / VIDEOS, folder / RECORDS
    run = plan_run(arguments, lambda _: [video.job for video in videos])
    warn_of_length(run, suite.name)
    log.info("%s: %d prompts, %d videos", suite.name, len(suite.entries), len(videos))
    manifest = Manifest(folder, suite.name, arguments.seed, videos)
    rank, world_size = rank_and_world_size()
    pipeline = load_pipeline(run)
    try:
        failed = generate(run, pipeline, rank, world_size, video_log=manifest)
    finally:
        manifest.close()
    if manifest.found:  # a process that only follows another writes none
        log.info("%d of %d videos are in %s, named by %s", manifest.found, len(videos), folder / VIDEOS, manifest.path)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
