"""Make training data: rollouts of the teacher as latents, with text embeddings, in resumable shards.

    python scripts/generate_latents.py --config configs/causal_forcing_dmd_chunkwise.yaml \\
        --data_path prompts/test.txt --output_folder data/rollouts
    torchrun --nproc_per_node 8 scripts/generate_latents.py …      # every rank fills data/rollouts/rank-<n>

The VAE is not needed: nothing is decoded.
"""

import argparse
import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated

import torch
from rich.progress import Progress

from arl2.checkpoint import build_hybrid
from arl2.distillation.data import LatentWriter
from arl2.model import HybridSettings
from arl2.rollout import num_blocks, rollout
from pipelines.cli import choose_device, end_together, exit_on_input_error, rank_and_world_size
from pipelines.config import HybridConfig, InferenceConfig, SpeedConfig
from pipelines.dtypes import choose_dtype
from pipelines.flags import Parser, as_path
from pipelines.generation.arguments import check_config, check_device, check_writable
from pipelines.generation.pipeline import SeededNoise
from pipelines.prompts import plan_jobs, read_prompts, shard_jobs
from pipelines.settings import load_config
from wan.checkpoints.formats import read_transformer, transformer_config
from wan.checkpoints.loading import fingerprint_of
from wan.ops.attention import require_backend
from wan.text import load_text_encoder
from wan.utils.ranges import Bounds
from wan.vae.wan_vae import spatial_stride

log = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        __doc__,
        InferenceConfig,
        reads_config=True,
        config_help="as for inference.py; hybrid layers are ignored",
        aliases={"--folder": "--output_folder"},
    )
    parser.add_argument("--data_path", type=as_path, required=True, metavar="PATH", help="prompts, one a line")
    parser.add_argument("--output_folder", type=as_path, required=True, metavar="PATH", help="where the shards go")
    parser.add_setting("--checkpoint_path", "checkpoint_path", "the teacher's weights; by default the config's")
    parser.add_argument("--use_ema", action="store_true", help="take generator_ema of the checkpoint")
    repeats = "rollouts of each, from other noise"
    parser.add_value("--videos_per_prompt", Annotated[int, Bounds(1, 10**5)], repeats, default=1)
    parser.add_seed("of the noise")
    parser.add_device()
    return parser.parse_args()


@end_together
@exit_on_input_error
@torch.no_grad()
def main() -> int:
    """Parse, check, roll out, write. Status 1 if a rollout was not finite, 2 for bad input."""
    arguments = parse()
    config = load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    check_config(config, i2v=False)
    teacher = replace(config, hybrid=HybridConfig(), speed=SpeedConfig(cuda_graphs=False))
    check_device(teacher, device, dtype, decodes=False)
    rank, world_size = rank_and_world_size()
    folder = arguments.output_folder / f"rank-{rank}" if world_size > 1 else arguments.output_folder
    check_writable(folder)
    jobs = shard_jobs(
        plan_jobs(read_prompts(arguments.data_path) * arguments.videos_per_prompt, arguments.seed), rank, world_size
    )
    model_folder = Path(config.model_folder)
    weights = read_transformer(config.checkpoint_path or model_folder, arguments.use_ema)
    sizes = transformer_config(model_folder)
    model, _ = build_hybrid(weights, sizes, HybridSettings(), dtype=dtype, device=device)
    model.use_attention_backend(require_backend(config.attention_backend, device, dtype))
    encoder = load_text_encoder(model_folder, text_len=model.config.text_len, dtype=dtype, device=device)
    sampler = config.sampler()
    stride = spatial_stride(model_folder)
    size = (config.height // stride, config.width // stride)
    blocks = num_blocks(config.num_output_frames, config.frames_per_block)
    settings = asdict(config) | {"dtype": str(dtype), "use_ema": arguments.use_ema}
    settings["weights"] = fingerprint_of(weights.state)
    failed = 0
    with LatentWriter(folder, settings) as writer, Progress(disable=rank != 0) as progress:
        for job in progress.track([job for job in jobs if job.name not in writer.keys], description="rollouts"):
            text_BTD = encoder.encode([job.prompt])
            noise = SeededNoise([job.seed], (config.frames_per_block, model.config.in_dim, *size), device)
            latents = torch.empty(1, config.num_output_frames, model.config.in_dim, *size, device=device)
            with model.as_teacher():
                memory, text = model.memory_for(latents, *config.memory.window), model.embed_text(text_BTD)
                for block in rollout(model, sampler, noise, text, memory, blocks, context_noise=config.context_noise):
                    latents[:, block.start_frame : block.start_frame + config.frames_per_block] = block.latents_BFCHW
            if torch.isfinite(latents).all():
                writer.add(job.name, latents[0].to(torch.bfloat16), job.prompt, job.seed, text_BTD[0])
            else:
                failed += 1
                log.error("%s is not finite: left out; check the weights, or use --dtype float32", job.name)
    log.info("%d samples are in %s", len(writer.keys), folder)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
