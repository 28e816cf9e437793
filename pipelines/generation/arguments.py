"""The command line of inference.py, checked before any weights are read."""

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

import torch

from arl2.model import FFNLoRA, check_layers
from arl2.rollout import FewStepSampler, num_blocks
from pipelines.cli import choose_device
from pipelines.config import InferenceConfig, MemoryKind, SpeedConfig, check_size, load_config
from pipelines.generation.requests import requested_jobs
from pipelines.prompts import PromptJob
from wan.checkpoints.formats import transformer_config
from wan.ops.attention import AttentionBackend, require_backend
from wan.utils.errors import InputError
from wan.utils.files import check_writable
from wan.vae.wan_vae import spatial_stride

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
Speed = TypeVar("Speed", bound=SpeedConfig)


def choose_dtype(name: str | None, device: torch.device) -> torch.dtype:
    """The type called `name`, one of `DTYPES`; by default bfloat16 on a GPU and float32 elsewhere."""
    return DTYPES[name or ("bfloat16" if device.type == "cuda" else "float32")]


def inference_parser() -> argparse.ArgumentParser:
    """The flags of inference.py; those that the config also has override it."""
    parser = argparse.ArgumentParser(
        description="Generate videos from prompts with a causal Wan model, hybrid or softmax."
    )
    add = parser.add_argument
    add("--config_path", type=Path, required=True, help="YAML file, see configs/")
    add("--output_folder", type=Path, required=True, help="where videos go; finished ones are skipped")
    add("--checkpoint_path", type=Path, help="transformer weights (.pt, .safetensors or a folder)")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--data_path", type=Path, help="prompts: text, JSON lines or CSV; with --i2v also images")
    source.add_argument("--prompt", help="one prompt instead of a file")
    add("--image", type=Path, help="with --i2v and --prompt: the first frame")
    add("--hybrid_layers", type=int, nargs="*", help="layers with hybrid attention; by default those of the checkpoint")
    add("--lora_rank", type=int, help="rank of the adapters")
    add("--lora_alpha", type=float, help="scale of the adapters times their rank")
    add("--ffn_lora_all_layers", action="store_true", help="adapters on the feed-forward of every block")
    add("--num_output_frames", type=int, help="latent frames, the given one included; F make 4F - 3 frames")
    add("--seed", type=int, default=0)
    add("--use_ema", action="store_true", help="take generator_ema of the checkpoint")
    add("--i2v", action="store_true", help="start from an image (frame-wise models)")
    add("--memory", choices=[kind.value for kind in MemoryKind], help="memory of the softmax layers")
    add("--metrics_dir", type=Path, help="where the measurements of each video go; by default the output folder")
    add("--device", help="cpu, cuda or cuda:N; the GPU if there is one")
    add("--dtype", choices=DTYPES, help="bfloat16 on a GPU, float32 on a CPU by default")
    add_speed_flags(parser)
    return parser


def add_speed_flags(parser: argparse.ArgumentParser) -> None:
    """Add the flags that override a `SpeedConfig`."""
    add = parser.add_argument
    switch = argparse.BooleanOptionalAction
    add("--compile", action=switch, help="compile the transformer's blocks; on a GPU by default")
    add("--cuda-graphs", action=switch, help="record passes as CUDA graphs; on a GPU by default")
    add("--fast-vae", action=switch, help="decode with the fast form of the VAE; by default")
    add(
        "--overlap-decoding",
        action=switch,
        help="decode beside the next block's denoising; for inference on a GPU by default",
    )
    add("--fp8", action="store_true", help="linear layers in FP8: faster, less exact; Ada or Hopper GPUs")
    add("--tiny-vae", help="decode with these weights in TAEHV's format (taew2_1.pth): quicker, less exact")
    add("--kernels", action=switch, help="our Triton kernels between products; on a GPU in half precision by default")


def apply_speed_flags(speed: Speed, arguments: argparse.Namespace) -> Speed:
    """The settings with the flags that were given in the place of their own values."""
    return replace(
        speed,
        compile=speed.compile if arguments.compile is None else arguments.compile,
        cuda_graphs=speed.cuda_graphs if arguments.cuda_graphs is None else arguments.cuda_graphs,
        fast_vae=speed.fast_vae if arguments.fast_vae is None else arguments.fast_vae,
        overlap_decoding=speed.overlap_decoding if arguments.overlap_decoding is None else arguments.overlap_decoding,
        fp8=speed.fp8 or arguments.fp8,
        kernels=speed.kernels if arguments.kernels is None else arguments.kernels,
        tiny_vae=speed.tiny_vae if arguments.tiny_vae is None else arguments.tiny_vae,
    )


