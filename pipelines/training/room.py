"""What a training step takes at the least, estimated before models load; see `pipelines.feasibility`."""

import os
from dataclasses import replace
from math import prod

import torch

from arl2.distillation.objective import ForwardMode
from arl2.distillation.stage2 import Trainable
from arl2.model import HybridSettings
from pipelines.cli import choose_device, rank_and_world_size
from pipelines.dtypes import choose_dtype
from pipelines.feasibility import (
    Estimate,
    TransformerSizes,
    require_room,
    tokens_per_frame,
    transformer_parameters,
)
from pipelines.training.config import GatesConfig, Stage1Config, Stage2Config, TrainingConfig
from wan.utils.errors import InputError

COPIES = 4
"""Of what trains, in float32: values, gradients, and the two moments of AdamW."""


def room_for_training(
    config: TrainingConfig, sizes: TransformerSizes, sample: tuple[int, ...], dtype: torch.dtype, ranks: int
) -> Estimate:
    """What a step takes on one rank at the least.

    Args:
        sample: shape of the latents of a video, [F, C, h, w].
        dtype: of the frozen weights.
        ranks: over which sharded weights are divided.
    """
    hybrid = config.hybrid(sizes.num_layers)
    frozen = transformer_parameters(sizes, HybridSettings())
    trained = 0 if isinstance(config, GatesConfig) else transformer_parameters(sizes, hybrid) - frozen
    if isinstance(config, Stage2Config) and config.trainable is Trainable.ALL:
        frozen, trained = 0, trained + frozen
    copies = COPIES + (config.ema_decay is not None)
    frames, *latent_size = sample[0], *sample[2:]
    in_graph = frames
    if config.blocks_per_graph is not None:
        in_graph = min(frames, config.blocks_per_graph * config.frames_per_block)
    per_frame = tokens_per_frame(sizes, (latent_size[0], latent_size[1]))
    tokens, block = in_graph * per_frame, config.frames_per_block * per_frame
    return Estimate(
        {
            "weights": frozen * dtype.itemsize // (ranks if config.shard else 1),
            "what trains": 4 * copies * trained,
            "videos and noise": 4 * config.batch * prod(sample) * (1 + config.levels.per_block),
            # Every block has a noisy pass, and all but the last a clean one.
            "activations": config.batch
            * (2 * tokens - block)
            * dtype.itemsize
            * _kept_per_token(config, sizes, hybrid),
        }
    )


def _kept_per_token(config: TrainingConfig, sizes: TransformerSizes, hybrid: HybridSettings) -> int:
    """Numbers that a graph keeps for every token of a noisy pass and of the clean pass that remembers it.

    Stage 1 keeps what goes into a layer and comes out of it: of one layer in parallel mode, of all in sequential mode.
    Stage 2 keeps what goes into every block, and without checkpointing also what its feed-forward takes and makes.
    Offloaded checkpoints leave one block's.
    """
    if isinstance(config, Stage1Config):
        return 2 * sizes.dim * (1 if config.forward_mode is ForwardMode.PARALLEL else len(hybrid.layers))
    first = min(hybrid.layers, default=0)  # before it nothing has a gradient
    if isinstance(config, Stage2Config) and config.trainable is Trainable.ALL:
        first = 0
    if not (isinstance(config, Stage2Config) and config.checkpointing):
        return (sizes.num_layers - first) * (2 * sizes.dim + sizes.ffn_dim)
    return sizes.dim * (1 if config.offload_checkpoints else sizes.num_layers - first)


def check_room(config: TrainingConfig, sizes: TransformerSizes, sample: tuple[int, ...]) -> None:
    """Make sure that a step fits the device, and what it offloads the host.

    Raises:
        InputError: it does not; the message names sizes, estimate and cure. Or offloading would do nothing.
    """
    device = choose_device(config.device)
    dtype = choose_dtype(config.dtype, device)
    ranks, on_this_host = rank_and_world_size()[1], int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    estimate = room_for_training(config, sizes, sample, dtype, ranks)
    if device.type == "cpu":  # ranks of one machine share its memory
        estimate = Estimate({name: size * on_this_host for name, size in estimate.parts.items()})
    what = f"a step on batch {config.batch} of {sample[0]} latent frames of {sample[2]}×{sample[3]}"
    require_room(estimate, device, what, _cures(config, device, ranks))
    if isinstance(config, Stage2Config) and config.offload_checkpoints:
        if device.type == "cpu":
            raise InputError("offload_checkpoints moves data from a GPU to the host, on a CPU it does nothing: drop it")
        kept = room_for_training(replace(config, offload_checkpoints=False), sizes, sample, dtype, ranks)
        size = (kept.total - estimate.total) * on_this_host
        host = Estimate({"inputs of the blocks": size})
        cure = "lower batch and raise accumulation, or set offload_checkpoints=false"
        require_room(host, torch.device("cpu"), f"keeping checkpoints of {what} on the host", cure)


def _cures(config: TrainingConfig, device: torch.device, ranks: int) -> str:
    """What takes less memory in a stage, of what is not set yet."""
    cures = ["lower batch and raise accumulation"]
    if isinstance(config, Stage2Config):
        cures += ["lower lora_rank"] if config.lora else []
        cures += [] if config.checkpointing else ["set checkpointing=true"]
        if config.checkpointing and not config.offload_checkpoints and device.type == "cuda":
            cures.append("set offload_checkpoints=true")
    if isinstance(config, Stage1Config) and config.forward_mode is not ForwardMode.PARALLEL:
        cures.append("set forward_mode=parallel")
    if config.forward_mode is ForwardMode.SEQUENTIAL and not isinstance(config, GatesConfig):
        cures.append("lower blocks_per_graph" if config.blocks_per_graph else "set blocks_per_graph")
    if not config.shard:
        cures.append("set shard=true" if ranks > 1 else "start on several GPUs with shard=true")
    return ", or ".join(cures)
