"""The command line of inference.py, checked before any weights are read."""

import argparse
import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from arl2.inference.parallel.factory import NO_PEERS, NO_SHARDING, Exchange
from arl2.inference.parallel.sequence_parallel import check_divides
from arl2.inference.past_blocks import recomputed_frames
from arl2.model import FFNLoRA, check_layers
from arl2.rollout import num_blocks
from pipelines.cli import choose_device, local_processes, rank_and_world_size
from pipelines.config import InferenceConfig, MemoryKind, SpeedConfig, check_size
from pipelines.dtypes import choose_dtype
from pipelines.feasibility import (
    TransformerSizes,
    check_speed,
    require_room,
    room_for_generation,
    tokens_per_frame,
)
from pipelines.flags import Parser, as_input, as_path
from pipelines.generation.inputs.given import GivenVideo, frames_to_continue
from pipelines.generation.inputs.request import check_strength
from pipelines.generation.inputs.schedule import check_on_switch
from pipelines.generation.requests import requested_jobs
from pipelines.prompts.jobs import PromptJob
from pipelines.prompts.names import shown
from pipelines.prompts.schedules import OnSwitch, Timeline
from pipelines.settings import given_names, load_config
from wan.checkpoints.formats import transformer_config
from wan.checkpoints.loading import require_weight_file
from wan.ops.attention import AttentionBackend, require_backend
from wan.utils.errors import InputError
from wan.utils.files import check_writable
from wan.utils.ranges import check_ranges
from wan.vae.wan_vae import spatial_stride, temporal_stride

log = logging.getLogger(__name__)

WHERE_IT_PAYS = {
    "--compile": "by default on a GPU with Triton",
    "--cuda_graphs": "by default on a GPU",
    "--overlap_decoding": "by default on a GPU",
    "--kernels": "by default on a GPU with Triton and CUDA graphs, in half precision",
}
"""Defaults of switches that a config leaves open, see `SpeedConfig.on`."""


def inference_parser() -> Parser:
    """The flags of inference.py; those that the config also has go before it."""
    parser = Parser(
        "Generate videos from prompts with a causal Wan model, hybrid or softmax.",
        InferenceConfig,
        reads_config=True,
        aliases={"--metrics_dir": "--metrics_folder"},
    )
    add = parser.add_argument
    add(
        "--output_folder",
        type=as_path,
        required=True,
        metavar="PATH",
        help="where videos go; finished ones are skipped",
    )
    add("--metrics_folder", type=as_path, metavar="PATH", help="where measurements go; by default the output folder")
    source = parser.add_argument_group("input").add_mutually_exclusive_group(required=True)
    source.add_argument(
        "--data_path", type=as_input, metavar="PATH", help="prompts: text, JSON lines or CSV; with --i2v also images"
    )
    source.add_argument("--prompt", help="one prompt instead of a file")
    scripts = "several prompts per video, each from some frame, block or second on: JSON lines (docs/sessions.md)"
    source.add_argument("--prompt_schedule", type=as_input, metavar="PATH", help=scripts)
    add("--image", type=as_path, metavar="PATH", help="with --i2v and --prompt: the first frame")
    add("--i2v", action="store_true", help="start from an image")
    add("--video", type=as_path, metavar="PATH", help="a video that every output continues, or goes through again")
    again = "take --video through this fraction of the steps, in place of continuing it"
    parser.add_setting("--strength", "strength", again)
    add_generation_flags(parser)
    return parser


def add_generation_flags(parser: Parser) -> None:
    """Add the flags that say how videos are made: seed, length, model, memory, speed, processes and device."""
    setting, group = parser.add_setting, parser.add_argument_group
    parser.add_seed()
    video = group("video")
    frames = "latent frames, the given one included; F make 4F - 3 frames"
    setting("--num_output_frames", "num_output_frames", frames, group=video)
    switch = "when the prompt changes: keep what is remembered, or compute it anew under the new prompt"
    setting("--on_switch", "on_switch", switch, group=video)
    model = group("model")
    weights = "transformer weights (.pt, .safetensors or a folder); by default the config's"
    setting("--checkpoint_path", "checkpoint_path", weights, group=model)
    loras = "a LoRA of peft, diffusers, ComfyUI or kohya, FILE or FILE:SCALE; may be given several times"
    setting("--lora", "lora", loras, group=model, repeatable=True)
    model.add_argument("--use_ema", action="store_true", help="take generator_ema of the checkpoint")
    layers = "layers with hybrid attention; by default those of the checkpoint"
    setting("--hybrid_layers", "hybrid.layers", layers, group=model)
    rank = "rank of the adapters; by default that of the checkpoint"
    setting("--lora_rank", "hybrid.lora_rank", rank, group=model)
    alpha = "scale of the adapters times their rank; by default that of the checkpoint, or 32 where it does not say"
    setting("--lora_alpha", "hybrid.lora_alpha", alpha, group=model, shows_default=False)
    everywhere = "adapters on the feed-forward of every block"
    setting("--ffn_lora_all_layers", "hybrid.ffn_lora", everywhere, group=model, const=FFNLoRA.ALL)
    add_memory_flags(parser)
    add_speed_flags(parser)
    about = "under torchrun: divide the prompts over the processes, or let all compute every video together"
    choices = ("prompts", "video")
    parser.add_argument("--parallel", choices=choices, default="prompts", help=f"{about} (default prompts)")
    parser.add_device()


