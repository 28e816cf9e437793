"""Measure on the toy world what a model remembers: JSON, and a table.

    python scripts/probe_memory.py --config configs/toyworld/inference.yaml --num_videos 256 --seed 0 --json probe.json

    python scripts/probe_memory.py --config … --also hybrid_75=models/toyworld/hybrid_75.safetensors --json probe.json

Rows: the softmax model with full memory (teacher); the same with every block blind to the others (local_only); the same
cut to a window and a sink at sampling time (window_sink); with --multi_step, the model before few-step training; and
others by --also, such as exports of a hybrid.
Each is judged on videos that go on from two given blocks, on videos made from a caption that names nothing, and on
whether videos made from a caption that names colour and shape obey it.
Ceilings (the videos themselves, and through the VAE) and the leak of the VAE stand beside them.

    python scripts/probe_memory.py --config … --times 16 --num_videos 24 --seed 1 [--world long] --json probe_long.json

With --times, videos that go on from given blocks are T times as long as those that the shipped models were trained on,
and read as they are made, so that memory does not grow with T. Every object that comes out again is a question; the
figures are those after the last time, by age of the memory, by number of objects to remember, and by pass. Rows are
the true frames through the VAE (vae); the softmax model with full memory (teacher), and with the hybrids' windows,
without and with a sink; the hybrids that lie in the model folder, with the memory stored in them; and those of --also.
--world long takes scenes whose objects first appear after the first block, up to four of them. --context true lets a
model remember true frames alone, which tells forgetting from the drift of its own frames. A run that is started again
makes the rows and videos that the file lacks.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
import math
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

import torch
from rich.console import Console
from rich.table import Table

from arl2.evaluation.eval_setup import EvalSetup
from arl2.model import HybridWanModel
from arl2.rollout import FewStepSampler
from arl2.toyworld.probe.leakage import leakage_by_block
from arl2.toyworld.probe.long_probe import Context
from arl2.toyworld.probe.memory_probe import ceilings, make_probe_set, probe_model
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, STANDARD_HIDDEN_FRAMES
from arl2.toyworld.world.worlds import World
from pipelines.cli import choose_device, entry_point
from pipelines.config import InferenceConfig
from pipelines.console.shipped import find_shipped
from pipelines.flags import Parser, SceneSeed, as_path
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.provenance import device_name
from pipelines.records import open_records, reserved, without_infinities
from pipelines.settings import load_config
from pipelines.toyworld.long_memory import (
    LongProbeSettings,
    bundled_hybrids,
    read_model,
    rows_of,
    run_rows,
    tables_of,
)
from wan.text import TextEncoder
from wan.utils.errors import InputError
from wan.utils.files import write_json
from wan.utils.ranges import Bounds
from wan.vae.wan_vae import WanVAE

log = logging.getLogger(__name__)

MULTI_STEPS = tuple(range(1000, 0, -1000 // 16))
LONG_FLAGS = ("world", "context", "batch")
"""Flags that mean something with --times alone."""
Row = TypeVar("Row")


def eval_setups(
    pipeline: CausalVideoPipeline, config: InferenceConfig, multi_step_folder: Path | None, also: Sequence[str]
) -> dict[str, EvalSetup]:
    """The rows of the table.

    Raises:
        InputError: `also` is not made of NAME=WEIGHTS with new names.
    """
    model, sampler = pipeline.transformer, pipeline.sampler
    rows = {
        "teacher": EvalSetup(model, sampler),
        "local_only": EvalSetup(model, sampler, window_frames=FRAMES_PER_BLOCK),
        "window_sink": EvalSetup(
            model, sampler, window_frames=config.memory.window_frames, sink_frames=config.memory.sink_frames
        ),
    }
    if multi_step_folder is not None:
        rows["teacher_multi_step"] = multi_step_setup(multi_step_folder, pipeline, config)
    models = also_models(Path(config.model_folder), also, rows, pipeline.device)
    return rows | {name: EvalSetup(model, sampler) for name, model in models.items()}


def multi_step_setup(folder: Path, pipeline: CausalVideoPipeline, config: InferenceConfig) -> EvalSetup:
    """The model before few-step training."""
    model = HybridWanModel.from_pretrained(folder).to(pipeline.device)
    return EvalSetup(model, FewStepSampler.from_steps(MULTI_STEPS, config.timestep_shift))


def also_models(
    folder: Path, also: Sequence[str], taken: Collection[str], device: torch.device
) -> dict[str, HybridWanModel]:
    """The models of --also by name.

    Raises:
        InputError: `also` is not made of NAME=WEIGHTS with new names.
    """
    models: dict[str, HybridWanModel] = {}
    for name, _, path in (one.partition("=") for one in also):
        if not name or not path or name in taken or name in models:
            raise InputError(f"--also {name}={path}: give NAME=WEIGHTS, with a name that no other row has")
        models[name] = read_model(folder, str(find_shipped(Path(path))), device)
    return models


def chosen(rows: dict[str, Row], only: Sequence[str] | None) -> dict[str, Row]:
    """The rows called `only`, or all.

    Raises:
        InputError: there is no such row.
    """
    unknown = set(only or ()) - rows.keys()
    if unknown:
        raise InputError(f"--rows {min(unknown)}: no such row; there are {', '.join(rows)}")
    return {name: row for name, row in rows.items() if only is None or name in only}


def print_table(models: Mapping[str, Mapping[str, Any]]) -> None:
    """Accuracies after re-emergence, with intervals and chance."""
    table = Table(
        "model", "colour and shape", "95 %", "chance", "colour", "shape", "before", "same, generated", "obeyed"
    )
    for name, row in models.items():
        after, before = row["continued"]["after"], row["continued"]["before"]
        low, high = row["interval"]
        generated = row["generated"]["same_object"]["both"]["accuracy"] if "generated" in row else math.nan
        obeyed = row["obeyed"]["both"]["accuracy"] if "obeyed" in row else math.nan
        table.add_row(
            name,
            f"{row['accuracy']:.3f}",
            f"{low:.3f} to {high:.3f}",
            f"{row['chance']:.3f}",
            f"{after['colour']['accuracy']:.3f}",
            f"{after['shape']['accuracy']:.3f}",
            f"{before['both']['accuracy']:.3f}",
            f"{generated:.3f}",
            f"{obeyed:.3f}",
        )
    Console().print(table)


def load_pipeline(config: InferenceConfig, device: torch.device) -> CausalVideoPipeline:
    """The models of a config, in float32.

    Raises:
        InputError: one is missing or damaged.
    """
    return CausalVideoPipeline.from_pretrained(
        config.model_folder,
        checkpoint_path=config.checkpoint_path,
        hybrid=config.hybrid.settings(),
        lora=config.lora_sources(),
        device=device,
        **config.sampling(),
    )


def long_settings(arguments: argparse.Namespace) -> LongProbeSettings | None:
    """What --times asks for; None without it.

    Raises:
        InputError: a flag that would do nothing.
    """
    if arguments.times is None:
        idle = [name for name in LONG_FLAGS if vars(arguments)[name] is not None]
        if idle:
            raise InputError(f"--{idle[0]} needs --times: give the length of the videos too")
        return None
    given = {name: vars(arguments)[name] for name in LONG_FLAGS if vars(arguments)[name] is not None}
    world = World(given.pop("world", World.STANDARD))
    if world is World.LONG and arguments.hidden_frames != STANDARD_HIDDEN_FRAMES:
        raise InputError("--hidden_frames is of --world standard: the long world's walls say how long objects wait")
    context = Context(given.pop("context", Context.OWN))
    return LongProbeSettings(
        arguments.times,
        arguments.num_videos,
        arguments.seed,
        world,
        context,
        arguments.hidden_frames,
        **given,
    )


def probe_long(
    arguments: argparse.Namespace, config: InferenceConfig, device: torch.device, settings: LongProbeSettings
) -> None:
    """Answer what the file of results lacks, and print all rows.

    Raises:
        InputError: a model that is missing or damaged, a row that cannot be, or a file of other settings.
    """
    with open_records(arguments.json, "models") as records:
        pipeline = load_pipeline(config, device)
        folder, sampler = Path(config.model_folder), pipeline.sampler
        bundled = bundled_hybrids(folder, device)
        also = also_models(folder, arguments.also, rows_of(pipeline.transformer, sampler, bundled), device)
        rows = rows_of(pipeline.transformer, sampler, bundled | also)
        if arguments.multi_step is not None:
            rows["teacher_multi_step"] = multi_step_setup(arguments.multi_step, pipeline, config)
        vae = WanVAE(pipeline.vae, fast=True)
        encoder = TextEncoder(pipeline.text_encoder, pipeline.tokenizer, pipeline.transformer.config.text_len)
        results = run_rows(chosen(rows, arguments.rows), vae, encoder, settings, records)
    for table in tables_of(results):
        Console().print(table)


def probe(arguments: argparse.Namespace, config: InferenceConfig, device: torch.device) -> dict[str, Any]:
    """All figures.

    Raises:
        InputError: a model that is missing or damaged, or a row that cannot be.
    """
    pipeline = load_pipeline(config, device)
    rows = chosen(eval_setups(pipeline, config, arguments.multi_step, arguments.also), arguments.rows)
    vae = WanVAE(pipeline.vae)
    encoder = TextEncoder(pipeline.text_encoder, pipeline.tokenizer, pipeline.transformer.config.text_len)
    probe_set = make_probe_set(vae, encoder, arguments.num_videos, arguments.seed, arguments.hidden_frames)
    models: dict[str, dict[str, Any]] = {}
    for name, setup in rows.items():
        models[name] = probe_model(setup, vae, probe_set)
        right, obeyed = models[name]["accuracy"], models[name]["obeyed"]["both"]["accuracy"]
        log.info("%s: remembered %.3f, obeyed %.3f", name, right, obeyed)
    models |= ceilings(vae, probe_set)
    return {
        "models": models,
        "leak": leakage_by_block(probe_set.latents_BFCHW, probe_set.scenes),
        "settings": {"videos": arguments.num_videos, "seed": arguments.seed, "hidden_frames": arguments.hidden_frames},
        "device": device_name(device),
        "torch": torch.__version__,
    }


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        __doc__,
        InferenceConfig,
        reads_config=True,
        config_help="as for inference.py",
        aliases={"--videos": "--num_videos", "--only": "--rows"},
    )
    parser.add_value("--num_videos", Annotated[int, Bounds(2, 10**5)], "how many of every form", default=256)
    parser.add_value("--seed", SceneSeed, "of the scenes and the noise", default=0)
    hidden = "frames behind the wall, at the least"
    parser.add_value("--hidden_frames", Annotated[int, Bounds(1, 1000)], hidden, default=STANDARD_HIDDEN_FRAMES)
    times = "length of the videos, as a multiple of the trained length; by default the probe of that length"
    parser.add_value("--times", Annotated[int, Bounds(1, 10**4)], times)
    parser.add_argument("--world", choices=list(World), help="kind of scenes with --times; standard by default")
    context = "what models remember with --times, their own frames or true ones; own by default"
    parser.add_argument("--context", choices=list(Context), help=context)
    parser.add_value("--batch", Annotated[int, Bounds(1, 10**4)], "videos at once with --times, for speed alone")
    parser.add_argument("--multi_step", type=as_path, metavar="PATH", help="folder of the multi-step model")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=WEIGHTS", help="further transformers")
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="these rows alone; a row takes minutes on a CPU")
    parser.add_argument("--json", type=as_path, required=True, metavar="PATH", help="where the figures go")
    parser.add_device(None)
    return parser.parse_args()


@entry_point()
def main() -> int:
    """Parse, probe, report."""
    arguments = parse()
    config = load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)
    config.memory.refuse_variants("memory")
    settings = long_settings(arguments)
    device = choose_device(arguments.device)
    if settings is not None:
        probe_long(arguments, config, device, settings)
        log.info("the figures are in %s", arguments.json)
        return 0
    with reserved(arguments.json):
        result = probe(arguments, config, device)
        write_json(arguments.json, without_infinities(result))
    print_table(result["models"])
    log.info("the figures are in %s", arguments.json)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
