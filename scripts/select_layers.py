"""Choose which layers to convert, and write the sets for 25, 50 and 75 % of them as YAML.

    python scripts/select_layers.py --config configs/causal_forcing_dmd_chunkwise.yaml --method replacement \\
        --checkpoint_path runs/stage1/export --data_path prompts/hundred.jsonl --json scores.json --yaml layers.yaml
    python scripts/select_layers.py --config … --method stage1_error --scores runs/stage1 --yaml layers.yaml
    python scripts/select_layers.py --config … --method gates --training configs/gates.yaml --yaml layers.yaml
    python scripts/select_layers.py --config … --method random --seed 1 --yaml layers.yaml
    python scripts/select_layers.py --config … --method vbench --scores output/layers/single_layers --yaml layers.yaml

replacement: one layer is hybrid at a time, and the videos are compared with the teacher's, from the same noise; needs a
stage-1 export with all layers hybrid. --json keeps the scores of every video as they come: a run that is started again
goes on there. stage1_error: how well each layer learnt to put out what the teacher's does. gates: trains a gate a layer
under a budget (arl2/layer_selection/gates.py; resumed like any training), or reads such a run, --scores. random: a
control. vbench: what videos lose in six dimensions of VBench when one layer is hybrid, as the paper has it; --scores is
the folder of evaluations that `scripts/reproduce.py layers` makes, or a file {"layer": score} with low for good.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from arl2.checkpoint import build_hybrid, plan_hybrid, read_generator
from arl2.distillation.trainer import BatchSize
from arl2.layer_selection.scores import (
    SHARES,
    Selection,
    random_scores,
    read_gates,
    read_scores,
    read_stage1_errors,
    replacement_scores,
)
from arl2.model import HybridSettings, HybridWanModel
from arl2.rollout import SeededNoise, num_blocks
from arl2.statement import found_settings
from pipelines.cli import choose_device, entry_point, rank_and_world_size
from pipelines.config import NOT_OF_LATENTS, HybridConfig, InferenceConfig, MemoryConfig, MemoryKind, SpeedConfig
from pipelines.dtypes import choose_dtype
from pipelines.evaluation.layer_scores import read_layer_scores
from pipelines.evaluation.tables.vbench import SHOWN
from pipelines.flags import Parser, as_input, as_path
from pipelines.generation.arguments import check_config, check_device
from pipelines.prompts.jobs import PromptJob, plan_jobs, read_requests, repeat_requests
from pipelines.provenance import architecture_of, text_fingerprints
from pipelines.records import Records, open_records
from pipelines.settings import load_config
from pipelines.training.config import GatesConfig
from pipelines.training.run import train
from wan.checkpoints.formats import TransformerWeights, transformer_config
from wan.checkpoints.loading import fingerprint_of_file
from wan.ops.attention import require_backend
from wan.text import TextEncoder, load_text_encoder
from wan.utils.errors import InputError
from wan.utils.files import check_target
from wan.utils.ranges import Bounds
from wan.vae.wan_vae import spatial_stride

log = logging.getLogger(__name__)

METHODS = ("replacement", "stage1_error", "gates", "random", "vbench")
VBENCH = (
    "vbench needs videos made with one layer hybrid at a time: scripts/reproduce.py layers prints the commands that "
    'make and score them; give their folder, or a file {"layer": score} with low for good, as --scores'
)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        __doc__,
        InferenceConfig,
        reads_config=True,
        config_help="as for inference.py; its hybrid layers and memory are ignored",
        aliases={"--videos": "--num_videos"},
    )
    add, group = parser.add_argument, parser.add_argument_group("replacement")
    add("--method", choices=METHODS, required=True, help="how to score layers")
    add("--yaml", type=as_path, required=True, metavar="PATH", help="where the sets go")
    weights = "a stage-1 export with all layers hybrid"
    parser.add_setting("--checkpoint_path", "checkpoint_path", weights, group=group)
    group.add_argument("--data_path", type=as_input, metavar="PATH", help="prompts: text, JSON lines or CSV")
    videos = "how many; the first prompts, again with other noise"
    parser.add_value("--num_videos", Annotated[int, Bounds(1, 10**5)], videos, group=group, default=12)
    parser.add_value("--batch", BatchSize, "videos at a time", group=group, default=1)
    group.add_argument("--json", type=as_path, metavar="PATH", help="where the scores of every video go")
    add(
        "--scores",
        type=as_path,
        metavar="PATH",
        help="stage1_error, gates: a run or one of its reports; vbench: a folder of evaluations, or a file",
    )
    dimensions = "vbench: of a folder of evaluations (default the paper's six)"
    add("--dimensions", nargs="+", default=list(SHOWN), metavar="NAME", help=dimensions)
    add("--training", type=as_input, metavar="PATH", help="gates: config of the training, see configs/gates.yaml")
    add("--set", nargs="+", default=[], metavar="key=value", help="gates: in the place of the training config's own")
    parser.add_seed("of noise, or of the random scores")
    parser.add_device()
    return parser.parse_args()


def needed(arguments: argparse.Namespace, name: str) -> Any:
    """A flag without which the method cannot work.

    Raises:
        InputError: it is not given.
    """
    value = getattr(arguments, name)
    if value is None:
        raise InputError(f"--method {arguments.method} needs --{name}: see --help")
    return value


def means(records: Records, jobs: list[PromptJob]) -> dict[int, float]:
    """Mean score over the videos of some jobs, by layer; infinite if one was not finite, which JSON calls null."""
    rows = [records.find(job.name) or {} for job in jobs]
    scores = {layer: [math.inf if row[layer] is None else row[layer] for row in rows] for layer in rows[0]}
    return {int(layer): sum(values) / len(values) for layer, values in scores.items()}


def plan(arguments: argparse.Namespace, config: InferenceConfig) -> list[PromptJob]:
    """Videos to make.

    Raises:
        InputError: a flag that is missing or cannot work, a config with a window, or videos of a single block.
    """
    needed(arguments, "checkpoint_path")
    if config.memory.kind is MemoryKind.window:
        raise InputError("replacement compares models with full memory: set memory.kind to full")
    if config.num_output_frames <= config.frames_per_block:
        raise InputError(
            f"videos of {config.num_output_frames} latent frames are a single block of {config.frames_per_block}, over "
            "which a hybrid layer is the teacher's exactly, and all scores 0: give num_output_frames of two blocks at "
            "least"
        )
    requests = read_requests(needed(arguments, "data_path"))
    times = -(-arguments.num_videos // len(requests))
    return plan_jobs(repeat_requests(requests, times)[: arguments.num_videos], arguments.seed)


def load(
    config: InferenceConfig, weights: TransformerWeights, dtype: torch.dtype, device: torch.device
) -> HybridWanModel:
    """A model that is hybrid in all layers.

    Raises:
        InputError: it is hybrid in some layers only.
    """
    sizes = transformer_config(Path(config.model_folder))
    layers = found_settings(weights.state).layers
    if len(layers) != sizes["num_layers"]:
        raise InputError(
            f"{config.checkpoint_path} is hybrid in {len(layers)} of {sizes['num_layers']} layers: replacement needs a "
            "stage-1 export with all"
        )
    model, _ = build_hybrid(weights, sizes, HybridSettings(), dtype=dtype, device=device)
    model.use_attention_backend(require_backend(config.attention_backend, device, dtype))
    return model


def score_by_replacement(arguments: argparse.Namespace, config: InferenceConfig) -> dict[int, float]:
    """Make the videos that are missing, and score all."""
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    jobs = plan(arguments, config)
    plain = replace(config, speed=SpeedConfig(cuda_graphs=False))
    check_device(plain, device, dtype, batch=min(arguments.batch, len(jobs)), decodes=False)
    settings = {name: value for name, value in config.identity().items() if name not in NOT_OF_LATENTS}
    backend = require_backend(config.attention_backend, device, dtype)
    settings |= {"seed": arguments.seed, "dtype": str(dtype), "attention_backend": backend.value}
    settings["memory"] = MemoryConfig(MemoryKind.full).identity()
    with open_records(arguments.json, "videos", cure="remove it, or give another --json") as records:
        model_folder = Path(config.model_folder)
        weights = read_generator(model_folder, str(config.checkpoint_path))
        sizes = transformer_config(model_folder)
        text_len = {name: value for name, value in sizes.items() if name == "text_len"}
        encoder = load_text_encoder(model_folder, **text_len, dtype=dtype, device=device)
        # Formats order names each in its own way.
        settings["weights"] = fingerprint_of_file(weights.state)
        settings["architecture"] = architecture_of(plan_hybrid(weights, sizes, HybridSettings()).model)
        records.made_with(settings | text_fingerprints(encoder))
        missing = [job for job in jobs if records.find(job.name) is None]
        if missing:
            done = len(jobs) - len(missing)
            score_videos(missing, arguments.batch, config, load(config, weights, dtype, device), encoder, records, done)
        return means(records, jobs)


def score_videos(
    jobs: list[PromptJob],
    batch_size: int,
    config: InferenceConfig,
    model: HybridWanModel,
    encoder: TextEncoder,
    records: Records,
    done: int,
) -> None:
    """Make videos batch by batch and note the scores of each, by layer.

    Args:
        done: how many an earlier run has made, for the progress bar.
    """
    sampler = config.sampler()
    stride = spatial_stride(Path(config.model_folder))
    shape = (config.frames_per_block, model.config.in_dim, config.height // stride, config.width // stride)
    blocks = num_blocks(config.num_output_frames, config.frames_per_block)
    batches = [jobs[first : first + batch_size] for first in range(0, len(jobs), batch_size)]
    with Progress() as progress:
        bar = progress.add_task("videos", total=done + len(jobs), completed=done)
        for batch in batches:
            text = encoder.encode([job.prompt for job in batch])
            noise = SeededNoise([job.seed for job in batch], shape, model.device)
            scores = replacement_scores(model, sampler, text, noise, blocks, config.context_noise)
            for place, job in enumerate(batch):
                records.put(job.name, {str(layer): values[place] for layer, values in scores.items()})
            progress.advance(bar, len(batch))


def score_by_file(arguments: argparse.Namespace, config: InferenceConfig) -> dict[int, float]:
    """Take the scores of a file or of a training, or none at all."""
    num_layers = transformer_config(Path(config.model_folder))["num_layers"]
    if arguments.method == "random":
        return random_scores(num_layers, arguments.seed)
    if arguments.method == "vbench" and arguments.scores is None:
        raise InputError(VBENCH)
    if arguments.method == "vbench" and arguments.scores.is_dir():
        return read_layer_scores(arguments.scores, num_layers, arguments.dimensions)
    if arguments.method == "gates" and arguments.training is not None:
        training = load_config(GatesConfig, arguments.training, arguments.set)
        train(training)
        return read_gates(Path(training.run_folder), num_layers)
    readers: dict[str, Callable[[Path, int], dict[int, float]]] = {
        "stage1_error": read_stage1_errors,
        "gates": read_gates,
        "vbench": read_scores,
    }
    return readers[arguments.method](needed(arguments, "scores"), num_layers)


@entry_point()
def main() -> int:
    """Parse, check, score, write."""
    arguments = parse()
    config = load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)
    config = replace(config, hybrid=HybridConfig())
    check_target(arguments.yaml)
    if arguments.method == "replacement":
        config.refuse_lora()
        check_config(config)
        scores = score_by_replacement(arguments, config)
    else:
        scores = score_by_file(arguments, config)
    if rank_and_world_size()[0]:
        return 0  # it trained gates with the others; one of them writes
    selection = Selection(arguments.method, scores)
    if len(set(scores.values())) == 1 < len(scores):
        log.warning("all layers score %g: the sets are the first layers, and no choice", next(iter(scores.values())))
    selection.write(arguments.yaml)
    table = Table("layer", "score", *(f"{share} %" for share in SHARES))
    for layer, score in sorted(scores.items()):
        table.add_row(
            str(layer), f"{score:.4g}", *("×" if layer in selection.layers(share) else "" for share in SHARES)
        )
    Console().print(table)
    if arguments.method == "replacement" and arguments.json is not None:
        log.info("the scores of every video are in %s", arguments.json)
    log.info("the sets are in %s", arguments.yaml)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