def add_memory_flags(parser: Parser) -> None:
    """Add the flags that set the fields of a config's `memory`."""
    memory = parser.add_argument_group("memory of the softmax layers")
    parser.add_setting(
        "--memory",
        "memory.kind",
        "what the checkpoint was trained with; everything; or a sink and a sliding window",
        group=memory,
    )
    seen = "latent frames that a query sees, its own block and the sink included; with --memory window"
    parser.add_setting("--window_frames", "memory.window_frames", seen, group=memory)
    for name, about in {
        "sink_frames": "latent frames of the sink, never dropped; with --memory window",
        "sink": "the first frames as they were, or a moving average of them and the frames that left the window",
        "sink_decay": "weight of the sink in that average when a frame leaves; with --sink average",
        "recompute": "compute keys and values of the window anew before every block; with --memory window",
    }.items():
        parser.add_setting(f"--{name}", f"memory.{name}", about, group=memory)


def add_speed_flags(parser: Parser) -> None:
    """Add the flags that set the fields of a config's `speed`."""
    group = parser.add_argument_group("speed")
    for flag, about in {
        "--compile": "compile the transformer's blocks",
        "--cuda_graphs": "record passes as CUDA graphs",
        "--fast_vae": "decode with the fast form of the VAE",
        "--overlap_decoding": "decode beside the next block's denoising",
        "--fp8": "linear layers in FP8: faster, less exact; Ada or Hopper GPUs",
        "--tiny_vae": "decode with these weights in TAEHV's format (taew2_1.pth): quicker, less exact",
        "--vae_device": "where the VAE is, to decode beside the transformer's work; by default the same device",
        "--kernels": "our Triton kernels between products",
        "--shard_weights": "of GPUs that compute one video, each keeps a part of the large weights",
        "--exchange": "how GPUs that compute one video exchange tokens for heads",
    }.items():
        field = f"speed.{flag[2:]}"
        is_open = flag in WHERE_IT_PAYS and parser.default_of(field) is None
        parser.add_setting(flag, field, about + (f"; {WHERE_IT_PAYS[flag]}" if is_open else ""), group=group)


@dataclass(frozen=True)
class InferenceRun:
    """A checked request: what to generate, with what, and where to.

    Attributes:
        config: with the flags applied.
        jobs: all prompts of the run; ranks share them.
        images: the first frame of every job, for --i2v.
        video: that every job continues or, with a strength, goes through again.
        given_frames: latent frames that every video starts with.
        over_video: all processes compute every video together, instead of dividing the prompts.
    """

    config: InferenceConfig
    jobs: list[PromptJob]
    images: dict[str, Path]
    video: Path | None
    given_frames: int
    output_folder: Path
    metrics_folder: Path
    device: torch.device
    dtype: torch.dtype
    backend: AttentionBackend
    seed: int
    use_ema: bool
    over_video: bool = False


