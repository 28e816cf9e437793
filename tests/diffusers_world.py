"""A tiny pipeline that is called as diffusers' are."""

import torch
from tiny_models import TINY
from transformers import UMT5EncoderModel

from arl2.model import HybridWanModel
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.text import TOY_TEXT, umt5_config, word_tokenizer
from wan.vae.wan_vae import TOY_VAE, new_vae

SIZES = {"height": 16, "width": 32, "num_frames": 21}
WORDS = ("a", "red", "blue", "shape", "rolls")


def new_pipeline(**settings: object) -> CausalVideoPipeline:
    """A model of three layers that stores the sizes of its videos."""
    torch.manual_seed(0)
    sizes = TINY | {"text_dim": TOY_TEXT["dim"], "in_dim": 16, "out_dim": 16, "text_len": 16}
    transformer = HybridWanModel(**sizes, hybrid_layers=[0], lora_rank=4)
    with torch.no_grad():
        for parameter in transformer.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    parts = transformer, new_vae(TOY_VAE | {"dim": 4}), UMT5EncoderModel(umt5_config(TOY_TEXT))
    for part in parts:
        part.eval().requires_grad_(False)
    options = {"denoising_steps": [1000, 500], **SIZES} | settings
    pipeline = CausalVideoPipeline(*parts, word_tokenizer(WORDS), **options)  # type: ignore[arg-type]
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
