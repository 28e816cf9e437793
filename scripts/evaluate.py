"""Score the videos of a folder, or compare the scores of two.

    python scripts/evaluate.py output/vbench --metrics pixels learned --json output/vbench/scores.json
    python scripts/evaluate.py output/new --metrics pixels reference --reference output/old --json new.json
    torchrun --nproc_per_node 8 scripts/evaluate.py output/vbench --metrics learned --json output/vbench/scores.json
    python scripts/evaluate.py --compare old.json new.json --tolerance 0.01

FOLDER is what scripts/sample_suite.py wrote, or any folder of videos. One JSON holds the value of every video and
metric, means with bootstrap intervals over prompts, and for what was not measured the reason. A run that is started
again scores what is left. Weights are files (docs/evaluation.md has their sources); nothing is downloaded. The
comparison ends with status 1 if B is worse by more than the tolerance, or lacks what A has.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
import math

from rich.console import Console

from pipelines.cli import EXIT_FAILURE, choose_device, entry_point, rank_and_world_size
from pipelines.evaluation.scoring.clips import find_clips
from pipelines.evaluation.scoring.compare import Comparison, Tolerance, compare
from pipelines.evaluation.scoring.metric import Blocks
from pipelines.evaluation.scoring.metrics.read_back import PROGRAMS, read_results
from pipelines.evaluation.scoring.metrics.smoothness import DEFAULT_PYTHON
from pipelines.evaluation.scoring.ranks.team import join_team
from pipelines.evaluation.scoring.registry import GROUPS, OWN, Resources, chosen_metrics
from pipelines.evaluation.scoring.report import comparison_table, left_out, score_table
from pipelines.evaluation.scoring.run import Run, score
from pipelines.evaluation.scoring.sets.metric import SetSettings
from pipelines.evaluation.scoring.weights import DEFAULT_FOLDER, SOURCES, WeightFolder, named_files
from pipelines.flags import Parser, as_path
from pipelines.records import write_record
from wan.utils.errors import InputError
from wan.utils.files import check_target
from wan.utils.ranges import Count, Positive

log = logging.getLogger(__name__)


def evaluate_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__)
    add = parser.add_argument
    add("folder", nargs="?", type=as_path, metavar="FOLDER", help="videos to score")
    add("--json", type=as_path, metavar="PATH", help="where scores go, or those of a comparison")
    names = f"{', '.join(OWN)}; groups: {', '.join(GROUPS)} (default pixels)"
    add("--metrics", nargs="+", metavar="NAME", help=names)
    reference = "videos to compare with: of the same names for psnr and ssim, any for fvd and kvd"
    add("--reference", type=as_path, metavar="PATH", help=reference)
    add("--fvd_network", type=as_path, metavar="PATH", help="a TorchScript I3D that you trust, for fvd and kvd")
    parser.add_value("--fvd_frames", Count, "frames of every video, from its beginning, for fvd and kvd", default=16)
    parser.add_value("--fvd_fps", Positive, "frames per second of them; by default the lowest rate of all videos")
    environment = f"interpreter with VBench, for motion_smoothness: make vbench-env (default {DEFAULT_PYTHON})"
    add("--vbench_python", type=as_path, default=DEFAULT_PYTHON, metavar="PATH", help=environment)
    weights = f"weights of metrics (default {DEFAULT_FOLDER})"
    add("--weights_folder", type=as_path, default=DEFAULT_FOLDER, metavar="PATH", help=weights)
    for program in PROGRAMS:
        group = program.prefix.removesuffix("_")
        add(program.flag, type=as_path, metavar="PATH", help=f"what {program.name} wrote, for the group {group}")
    files = f"a file of weights: {', '.join(SOURCES)}"
    add("--weights", action="collect", nargs="+", default=[], metavar="NAME=FILE", help=files)
    blocks = "frames of the first block and of every later one; by default what the manifest says"
    parser.add_value("--blocks", Count, blocks, nargs=2, metavar=("FIRST", "LENGTH"))
    drift = "seconds at both ends of a video that drift compares"
    parser.add_value("--drift_seconds", Positive, drift, default=5.0)
    add("--prompts_from_names", action="store_true", help="names without a manifest are {prompt}-{index}")
    parser.add_device(dtypes=None)
    comparison = parser.add_argument_group("comparison")
    comparison.add_argument("--compare", nargs=2, type=as_path, metavar=("A", "B"), help="judge B against A")
    tolerance = "how much worse B may be: a fraction of A's mean, or NAME=X in the unit of a metric (default 0)"
    comparison.add_argument("--tolerance", action="collect", nargs="+", default=[], metavar="X", help=tolerance)
    comparison.add_argument("--common", action="store_true", help="compare the videos that both files have")
    return parser


def read_tolerance(texts: list[str]) -> Tolerance:
    """Read the values of `--tolerance`.

    Raises:
        InputError: not a number of at least zero, or not that with a name before it.
    """
    fraction, absolute = 0.0, {}
    for text in texts:
        name, equals, number = text.rpartition("=")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not (0 <= value < math.inf) or bool(equals) != bool(name):
            raise InputError(f"--tolerance {text}: give a number of at least 0, or NAME=X with such a number")
        if equals:
            absolute[name] = value
        else:
            fraction = value
    return Tolerance(fraction, absolute)


def compare_runs(arguments: argparse.Namespace) -> list[Comparison]:
    """Compare two files, and write the comparison if a file is named for it."""
    if arguments.folder is not None:
        raise InputError("give FOLDER to score it, or --compare A B, not both")
    if arguments.json is not None:
        check_target(arguments.json)
    tolerance = read_tolerance(arguments.tolerance)
    names = None if arguments.metrics is None else chosen_metrics(arguments.metrics)
    first, second = arguments.compare
    rows = compare(first, second, tolerance, names, arguments.common)
    if arguments.json is not None:
        settings = {"first": str(first), "second": str(second), "tolerance": arguments.tolerance}
        write_record(arguments.json, settings, {"metrics": {row.name: row.as_record() for row in rows}})
    return rows


def plan(arguments: argparse.Namespace) -> Run:
    """Check everything that the command line names, before the first frame is decoded.

    Raises:
        InputError: something is missing, unknown, damaged, or does not fit.
    """
    if arguments.folder is None or arguments.json is None:
        raise InputError("give FOLDER and --json FILE to score videos, or --compare A B; --help lists all flags")
    if arguments.tolerance or arguments.common:
        raise InputError("--tolerance and --common are for --compare A B: leave them out")
    names = chosen_metrics(arguments.metrics or ["pixels"])
    files = named_files(arguments.weights)
    check_target(arguments.json)
    blocks = None if arguments.blocks is None else Blocks(*arguments.blocks)
    clips = find_clips(arguments.folder, blocks, arguments.prompts_from_names)
    reference = None if arguments.reference is None else find_clips(arguments.reference)
    files_of_others = {program: vars(arguments)[program.flag.removeprefix("--")] for program in PROGRAMS}
    results = {
        program.prefix: read_results(program, path) for program, path in files_of_others.items() if path is not None
    }
    weights = WeightFolder(arguments.weights_folder, files)
    folder = arguments.json.with_name(f"{arguments.json.name}.features")
    sets = SetSettings(arguments.fvd_network, arguments.fvd_frames, arguments.fvd_fps, folder)
    device = choose_device(arguments.device)
    resources = Resources(device, weights, clips, reference, results, arguments.vbench_python, sets)
    return Run(clips, names, resources, arguments.drift_seconds)


@entry_point()
def main() -> int:
    """Score or compare. Status 1 if the second file is worse, or if nothing could be measured, 2 for bad input."""
    arguments = evaluate_parser().parse_args()
    console = Console()
    if arguments.compare is not None:
        if rank_and_world_size()[1] > 1:
            raise InputError("--compare is work for one process: start it without torchrun")
        rows = compare_runs(arguments)
        console.print(comparison_table(rows))
        for line in left_out(rows):
            log.warning("%s", line)
        if arguments.json is not None:
            log.info("the comparison is in %s", arguments.json)
        return EXIT_FAILURE if any(row.fails for row in rows) else 0
    run = plan(arguments)
    team = join_team()
    page = score(run, arguments.json, team)
    team.leave()
    if not team.leads:
        return 0
    console.print(score_table(page))
    log.info("the scores of %d videos are in %s", len(page["videos"]), arguments.json)
    return 0 if any("value" in metric for metric in page["metrics"].values()) else EXIT_FAILURE


if __name__ == "__main__":
    raise SystemExit(main())