def plan_run(
    arguments: argparse.Namespace, read_jobs: Callable[[argparse.Namespace], list[PromptJob]] = requested_jobs
) -> InferenceRun:
    """Check everything that can be checked before models load.

    Args:
        arguments: those of `inference_parser`.
        read_jobs: finds the videos to make; called once the settings are known to work.

    Raises:
        InputError: the cause and the cure in one line.
    """
    config = load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)
    config.memory.refuse_idle(given_names(InferenceConfig, arguments))
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    config = replace(config, speed=config.speed.on(device, dtype))
    over_video = arguments.parallel == "video" and rank_and_world_size()[1] > 1
    given_frames = check_config(config, arguments.i2v, arguments.video)
    check_vae_device(config, device, over_video)
    check_exchange(config.speed, device, over_video)
    if over_video:
        check_parallel(config, rank_and_world_size()[1])
    elif arguments.parallel == "video":
        log.warning("--parallel video does nothing for a single process: start several with torchrun")
    check_device(config, device, dtype, processes=rank_and_world_size()[1] if over_video else 1)
    jobs = read_jobs(arguments)
    check_schedules(config, jobs, given_frames, "on_switch" in given_names(InferenceConfig, arguments))
    metrics_folder = arguments.metrics_folder or arguments.output_folder
    for folder in (arguments.output_folder, metrics_folder):
        check_writable(folder)
    return InferenceRun(
        config=config,
        jobs=jobs,
        images={job.name: job.image for job in jobs if job.image is not None},
        video=arguments.video,
        given_frames=given_frames,
        output_folder=arguments.output_folder,
        metrics_folder=metrics_folder,
        device=device,
        dtype=dtype,
        backend=require_backend(config.attention_backend, device, dtype),
        seed=arguments.seed,
        use_ema=arguments.use_ema,
        over_video=over_video,
    )


def check_config(config: InferenceConfig, i2v: bool = False, video: Path | None = None) -> int:
    """Check settings against each other and against the model's sizes.

    Args:
        i2v: whether videos start with a picture.
        video: that they continue or go through again.

    Returns:
        latent frames that videos start with.

    Raises:
        InputError: a value that cannot work.
    """
    check_ranges(config)
    if i2v and video is not None:
        raise InputError("--video does not go with --i2v: give a picture or a video to start with")
    if config.strength is not None and video is None:
        raise InputError("strength is of a video that goes through the steps again: give --video too, or drop it")
    given = given_latent_frames(config, i2v, video)
    if given >= config.num_output_frames:
        raise InputError(
            f"{given} latent frames are given for a video of {config.num_output_frames}: raise --num_output_frames"
        )
    num_blocks(
        config.num_output_frames - given // config.frames_per_block * config.frames_per_block, config.frames_per_block
    )
    config.memory.check(config.frames_per_block)
    config.sampler()
    checkpoint = config.checkpoint_path
    if checkpoint is not None and not Path(checkpoint).exists():
        raise InputError(
            f"no checkpoint at {checkpoint}: check the path, or fetch it with scripts/download_weights.py --what NAME, "
            "whose --help has the names"
        )
    for source in config.lora_sources():
        for file in source.files():
            if file.suffix != ".json":
                require_weight_file(file)
    tiny = config.speed.tiny_vae
    if tiny is not None and not Path(tiny).is_file():
        raise InputError(f"no tiny decoder at {tiny}: check the path, or drop --tiny_vae")
    folder = Path(config.model_folder)
    sizes = TransformerSizes.of(transformer_config(folder))
    check_layers(config.hybrid.layers, sizes.num_layers)
    check_size(config.height, config.width, spatial_stride(folder), sizes.patch_size)
    config.hybrid.settings()
    return given


def check_schedules(
    config: InferenceConfig, jobs: Sequence[PromptJob], given_frames: int, names_on_switch: bool
) -> None:
    """Make sure that prompts begin inside of their videos, and that the memory can do what is asked of it then.

    Args:
        given_frames: latent frames that videos start with.
        names_on_switch: whether the command line says what happens at a switch.

    Raises:
        InputError: they do not, it cannot, or there is no switch.
    """
    scripted = [job for job in jobs if job.prompts]
    timeline = timeline_of(config, given_frames)
    for job in scripted:
        timeline.starts(job.prompts, f"the video '{shown(job.prompt)[:60]}'")
    if scripted:
        anew = check_on_switch(config.on_switch, config.memory) is OnSwitch.recompute
        if anew and config.memory.kind is MemoryKind.window:
            recomputed_frames(config.frames_per_block, *config.memory.window_for(config.num_output_frames))
    elif names_on_switch:
        raise InputError("on_switch is of a prompt that changes: give --prompt_schedule too, or drop it")


def timeline_of(config: InferenceConfig, given_frames: int) -> Timeline:
    """Frames of the videos of a config.

    Args:
        given_frames: latent frames that they start with.
    """
    per_block = config.frames_per_block
    stride = temporal_stride(Path(config.model_folder))
    context = given_frames // per_block * per_block
    return Timeline(per_block, config.num_output_frames, context, stride, config.fps)


