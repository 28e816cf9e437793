"""The VAE over whole clips equals the VAE in chunks, values and gradients."""

import pytest
import torch

from wan.vae.wan_vae import WAN21_VAE, new_vae
from wan.vae.whole_clip import decode_clip, encode_clip

TINY = WAN21_VAE | {"dim": 4, "z_dim": 2, "latent_mean": [0.0] * 2, "latent_std": [1.0] * 2}


@pytest.mark.parametrize("frames", [1, 9])
def test_whole_clip_equals_diffusers_chunks(frames: int) -> None:
    model = new_vae(TINY).double()
    pixels = torch.rand(2, 3, frames, 8, 16, dtype=torch.float64) * 2 - 1
    latents = torch.randn(2, 2, (frames + 3) // 4, 1, 2, dtype=torch.float64)
    gradients = []
    for whole in (True, False):
        model.zero_grad()
        if whole:
            mean, log_variance = encode_clip(model, pixels)
            decoded = decode_clip(model, latents).clamp(-1, 1)
        else:
            mean, log_variance = model._encode(pixels).chunk(2, dim=1)
            decoded = model._decode(latents).sample
        (mean.square().sum() + log_variance.sum() + decoded.square().sum()).backward()
        gradients.append(
            (mean.detach(), log_variance.detach(), decoded.detach(), *(p.grad for p in model.parameters()))
        )
        gradients[-1] = tuple(None if g is None else g.clone() for g in gradients[-1])
    for whole_value, chunk_value in zip(*gradients, strict=True):
        if whole_value is not None or chunk_value is not None:
            torch.testing.assert_close(whole_value, chunk_value, rtol=1e-8, atol=1e-10)
