"""Tiny pipelines of several kinds of layers, for tests of sessions."""

from collections.abc import Callable

import torch
from diffusers_world import new_pipeline
from tiny_models import TINY

from arl2.model import HybridWanModel
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.text import TOY_TEXT
from wan.vae.wan_vae import TOY_VAE, WanVAE, new_vae

Pipelines = Callable[..., CausalVideoPipeline]


HEIGHT, WIDTH = 4, 8
SMALL_VAE = TOY_VAE | {"dim": 4, "dim_mult": [1, 2], "temperal_downsample": [True], "num_res_blocks": 1}
"""Two frames per latent and two pixels per side: most of the time of a small video is its decoding."""


def num_frames(latent_frames: int) -> int:
    """Frames of so many latents."""
    return 2 * latent_frames - 1


def build(
    layers: tuple[int, ...] = (), fast: bool = False, local_frames: int = 0, **settings: object
) -> CausalVideoPipeline:
    """A pipeline whose given layers are hybrid; equal arguments give equal weights."""
    pipeline = new_pipeline(**settings)
    torch.manual_seed(1)
    pipeline.register_modules(vae=new_vae(SMALL_VAE).eval().requires_grad_(False))
    pipeline.wan_vae = WanVAE(pipeline.vae)
    pipeline.register_to_config(height=HEIGHT, width=WIDTH)
    sizes = TINY | {"text_dim": TOY_TEXT["dim"], "in_dim": 16, "out_dim": 16, "text_len": 16}
    hybrid = {"hybrid_layers": list(layers), "lora_rank": 4} if layers else {}
    state = {"state": {"local_frames": local_frames}} if local_frames else {}
    transformer = HybridWanModel(**sizes, **hybrid, **state)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    pipeline.transformer = transformer.eval().requires_grad_(False)
    pipeline.wan_vae.fast = fast
    return pipeline
