"""Make training data: rollouts of the teacher as latents, with text embeddings, in resumable shards.

    python scripts/generate_latents.py --config configs/causal_forcing_dmd_chunkwise.yaml \\
        --data_path prompts/test.txt --folder data/rollouts
    torchrun --nproc_per_node 8 scripts/generate_latents.py …      # every rank fills data/rollouts/rank-<n>

The VAE is not needed: nothing is decoded.
"""

import argparse
import logging
from dataclasses import asdict, replace
from pathlib import Path

import torch
from rich.progress import Progress

from arl2.checkpoint import build_hybrid
from arl2.distillation.data import LatentWriter
from arl2.model import HybridSettings
from arl2.rollout import FewStepSampler, SeededNoise, num_blocks, rollout
from pipelines.cli import choose_device, end_together, exit_on_input_error, rank_and_world_size
from pipelines.config import InferenceConfig, load_config
from pipelines.generation.arguments import DTYPES, check_config, check_writable, choose_dtype
from pipelines.prompts import plan_jobs, read_prompts, shard_jobs
from wan.checkpoints.formats import read_transformer, transformer_config
from wan.checkpoints.loading import fingerprint_of
from wan.ops.attention import require_backend
from wan.text import load_text_encoder
from wan.vae.wan_vae import spatial_stride

log = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="as for inference.py; hybrid layers are ignored")
    parser.add_argument("--data_path", type=Path, required=True, help="prompts, one a line")
    parser.add_argument("--folder", type=Path, required=True, help="where the shards go")
    parser.add_argument("--checkpoint_path", help="the teacher's weights")
    parser.add_argument("--use_ema", action="store_true")
    parser.add_argument("--videos_per_prompt", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=DTYPES)
    return parser.parse_args()


@end_together
@exit_on_input_error
@torch.no_grad()
def main() -> int:
    """Parse, check, roll out, write. Status 1 if a rollout was not finite, 2 for bad input."""
    arguments = parse()
    config = load_config(InferenceConfig, arguments.config)
    if arguments.checkpoint_path is not None:
        config = replace(config, checkpoint_path=arguments.checkpoint_path)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    check_config(config, i2v=False)
    rank, world_size = rank_and_world_size()
    folder = arguments.folder / f"rank-{rank}" if world_size > 1 else arguments.folder
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
    sampler = FewStepSampler.from_steps(config.denoising_steps, config.timestep_shift, config.warp_denoising_steps)
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
