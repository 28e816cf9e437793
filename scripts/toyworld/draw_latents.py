"""Make training data of the toy world at any length: scenes, drawn and encoded, in resumable shards.

    python scripts/toyworld/draw_latents.py --world long --videos 2560 --latent_frames 84 --seed 0 \\
        --output_folder data/toy_long

Video n of a set is the scene of seed + n, of the worlds of --world in turn; a longer video begins with the shorter one.
A fraction of the captions, --informative, names colours and shapes; the shipped generator was trained with half.
Scenes are drawn where they are encoded. On a GPU the VAE computes in bfloat16, as in its own training, unless --dtype
says otherwise. Videos are encoded in pieces, so memory does not depend on their length.

A run that is started again makes what is missing. Afterwards the folder holds what this command line says, and no more.
Other worlds, lengths, fractions or models are refused. The data are those of scripts/encode_videos.py: train_stage1.py
and train_stage2.py take the folder.
"""

from wan.utils.signals import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
from collections.abc import Iterator, Sequence
from typing import Annotated, Any

import torch
from rich.progress import Progress

from arl2.distillation.latent_writer import LatentWriter, SampleInfo
from arl2.rollout import num_blocks
from arl2.toyworld.world.captions import INFORMATIVE_FRACTION, draw_informative
from arl2.toyworld.world.latents import embed_captions, encode_scenes
from arl2.toyworld.world.scenes import FRAMES_PER_BLOCK, HEIGHT, WIDTH
from arl2.toyworld.world.worlds import World, caption_world, sample_world
from pipelines.cli import choose_device, entry_point
from pipelines.config import Frames
from pipelines.dtypes import choose_dtype
from pipelines.flags import Parser, SceneSeed, as_path
from pipelines.provenance import ROOT, text_fingerprints, vae_fingerprint
from wan.checkpoints.formats import transformer_config
from wan.text import TextEncoder, load_text_encoder
from wan.utils.errors import InputError
from wan.utils.files import check_writable
from wan.utils.ranges import Bounds
from wan.vae.wan_vae import WanVAE, load_vae

log = logging.getLogger(__name__)

BATCH = {"cpu": 4, "cuda": 64}
"""Videos at once by default."""


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(__doc__, aliases={"--videos": "--num_videos", "--folder": "--output_folder"})
    bundle = "the toy world's bundle, of which VAE and text encoder are taken; models/toyworld by default"
    parser.add_argument(
        "--model_folder", type=as_path, default=ROOT / "models" / "toyworld", metavar="PATH", help=bundle
    )
    parser.add_argument("--output_folder", type=as_path, required=True, metavar="PATH", help="where the shards go")
    worlds = "kinds of scenes, in turn if there are several; standard by default"
    parser.add_argument("--world", nargs="+", choices=list(World), default=[World.STANDARD], help=worlds)
    parser.add_value("--num_videos", Annotated[int, Bounds(1, 10**7)], "how many", default=2560)
    parser.add_value("--latent_frames", Frames, "length of the videos in latent frames", default=84)
    parser.add_value("--seed", SceneSeed, "of the first scene; others have its successors", default=0)
    told = "fraction of the captions that name colours and shapes"
    parser.add_value("--informative", Annotated[float, Bounds(0, 1)], told, default=INFORMATIVE_FRACTION)
    parser.add_value("--batch", Annotated[int, Bounds(1, 10**4)], "videos at once, for speed alone")
    parser.add_device()
    return parser.parse_args()


def samples_of(arguments: argparse.Namespace) -> dict[World, list[SampleInfo]]:
    """The videos of each world, which are functions of the command line alone."""
    worlds = list(dict.fromkeys(map(World, arguments.world)))
    samples = {}
    for place, world in enumerate(worlds):
        seeds = arguments.seed + torch.arange(place, arguments.num_videos, len(worlds))
        if not len(seeds):
            raise InputError(f"--num_videos {arguments.num_videos} is less than the {len(worlds)} worlds: give more")
        scenes = sample_world(world, seeds, 1)
        captions = caption_world(scenes, draw_informative(seeds, arguments.informative))
        samples[world] = [
            SampleInfo(f"{world}-{seed}", caption, seed) for seed, caption in zip(seeds.tolist(), captions, strict=True)
        ]
    return samples


def batches_of(
    samples: dict[World, list[SampleInfo]], missing: Sequence[SampleInfo], size: int
) -> Iterator[tuple[World, list[SampleInfo]]]:
    """Missing samples of one world at a time."""
    keys = {sample.key for sample in missing}
    for world, wanted in samples.items():
        left = [sample for sample in wanted if sample.key in keys]
        for first in range(0, len(left), size):
            yield world, left[first : first + size]


def draw_all(
    samples: dict[World, list[SampleInfo]],
    arguments: argparse.Namespace,
    vae: WanVAE,
    encoder: TextEncoder,
    writer: LatentWriter,
    dtype: torch.dtype,
) -> None:
    """Make the data set that the command line says.

    Raises:
        InputError: latents are not finite.
    """
    missing = writer.missing([sample for of_world in samples.values() for sample in of_world], prune=True)
    size = arguments.batch or BATCH[vae.device.type]
    with Progress(disable=not missing) as progress:
        task = progress.add_task("videos", total=len(missing))
        for world, batch in batches_of(samples, missing, size):
            seeds = torch.tensor([sample.seed for sample in batch], device=vae.device)
            with torch.autocast(vae.device.type, dtype, enabled=dtype != torch.float32):
                latents = encode_scenes(vae, sample_world(world, seeds, 1), arguments.latent_frames)
            text = embed_captions(encoder, [sample.prompt for sample in batch])
            for sample, latent, embedding in zip(batch, latents.half().cpu(), text, strict=True):
                writer.add(sample.key, latent, sample.prompt, sample.seed, embedding)
            progress.advance(task, len(batch))


@entry_point()
@torch.no_grad()
def main() -> int:
    """Parse, check, draw, encode, write."""
    arguments = parse()
    num_blocks(arguments.latent_frames, FRAMES_PER_BLOCK)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    samples = samples_of(arguments)
    check_writable(arguments.output_folder)
    settings: dict[str, Any] = {
        "source": "toy world",
        "world": list(samples),
        "latent_frames": arguments.latent_frames,
        "informative": arguments.informative,
        "dtype": str(dtype),
    }
    pending = ("vae", "text_encoder", "tokenizer")
    with LatentWriter(arguments.output_folder, settings, pending=pending) as writer:
        vae = load_vae(arguments.model_folder, device=device)
        text_len = transformer_config(arguments.model_folder)["text_len"]
        encoder = load_text_encoder(arguments.model_folder, text_len=text_len, device=device)
        stride = vae.spatial_compression
        shape = (arguments.latent_frames, vae.latent_channels, HEIGHT // stride, WIDTH // stride)
        text_shape = (text_len, int(encoder.model.config.d_model))
        writer.complete({"vae": vae_fingerprint(vae)} | text_fingerprints(encoder), shape, text_shape)
        draw_all(samples, arguments, vae, encoder, writer, dtype)
    log.info("%d samples are in %s (%s)", len(writer.keys), arguments.output_folder, writer.counts)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
