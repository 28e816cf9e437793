"""Draw real samples of the toy world for the docs: an enlarged contact sheet and a video.

python scripts/toyworld_samples.py
"""

import argparse
import logging
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from arl2.toyworld.captions import caption_scenes
from arl2.toyworld.render import render
from arl2.toyworld.world import BACKGROUNDS, HEIGHT, NUM_FRAMES, STANDARD_HIDDEN_FRAMES, WIDTH, sample_scenes
from pipelines.cli import exit_on_input_error
from pipelines.video import VideoWriter
from wan.checkpoint import atomic_path
from wan.errors import InputError

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
COLUMNS = 9
SCALE = 2
VIDEO_SCALE, VIDEO_COLUMNS = 4, 3
GAP, LINE = 8, 30
PAGE, INK, FAINT = (255, 255, 255), (36, 41, 47), (110, 119, 129)
MOST_SEEDS = 4096


def first_video(kind: str, background: str, hidden_frames: int, frames: int, seed: int) -> tuple[Tensor, str]:
    """Video [T, 3, H, W] and caption of the first scene from `seed` on with this kind and background.

    Raises:
        InputError: none among MOST_SEEDS seeds.
    """
    seeds = torch.arange(seed, seed + MOST_SEEDS)
    scenes = sample_scenes(seeds, frames, {kind: 1.0}, hidden_frames)
    scenes = scenes[scenes.background == tuple(BACKGROUNDS).index(background)]
    if not len(scenes):
        raise InputError(f"no scene of kind {kind} before {background} from seed {seed} on: give another --seed")
    return render(scenes[:1])[0], caption_scenes(scenes[:1], informative=True)[0]


def enlarge(frames_TCHW: Tensor, scale: int) -> Tensor:
    """Repeat every pixel `scale` times each way: [T, 3, H, W] to [T, H, W, 3]."""
    return frames_TCHW.repeat_interleave(scale, 2).repeat_interleave(scale, 3).permute(0, 2, 3, 1).contiguous()


def contact_sheet(samples: list[tuple[Tensor, str]]) -> Image.Image:
    """One row of frames for each video, its caption above and the frames' numbers below."""
    width, height = WIDTH * SCALE, HEIGHT * SCALE
    row_height = LINE + height + LINE
    sheet = Image.new("RGB", (COLUMNS * (width + GAP) + GAP, len(samples) * row_height + GAP), PAGE)
    page, font, small = ImageDraw.Draw(sheet), ImageFont.load_default(18), ImageFont.load_default(13)
    for row, (video, caption) in enumerate(samples):
        top = row * row_height
        page.text((GAP, top + LINE / 2 + 2), caption, INK, font, anchor="lm")
        numbers = torch.linspace(0, len(video) - 1, COLUMNS).round().long()
        for column, (number, frame) in enumerate(zip(numbers.tolist(), enlarge(video[numbers], SCALE), strict=True)):
            left = GAP + column * (width + GAP)
            sheet.paste(Image.fromarray(frame.numpy()), (left, top + LINE))
            page.text((left, top + LINE + height + 4), f"frame {number}", FAINT, small)
    return sheet


def video_wall(videos: list[Tensor]) -> Tensor:
    """All videos side by side, [T, H, W, 3]; the shorter ones must be as long as the longest."""
    tiles = torch.stack([enlarge(video, VIDEO_SCALE) for video in videos])
    tiles = torch.nn.functional.pad(tiles, (0, 0, GAP, 0, GAP, 0), value=PAGE[0])
    rows = tiles.unflatten(0, (-1, VIDEO_COLUMNS)).permute(2, 0, 3, 1, 4, 5).flatten(3, 4).flatten(1, 2)
    return torch.nn.functional.pad(rows, (0, 0, 0, GAP, 0, GAP), value=PAGE[0])


@exit_on_input_error
def main() -> int:
    """Draw and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=Path("docs/images"))
    parser.add_argument("--seed", type=int, default=6816, help="the default shows all colours and shapes")
    parser.add_argument("--fps", type=int, default=16)
    arguments = parser.parse_args()
    samples = [first_video(*row, arguments.seed + index) for index, row in enumerate(ROWS)]
    sheet_path, video_path = (arguments.folder / f"toyworld_samples.{ending}" for ending in ("png", "mp4"))
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
