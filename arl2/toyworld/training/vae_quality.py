"""Quality of the toy world's VAE: error over the frame and on objects, and accuracy of reading its videos."""

import torch
from torch import Tensor

from arl2.evaluation.deviation import psnr
from arl2.toyworld.training.train_vae import object_mask
from arl2.toyworld.world.reader import judge, read_video
from arl2.toyworld.world.render import as_pixels, render
from arl2.toyworld.world.scenes import sample_scenes
from wan.vae.wan_vae import WanVAE
from wan.vae.whole_clip import decode_clip, encode_clip

FIRST_SEED = -1_000_000
"""First seed of evaluation; training uses seeds from 0."""


def weighted_psnr(squared_error: Tensor, weight: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pixels in [-1, 1], from their weighted mean squared error."""
    return psnr(float((squared_error * weight).sum() / (weight.sum() * squared_error.shape[1])))


@torch.no_grad()
def vae_quality(vae: WanVAE, device: torch.device, videos: int = 256, batch: int = 16) -> dict[str, float]:
    """Measure the VAE on whole videos of 81 frames that are not in training.

    Returns:
        `psnr` and `psnr_objects` in dB. `colour`, `shape` and `both`: fraction of objects, before and after they were
        hidden, that are read correctly through the VAE. `both_truth`: the same for the videos themselves.
    """
    errors, weights = [], []
    right: dict[str, list[Tensor]] = {"colour": [], "shape": [], "both": [], "both_truth": []}
    for first in range(0, videos, batch):
        scenes = sample_scenes(torch.arange(FIRST_SEED + first, FIRST_SEED + first + batch, device=device))
        truth = as_pixels(render(scenes))
        pixels = truth.transpose(1, 2)
        decoded = decode_clip(vae.model, encode_clip(vae.model, pixels)[0]).clamp(-1, 1)
        errors.append((decoded - pixels).square().cpu())
        weights.append(object_mask(scenes, scenes.frames())[:, None].cpu())
        verdict = judge(read_video(decoded.transpose(1, 2), scenes), scenes)
        for name in ("colour", "shape", "both"):
            right[name].append(verdict[name][verdict["count"]].float().cpu())
        verdict = judge(read_video(truth, scenes), scenes)
        right["both_truth"].append(verdict["both"][verdict["count"]].float().cpu())
    error, weight = torch.cat(errors), torch.cat(weights)
    figures = {"psnr": weighted_psnr(error, torch.ones_like(weight)), "psnr_objects": weighted_psnr(error, weight)}
    return figures | {name: float(torch.cat(values).mean()) for name, values in right.items()}
