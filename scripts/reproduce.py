"""Print, or run, the commands that make one of the paper's tables from checkpoints.

    python scripts/reproduce.py quality --config configs/causal_forcing_dmd_chunkwise.yaml \\
        --checkpoint_path softmax=checkpoints/chunkwise/causal_forcing.pt hybrid=runs/stage2/export_ema
    python scripts/reproduce.py quality --config configs/toyworld/inference.yaml --suite hundred --limit 12 \\
        --checkpoint_path softmax hybrid=models/toyworld/hybrid_75.safetensors --metrics pixels --device cpu --run

Hours are for Wan 1.3B on one H100, from rates that were measured; docs/reproduce.md says what each table needs and what
is proven. With --run the commands are run one after the other, and the first that fails ends it; started again, each
goes on where it stopped.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
import subprocess
import sys
from pathlib import Path
from typing import Annotated

from rich.console import Console

from pipelines.cli import entry_point
from pipelines.console.commands import in_words_of_console
from pipelines.console.shipped import ROOT, find_shipped
from pipelines.evaluation.tables.recipes import RECIPES, Request, Step, steps_of
from pipelines.flags import Parser, as_input, as_path
from wan.utils.errors import InputError
from wan.utils.files import check_writable
from wan.utils.ranges import Bounds

log = logging.getLogger(__name__)


def reproduce_parser() -> Parser:
    """The command line."""
    parser = Parser(__doc__, aliases={"--samples": "--videos_per_prompt"})
    add = parser.add_argument
    add("table", choices=tuple(RECIPES), help="which table")
    about = "as for inference.py; of efficiency, benchmark.py"
    add("--config", type=as_input, required=True, metavar="FILE", help=about)
    weights = "weights by name; a name alone for those of the config"
    add("--checkpoint_path", nargs="+", default=[], metavar="NAME[=PATH]", help=weights)
    add("--output_folder", type=as_path, metavar="PATH", help="of everything (default output/TABLE)")
    suite = "prompts, as for sample_suite.py; by default vbench, for drift moviegen, for layers hundred"
    add("--suite", metavar="NAME", help=suite)
    parser.add_value("--limit", Annotated[int, Bounds(1, 10**6)], "so many prompts, or videos of a probe, at most")
    parser.add_value("--videos_per_prompt", Annotated[int, Bounds(1, 9999)], "videos per prompt")
    metrics = "as for evaluate.py (default pixels learned)"
    add("--metrics", nargs="+", default=["pixels", "learned"], metavar="NAME", help=metrics)
    add(
        "--set", nargs="+", default=[], metavar="key=value", help="settings of the config, such as num_output_frames=21"
    )
    add("--run", action="store_true", help="run the commands instead of printing them")
    parser.add_device(dtypes=None)
    return parser


def request_of(arguments: argparse.Namespace) -> Request:
    """The request of a command line.

    Raises:
        InputError: no such config, a name that is given twice, or weights that are not there.
    """
    if not arguments.config.is_file():
        raise InputError(f"no config {arguments.config}: give a file, such as configs/toyworld/inference.yaml")
    checkpoints: dict[str, Path | None] = {}
    for text in arguments.checkpoint_path or ["model"]:
        name, equals, path = text.partition("=")
        if not name or (equals and not path):
            raise InputError(f"--checkpoint_path {text}: give NAME=PATH, or a NAME for the config's own weights")
        if name in checkpoints:
            raise InputError(f"--checkpoint_path names {name} twice: give every model a name of its own")
        found = find_shipped(Path(path)) if equals else None
        if found is not None and not found.exists():
            raise InputError(f"--checkpoint_path {name}: no file or folder {path}")
        checkpoints[name] = found
    return Request(
        arguments.table,
        arguments.config,
        arguments.output_folder or Path("output") / arguments.table,
        checkpoints,
        arguments.suite,
        arguments.limit,
        arguments.videos_per_prompt,
        tuple(arguments.metrics),
        arguments.device,
        tuple(arguments.set),
    )


def print_steps(steps: list[Step]) -> None:
    """Commands, and what they take, as comments of a shell."""
    console = Console(soft_wrap=True, highlight=False, markup=False)
    for step in steps:
        hours = "no rate was measured" if step.hours is None else f"{step.hours:.1f} H100-hours"
        console.print(f"# {hours if step.hours != 0 else 'seconds'}")
        console.print(in_words_of_console(step.line).replace(f"{ROOT}/", ""))
    known = [step.hours for step in steps if step.hours is not None]
    console.print(f"# in all: {sum(known):.1f} H100-hours, and {len(steps) - len(known)} commands of unknown length")


def run_steps(steps: list[Step]) -> int:
    """Run commands until one fails; returns its status, which is 0 if none does."""
    for number, step in enumerate(steps, 1):
        log.info("%d of %d: %s", number, len(steps), step.line)
        # Scripts are where the project is; what they write goes where this command was started.
        words = [str(ROOT / word) if word.endswith(".py") else word for word in step.words]
        words = [sys.executable, *words[1:]] if words[0] == "python" else words
        status = subprocess.run(words, check=False).returncode
        if status:
            log.error("it ended with status %d: mend that, and start the same command again to go on", status)
            return status if status > 0 else 128 - status
    log.info("the table is %s", steps[-1].makes)
    return 0


@entry_point()
def main() -> int:
    """Parse, plan, print or run."""
    arguments = reproduce_parser().parse_args()
    request = request_of(arguments)
    steps = steps_of(request)
    if not arguments.run:
        print_steps(steps)
        return 0
    check_writable(request.folder)
    return run_steps(steps)


if __name__ == "__main__":
    raise SystemExit(main())
