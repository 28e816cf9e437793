"""Tiny models and inputs for tests."""

from dataclasses import dataclass

import torch
from torch import Tensor

from arl2.model import FFNLoRA, HybridSettings, HybridWanModel
from wan.memory import Memory, MemorySpec

TINY = {
    "dim": 24,
    "ffn_dim": 40,
    "num_heads": 2,
    "num_layers": 3,
    "freq_dim": 8,
    "text_dim": 12,
    "text_len": 5,
    "in_dim": 4,
    "out_dim": 4,
}
HEIGHT, WIDTH = 4, 6
TOKENS_PER_FRAME = 6
HYBRID = HybridSettings(layers=(0, 2), lora_rank=3, lora_alpha=6.0, ffn_lora=FFNLoRA.HYBRID)


def tiny_model(hybrid: HybridSettings = HybridSettings(), dtype: torch.dtype = torch.float64) -> HybridWanModel:
    """A model whose every parameter matters: nothing is left at zero or identity."""
    model = HybridWanModel(
        **TINY,
        hybrid_layers=list(hybrid.layers),
        lora_rank=hybrid.lora_rank,
        lora_alpha=hybrid.lora_alpha,
        ffn_lora=hybrid.ffn_lora.value,
        state=hybrid.state.as_plain(),
    )
    model.to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


@dataclass
class Video:
    """Inputs of a whole video of 9 latent frames."""

    clean: Tensor
    noisy: Tensor
    timesteps: Tensor
    text: Tensor


def tiny_video(frames: int = 9, batch: int = 2, dtype: torch.dtype = torch.float64) -> Video:
    """Random latents, one timestep a block of three frames, and text shorter than the model takes."""
    shape = (batch, frames, TINY["in_dim"], HEIGHT, WIDTH)
    timesteps = (1000 * torch.rand(batch, (frames + 2) // 3)).repeat_interleave(3, dim=1)[:, :frames]
    text = torch.randn(batch, 4, TINY["text_dim"], dtype=dtype)
    return Video(torch.randn(shape, dtype=dtype), torch.randn(shape, dtype=dtype), timesteps, text)


def new_memory(
    model: HybridWanModel,
    batch: int = 2,
    window: int | None = None,
    sink: int = 0,
    differentiable: bool = False,
    decay: float | None = None,
) -> Memory:
    """An empty memory that starts small, so that full ones must grow."""
    return model.new_memory(
        MemorySpec(
            batch_size=batch,
            tokens_per_frame=TOKENS_PER_FRAME,
            device=torch.device("cpu"),
            dtype=model.patch_embedding.weight.dtype,
            frames=3,
            window_frames=window,
            sink_frames=sink,
            differentiable=differentiable,
            sink_decay=decay,
        )
    )
