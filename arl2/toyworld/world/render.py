"""Rendering of scenes: soft-edged shapes over a flat background, behind a wall; batched, on CPU or GPU."""

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from arl2.toyworld.world.scenes import (
    AREA,
    BACKGROUNDS,
    COLOURS,
    HEIGHT,
    MAX_OBJECTS,
    SHAPES,
    STRIPE_COLOUR,
    STRIPE_HEIGHT,
    STRIPED,
    WALLS,
    WIDTH,
    SceneBatch,
)

RING_HOLE = 0.5
"""Inner radius of a ring over its outer radius."""
TRIANGLE_BASE = 21.6
CROSS_SIZE = 22.5
STRIDE = 4
"""Frames per latent frame after the first."""
CHUNK_FRAMES = {"cpu": 16, "cuda": 32 * 1024}
"""Frames per batch of rendering, of MAX_OBJECTS objects each: what fits the cache of a CPU, and what fills a GPU."""


def _inside(distance: Tensor, limit: float) -> Tensor:
    """Fraction of a pixel within `limit`, with an edge one pixel wide."""
    return (limit + 0.5 - distance).clamp(0, 1)


def _ring(x: Tensor, y: Tensor) -> Tensor:
    outer = math.sqrt(AREA / math.pi / (1 - RING_HOLE**2))
    distance = (x.square() + y.square()).sqrt()
    return _inside(distance, outer) - _inside(distance, RING_HOLE * outer)


def _square(x: Tensor, y: Tensor) -> Tensor:
    half = math.sqrt(AREA) / 2
    return _inside(x.abs(), half) * _inside(y.abs(), half)


def _triangle(x: Tensor, y: Tensor) -> Tensor:
    half_base, height = TRIANGLE_BASE / 2, 2 * AREA / TRIANGLE_BASE
    length = math.hypot(half_base, height)
    beyond_side = x.abs() * (height / length) - (y + height / 2) * (half_base / length)
    return _inside(beyond_side, 0) * _inside(y, height / 2)


def _cross(x: Tensor, y: Tensor) -> Tensor:
    half = CROSS_SIZE / 2
    half_arm = (CROSS_SIZE - math.sqrt(CROSS_SIZE**2 - AREA)) / 2
    x, y = x.abs(), y.abs()
    x_arm, y_arm = _inside(x, half_arm), _inside(y, half_arm)
    return _inside(x, half) * y_arm + x_arm * _inside(y, half) - x_arm * y_arm


_DRAW = {"ring": _ring, "square": _square, "triangle": _triangle, "cross": _cross}


def shape_coverage(shape: str, x: Tensor, y: Tensor) -> Tensor:
    """Fraction of the pixel at (x, y) from a shape's centre that it covers, 0 to 1; x and y broadcast."""
    return _DRAW[shape](x, y)


def coverage(scenes: SceneBatch, frames: Tensor | None = None) -> Tensor:
    """Fraction of every pixel that each object would cover without a wall, [B, O, T, H, W], float32, 0 to 1."""
    centres = scenes.centres(frames)
    x = torch.arange(WIDTH, device=scenes.device) + 0.5
    y = torch.arange(HEIGHT, device=scenes.device) + 0.5
    drawn = centres.new_zeros(*centres.shape[:3], HEIGHT, WIDTH)
    for index, shape in enumerate(SHAPES):
        rows = (scenes.exists & (scenes.shape == index)).nonzero(as_tuple=True)
        centre = centres[rows][..., None, None]
        drawn[rows] = shape_coverage(shape, x - centre[:, :, 0], y[:, None] - centre[:, :, 1])
    return drawn


def wall_columns(scenes: SceneBatch) -> Tensor:
    """Mask of the columns that walls cover, [B, W], bool."""
    return _columns_by_wall(scenes).any(1)


def _columns_by_wall(scenes: SceneBatch) -> Tensor:
    """Mask of the columns of each wall, [B, number of walls, W], bool."""
    x = torch.arange(WIDTH, device=scenes.device)
    _, left, right = scenes.walls()
    return (x >= left[..., None]) & (x < right[..., None])


