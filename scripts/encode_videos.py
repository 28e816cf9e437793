"""Make training data from real videos: latents of a given size and length, with text embeddings, in resumable shards.

    python scripts/encode_videos.py --config configs/causal_forcing_dmd_chunkwise.yaml \\
        --data_path clips.tsv --output_folder data/clips [height=480 width=832 num_output_frames=21 fps=16]
    torchrun --nproc_per_node 8 scripts/encode_videos.py …         # every rank fills data/clips/rank-<n>

--data_path is a file of lines path<TAB>prompt, or a folder of .mp4 with captions in .txt of the same name. Of every
video the first 4F - 3 frames are taken at the config's frame rate, their middle cropped to its aspect and resized.
Videos that are too short or cannot be read are skipped with a warning. A run that is started again makes what is
missing.
"""

import argparse
import logging
from pathlib import Path

import torch
from rich.progress import Progress
from safetensors.torch import load_file
from torch import Tensor

from arl2.distillation.data import LatentWriter, text_file
from pipelines.cli import choose_device, end_together, exit_on_input_error, rank_and_world_size
from pipelines.config import HybridConfig, InferenceConfig
from pipelines.dtypes import choose_dtype
from pipelines.feasibility import Estimate, decoder_bytes, require_room
from pipelines.flags import Parser, as_path
from pipelines.generation.arguments import check_config, check_writable
from pipelines.media.reader import CaptionedVideo, UnusableVideoError, encode_frames, find_videos, read_clip
from pipelines.settings import load_config
from wan.checkpoints.formats import transformer_config
from wan.text import TextEncoder, load_text_encoder
from wan.utils.errors import InputError
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
    config.checkpoint_path, config.hybrid = None, HybridConfig()
    check_config(config, i2v=False)
    return config


def embedding(encoder: TextEncoder, folder: Path, prompt: str) -> Tensor:
    """The embedding of a prompt [T, D]: from the data set if it is there."""
    file = text_file(folder, prompt)
    return load_file(file)["text"] if file.is_file() else encoder.encode([prompt])[0]


def encode_all(
    videos: list[CaptionedVideo],
    config: InferenceConfig,
    vae: WanVAE,
    encoder: TextEncoder,
    writer: LatentWriter,
    folder: Path,
    quiet: bool,
) -> int:
    """Add what is missing; returns how many videos were skipped."""
    skipped = 0
    with Progress(disable=quiet) as progress:
        missing = [video for video in videos if video.source not in writer.keys]
        for video in progress.track(missing, description="videos"):
            try:
                pictures = read_clip(video.path, config.height, config.width, config.fps)
                latents = encode_frames(vae, pictures, config.num_output_frames)
            except UnusableVideoError as error:
                log.warning("skipped %s: %s", video.source, error)
                skipped += 1
                continue
            text = embedding(encoder, folder, video.prompt)
            writer.add(video.source, latents.to(torch.bfloat16), video.prompt, 0, text)
    return skipped


@end_together
@exit_on_input_error
@torch.no_grad()
def main() -> int:
    """Parse, check, encode, write."""
    arguments = parse()
    config = read_config(arguments)
    device = choose_device(arguments.device)
    dtype = choose_dtype(arguments.dtype, device)
    encoding = decoder_bytes(Path(config.model_folder), config.height, config.width, dtype, frames=1)
    pictures = f"encoding pictures of {config.height}×{config.width}"
    require_room(Estimate({"tensors of one picture": encoding}), device, pictures, "lower height and width")
    rank, world_size = rank_and_world_size()
    folder = arguments.output_folder / f"rank-{rank}" if world_size > 1 else arguments.output_folder
    check_writable(folder)
    videos = find_videos(arguments.data_path)[rank::world_size]
    settings = {
        "source": "videos",
        "model_folder": config.model_folder,
        "num_output_frames": config.num_output_frames,
        "height": config.height,
        "width": config.width,
        "fps": config.fps,
        "dtype": str(dtype),
    }
    with LatentWriter(folder, settings) as writer:
        model_folder = Path(config.model_folder)
        sizes = transformer_config(model_folder)
        text_len = {"text_len": sizes["text_len"]} if "text_len" in sizes else {}
        vae = load_vae(model_folder, dtype=dtype, device=device)
        encoder = load_text_encoder(model_folder, dtype=dtype, device=device, **text_len)
        skipped = encode_all(videos, config, vae, encoder, writer, folder, quiet=rank != 0)
        if videos and not writer.keys:
            raise InputError(f"none of {len(videos)} videos could be used: the warnings above say why")
    log.info("%d samples are in %s; %d videos were skipped", len(writer.keys), folder, skipped)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
