"""What a device can do, found out before weights load: whether it has what switches need, and room for the sizes.

Estimates are lower bounds, so that nothing that fits is refused: weights, memory of the layers, and the largest tensors
that live at one time. `tests/pipelines/test_feasibility.py` compares them with measured bytes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import psutil
import torch

from arl2.inference.fused_ops import require_kernels
from arl2.inference.linear import require_fp8
from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from arl2.state_settings import PAPER_STATE, StateSettings, stated_state
from arl2.statement import hybrid_layer_of, trained_memory_of
from arl2.trained_memory import TrainedMemory
from pipelines.config import InferenceConfig, SpeedConfig
from wan.checkpoints.configs import read_config
from wan.checkpoints.formats import (
    GENERATOR,
    GENERATOR_EMA,
    MODEL,
    has_config,
    transformer_config,
    unwrapped_name,
)
from wan.checkpoints.loading import read_header, read_weights
from wan.checkpoints.record import read_record
from wan.text import NATIVE_TEXT_FILE
from wan.utils.device import triton_installed
from wan.utils.errors import CheckpointError, InputError
from wan.utils.ranges import Count, typed
from wan.vae.wan_vae import WAN21_VAE, spatial_stride

GIGABYTE = 1e9
DECODING = "decoding"
TRITON_CAPABILITY = (7, 0)
"""Compute capability of the oldest GPUs that Triton compiles for."""
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class TransformerSizes:
    """Sizes of a transformer, as `wan.checkpoints.formats.transformer_config` has checked them."""

    patch_size: tuple[int, int, int] = (1, 2, 2)
    text_len: int = 512
    in_dim: int = 16
    out_dim: int = 16
    dim: int = 1536
    ffn_dim: int = 8960
    freq_dim: int = 256
    text_dim: int = 4096
    num_heads: int = 12
    num_layers: int = 30

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "TransformerSizes":
        """The sizes among a model's constructor arguments."""
        known = {field.name: config[field.name] for field in fields(cls) if field.name in config}
        return cls(**known | {"patch_size": tuple(known.get("patch_size", cls.patch_size))})


@dataclass(frozen=True)
class Estimate:
    """Bytes that are needed at the least, by what they are for."""

    parts: Mapping[str, int]

    @property
    def total(self) -> int:
        """All of them together."""
        return sum(self.parts.values())

    def divided(self, device: torch.device, vae_device: torch.device) -> dict[torch.device, "Estimate"]:
        """What each of the devices needs of it; a VAE on a device of its own decodes there."""
        if vae_device == device:
            return {device: self}
        here, there = (
            {name: self.parts[name] for name in self.parts if (name == DECODING) is is_there}
            for is_there in (False, True)
        )
        return {device: Estimate(here), vae_device: Estimate(there)}


@lru_cache(maxsize=8)
def parameters(
    sizes: TransformerSizes, lora_rank: int | None, ffn_lora: FFNLoRA, state: StateSettings = PAPER_STATE
) -> tuple[int, int, int]:
    """Numbers of parameters: of a softmax layer, of a hybrid layer, and of what is beside the layers.

    Counted on models of one and two layers without storage.
    """

    def count(layers: int, hybrid: tuple[int, ...]) -> int:
        with torch.device("meta"):
            model = HybridWanModel(
                **({field.name: vars(sizes)[field.name] for field in fields(sizes)} | {"num_layers": layers}),
                hybrid_layers=hybrid,
                lora_rank=lora_rank,
                ffn_lora=ffn_lora.value,
                state=state.as_plain(),
            )
        return sum(parameter.numel() for parameter in model.parameters())

    one, two, mixed = count(1, ()), count(2, ()), count(2, (0,))
    softmax = two - one
    return softmax, mixed - one, one - softmax


def transformer_parameters(sizes: TransformerSizes, hybrid: HybridSettings) -> int:
    """Number of parameters of a transformer with some hybrid layers."""
    softmax, mixed, outside = parameters(sizes, hybrid.lora_rank, hybrid.ffn_lora, hybrid.state)
    layers = len(hybrid.layers)
    return outside + layers * mixed + (sizes.num_layers - layers) * softmax


