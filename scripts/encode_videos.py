"""Make training data from real videos: latents of a given size and length, with text embeddings, in resumable shards.

    python scripts/encode_videos.py --config configs/causal_forcing_dmd_chunkwise.yaml \\
        --data_path clips.tsv --output_folder data/clips [height=480 width=832 num_output_frames=21 fps=16]
    torchrun --nproc_per_node 8 scripts/encode_videos.py …         # every rank fills data/clips/rank-<n>

--data_path is a file of lines path<TAB>prompt, or a folder of videos with captions in .txt of the same name. Of every
video the first 4F - 3 frames are taken at the config's frame rate, their middle cropped to its aspect and resized.
Videos that are too short or cannot be read are skipped with a warning.

A run that is started again makes what is missing. Afterwards the folder holds what one made from nothing would hold:
samples of other captions, of clips with another content, and of clips that the list does not name any more are replaced
or removed. Clips are told by their content, so a clip under another path or with another caption is not encoded again.
Another VAE, text encoder, size, rate or number of processes is refused.
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import argparse
import logging
from contextlib import ExitStack
from pathlib import Path

import torch
from rich.progress import Progress
from torch import Tensor

from arl2.distillation.latent_writer import LatentWriter, SampleInfo, file_stamp
from pipelines.cli import choose_device, end_together, entry_point, own_folder, rank_and_world_size
from pipelines.config import HybridConfig, InferenceConfig
from pipelines.dtypes import choose_dtype
from pipelines.feasibility import Estimate, decoder_bytes, require_room
from pipelines.flags import Parser, as_path
from pipelines.generation.arguments import check_config
from pipelines.media.reader import CaptionedVideo, UnusableVideoError, encode_frames, find_videos, read_clip
from pipelines.prompts.names import shown
from pipelines.provenance import text_fingerprints, vae_fingerprint
from pipelines.settings import load_config
from wan.checkpoints.formats import transformer_config
from wan.text import TextEncoder, load_text_encoder
from wan.utils.errors import InputError
from wan.utils.files import check_writable, content_hash, no_empty_folder_left
from wan.vae.wan_vae import WanVAE, load_vae

log = logging.getLogger(__name__)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = Parser(
        __doc__,
        InferenceConfig,
        reads_config=True,
        config_help="as for inference.py; the transformer is not needed",
        aliases={"--folder": "--output_folder", "--videos": "--data_path"},
    )
    parser.add_argument("--data_path", type=as_path, required=True, metavar="PATH", help="videos: a list or a folder")
    parser.add_argument("--output_folder", type=as_path, required=True, metavar="PATH", help="where the shards go")
    parser.add_device()
    return parser.parse_args()


def read_config(arguments: argparse.Namespace) -> InferenceConfig:
    """The config, checked; weights and layers of the transformer do not matter.

    Raises:
        InputError: a value that cannot work.
    """
    config = load_config(InferenceConfig, arguments.config, arguments.settings, arguments.flags)
    config.checkpoint_path, config.hybrid, config.lora = None, HybridConfig(), []
    check_config(config)
    return config


def identified(videos: list[CaptionedVideo], writer: LatentWriter, quiet: bool) -> dict[str, SampleInfo]:
    """What each video is to become, by its source; videos that cannot be read are left out with a warning.

    A file whose size and times are those of an earlier run is not read again.
    """
    samples = {}
    with Progress(disable=quiet) as progress:
        for video in progress.track(videos, description="hashes"):
            try:
                stamp = file_stamp(video.path)
                content = writer.known_content(video.source, stamp) or content_hash(video.path)
            except (OSError, InputError) as error:
                log.warning("skipped %s: %s", video.source, error)
                continue
            samples[video.source] = SampleInfo(video.source, video.prompt, 0, content=content, stamp=stamp)
    return samples


def encode_all(
    videos: list[CaptionedVideo],
    config: InferenceConfig,
    vae: WanVAE,
    encoder: TextEncoder,
    writer: LatentWriter,
    quiet: bool,
) -> tuple[int, int]:
    """Make the data set that the videos say; returns how many were skipped, and how many latents were not finite."""
    samples = identified(videos, writer, quiet)
    missing = {sample.key: sample for sample in writer.missing(list(samples.values()), prune=True)}
    skipped, failed = len(videos) - len(samples), 0
    with Progress(disable=quiet) as progress:
        left = [one for one in videos if one.source in missing]
        done = len(videos) - len(left)
        for video in progress.track(left, total=len(videos), completed=done, description="videos"):
            sample = missing[video.source]
            latents = None
            if not writer.has_latents(sample):
                try:
                    latents = encode_clip(video, config, vae, sample)
                except UnusableVideoError as error:
                    log.warning("skipped %s: %s", shown(video.source), error)
                    skipped += 1
                    continue
                if not torch.isfinite(latents).all():
                    log.error("%s is not finite: left out; check the VAE, or use --dtype float32", shown(video.source))
                    failed += 1
                    continue
            text = writer.text(video.prompt)
            if text is None:
                text = encoder.encode([video.prompt])[0]
            writer.add(sample.key, latents, video.prompt, 0, text, content=sample.content, stamp=sample.stamp)
    return skipped, failed


def encode_clip(video: CaptionedVideo, config: InferenceConfig, vae: WanVAE, sample: SampleInfo) -> Tensor:
    """Latents of a video, [F, C, h, w] in bfloat16.

    Raises:
        UnusableVideoError: it is too short, cannot be read, or is not what was hashed.
    """
    pictures = read_clip(video.path, config.height, config.width, config.fps)
    latents = encode_frames(vae, pictures, config.num_output_frames)
    if content_hash(video.path) != sample.content:
        raise UnusableVideoError("was changed while it was read: start again when it is complete")
    return latents.to(torch.bfloat16)


@end_together
@entry_point()
@torch.no_grad()
def main() -> int:
    """Parse, check, encode, write. Status 1 if latents of a video were not finite, 2 for bad input."""
    arguments = parse()
    config = read_config(arguments)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    encoding = decoder_bytes(Path(config.model_folder), config.height, config.width, dtype, frames=1)
    pictures = f"encoding pictures of {config.height}×{config.width}"
    require_room(Estimate({"tensors of one picture": encoding}), device, pictures, "lower height and width")
    rank, world_size = rank_and_world_size()
    folder, part = own_folder(arguments.output_folder)
    videos = find_videos(arguments.data_path)[rank::world_size]
    model_folder = Path(config.model_folder)
    sizes = transformer_config(model_folder)
    text_len = {"text_len": sizes["text_len"]} if "text_len" in sizes else {}
    settings = {
        "source": "videos",
        "num_output_frames": config.num_output_frames,
        "height": config.height,
        "width": config.width,
        "fps": config.fps,
        "dtype": str(dtype),
    }
    with ExitStack() as stack:
        stack.enter_context(no_empty_folder_left(folder))
        check_writable(folder)
        writer = stack.enter_context(
            LatentWriter(folder, settings, pending=("vae", "text_encoder", "tokenizer"), part=part)
        )
        vae = load_vae(model_folder, dtype=dtype, device=device)
        encoder = load_text_encoder(model_folder, dtype=dtype, device=device, **text_len)
        stride = vae.spatial_compression
        shape = (config.num_output_frames, vae.latent_channels, config.height // stride, config.width // stride)
        text_shape = (encoder.text_len, int(encoder.model.config.d_model))
        writer.complete({"vae": vae_fingerprint(vae)} | text_fingerprints(encoder), shape, text_shape)
        skipped, failed = encode_all(videos, config, vae, encoder, writer, quiet=rank != 0)
        if videos and not writer.keys:
            raise InputError(f"none of {len(videos)} videos could be used: the warnings above say why")
    log.info(
        "%d samples are in %s (%s); %d videos were skipped", len(writer.keys), folder, writer.counts, skipped + failed
    )
    return 1 if failed else 0


if __name__ == "__main__":
    raise SystemExit(main())
