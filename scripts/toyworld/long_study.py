"""The study of long training on the toy world: what a memory of constant size keeps at 16 times a video's length.

    python scripts/toyworld/long_study.py --output_folder runs/long_study --part data
    python scripts/toyworld/long_study.py --output_folder runs/long_study --part hybrids softmax --budget_seconds 540
    python scripts/toyworld/long_study.py --output_folder runs/long_study --part hybrids --rows hybrid_75 --seed 1
    python scripts/toyworld/long_study.py --output_folder runs/long_study --part curves --rows hybrid_75 softmax_full
    python scripts/toyworld/long_study.py --output_folder runs/long_study --part table

Parts: data draws the training videos; hybrids, softmax, contexts, states and long_world train and examine models, row
by row (arl2/toyworld/study/long_rows.py says what each is); curves examines rows at 64 times the length; table writes
long_study.md into the output folder. Every row is a JSON in results below it, and is skipped when it is there. A run
that is killed, or that stops when --budget_seconds are over, goes on at the same step, and in exams at the same batch
of videos. The same command may run several times at once, on one GPU or several (CUDA_VISIBLE_DEVICES): each takes the
next row that no other has.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
import time

from arl2.toyworld.study.long_rows import PARTS
from arl2.toyworld.world.worlds import World
from pipelines.cli import choose_device, entry_point
from pipelines.console.shipped import ROOT
from pipelines.flags import Parser, as_input, as_path
from pipelines.toyworld.long_study import LongStudy, LongStudySettings, rows_of
from pipelines.toyworld.long_table import write_tables
from pipelines.toyworld.study import OutOfTimeError
from wan.utils.files import check_writable
from wan.utils.ranges import NotNegative

log = logging.getLogger(__name__)

FLAGS = {
    "long_videos": "drawn for training of each world, of four times the standard length",
    "short_videos": "drawn for training, of the standard length",
    "pieces": "in how many parts videos are drawn, each by one process",
    "exam_videos": "of every exam",
    "exam_batch": "videos at once, for speed alone",
    "seed": "of the trainings",
    "steps": "of every training, in the place of configs/toyworld/*.yaml",
}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, LongStudySettings, aliases={"--work": "--output_folder", "--only": "--rows"})
    add = parser.add_argument
    add("--output_folder", type=as_path, required=True, metavar="PATH", help="where everything goes")
    add("--part", choices=("data", *PARTS, "curves", "table"), required=True, nargs="+", help="what to make")
    add("--rows", nargs="+", default=[], metavar="NAME", help="only these rows; by default all")
    bundle = "the bundle: VAE, text encoder, few-step generator, hybrid (default models/toyworld)"
    add("--model_folder", type=as_input, default=ROOT / "models" / "toyworld", metavar="PATH", help=bundle)
    for name, about in FLAGS.items():
        parser.add_setting(f"--{name}", name, about)
    parser.add_value("--budget_seconds", NotNegative, "stop cleanly after them")
    parser.add_device(None)
    add("--set", nargs="+", default=[], metavar="key=value", help="settings of all trainings, such as batch=2")
    return parser.parse_args()


def run_part(study: LongStudy, part: str, only: list[str]) -> None:
    """Everything of a part that is missing."""
    if part == "data":
        for world, is_short in ((World.STANDARD, False), (World.STANDARD, True), (World.LONG, False)):
            log.info("training videos are in %s", study.data(world, is_short)[0].parent)
    elif part == "table":
        log.info("tables are in %s", write_tables(study.settings.work))
    elif part == "curves":
        rows = tuple(row for some in PARTS.values() for row in some if not row.is_short)
        for row in rows_of(rows, only):
            if study.path("weights", row.name, ".safetensors").is_file():
                study.run_curves(row)
    else:
        for row in rows_of(PARTS[part], only):
            study.run_row(row)


@entry_point()
def main() -> int:
    """Parse, and run the parts that are asked for."""
    arguments = parse()
    settings = LongStudySettings(
        work=arguments.output_folder,
        model=arguments.model_folder,
        device=choose_device(arguments.device),
        overrides=tuple(arguments.set),
        **({} if arguments.budget_seconds is None else {"deadline": time.monotonic() + arguments.budget_seconds}),
        **arguments.flags,
    )
    check_writable(settings.work)
    study = LongStudy(settings)
    try:
        for part in arguments.part:
            started = time.perf_counter()
            run_part(study, part, arguments.rows)
            log.info("part %s: %.0f s", part, time.perf_counter() - started)
    except OutOfTimeError:
        log.info("the time is over; the same command goes on where this one stopped")
    log.info("everything is in %s", arguments.output_folder)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
