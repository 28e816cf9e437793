"""Make training data: rollouts of the teacher as latents, with text embeddings, in resumable shards.

    python scripts/generate_latents.py --config configs/causal_forcing_dmd_chunkwise.yaml \\
        --data_path prompts/hundred.jsonl --output_folder data/rollouts
    torchrun --nproc_per_node 8 scripts/generate_latents.py …      # every rank fills data/rollouts/rank-<n>

Training takes the folders of all ranks: data=[data/rollouts/rank-0,data/rollouts/rank-1,…].

The VAE is not needed: nothing is decoded.

A rollout is told by its prompt, its seed (--seed and how often the prompt came before) and what made it. Runs into one
folder add up: more prompts, more --videos_per_prompt or another --seed make what is missing, and what other command
lines made stays, since it is as valid. --prune removes it: then the folder holds what this command line says, and no
more. Another teacher, text encoder, setting or number of processes is refused.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import Progress
from torch import Tensor

from arl2.checkpoint import build_hybrid
from arl2.distillation.latent_writer import LatentWriter, SampleInfo
from arl2.model import HybridSettings, HybridWanModel
from arl2.rollout import SeededNoise, num_blocks, rollout
from pipelines.cli import choose_device, end_together, entry_point, own_folder, rank_and_world_size
from pipelines.config import NOT_OF_LATENTS, HybridConfig, InferenceConfig, MemoryConfig, SpeedConfig
from pipelines.dtypes import choose_dtype
from pipelines.flags import Parser, as_input, as_path
from pipelines.generation.arguments import check_config, check_device
from pipelines.prompts.jobs import PromptJob, plan_jobs, read_requests, repeat_requests, shard_jobs
from pipelines.provenance import architecture_of, text_fingerprints
from pipelines.settings import given_names, load_config
from wan.checkpoints.formats import read_transformer, transformer_config
from wan.checkpoints.loading import fingerprint_of_file
from wan.ops.attention import require_backend
from wan.text import TextEncoder, load_text_encoder
from wan.utils.errors import InputError
from wan.utils.files import check_writable
from wan.utils.ranges import Bounds
from wan.vae.wan_vae import spatial_stride

log = logging.getLogger(__name__)

KNOWN_LATER = ("weights", "architecture", "memory", "text_encoder", "tokenizer")
"""What a data set depends on that the model's files say, see `Teacher.made_by`."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        __doc__,
        InferenceConfig,
        reads_config=True,
        config_help="as for inference.py; hybrid layers are ignored",
        aliases={"--folder": "--output_folder"},
    )
    parser.add_argument(
        "--data_path", type=as_input, required=True, metavar="PATH", help="prompts: text, JSON lines or CSV"
    )
    parser.add_argument("--output_folder", type=as_path, required=True, metavar="PATH", help="where the shards go")
    parser.add_setting("--checkpoint_path", "checkpoint_path", "the teacher's weights; by default the config's")
    parser.add_argument("--use_ema", action="store_true", help="take generator_ema of the checkpoint")
    repeats = "rollouts of each, from other noise"
    parser.add_value("--videos_per_prompt", Annotated[int, Bounds(1, 10**5)], repeats, default=1)
    parser.add_seed("of the noise")
    parser.add_argument("--prune", action="store_true", help="remove samples that this command line does not name")
    parser.add_device()
    return parser.parse_args()


def read_jobs(arguments: argparse.Namespace) -> list[PromptJob]:
    """This process's share of the rollouts.

    Raises:
        InputError: no prompts, or no videos of each.
    """
    if arguments.videos_per_prompt < 1:
        raise InputError(f"--videos_per_prompt {arguments.videos_per_prompt} is not positive")
    requests = repeat_requests(read_requests(arguments.data_path), arguments.videos_per_prompt)
    return shard_jobs(plan_jobs(requests, arguments.seed), *rank_and_world_size())


