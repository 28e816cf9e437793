"""Tiny models for tests on a GPU, whose heads have a size that kernels take, and videos of theirs."""

import torch
from torch import Tensor

from arl2.inference.memory_pool import MemoryPool
from arl2.model import HybridWanModel, keep_gates_in_float32
from arl2.ops.gated_delta import WriteBackend
from arl2.rollout import FewStepSampler, SeededNoise, denoise_block, remember_block
from wan.memory import Memory, MemorySpec
from wan.model import FlowModel, TextKV

GPU = torch.device("cuda")
SAMPLER = FewStepSampler.from_steps([1000, 750, 500, 250], 5.0)
SIZES = {"dim": 128, "ffn_dim": 256, "num_heads": 2, "num_layers": 3, "freq_dim": 16, "text_dim": 12, "text_len": 16}


def gpu_model(dtype: torch.dtype, backend: WriteBackend, layers: tuple[int, ...] = (0, 2)) -> HybridWanModel:
    """A model whose heads have a size that kernels take."""
    torch.manual_seed(0)
    model = HybridWanModel(**SIZES, hybrid_layers=list(layers), lora_rank=4, ffn_lora="none")
    keep_gates_in_float32(model, dtype)
    model.use_write_backend(backend)
    return model.to(GPU).eval().requires_grad_(False)


@torch.no_grad()
def gpu_blocks(model: FlowModel, memory: Memory, text: TextKV, blocks: int, seed: int = 2) -> list[Tensor]:
    """Blocks of a video of 8×12 latents, each generated and remembered."""
    noise, made = SeededNoise([seed], (3, 16, 8, 12), GPU), []
    for index in range(blocks):
        made.append(denoise_block(model, SAMPLER, lambda step, i=index: noise(i, step), text, memory, 3 * index))
        remember_block(model, made[-1], text, memory, 3 * index)
    return made


def gpu_text(model: HybridWanModel, seed: int = 3) -> TextKV:
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        return model.embed_text(torch.randn(1, 16, 12, generator=generator).to(GPU, model.dtype))


def gpu_memory(model: HybridWanModel | MemoryPool, dtype: torch.dtype) -> Memory:
    return model.new_memory(MemorySpec(1, 24, GPU, dtype, 3, 9, 3))
