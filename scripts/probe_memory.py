"""Measure on the toy world what a model remembers: JSON, and a table.

    python scripts/probe_memory.py --config configs/toyworld/inference.yaml --num_videos 256 --seed 0 --json probe.json

    python scripts/probe_memory.py --config … --also hybrid_75=models/toyworld/hybrid_75.safetensors --json probe.json

Rows: the softmax model with full memory (teacher); the same with every block blind to the others (local_only); the same
cut to a window and a sink at sampling time (window_sink); with --multi_step, the model before few-step training; and
others by --also, such as exports of a hybrid.
Each is judged on videos that go on from two given blocks, on videos made from a caption that names nothing, and on
whether videos made from a caption that names colour and shape obey it.
Ceilings (the videos themselves, and through the VAE) and the leak of the VAE stand beside them.
"""

from wan.utils.signals import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.table import Table

from arl2.checkpoint import build_hybrid, read_generator
from arl2.evaluation.eval_setup import EvalSetup
from arl2.model import HybridSettings, HybridWanModel
from arl2.rollout import FewStepSampler
from arl2.toyworld.probe.leakage import leakage_by_block
from arl2.toyworld.probe.memory_probe import ceilings, make_probe_set, probe_model
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, STANDARD_HIDDEN_FRAMES
from pipelines.cli import choose_device, entry_point
from pipelines.config import InferenceConfig
from pipelines.flags import Parser, SceneSeed, as_path
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.provenance import device_name
from pipelines.records import reserved, without_infinities
from pipelines.settings import load_config
from wan.checkpoints.formats import transformer_config
from wan.text import TextEncoder
from wan.utils.errors import InputError
from wan.utils.files import write_json
from wan.utils.ranges import Bounds
from wan.vae.wan_vae import WanVAE

log = logging.getLogger(__name__)

MULTI_STEPS = tuple(range(1000, 0, -1000 // 16))


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
        multi_step = HybridWanModel.from_pretrained(multi_step_folder).to(model.device)
        rows["teacher_multi_step"] = EvalSetup(
            multi_step, FewStepSampler.from_steps(MULTI_STEPS, config.timestep_shift)
        )
    for name, _, path in (one.partition("=") for one in also):
        if not name or not path or name in rows:
            raise InputError(f"--also {name}={path}: give NAME=WEIGHTS, with a name that no other row has")
        folder = Path(config.model_folder)
        weights, sizes = read_generator(folder, path), transformer_config(folder)
        built = build_hybrid(weights, sizes, HybridSettings(), dtype=torch.float32, device=pipeline.device)
        rows[name] = EvalSetup(built[0], sampler)
    return rows


def chosen(rows: dict[str, EvalSetup], only: Sequence[str] | None) -> dict[str, EvalSetup]:
    """The rows called `only`, or all.

    Raises:
        InputError: there is no such row.
    """
    unknown = set(only or ()) - rows.keys()
    if unknown:
        raise InputError(f"--only {min(unknown)}: no such row; there are {', '.join(rows)}")
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


def probe(arguments: argparse.Namespace, config: InferenceConfig, device: torch.device) -> dict[str, Any]:
    """All figures.

    Raises:
        InputError: a model that is missing or damaged, or a row that cannot be.
    """
    pipeline = CausalVideoPipeline.from_pretrained(
        config.model_folder,
        checkpoint_path=config.checkpoint_path,
        hybrid=config.hybrid.settings(),
        lora=config.lora_sources(),
        device=device,
        **config.sampling(),
    )
    rows = chosen(eval_setups(pipeline, config, arguments.multi_step, arguments.also), arguments.only)
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
        aliases={"--videos": "--num_videos"},
    )
    parser.add_value("--num_videos", Annotated[int, Bounds(2, 10**5)], "how many of every form", default=256)
    parser.add_value("--seed", SceneSeed, "of the scenes and the noise", default=0)
    hidden = "frames behind the wall, at the least"
    parser.add_value("--hidden_frames", Annotated[int, Bounds(1, 1000)], hidden, default=STANDARD_HIDDEN_FRAMES)
    parser.add_argument("--multi_step", type=as_path, metavar="PATH", help="folder of the multi-step model")
    parser.add_argument("--also", nargs="+", default=[], metavar="NAME=WEIGHTS", help="further transformers")
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these rows alone; a row takes minutes on a CPU")
    parser.add_argument("--json", type=as_path, required=True, metavar="PATH", help="where the figures go")
    parser.add_device(None)
    return parser.parse_args()


@entry_point()
def main() -> int:
    """Parse, probe, report."""
    arguments = parse()
    config = load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)
    device = choose_device(arguments.device)
    with reserved(arguments.json):
        result = probe(arguments, config, device)
        write_json(arguments.json, without_infinities(result))
    print_table(result["models"])
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
