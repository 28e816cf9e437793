"""Videos of the toy world as the transformer sees them: latents, and embeddings of their captions."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import PreTrainedTokenizerFast, UMT5EncoderModel

from arl2.toyworld.world.captions import VOCABULARY, caption_scenes
from arl2.toyworld.world.render import as_pixels, render, render_blocks
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, SceneBatch, sample_scenes
from wan.checkpoints.loading import fingerprint_of
from wan.checkpoints.saving import write_safetensors
from wan.config import WAN_SIZES
from wan.text import TOY_TEXT, TextEncoder, umt5_config, word_tokenizer
from wan.utils.errors import InputError
from wan.utils.settings import require_same_settings
from wan.vae.wan_vae import WanVAE
from wan.vae.whole_clip import encode_clip


def world_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of the world's vocabulary."""
    return word_tokenizer(VOCABULARY)


def toy_text_encoder(seed: int = 0) -> TextEncoder:
    """A small UMT5 with random weights, for `arl2.toyworld.training.train_text`, and the world's tokenizer."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = UMT5EncoderModel(umt5_config(TOY_TEXT)).eval().requires_grad_(False)
    return TextEncoder(model, world_tokenizer(), WAN_SIZES["toy"]["text_len"])


def embed_captions(encoder: TextEncoder, captions: Sequence[str], batch: int = 1024) -> Tensor:
    """Embeddings [N, text_len, text_dim]; equal captions are computed once."""
    distinct = sorted(set(captions))
    rows = {caption: row for row, caption in enumerate(distinct)}
    parts = [encoder.encode(distinct[first : first + batch]) for first in range(0, len(distinct), batch)]
    return torch.cat(parts)[[rows[caption] for caption in captions]]


@torch.no_grad()
def encode_pixels(vae: WanVAE, pixels_BTCHW: Tensor) -> Tensor:
    """Normalised latents [B, F, C, h, w] of whole videos, in one forward."""
    mean, std = vae.statistics()
    latents = encode_clip(vae.model, pixels_BTCHW.transpose(1, 2).to(vae.dtype))[0]
    return ((latents - mean) / std).transpose(1, 2)


@torch.no_grad()
def encode_scenes(vae: WanVAE, scenes: SceneBatch, latents: int) -> Tensor:
    """Draw and encode videos of any length in pieces; normalised latents [B, F, C, h, w] in float32.

    Args:
        vae: VAE on the device of the scenes.
        scenes: B scenes of any world.
        latents: length of the videos in latent frames.
    """
    stream = vae.encode_stream()
    pieces = render_blocks(scenes, latents, FRAMES_PER_BLOCK)
    return torch.cat([stream.encode(as_pixels(frames).to(vae.dtype)).float() for frames in pieces], dim=1)


@dataclass(frozen=True)
class LatentVideos:
    """A training set on one device, or a batch of it.

    Attributes:
        latents_NFCHW: normalised latents, in half precision in a training set and in float32 in a batch.
        text_NTD: embeddings of the captions.
        untold_NTD: of what the captions would be if they named nothing, for guidance.
    """

    latents_NFCHW: Tensor
    text_NTD: Tensor
    untold_NTD: Tensor

    def __len__(self) -> int:
        return self.latents_NFCHW.shape[0]

    def batch(self, generator: torch.Generator, size: int, frames: int | None = None) -> "LatentVideos":
        """Draw random videos, or their first `frames` latent frames."""
        rows = torch.randint(len(self), (size,), generator=generator).to(self.latents_NFCHW.device)
        latents = self.latents_NFCHW[rows, :frames]
        return LatentVideos(latents.float(), self.text_NTD[rows].float(), self.untold_NTD[rows].float())


def encode_world(vae: WanVAE, encoder: TextEncoder, videos: int, first_seed: int = 0, batch: int = 32) -> LatentVideos:
    """Draw, caption and encode videos of the standard length with seeds from `first_seed` on; half name nothing.

    On a GPU the VAE computes in bfloat16, as in its own training: training sets take minutes otherwise.
    """
    latents = []
    captions: list[str] = []
    untold: list[str] = []
    for first in range(first_seed, first_seed + videos, batch):
        seeds = torch.arange(first, min(first + batch, first_seed + videos), device=vae.device)
        scenes = sample_scenes(seeds)
        with torch.autocast(vae.device.type, torch.bfloat16, enabled=vae.device.type == "cuda"):
            latents.append(encode_pixels(vae, as_pixels(render(scenes))).half())
        captions += caption_scenes(scenes)
        untold += caption_scenes(scenes, informative=False)
    text, silent = (embed_captions(encoder, said).to(vae.device).half() for said in (captions, untold))
    return LatentVideos(torch.cat(latents), text, silent)


def models_of(vae: WanVAE, encoder: TextEncoder) -> dict[str, str]:
    """Fingerprints of the models that a training set depends on, in half precision, as the bundle ships them."""
    config = vae.model.config
    statistics = {"mean": torch.tensor(config.latents_mean), "std": torch.tensor(config.latents_std)}
    states = {"vae": vae.model.state_dict() | statistics, "text_encoder": encoder.model.state_dict()}
    return {name: fingerprint_of({key: value.half() for key, value in state.items()}) for name, state in states.items()}


def save_latent_videos(data: LatentVideos, file: Path, made_by: Mapping[str, str]) -> None:
    """Keep a training set.

    Args:
        made_by: see `models_of`.

    Raises:
        InputError: the file cannot be written.
    """
    content = {"latents": data.latents_NFCHW, "text": data.text_NTD, "untold": data.untold_NTD}
    write_safetensors(file, content, made_by)


def require_same_models(file: Path, made_by: Mapping[str, str]) -> None:
    """Make sure that a training set was made by some models.

    Raises:
        InputError: it was made by others, does not say by which, or is damaged.
    """
    try:
        with safe_open(file, framework="pt") as opened:
            before = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise InputError(f"cannot read {file} ({error}): delete it, it is made again") from error
    require_same_settings(before, made_by, f"{file} was made", "delete it, it is made again")


def load_latent_videos(file: Path, device: torch.device, made_by: Mapping[str, str]) -> LatentVideos:
    """Read a training set that `save_latent_videos` kept.

    Raises:
        InputError: see `require_same_models`.
    """
    require_same_models(file, made_by)
    stored = load_file(file, device=str(device))
    return LatentVideos(stored["latents"], stored["text"], stored["untold"])
