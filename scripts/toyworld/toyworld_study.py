"""The study of distillation on the toy world: what the two stages keep of a softmax model's memory, and what matters.

    python scripts/toyworld/toyworld_study.py --output_folder runs/toyworld --part stage1  # once, for everything
    python scripts/toyworld/toyworld_study.py --output_folder runs/toyworld --part ratios --budget_seconds 540
    python scripts/toyworld/toyworld_study.py --output_folder runs/toyworld --part ablations --rows no_gate --seed 1
    python scripts/toyworld/toyworld_study.py --output_folder runs/toyworld --part table

Parts: data, stage1, ratios, window, ablations, settings, selection, table, export; docs/results/distillation.md says
what each measures. Every row is a JSON in study/results below the output folder, and is skipped when it is there; a run
that is killed, or that stops when --budget_seconds are over, goes on at the same step. Of an exam (about half a minute
on an H100) nothing is kept in the middle: leave that much between the budget and a hard limit. The same command may run
several times at once, on one GPU or several (CUDA_VISIBLE_DEVICES): each takes the next row that no other has.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Annotated

from arl2.layer_selection.scores import Selection, random_scores, read_stage1_errors
from arl2.toyworld.probe.memory_benchmark import MemoryBenchmarkSettings
from arl2.toyworld.study.rows import PARTS, RANDOM_SETS, SELECTION_SHARE, Row, row_for
from pipelines.cli import choose_device, entry_point
from pipelines.console.shipped import ROOT
from pipelines.flags import Parser, as_input, as_path
from pipelines.toyworld.study import OutOfTimeError, Result, Study, StudySettings
from pipelines.toyworld.table import write_report
from wan.utils.errors import InputError
from wan.utils.files import check_writable
from wan.utils.ranges import Bounds, Count, NotNegative

log = logging.getLogger(__name__)

FORMER = {
    "--videos": "--num_videos",
    "--model": "--model_folder",
    "--work": "--output_folder",
    "--only": "--rows",
}
"""Former names of flags."""
EXAM_BATCH = {"cpu": 16, "cuda": 256}


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, aliases=FORMER)
    add, number = parser.add_argument, parser.add_value
    add("--output_folder", type=as_path, required=True, metavar="PATH", help="where everything goes")
    parts = ("data", "stage1", *PARTS, "selection", "table", "export")
    add("--part", choices=parts, required=True, nargs="+", help="what to make")
    add("--rows", nargs="+", default=[], metavar="NAME", help="only these rows; by default all")
    bundle = "the bundle: VAE, text encoder, few-step generator (default models/toyworld)"
    add("--model_folder", type=as_input, default=ROOT / "models" / "toyworld", metavar="PATH", help=bundle)
    number("--steps", Count, "of every training but stage 1, in the place of configs/toyworld/*.yaml")
    number("--stage1_steps", Count, "of stage 1")
    number("--num_videos", Annotated[int, Bounds(2, 10**5)], "of an exam", default=256)
    number("--long_videos", Annotated[int, Bounds(0, 10**5)], "of four times the length; 0 for none", default=128)
    number("--exam_batch", Annotated[int, Bounds(1, 10**5)], "videos made at a time")
    to_draw = "to draw, if the output folder has no latents_*_from_0.safetensors yet"
    number("--training_videos", Annotated[int, Bounds(1, 10**7)], to_draw, default=24576)
    layers = "of scripts/select_layers.py, in the place of stage 1's errors"
    add("--layers_file", type=as_path, metavar="PATH", help=layers)
    number("--seed", Annotated[int, Bounds(0, 2**40)], "of stage 2", default=0)
    number("--budget_seconds", NotNegative, "stop cleanly after them")
    parser.add_device(None)
    add("--set", nargs="+", default=[], metavar="key=value", help="settings of all trainings, such as batch=2")
    return parser.parse_args()


def settings_from(arguments: argparse.Namespace) -> StudySettings:
    """The session that a command line asks for.

    Raises:
        InputError: it cannot work.
    """
    device = choose_device(arguments.device)
    batch = arguments.exam_batch or EXAM_BATCH[device.type]
    settings = StudySettings(
        work=arguments.output_folder,
        model=arguments.model_folder,
        device=device,
        training_videos=arguments.training_videos,
        exam=MemoryBenchmarkSettings(arguments.num_videos, arguments.long_videos, batch),
        seed=arguments.seed,
        steps=arguments.steps,
        stage1_steps=arguments.stage1_steps,
        overrides=tuple(arguments.set),
        layers_file=arguments.layers_file,
    )
    if arguments.budget_seconds is None:
        return settings
    return replace(settings, deadline=time.monotonic() + arguments.budget_seconds)


def run_rows(study: Study, rows: list[Row], only: list[str]) -> None:
    """Train and examine what is missing.

    Raises:
        InputError: a name that no row has.
    """
    unknown = set(only) - {row.name for row in rows}
    if unknown:
        raise InputError(f"no row {min(unknown)!r} in this part: choose from {', '.join(row.name for row in rows)}")
    for row in rows:
        if not only or row.name in only:
            study.run_row(row)


def kept_scores(study: Study, name: str, score: Callable[[], tuple[dict[int, float], Result | None]]) -> Selection:
    """The scores of a method of selection, computed once, and written as scripts/select_layers.py does."""
    made_with = study.training_settings() | study.exam_settings()
    with study.claimed(f"scores_{name}", wait=True):
        page = study.result(f"scores_{name}", made_with)
        if page is None:
            scores, training = score()
            study.keep(f"scores_{name}", {"scores": scores, "training": training}, made_with)
        else:
            # JSON has no infinity: a score that is none was not finite.
            scores = {int(layer): math.inf if value is None else value for layer, value in page["scores"].items()}
        selection = Selection(name, scores)
        selection.write(study.path("results", name, ".layers.yaml"))
    return selection


def run_selection(study: Study, only: list[str]) -> None:
    """Choose layers by every method and at random; train and examine each set."""
    layers, seed = study.sizes["num_layers"], study.settings.seed
    stage1 = study.path("results", "stage1", ".json")
    selections = {
        "stage1_error": Selection("stage1_error", read_stage1_errors(stage1, layers)),
        "replacement": kept_scores(study, "replacement", lambda: (study.replacement(), None)),
        "gates": kept_scores(study, "gates", study.gates),
    }
    selections |= {
        f"random_{number}": Selection("random", random_scores(layers, RANDOM_SETS * seed + number))
        for number in range(RANDOM_SETS)
    }
    sets = {name: selection.layers(SELECTION_SHARE) for name, selection in selections.items()}
    ratio = next(row for row in PARTS["ratios"] if row.trains and row.share == SELECTION_SHARE)
    # A set that a ratio has trained already is that row.
    rows = {name: ratio if layers == study.layers_of(ratio) else row_for(layers) for name, layers in sets.items()}
    names = {name: row.name for name, row in rows.items()}
    with study.claimed("selection", wait=True):
        result = {"share": SELECTION_SHARE, "sets": sets, "rows": names}
        study.keep("selection", result, study.training_settings() | study.exam_settings())
    run_rows(study, list({row.name: row for row in rows.values()}.values()), only)


def run_part(study: Study, part: str, only: list[str]) -> None:
    """Everything of a part that is missing."""
    if part == "data":
        log.info("training videos are in %s", study.data_file)
    elif part == "stage1":
        study.stage1()
    elif part == "selection":
        run_selection(study, only)
    elif part == "table":
        log.info("tables are in %s", write_report(study.settings.folder / "results", study.settings.folder))
    elif part == "export":
        rows = {row.name: row for some in PARTS.values() for row in some}
        for name in only or ["hybrid_75"]:
            if name not in rows:
                raise InputError(f"no row {name!r} to export: choose from {', '.join(rows)}")
            log.info("exported to %s", study.export(rows[name]))
    else:
        if part == "ratios" and not only:
            study.run_ceilings()
        run_rows(study, list(PARTS[part]), only)


@entry_point()
def main() -> int:
    """Parse, and run the parts that are asked for."""
    arguments = parse()
    study = Study(settings_from(arguments))
    check_writable(study.settings.folder)
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
