"""Sizes of the toy world's models, as data; the transformer's are `wan.config.WAN_SIZES["toy"]`."""

from typing import Any

from wan.text import UMT5_XXL
from wan.vae import WAN21_VAE

FRAMES_PER_BLOCK = 3
TOY_VAE: dict[str, Any] = WAN21_VAE | {"dim": 16, "latent_mean": [0.0] * 16, "latent_std": [1.0] * 16}
"""The statistics are those of an untrained VAE; training measures and replaces them."""
TOY_TEXT: dict[str, Any] = UMT5_XXL | {
    "vocab_size": 256,
    "dim": 64,
    "dim_attn": 64,
    "dim_ffn": 128,
    "num_heads": 4,
    "num_layers": 2,
}