def memory_of_layers(
    sizes: TransformerSizes,
    hybrid_layers: int,
    tokens: int,
    dtype: torch.dtype,
    variant: StateSettings = PAPER_STATE,
    averaged_tokens: int = 0,
) -> int:
    """Bytes of the memory of one video: keys and values of softmax layers, states of hybrid ones.

    Args:
        tokens: that softmax layers keep.
        variant: of the states.
        averaged_tokens: of a sink that is a moving average, which is kept in float32 too.
    """
    wide = torch.promote_types(dtype, torch.float32).itemsize
    state = sizes.dim * (sizes.dim // sizes.num_heads) * wide * variant.num_states * variant.value_expansion
    keys_and_values = 2 * sizes.dim * (tokens * dtype.itemsize + averaged_tokens * wide)
    return hybrid_layers * state + (sizes.num_layers - hybrid_layers) * keys_and_values


def tokens_per_frame(sizes: TransformerSizes, latent_size: tuple[int, int]) -> int:
    """Tokens of one latent frame of a height and width."""
    return (latent_size[0] // sizes.patch_size[1]) * (latent_size[1] // sizes.patch_size[2])


@dataclass(frozen=True)
class StoredModel:
    """What a checkpoint says of itself without its tensors being read.

    Attributes:
        layers: the hybrid ones.
        memory: of the softmax layers in training; None if it does not say.
        state: variant of the state.
    """

    layers: tuple[int, ...]
    memory: TrainedMemory | None
    state: StateSettings = PAPER_STATE

    @classmethod
    def at(cls, path: Path) -> "StoredModel | None":
        """What a folder or weight file says; None if only reading all of it would tell.

        Raises:
            CheckpointError: it is damaged, or no checkpoint.
        """
        if not path.is_dir() and not path.is_file():
            raise CheckpointError(f"{path} is neither a file nor a folder: give weights of a supported format")
        if path.is_dir() and not has_config(path):
            return None  # shards alone
        if path.is_dir():
            record = transformer_config(path)
            layers = record.get("hybrid_layers", ())
        elif path.suffix == ".safetensors" or is_zipfile(path):
            weights = {} if path.suffix == ".safetensors" else read_weights(path)
            inner = next((weights[key] for key in (GENERATOR, GENERATOR_EMA, MODEL) if key in weights), weights)
            names = inner if isinstance(inner, Mapping) else ()
            found = read_header(path)[0] if path.suffix == ".safetensors" else [str(name) for name in names]
            record = read_record(path, weights)
            numbers = {hybrid_layer_of(unwrapped_name(name)) for name in found}
            layers = sorted(number for number in numbers if number is not None)
        else:
            return None
        memory = trained_memory_of(record, path)
        state = stated_state(record, {}, path)
        return cls(tuple(layers), None if memory is None else TrainedMemory(**memory), state)


def room_for_generation(
    config: InferenceConfig,
    sizes: TransformerSizes,
    dtype: torch.dtype,
    *,
    batch: int = 1,
    decodes: bool = True,
    processes: int = 1,
) -> Estimate:
    """What generating videos takes at the least.

    Args:
        batch: videos at a time.
        decodes: whether they are decoded, block by block; else all their latents are kept.
        processes: that compute every video together: what each of them needs, one that decodes.

    Raises:
        CheckpointError: the checkpoint is damaged, or was trained with a memory that cannot hold a block.
    """
    folder, stride = Path(config.model_folder), spatial_stride(Path(config.model_folder))
    hybrid = config.hybrid.settings()
    source = Path(config.checkpoint_path or folder)
    stored = StoredModel.at(source)
    layers = hybrid.layers or (tuple(range(sizes.num_layers)) if stored is None else stored.layers)
    hybrid = replace(hybrid, layers=layers, state=hybrid.state if stored is None else stored.state)
    tokens = tokens_per_frame(sizes, (config.height // stride, config.width // stride))
    trained = None if stored is None else stored.memory
    memory = config.memory.fitting(trained, config.frames_per_block, source)
    if hybrid.layers or stored is not None:
        memory.refuse_for_layers(layers, sizes.num_layers)
    window_frames, sink_frames = memory.window_for(config.num_output_frames)
    averaged = 0 if memory.decay_for(config.num_output_frames) is None else sink_frames * tokens
    frames = window_frames if window_frames is not None else config.num_output_frames
    block = config.frames_per_block * tokens
    parts = {
        "weights": transformer_parameters(sizes, hybrid) * dtype.itemsize + text_encoder_bytes(folder, dtype),
        "memory of layers": batch
        * memory_of_layers(sizes, len(layers), frames * tokens, dtype, hybrid.state, averaged)
        // processes,
        "a pass over a block": batch * block * (sizes.dim + sizes.ffn_dim) * dtype.itemsize // processes,
    }
    if not decodes:  # then the latents of the whole video are kept
        latents = config.num_output_frames * sizes.in_dim * (config.height // stride) * (config.width // stride)
        parts["latents"] = 4 * batch * latents
    elif config.speed.tiny_vae is None:
        frames = min(4, 4 * config.num_output_frames - 3)
        whole = batch * decoder_bytes(folder, config.height, config.width, dtype, frames)
        parts[DECODING] = whole // processes if config.speed.fast_vae else whole
    return Estimate(parts)


def text_encoder_bytes(folder: Path, dtype: torch.dtype) -> int:
    """Bytes of the text encoder at the least, if its file holds float32."""
    native = folder / NATIVE_TEXT_FILE
    size = native.stat().st_size if native.is_file() else 0
    for file in (folder / "text_encoder").glob("*.safetensors"):
        with file.open("rb") as stream:
            header = int.from_bytes(stream.read(8), "little")
        size += max(0, file.stat().st_size - 8 - header)
    return size * dtype.itemsize // 4


def decoder_bytes(folder: Path, height: int, width: int, dtype: torch.dtype, frames: int = 4) -> int:
    """Bytes of what goes into and comes out of a decoder's last convolutions for the frames of one latent frame."""
    config = folder / "vae" / "config.json"
    stored = read_config(config).get("base_dim", WAN21_VAE["dim"]) if config.is_file() else WAN21_VAE["dim"]
    channels: int = typed(Count, stored, f"{config}: base_dim")
    return 2 * channels * frames * height * width * dtype.itemsize


def available_bytes(device: torch.device) -> int:
    """Bytes that can still be allocated: on a GPU what is free; else memory and swap, within the container's limit."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return int(torch.cuda.mem_get_info(device)[0]) + cached
    free = psutil.virtual_memory().available + psutil.swap_memory().free
    try:
        limit, used = ((CGROUP / f"memory.{name}").read_text().strip() for name in ("max", "current"))
        statistics = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
    except OSError:
        return free
    if not limit.isdigit():
        return free
    return min(
        free, int(limit) - int(used) + int(statistics.get("inactive_file", 0)) + int(statistics.get("active_file", 0))
    )


def require_room(estimate: Estimate, device: torch.device, what: str, cure: str) -> None:
    """Make sure that a device has room for what is needed at the least.

    Args:
        what: the sizes, for the message.
        cure: which of them to lower.

    Raises:
        InputError: it has not.
    """
    free = available_bytes(device)
    if estimate.total > free:
        parts = ", ".join(f"{name} {size / GIGABYTE:.1f}" for name, size in estimate.parts.items())
        raise InputError(
            f"{what} needs at least {estimate.total / GIGABYTE:.1f} GB ({parts}), {device} has "
            f"{free / GIGABYTE:.1f} GB free: {cure}"
        )


def check_speed(speed: SpeedConfig, device: torch.device, dtype: torch.dtype, dim: int, ffn_dim: int) -> None:
    """Make sure that a device can compute as the switches say.

    Args:
        dim, ffn_dim: widths of the transformer.

    Raises:
        InputError: it cannot; the message names the switch.
    """
    speed = speed.on(device, dtype)
    speed.vae_on(device)
    for switch in ("cuda_graphs", "overlap_decoding"):
        if vars(speed)[switch] and device.type != "cuda":
            raise InputError(f"{switch} needs a GPU: leave it off")
    if speed.fp8:
        require_fp8(device, dim, ffn_dim)
    if speed.kernels:
        require_kernels(device, dtype)
    if device.type == "cuda" and (speed.compile or speed.kernels):
        if not triton_installed():
            raise InputError("compile needs Triton on a GPU: pip install triton, or leave it off")
        capability = torch.cuda.get_device_capability(device)
        if capability < TRITON_CAPABILITY:
            raise InputError(
                f"compile and kernels need a GPU of compute capability {'.'.join(map(str, TRITON_CAPABILITY))} or "
                f"newer, {device} has {'.'.join(map(str, capability))}: give --no_compile --no_kernels"
            )