def _chunks(scenes: SceneBatch, frames: Tensor) -> Iterator[tuple[slice, slice]]:
    """Iterate over ranges of scenes and frames with at most CHUNK_FRAMES frames in total."""
    limit = CHUNK_FRAMES["cuda" if scenes.device.type == "cuda" else "cpu"] * MAX_OBJECTS // scenes.exists.shape[1]
    frame_step = min(len(frames), limit)
    scene_step = max(1, limit // frame_step)
    for first in range(0, len(scenes), scene_step):
        for begin in range(0, len(frames), frame_step):
            yield slice(first, first + scene_step), slice(begin, begin + frame_step)


def render(scenes: SceneBatch, frames: Tensor | None = None) -> Tensor:
    """Render videos, uint8 [B, T, 3, H, W], on the scenes' device.

    Args:
        scenes: scenes to render.
        frames: frame indices, [T]; None for all frames of a video of the default length.
    """
    frames = scenes.frames() if frames is None else frames.to(scenes.device)
    video = torch.empty(len(scenes), len(frames), 3, HEIGHT, WIDTH, dtype=torch.uint8, device=scenes.device)
    for rows, columns in _chunks(scenes, frames):
        video[rows, columns] = _draw(scenes[rows], frames[columns])
    return video


def as_pixels(video: Tensor) -> Tensor:
    """Convert bytes to the models' pixels: float32 in [-1, 1]."""
    return video.float() / 127.5 - 1


def visible_fraction(scenes: SceneBatch, frames: Tensor | None = None) -> Tensor:
    """Visible fraction of each object, [B, O, T], 0 to 1; exactly 0 if no pixel of it is visible."""
    frames = scenes.frames() if frames is None else frames.to(scenes.device)
    visible = torch.empty(*scenes.exists.shape, len(frames), device=scenes.device)
    for rows, columns in _chunks(scenes, frames):
        seen = coverage(scenes[rows], frames[columns]).sum(-2) * ~wall_columns(scenes[rows])[:, None, None]
        visible[rows, :, columns] = (seen.sum(-1) / AREA).clamp(max=1)
    return visible


def hidden_spans(hidden: Tensor) -> Tensor:
    """First and last frame of each run of hidden frames, [B, O, P, 2] for up to P runs; -1 for missing runs.

    Args:
        hidden: [B, O, T], bool, for example `visible_fraction(scenes) == 0`.
    """
    edge = torch.zeros_like(hidden[..., :1])
    begins = hidden & ~torch.cat((edge, hidden[..., :-1]), -1)
    ends = hidden & ~torch.cat((hidden[..., 1:], edge), -1)
    spans = torch.full((*hidden.shape[:-1], int(begins.sum(-1).max()), 2), -1, device=hidden.device)
    for side, marks in enumerate((begins, ends)):
        scene, thing, frame = marks.nonzero(as_tuple=True)
        spans[scene, thing, marks.cumsum(-1)[marks] - 1, side] = frame
    return spans


def _draw(scenes: SceneBatch, frames: Tensor) -> Tensor:
    colours, backgrounds, walls = (
        torch.tensor(list(table.values()), dtype=torch.float32, device=scenes.device)
        for table in (COLOURS, BACKGROUNDS, WALLS)
    )
    background = backgrounds[scenes.background]
    contrast = (colours[scenes.colour] - background[:, None])[:, :, None, :, None, None]
    image = background[:, None, :, None, None]
    for index, covered in enumerate(coverage(scenes, frames).unbind(1)):
        image = image + covered[:, :, None] * contrast[:, index]
    stripe = torch.arange(HEIGHT, device=scenes.device) // STRIPE_HEIGHT % 2 == 1
    stripe_colour = torch.tensor(STRIPE_COLOUR, dtype=torch.float32, device=scenes.device)
    for look, columns in zip(scenes.walls()[0].unbind(1), _columns_by_wall(scenes).unbind(1), strict=True):
        striped = (look == STRIPED)[:, None] & stripe
        wall = torch.where(striped[:, None], stripe_colour[:, None], walls[look][..., None])
        image = torch.where(columns[:, None, None, None], wall[:, None, ..., None], image)
    return image.round().byte()


def frames_of(first_latent: int, latents: int, device: torch.device | str = "cpu") -> Tensor:
    """Indices of the frames of some latent frames: one of a video's first, four of every other; [T].

    Args:
        first_latent: index of the first latent frame.
        latents: number of latent frames.
    """
    begin, end = (max(0, 1 + STRIDE * (latent - 1)) for latent in (first_latent, first_latent + latents))
    return torch.arange(begin, end, device=device)


def render_blocks(scenes: SceneBatch, latents: int, latents_per_block: int) -> Iterator[Tensor]:
    """Render videos piece by piece, uint8 [B, T, 3, H, W]: of a video of any length only one piece is in memory.

    Args:
        scenes: scenes to render.
        latents: length of the videos in latent frames, of which the first has one frame and every other four.
        latents_per_block: latent frames per piece; the last piece may be shorter.
    """
    for first in range(0, latents, latents_per_block):
        yield render(scenes, frames_of(first, min(latents_per_block, latents - first), scenes.device))
