"""Training data of the toy world at any length: scenes, drawn and encoded, in resumable shards."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from rich.progress import Progress

from arl2.distillation.latent_writer import LatentWriter, SampleInfo
from arl2.rollout import num_blocks
from arl2.toyworld.world.captions import INFORMATIVE_FRACTION, draw_informative
from arl2.toyworld.world.latents import embed_captions, encode_scenes
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, HEIGHT, WIDTH
from arl2.toyworld.world.worlds import World, caption_world, sample_world
from pipelines.config import Frames
from pipelines.flags import SceneSeed
from pipelines.provenance import text_fingerprints, vae_fingerprint
from wan.checkpoints.formats import transformer_config
from wan.text import TextEncoder, load_text_encoder
from wan.utils.errors import InputError
from wan.utils.files import check_writable
from wan.utils.ranges import Bounds
from wan.vae.wan_vae import WanVAE, load_vae

log = logging.getLogger(__name__)

BATCH = {"cpu": 4, "cuda": 64}
"""Videos at once by default."""


@dataclass(frozen=True)
class DrawSettings:
    """A set of videos, which is a function of these settings alone, but for the batch.

    Attributes:
        world: kinds of scenes, in turn if there are several.
        num_videos: how many.
        latent_frames: length of each in latent frames.
        seed: of the first scene; others have its successors.
        informative: fraction of the captions that name colours and shapes.
        batch: videos at once, for speed alone; None for a number that suits the device.
    """

    world: tuple[World, ...] = (World.STANDARD,)
    num_videos: Annotated[int, Bounds(1, 10**7)] = 2560
    latent_frames: Frames = 84
    seed: SceneSeed = 0
    informative: Annotated[float, Bounds(0, 1)] = INFORMATIVE_FRACTION
    batch: Annotated[int, Bounds(1, 10**4)] | None = None

    def samples(self) -> dict[World, list[SampleInfo]]:
        """The videos of each world.

        Raises:
            InputError: there are fewer videos than worlds.
        """
        worlds = list(dict.fromkeys(map(World, self.world)))
        samples = {}
        for place, world in enumerate(worlds):
            seeds = self.seed + torch.arange(place, self.num_videos, len(worlds))
            if not len(seeds):
                raise InputError(f"--num_videos {self.num_videos} is less than the {len(worlds)} worlds: give more")
            scenes = sample_world(world, seeds, 1)
            captions = caption_world(scenes, draw_informative(seeds, self.informative))
            samples[world] = [
                SampleInfo(f"{world}-{seed}", caption, seed)
                for seed, caption in zip(seeds.tolist(), captions, strict=True)
            ]
        return samples


def draw_latents(
    settings: DrawSettings, model_folder: Path, folder: Path, device: torch.device, dtype: torch.dtype
) -> None:
    """Make what a folder lacks of a set of videos; afterwards it holds these, and no more.

    Args:
        settings: what to draw.
        model_folder: the toy world's bundle, of which VAE and text encoder are taken.
        folder: where the shards go.
        device, dtype: of the VAE's computation. Scenes are drawn there, too.

    Raises:
        InputError: the length is no number of blocks, the folder has other data, or latents are not finite.
    """
    num_blocks(settings.latent_frames, FRAMES_PER_BLOCK)
    samples = settings.samples()
    check_writable(folder)
    page: dict[str, Any] = {
        "source": "toy world",
        "world": list(samples),
        "latent_frames": settings.latent_frames,
        "informative": settings.informative,
        "dtype": str(dtype),
    }
    with LatentWriter(folder, page, pending=("vae", "text_encoder", "tokenizer")) as writer:
        vae = load_vae(model_folder, device=device)
        text_len = transformer_config(model_folder)["text_len"]
        encoder = load_text_encoder(model_folder, text_len=text_len, device=device)
        stride = vae.spatial_compression
        shape = (settings.latent_frames, vae.latent_channels, HEIGHT // stride, WIDTH // stride)
        text_shape = (text_len, int(encoder.model.config.d_model))
        writer.complete({"vae": vae_fingerprint(vae)} | text_fingerprints(encoder), shape, text_shape)
        _draw_all(samples, settings, vae, encoder, writer, dtype)
    log.info("%d samples are in %s (%s)", len(writer.keys), folder, writer.counts)


@torch.no_grad()
def _draw_all(
    samples: dict[World, list[SampleInfo]],
    settings: DrawSettings,
    vae: WanVAE,
    encoder: TextEncoder,
    writer: LatentWriter,
    dtype: torch.dtype,
) -> None:
    missing = writer.missing([sample for of_world in samples.values() for sample in of_world], prune=True)
    size = settings.batch or BATCH[vae.device.type]
    with Progress(disable=not missing) as progress:
        total = sum(map(len, samples.values()))
        task = progress.add_task("videos", total=total, completed=total - len(missing))
        for world, batch in _batches_of(samples, missing, size):
            seeds = torch.tensor([sample.seed for sample in batch], device=vae.device)
            with torch.autocast(vae.device.type, dtype, enabled=dtype != torch.float32):
                latents = encode_scenes(vae, sample_world(world, seeds, 1), settings.latent_frames)
            text = embed_captions(encoder, [sample.prompt for sample in batch])
            for sample, latent, embedding in zip(batch, latents.half().cpu(), text, strict=True):
                writer.add(sample.key, latent, sample.prompt, sample.seed, embedding)
            progress.advance(task, len(batch))


def _batches_of(
    samples: dict[World, list[SampleInfo]], missing: Sequence[SampleInfo], size: int
) -> Iterator[tuple[World, list[SampleInfo]]]:
    """Missing samples of one world at a time."""
    keys = {sample.key for sample in missing}
    for world, wanted in samples.items():
        left = [sample for sample in wanted if sample.key in keys]
        for first in range(0, len(left), size):
            yield world, left[first : first + size]