@dataclass(frozen=True)
class InferenceRun:
    """A checked request: what to generate, with what, and where to.

    Attributes:
        config: with the flags applied.
        jobs: all prompts of the run; ranks share them.
        images: the first frame of every job, for --i2v.
    """

    config: InferenceConfig
    jobs: list[PromptJob]
    images: dict[str, Path]
    output_folder: Path
    metrics_folder: Path
    device: torch.device
    dtype: torch.dtype
    backend: AttentionBackend
    seed: int
    use_ema: bool


def plan_run(arguments: argparse.Namespace) -> InferenceRun:
    """Check everything that can be checked before models load.

    Raises:
        InputError: the cause and the cure in one line.
    """
    config = apply_flags(load_config(InferenceConfig, arguments.config_path), arguments)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    config = replace(config, speed=config.speed.on(device, dtype))
    check_config(config, arguments.i2v)
    jobs = requested_jobs(arguments)
    metrics_folder = arguments.metrics_dir or arguments.output_folder
    for folder in (arguments.output_folder, metrics_folder):
        check_writable(folder)
    return InferenceRun(
        config=config,
        jobs=jobs,
        images={job.name: job.image for job in jobs if job.image is not None},
        output_folder=arguments.output_folder,
        metrics_folder=metrics_folder,
        device=device,
        dtype=dtype,
        backend=require_backend(config.attention_backend, device, dtype),
        seed=arguments.seed,
        use_ema=arguments.use_ema,
    )


def apply_flags(config: InferenceConfig, arguments: argparse.Namespace) -> InferenceConfig:
    """The config with the flags that were given in the place of its own values."""
    flags = {
        "layers": arguments.hybrid_layers,
        "lora_rank": arguments.lora_rank,
        "lora_alpha": arguments.lora_alpha,
        "ffn_lora": FFNLoRA.ALL if arguments.ffn_lora_all_layers else None,
    }
    hybrid = replace(config.hybrid, **{key: value for key, value in flags.items() if value is not None})
    memory = replace(config.memory, kind=MemoryKind(arguments.memory)) if arguments.memory else config.memory
    frames = config.num_output_frames if arguments.num_output_frames is None else arguments.num_output_frames
    checkpoint = config.checkpoint_path if arguments.checkpoint_path is None else str(arguments.checkpoint_path)
    return replace(
        config,
        hybrid=hybrid,
        memory=memory,
        num_output_frames=frames,
        checkpoint_path=checkpoint,
        speed=apply_speed_flags(config.speed, arguments),
    )


def check_config(config: InferenceConfig, i2v: bool) -> None:
    """Check settings against each other and against the model's sizes.

    Raises:
        InputError: a value that cannot work.
    """
    if i2v and config.frames_per_block != 1:
        raise InputError(
            f"--i2v needs a frame-wise model, this config is chunk-wise ({config.frames_per_block} frames a block): "
            "use configs/causal_forcing_dmd_framewise.yaml with a frame-wise checkpoint"
        )
    if config.frames_per_block < 1:
        raise InputError(f"frames_per_block {config.frames_per_block} is not positive")
    num_blocks(config.num_output_frames - (1 if i2v else 0), config.frames_per_block)
    config.memory.check(config.frames_per_block)
    FewStepSampler.from_steps(config.denoising_steps, config.timestep_shift, config.warp_denoising_steps)
    checkpoint = config.checkpoint_path
    if checkpoint is not None and not Path(checkpoint).exists():
        raise InputError(f"no checkpoint at {checkpoint}: check the path, or run scripts/download_weights.py")
    tiny = config.speed.tiny_vae
    if tiny is not None and not Path(tiny).is_file():
        raise InputError(f"no tiny decoder at {tiny}: check the path, or drop --tiny-vae")
    folder = Path(config.model_folder)
    sizes = transformer_config(folder)
    check_layers(config.hybrid.layers, sizes["num_layers"])
    check_size(config.height, config.width, spatial_stride(folder), sizes["patch_size"])
    config.hybrid.settings()