class Teacher:
    """Rolls out the teacher.

    Args:
        config: sizes and sampling.
        use_ema: see `read_transformer`.

    Attributes:
        made_by: what latents and embeddings depend on beside the config: fingerprints of the weights and of the
            tokenizer, the settings of the transformer, and the memory that the config means for it.
        latents_shape, text_shape: [F, C, h, w] of a rollout; [T, D] of a text embedding.

    Raises:
        CheckpointError, InputError: weights that are missing or damaged, or do not fit.
    """

    def __init__(self, config: InferenceConfig, use_ema: bool, dtype: torch.dtype, device: torch.device) -> None:
        model_folder = Path(config.model_folder)
        weights = read_transformer(config.checkpoint_path or model_folder, use_ema)
        sizes = transformer_config(model_folder)
        self.model: HybridWanModel = build_hybrid(weights, sizes, HybridSettings(), dtype=dtype, device=device)[0]
        self.model.use_attention_backend(require_backend(config.attention_backend, device, dtype))
        self.encoder: TextEncoder = load_text_encoder(
            model_folder, text_len=self.model.config.text_len, dtype=dtype, device=device
        )
        self._memory = self._resolved(config)
        self.made_by: dict[str, Any] = {
            "weights": fingerprint_of_file(weights.state),
            "architecture": architecture_of(self.model),
            "memory": self._memory.identity(),
            **text_fingerprints(self.encoder),
        }
        self._config, self._device = config, device
        self._sampler = config.sampler()
        stride = spatial_stride(model_folder)
        self._shape = (self.model.config.in_dim, config.height // stride, config.width // stride)
        self.latents_shape = (config.num_output_frames, *self._shape)
        self.text_shape = (self.model.config.text_len, self.model.config.text_dim)

    def _resolved(self, config: InferenceConfig) -> MemoryConfig:
        """The memory that a config means for the model; one that training did not meet is warned of."""
        trained = self.model.trained_memory
        warning = config.memory.warning(trained, bool(self.model.hybrid.layers))
        if warning is not None:
            log.warning("%s", warning)
        memory = config.memory.resolved(trained)
        memory.check(config.frames_per_block)
        return memory

    def roll_out(self, seed: int, text_BTD: Tensor) -> Tensor:
        """The latents of a video, [1, F, C, h, w]."""
        config, model = self._config, self.model
        noise = SeededNoise([seed], (config.frames_per_block, *self._shape), self._device)
        latents = torch.empty(1, config.num_output_frames, *self._shape, device=self._device)
        blocks = num_blocks(config.num_output_frames, config.frames_per_block)
        with model.as_teacher():
            frames, asked = config.num_output_frames, self._memory
            memory = model.memory_for(latents, *asked.window_for(frames), sink_decay=asked.decay_for(frames))
            made = rollout(
                model,
                self._sampler,
                noise,
                model.embed_text(text_BTD),
                memory,
                blocks,
                context_noise=config.context_noise,
                recomputed_frames=asked.recomputed_for(frames, config.frames_per_block),
            )
            for block in made:
                latents[:, block.start_frame : block.start_frame + config.frames_per_block] = block.latents_BFCHW
        return latents


def generate_all(jobs: list[PromptJob], teacher: Teacher, writer: LatentWriter, prune: bool, quiet: bool) -> int:
    """Add what is missing; returns how many rollouts were not finite."""
    missing = writer.missing([SampleInfo(job.name, job.prompt, job.seed) for job in jobs], prune)
    failed = 0
    with Progress(disable=quiet) as progress:
        done = len(jobs) - len(missing)
        for sample in progress.track(missing, total=len(jobs), completed=done, description="rollouts"):
            text_BTD = teacher.encoder.encode([sample.prompt])
            latents = None
            if not writer.has_latents(sample):
                latents = teacher.roll_out(sample.seed, text_BTD)[0].to(torch.bfloat16)
                if not torch.isfinite(latents).all():
                    failed += 1
                    log.error("%s is not finite: left out; check the weights, or use --dtype float32", sample.key)
                    continue
            writer.add(sample.key, latents, sample.prompt, sample.seed, text_BTD[0])
    return failed


@end_together
@entry_point()
@torch.no_grad()
def main() -> int:
    """Parse, check, roll out, write. Status 1 if a rollout was not finite, 2 for bad input."""
    arguments = parse()
    config = load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)
    config.memory.refuse_idle(given_names(InferenceConfig, arguments))
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    config.refuse_lora()
    check_config(config)
    softmax = replace(config, hybrid=HybridConfig(), speed=SpeedConfig(cuda_graphs=False))
    check_device(softmax, device, dtype, decodes=False)
    jobs = read_jobs(arguments)
    folder, part = own_folder(arguments.output_folder)
    check_writable(folder)
    settings = {name: value for name, value in config.identity().items() if name not in NOT_OF_LATENTS}
    backend = require_backend(config.attention_backend, device, dtype)
    settings |= {"source": "rollouts", "dtype": str(dtype), "attention_backend": backend.value}
    with LatentWriter(folder, settings, pending=KNOWN_LATER, part=part) as writer:
        teacher = Teacher(config, arguments.use_ema, dtype, device)
        writer.complete(teacher.made_by, teacher.latents_shape, teacher.text_shape)
        failed = generate_all(jobs, teacher, writer, arguments.prune, quiet=rank_and_world_size()[0] != 0)
        others = len(writer.keys - {job.name for job in jobs})
    if others:
        log.info("%d samples of other prompts or seeds stay: --prune removes them", others)
    log.info("%d samples are in %s (%s)", len(writer.keys), folder, writer.counts)
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
