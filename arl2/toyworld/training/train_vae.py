"""Training of the toy world's VAE: a small AutoencoderKLWan on clips rendered during training."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from diffusers import AutoencoderKLWan
from torch import Tensor
from torch.nn import functional as F

from arl2.evaluation.deviation import psnr
from arl2.toyworld.training.muon import MuonWithAdam
from arl2.toyworld.training.progress import Progress, is_reported, step_seed
from arl2.toyworld.world.render import as_pixels, coverage, render, wall_columns
from arl2.toyworld.world.scenes import NUM_FRAMES, Scenes, sample_scenes
from wan.vae.wan_vae import TOY_VAE, WanVAE, new_vae
from wan.vae.whole_clip import decode_clip, encode_clip

OUTER_LAYERS = ("encoder.conv_in", "decoder.conv_out", "quant_conv", "post_quant_conv", "encoder.conv_out")
"""Name prefixes of the layers at the ends, whose inputs or outputs are not features; Adam trains them."""
BATCHES_PER_DRAW = 4


@dataclass(frozen=True)
class VAETraining:
    """Settings of VAE training.

    Attributes:
        steps: optimizer steps.
        clip_frames: lengths of clips, each 1 + 4k, used in turn. Whole videos must be among them. Trained on 17 frames
            alone, the model keeps still parts from the first latent, and loses them after 17 frames. Short clips show
            more scenes.
        frames_per_step, batch: approximate frames of all clips of a step, and upper bound on its clips.
        muon_lr, adam_lr: peak learning rates of matrices and of other parameters; both decay to zero along a cosine.
        object_weight: weight of an object's pixels in the error; other pixels have 1. Objects are 4 % of a frame.
        near_weight, near: weight of pixels within `near` pixels of an object. Without it the model prefers objects
            that are too large, since an error outside them costs a tenth of one inside.
        squared_weight: weight of the squared error relative to the absolute one.
        kl_weight: final weight of the divergence from a standard normal; rises from a thirtieth over half of the steps.
        seed: seed of scenes, clips and noise. Training draws seeds from 0 upwards, evaluation negative ones.
    """

    steps: int = 2800
    clip_frames: tuple[int, ...] = (17, NUM_FRAMES)
    frames_per_step: int = 272
    batch: int = 64
    muon_lr: float = 0.02
    adam_lr: float = 2e-3
    object_weight: float = 10.0
    near_weight: float = 10.0
    near: int = 3
    squared_weight: float = 2.0
    kl_weight: float = 3e-5
    seed: int = 0


FIRST = VAETraining()
SHARPENING = VAETraining(steps=900, muon_lr=0.006, adam_lr=6e-4, object_weight=30.0, seed=1)
"""Settings of a second training after `FIRST`: the remaining error is at the edges of the small objects."""


def object_mask(scenes: Scenes, frames: Tensor) -> Tensor:
    """Fraction of every pixel that shows an object, [B, T, H, W], 0 to 1."""
    return coverage(scenes, frames).sum(1).clamp(max=1) * ~wall_columns(scenes)[:, None, None]


def draw_clips(settings: VAETraining, device: torch.device, first_draw: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
    """Iterate without end over batches of clips [B, 3, T, H, W] in [-1, 1] and object masks [B, 1, T, H, W].

    Several batches are drawn together, with one length and one random first frame, which costs hardly more than one.
    Draws are independent; `first_draw` is the index of the first.
    """
    most = settings.batch * BATCHES_PER_DRAW
    for draw in count(first_draw):
        length = settings.clip_frames[draw % len(settings.clip_frames)]
        batch = max(1, min(settings.batch, settings.frames_per_step // length))
        seeds = draw * most + torch.arange(batch * BATCHES_PER_DRAW, device=device)
        generator = torch.Generator().manual_seed(step_seed(settings.seed, draw))
        begin = int(torch.randint(NUM_FRAMES - length + 1, (), generator=generator))
        frames, scenes = torch.arange(begin, begin + length, device=device), sample_scenes(seeds)
        pixels, mask = as_pixels(render(scenes, frames)).transpose(1, 2), object_mask(scenes, frames)[:, None]
        yield from zip(pixels.split(batch), mask.split(batch), strict=True)


def error_weight(mask_B1THW: Tensor, settings: VAETraining) -> Tensor:
    """Weight of every pixel in the error, from the object masks."""
    reach = settings.near
    near = F.max_pool2d(mask_B1THW.flatten(0, 2)[:, None].float(), 2 * reach + 1, 1, reach)
    near = near.view_as(mask_B1THW)
    return 1 + (settings.near_weight - 1) * near + (settings.object_weight - settings.near_weight) * mask_B1THW


def vae_loss(
    model: AutoencoderKLWan, pixels: Tensor, mask: Tensor, settings: VAETraining, kl_weight: float
) -> tuple[Tensor, Tensor]:
    """Loss (weighted reconstruction error plus divergence), and the unweighted squared error."""
    mean, log_variance = encode_clip(model, pixels)
    log_variance = log_variance.clamp(-30, 20)
    decoded = decode_clip(model, mean + torch.exp(0.5 * log_variance) * torch.randn_like(mean)).float()
    error, weight = decoded - pixels, error_weight(mask, settings)
    reconstruction = ((error.abs() + settings.squared_weight * error.square()) * weight).mean() / weight.mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).float().mean()
    return reconstruction + kl_weight * divergence, error.detach().square().mean()


def train_vae(
    settings: VAETraining,
    device: torch.device,
    report: Callable[[int, float, float], None],
    normalising_videos: int = 64,
    progress: Progress = Progress(),
    start: AutoencoderKLWan | None = None,
) -> WanVAE:
    """Train a VAE from scratch or from a trained model.

    Args:
        settings: see `VAETraining`.
        device: arithmetic is bfloat16 on a GPU and float32 on a CPU.
        report: called with step, loss and PSNR in dB, every hundredth step.
        normalising_videos: number of whole videos for the statistics of the latents.
        progress: storage from which a killed run resumes.
        start: model to train further, in place; None for a new one.

    Returns:
        the VAE with latents normalised per channel, float32.
    """
    torch.manual_seed(settings.seed)
    model = (new_vae(TOY_VAE) if start is None else start).to(device).train()
    optimizer = MuonWithAdam(model, settings.steps, settings.muon_lr, settings.adam_lr, OUTER_LAYERS)
    done = progress.resume(model, optimizer)
    assert done % BATCHES_PER_DRAW == 0, "a run is kept between draws"
    clips = draw_clips(settings, device, done // BATCHES_PER_DRAW)
    for step, (pixels, mask) in zip(range(done, settings.steps), clips, strict=False):
        torch.manual_seed(step_seed(settings.seed, step))
        kl_weight = settings.kl_weight * 30 ** (min(1.0, 2 * step / settings.steps) - 1)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss, squared = vae_loss(model, pixels, mask, settings, kl_weight)
        loss.backward()
        optimizer.step(step)
        if is_reported(step, settings.steps):
            report(step + 1, loss.item(), psnr(squared.item()))
        progress.save(step + 1, settings.steps, model, optimizer)
    return normalise_latents(WanVAE(model), device, normalising_videos)


@torch.no_grad()
def normalise_latents(vae: WanVAE, device: torch.device, videos: int) -> WanVAE:
    """Measure mean and standard deviation of every latent channel, and store them in the VAE's config."""
    scenes = sample_scenes(torch.arange(-2 * videos, -videos, device=device))
    pixels = as_pixels(render(scenes)).transpose(1, 2)
    mean = torch.cat([encode_clip(vae.model, part)[0].float() for part in pixels.split(8)])
    channels = mean.transpose(0, 1).flatten(1)
    vae.model.register_to_config(
        latents_mean=channels.mean(1).tolist(),
        latents_std=channels.std(1).tolist(),
    )
    return vae
