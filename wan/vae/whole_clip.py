"""The Wan VAE over a whole clip in one forward: for training, where a stream's many small passes are slow.

Equal, values and gradients, to diffusers' pass in chunks. Chunks differ from a plain forward only where time is
resampled: the first frame passes by, and the temporal convolution that upsamples starts anew after it.
"""

from typing import Any

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor


def encode_clip(model: AutoencoderKLWan, pixels_BCTHW: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and log variance of the latents of 1 + 4k frames, each [B, z, F, h, w], not normalised."""
    encoder = model.encoder
    x = encoder.conv_in(pixels_BCTHW)
    for layer in encoder.down_blocks:
        x = _downsampled(layer, x) if hasattr(layer, "resample") else layer(x)
    x = encoder.conv_out(encoder.nonlinearity(encoder.norm_out(encoder.mid_block(x))))
    mean, log_variance = model.quant_conv(x).chunk(2, dim=1)
    return mean, log_variance


def decode_clip(model: AutoencoderKLWan, latents_BCFHW: Tensor) -> Tensor:
    """Pixels of a whole clip, [B, 3, 4F - 3, H, W], from latents that are not normalised; not clamped."""
    decoder = model.decoder
    x = decoder.mid_block(decoder.conv_in(model.post_quant_conv(latents_BCFHW)))
    for block in decoder.up_blocks:
        for resnet in block.resnets:
            x = resnet(x)
        if block.upsamplers is not None:
            x = _upsampled(block.upsamplers[0], x)
    return decoder.conv_out(decoder.nonlinearity(decoder.norm_out(x)))


def _in_space(layer: Any, x_BCTHW: Tensor) -> Tensor:
    """The spatial part of a resampling layer, frame by frame."""
    frames = layer.resample(x_BCTHW.transpose(1, 2).flatten(0, 1))
    return frames.unflatten(0, (x_BCTHW.shape[0], -1)).transpose(1, 2)


def _downsampled(layer: Any, x_BCTHW: Tensor) -> Tensor:
    x = _in_space(layer, x_BCTHW)
    if layer.mode != "downsample3d":
        return x
    first = x[:, :, :1]
    return torch.cat([first, layer.time_conv(x)], dim=2) if x.shape[2] > 1 else first


def _upsampled(layer: Any, x_BCTHW: Tensor) -> Tensor:
    x = x_BCTHW
    if layer.mode == "upsample3d" and x.shape[2] > 1:
        # Twice the channels are two frames each.
        doubled = layer.time_conv(x[:, :, 1:]).unflatten(1, (2, -1)).transpose(1, 2).transpose(2, 3).flatten(2, 3)
        x = torch.cat([x[:, :, :1], doubled], dim=2)
    return _in_space(layer, x)