def given_latent_frames(config: InferenceConfig, i2v: bool, video: Path | None) -> int:
    """Latent frames that videos start with; 0 for a video that goes through the steps again.

    Raises:
        InputError: the video cannot be read, or is too short to go through again.
    """
    if video is None:
        return 1 if i2v else 0
    stride = temporal_stride(Path(config.model_folder))
    count = GivenVideo(video, config.height, config.width, config.fps).num_frames
    if config.strength is None:
        return frames_to_continue(count, stride, quiet=True)[1]
    check_strength(config.strength, config.sampler())
    needed = (config.num_output_frames - 1) * stride + 1
    if count < needed:
        raise InputError(
            f"{video} has {count} frames at {config.fps} per second, {needed} are needed: give a longer one, or lower "
            f"--num_output_frames to at most {(count - 1) // stride + 1}"
        )
    return 0


def check_parallel(config: InferenceConfig, processes: int) -> None:
    """Make sure that a video divides over processes.

    Raises:
        InputError: heads or tokens do not, or a setting does not go with it.
    """
    folder = Path(config.model_folder)
    sizes = TransformerSizes.of(transformer_config(folder))
    stride = spatial_stride(folder)
    tokens = tokens_per_frame(sizes, (config.height // stride, config.width // stride))
    check_divides(sizes.num_heads, tokens, processes)


def check_exchange(speed: SpeedConfig, device: torch.device, over_video: bool) -> None:
    """Refuse, before models load, what only GPUs that compute a video together can do.

    Raises:
        InputError: it cannot be done here. Whether these GPUs can is known once all processes have joined.
    """
    can_be_peers = over_video and device.type == "cuda" and speed.exchange is not Exchange.COLLECTIVE
    if speed.shard_weights and not can_be_peers:
        raise InputError(NO_SHARDING)
    if over_video and speed.exchange is Exchange.PEER and not can_be_peers:
        raise InputError(NO_PEERS)
    if not over_video and speed.exchange is not Exchange.AUTO:
        log.warning(
            "exchange %s does nothing: it is of processes that compute one video together (--parallel video)",
            speed.exchange.value,
        )


def check_vae_device(config: InferenceConfig, device: torch.device, over_video: bool) -> None:
    """Make sure that a VAE on a device of its own is possible and has that for itself.

    Raises:
        InputError: there is no such device, or other processes use it.
    """
    vae_device = config.speed.vae_on(device)
    if vae_device == device:
        return
    if over_video:
        raise InputError(
            f"--vae_device {vae_device} does not go with --parallel video, with which every process decodes a part of "
            "each frame on its own device: leave --vae_device out"
        )
    processes = local_processes()
    if vae_device.type == "cuda" and processes > 1:
        raise InputError(
            f"{processes} processes cannot share --vae_device {vae_device}: leave it out, and each decodes on its own "
            "GPU; or start one process without torchrun"
        )


def check_device(
    config: InferenceConfig,
    device: torch.device,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    decodes: bool = True,
    processes: int = 1,
) -> None:
    """Make sure that a device can do what a config asks for, and has room for it, and the VAE's likewise.

    Args:
        batch: videos at a time.
        decodes: whether they are decoded.
        processes: that compute every video together.

    Raises:
        InputError: it cannot, or has not.
    """
    folder = Path(config.model_folder)
    sizes = TransformerSizes.of(transformer_config(folder))
    check_speed(config.speed, device, dtype, sizes.dim, sizes.ffn_dim)
    estimate = room_for_generation(config, sizes, dtype, batch=batch, decodes=decodes, processes=processes)
    videos = f"{batch} videos of " if batch > 1 else ""
    what = (
        f"generating {videos}{config.num_output_frames} latent frames of {config.height}×{config.width} pixels with "
        f"{config.memory.kind.value} memory"
    )
    for place, part in estimate.divided(device, config.speed.vae_on(device)).items():
        require_room(part, place, what, cure_of_size(config))


def cure_of_size(config: InferenceConfig) -> str:
    """Which settings to lower where there is no room: those that count."""
    memory = config.memory
    slides = memory.kind is MemoryKind.window and memory.window_frames < config.num_output_frames
    names = ["memory.window_frames" if slides else "num_output_frames", "height"]
    last = "width"
    if config.hybrid.lora_rank is not None:
        names, last = [*names, last], "lora_rank"
    cure = f"lower {', '.join(names)} or {last}"
    return cure if memory.kind is MemoryKind.window else f"{cure}, or give --memory window"
