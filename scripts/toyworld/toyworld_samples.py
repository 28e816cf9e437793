"""Draw real samples of the toy world for the docs: an enlarged contact sheet and a video.

python scripts/toyworld/toyworld_samples.py
"""

from arl2 import end_on_signals

if __name__ == "__main__":
    end_on_signals()

import logging
from pathlib import Path

import torch
from torch import Tensor

from arl2.toyworld.world.captions import caption_scenes
from arl2.toyworld.world.render import render
from arl2.toyworld.world.scenes import BACKGROUNDS, NUM_FRAMES, STANDARD_HIDDEN_FRAMES, sample_scenes
from pipelines.cli import entry_point
from pipelines.config import FramesPerSecond
from pipelines.flags import Parser, SceneSeed, as_path
from pipelines.media.contact_sheet import GAP, PAGE, contact_sheet, enlarge
from pipelines.media.video import VideoWriter
from wan.utils.errors import InputError
from wan.utils.files import atomic_path, check_target

log = logging.getLogger(__name__)

# Kind, background, frames hidden and frames shown: one row of the sheet, one tile of the video.
ROWS = (
    ("occlusion", "cream", STANDARD_HIDDEN_FRAMES, NUM_FRAMES),
    ("binding", "night", STANDARD_HIDDEN_FRAMES, NUM_FRAMES),
    ("binding", "sage", STANDARD_HIDDEN_FRAMES, NUM_FRAMES),
    ("leave", "mist", STANDARD_HIDDEN_FRAMES, NUM_FRAMES),
    ("bounce", "night", STANDARD_HIDDEN_FRAMES, NUM_FRAMES),
    ("occlusion", "mist", 100, 2 * NUM_FRAMES - 1),
)
VIDEO_SCALE, VIDEO_COLUMNS = 4, 3
MAX_SEEDS = 4096


def first_video(kind: str, background: str, hidden_frames: int, frames: int, seed: int) -> tuple[Tensor, str]:
    """Video [T, 3, H, W] and caption of the first scene from `seed` on with this kind and background.

    Raises:
        InputError: none among MAX_SEEDS seeds.
    """
    seeds = torch.arange(seed, seed + MAX_SEEDS)
    scenes = sample_scenes(seeds, frames, {kind: 1.0}, hidden_frames)
    scenes = scenes[scenes.background == tuple(BACKGROUNDS).index(background)]
    if not len(scenes):
        raise InputError(f"no scene of kind {kind} before {background} from seed {seed} on: give another --seed")
    return render(scenes[:1])[0], caption_scenes(scenes[:1], informative=True)[0]


def video_wall(videos: list[Tensor]) -> Tensor:
    """All videos side by side, [T, H, W, 3]; the shorter ones must be as long as the longest."""
    tiles = torch.stack([enlarge(video, VIDEO_SCALE) for video in videos])
    tiles = torch.nn.functional.pad(tiles, (0, 0, GAP, 0, GAP, 0), value=PAGE[0])
    rows = tiles.unflatten(0, (-1, VIDEO_COLUMNS)).permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)
    return torch.nn.functional.pad(rows, (0, 0, 0, GAP, 0, GAP), value=PAGE[0])


@entry_point()
def main() -> int:
    """Draw and write."""
    parser = Parser(__doc__, aliases={"--folder": "--output_folder"})
    folder = Path("docs/images")
    parser.add_argument(
        "--output_folder", type=as_path, default=folder, metavar="PATH", help=f"where both go (default {folder})"
    )
    parser.add_value("--seed", SceneSeed, "the default shows all colours and shapes", default=6816)
    parser.add_value("--fps", FramesPerSecond, "of the video", default=16)
    arguments = parser.parse_args()
    sheet_path, video_path = (arguments.output_folder / f"toyworld_samples.{ending}" for ending in ("png", "mp4"))
    for path in (sheet_path, video_path):
        check_target(path)
    samples = [first_video(*row, arguments.seed + index) for index, row in enumerate(ROWS)]
    with atomic_path(sheet_path) as temporary:
        contact_sheet(samples).save(temporary, format="png", optimize=True)
    longest = max(len(video) for video, _ in samples)
    videos = [first_video(*row[:3], longest, arguments.seed + index)[0] for index, row in enumerate(ROWS)]
    frames = video_wall(videos)
    with VideoWriter(video_path, frames.shape[1], frames.shape[2], arguments.fps) as writer:
        writer.write(frames)
    log.info("wrote %s and %s", sheet_path, video_path)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
