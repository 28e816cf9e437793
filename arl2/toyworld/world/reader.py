"""Reader of colour, shape and position of objects from pixels, by segmentation; the measure of the memory probe.

Objects are saturated; background and walls are nearly neutral. Chroma is a pixel's colour without its grey part. It
tells whether the pixel shows an object, and of which colour. A blurred edge, mixed with the background, keeps its hue.

In each frame the reader finds the most saturated region, counts the pixels around it by hue, and compares them with the
four shapes. It sums the result over a range of frames, with most weight on frames that show a whole object. It knows
the palette and the shapes, but not the answer.

A video is divided into phases by the disappearances of an object: phase 0 before the first, phase 1 after it.
`read_video` takes their times from the scene, `read_generated` from the pixels.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from arl2.toyworld.world.render import shape_coverage, visible_fraction
from arl2.toyworld.world.scenes import AREA, COLOURS, HEIGHT, SHAPES, WIDTH, Scenes
from wan.utils.errors import InputError

CHANCE = {"colour": 1 / len(COLOURS), "shape": 1 / len(SHAPES), "both": 1 / len(COLOURS) / len(SHAPES), "side": 1 / 2}
"""Chance levels of the measures."""
PLACE_TOLERANCE = 6.0
"""Tolerance of an object's position in pixels, averaged over a phase."""
WHOLE = 0.99
"""Visible fraction from which an object counts as whole."""
PRESENT_AREA, ABSENT_AREA = 0.4, 0.15
"""Fractions of an object's area: above the first an object is present, below the second it is absent."""
MIN_GAP = 8
"""Minimum length in frames of a disappearance; shorter gaps are flicker."""

_WINDOW = 31
_SHIFTS_X, _SHIFTS_Y = range(-4, 5), range(-6, 7)
_CHUNK_FRAMES = {"cpu": 128, "cuda": 4096}
# As fractions of a colour's own chroma: below the first is background, above the second is object. Their midpoint
# counts one half, so that blur does not change areas.
_CHROMA_BOUNDS = (0.2, 0.8)
# A rotation of RGB whose third axis is grey.
_CHROMA_AXES = ((2 / math.sqrt(6), -1 / math.sqrt(6), -1 / math.sqrt(6)), (0.0, 1 / math.sqrt(2), -1 / math.sqrt(2)))


@dataclass(frozen=True)
class Detections:
    """Detections in each object's region in each frame.

    Attributes:
        votes [B, O, T, colours]: area by colour, as a fraction of an object's area.
        scores [B, O, T, shapes]: similarity to each shape, 0 to 1.
        centre [B, O, T, 2]: (x, y) of the best shape in pixels.
    """

    votes: Tensor
    scores: Tensor
    centre: Tensor

    @property
    def area(self) -> Tensor:
        """Largest area in one colour, as a fraction of an object's area, [B, O, T]; noise spreads over all colours."""
        return self.votes.amax(-1)


@dataclass(frozen=True)
class Reading:
    """Content of a video by object and phase.

    Attributes:
        colour, shape [B, O, S]: indices in COLOURS and SHAPES, -1 where no object is visible.
        phase [B, O, T]: 0 before the first disappearance, k after the k-th, -1 while hidden.
        detections: detections in each frame.
    """

    colour: Tensor
    shape: Tensor
    phase: Tensor
    detections: Detections

    def same_object(self, phase: int = 1) -> dict[str, Tensor]:
        """Compare colour, shape and both after a disappearance with those of phase 0, [B, O], bool.

        They are False where either phase shows no object, so an object that never comes out again counts as forgotten.
        """
        if phase >= self.colour.shape[-1]:
            missing = torch.zeros_like(self.colour[..., 0], dtype=torch.bool)
            return {"colour": missing, "shape": missing, "both": missing}
        seen = (self.colour[..., 0] >= 0) & (self.colour[..., phase] >= 0)
        colour = seen & (self.colour[..., 0] == self.colour[..., phase])
        shape = seen & (self.shape[..., 0] == self.shape[..., phase])
        return {"colour": colour, "shape": shape, "both": colour & shape}


def read_video(pixels: Tensor, scenes: Scenes) -> Reading:
    """Read videos of known scenes: real, decoded, or continued from their first frames.

    Only two facts of the scenes are used: the times at which objects are hidden, and that of two objects one moves in
    the upper half and one in the lower.

    Args:
        pixels: [B, T, 3, H, W] in [-1, 1], from frame 0 on.
        scenes: scenes that the videos show or should show.

    Raises:
        InputError: the pixels have another size.
    """
    times = torch.arange(pixels.shape[1], device=scenes.device)
    hidden = (visible_fraction(scenes, times) == 0).to(pixels.device)
    two = scenes.exists[:, 1].to(pixels.device)
    return _read(detect(pixels, two), phases(hidden & scenes.exists[..., None].to(pixels.device)))


def read_generated(pixels: Tensor, two_objects: Tensor) -> Reading:
    """Read videos of which only the prompt is known; disappearances are gaps of MIN_GAP frames without an object.

    Args:
        pixels: [B, T, 3, H, W] in [-1, 1].
        two_objects: [B], bool, whether the prompt has two objects; otherwise it has one.

    Raises:
        InputError: the pixels have another size.
    """
    detections = detect(pixels, two_objects)
    absent = (detections.area < ABSENT_AREA).float().flatten(0, 1)[:, None]
    # Erosion and dilation remove gaps that are too short, and restore the others.
    kept = -F.max_pool1d(F.pad(-absent, (MIN_GAP - 1, 0), value=-1.0), MIN_GAP, 1)
    gaps = F.max_pool1d(F.pad(kept, (0, MIN_GAP - 1)), MIN_GAP, 1)
    return _read(detections, phases(gaps[:, 0].unflatten(0, detections.area.shape[:2]) > 0))


def _read(detections: Detections, phase: Tensor) -> Reading:
    count = max(int(phase.max()) + 1, 1)
    in_phase = phase[:, :, None] == torch.arange(count, device=phase.device)[:, None]
    area = detections.area[:, :, None] * in_phase
    weight = frame_weights(area)
    present = area.amax(-1) >= PRESENT_AREA
    votes, scores = (
        torch.einsum("bost,botk->bosk", weight, seen).argmax(-1) for seen in (detections.votes, detections.scores)
    )
    return Reading(torch.where(present, votes, -1), torch.where(present, scores, -1), phase, detections)


def frame_weights(area: Tensor) -> Tensor:
    """Weights of frames by the area of an object that they show: a quarter of one resembles another shape."""
    return area.clamp(max=1) ** 4


def phases(hidden: Tensor) -> Tensor:
    """Phase of each frame, [B, O, T]: number of disappearances so far, -1 in hidden frames.

    Frames hidden from the start are not a disappearance: phase 0 follows them.
    """
    begins = hidden[..., 1:] & ~hidden[..., :-1]
    begins = F.pad(begins.long(), (1, 0))
    return torch.where(hidden, -1, begins.cumsum(-1))


def judge(reading: Reading, scenes: Scenes) -> dict[str, Tensor]:
    """Compare a reading with the true scenes; all results are [B, O, S], bool.

    Returns:
        `colour`, `shape`, `both`: whether they are correct. `place`: whether the object is within PLACE_TOLERANCE of
        its true path, averaged over the frames that show the whole object. `side`: whether it is on the true side of
        the wall, or of the middle, in most of these frames. `count`: whether the entry counts; it does not if the
        object does not exist or is never whole in the phase.
    """
    device = reading.colour.device
    scenes = scenes.to(device)
    times = torch.arange(reading.phase.shape[-1], device=device)
    count = reading.colour.shape[-1]
    whole = visible_fraction(scenes, times) >= WHOLE
    weight = (whole[:, :, None] & (reading.phase[:, :, None] == torch.arange(count, device=device)[:, None])).float()
    frames = weight.sum(-1)
    truth, read = scenes.centres(times), reading.detections.centre
    distance = (read - truth).norm(dim=-1)
    middle = torch.where(scenes.wall < 0, WIDTH / 2, (scenes.wall_left + scenes.wall_right) / 2)[:, None, None]
    right_side = ((read[..., 0] > middle) == (truth[..., 0] > middle)).float()
    seen = reading.colour >= 0
    colour = reading.colour == scenes.colour[..., None]
    shape = reading.shape == scenes.shape[..., None]
    return {
        "count": (frames > 0) & scenes.exists[..., None],
        "colour": colour,
        "shape": shape,
        "both": colour & shape,
        "place": seen & (torch.einsum("bost,bot->bos", weight, distance) <= PLACE_TOLERANCE * frames),
        "side": seen & (torch.einsum("bost,bot->bos", weight, right_side) > frames / 2),
    }


def detect(pixels: Tensor, two_objects: Tensor) -> Detections:
    """Detect in each frame one object anywhere, or one in the upper and one in the lower half.

    Args:
        pixels: [B, T, 3, H, W] in [-1, 1].
        two_objects: [B], bool.

    Raises:
        InputError: the pixels have another size.
    """
    if pixels.ndim != 5 or pixels.shape[2:] != (3, HEIGHT, WIDTH) or len(two_objects) != len(pixels):
        raise InputError(f"pixels are {tuple(pixels.shape)}: give [B, T, 3, {HEIGHT}, {WIDTH}], B as in the scenes")
    axes, palette, templates = _tables(pixels.device)
    y = torch.arange(HEIGHT, device=pixels.device)
    halves = torch.stack((y < HEIGHT // 2, y >= HEIGHT // 2))
    whole = torch.stack((torch.ones_like(halves[0]), torch.zeros_like(halves[0])))
    rows = torch.where(two_objects.to(pixels.device)[:, None, None], halves, whole)
    rows = rows[:, None].expand(-1, pixels.shape[1], -1, -1).flatten(0, 1)
    step = _CHUNK_FRAMES["cuda" if pixels.is_cuda else "cpu"]
    parts = [
        _detect_frames(frames.float(), regions, axes, palette, templates)
        for frames, regions in zip(pixels.flatten(0, 1).split(step), rows.split(step), strict=True)
    ]
    joined = (torch.cat(part).unflatten(0, pixels.shape[:2]).transpose(1, 2) for part in zip(*parts, strict=True))
    return Detections(*joined)


def _detect_frames(
    frames: Tensor, rows: Tensor, axes: Tensor, palette: Tensor, templates: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Votes [N, O, colours], scores [N, O, shapes] and centres [N, O, 2] in frames [N, 3, H, W], rows [N, O, H]."""
    chroma = torch.einsum("kc,nchw->nkhw", axes, frames)
    lengths = palette.norm(dim=1)
    saturation = _object_fraction(torch.hypot(chroma[:, 0], chroma[:, 1]) / lengths.mean())
    found = saturation[:, None] * rows[..., None]
    x, y = _locate(found)
    windows, windows_rows = _cut(chroma, rows, x, y)
    likeness, colour = torch.einsum("nkohw,ck->nohwc", windows, palette / lengths[:, None]).max(-1)
    mask = _object_fraction(likeness / lengths[colour]) * windows_rows[..., None]
    mask, colour = mask.flatten(2), colour.flatten(2)
    votes = torch.zeros(*mask.shape[:2], len(palette), device=mask.device).scatter_add_(2, colour, mask) / AREA
    fits = torch.einsum("nop,sdp->nosd", mask, templates) / mask.norm(dim=-1).clamp(min=1e-6)[..., None, None]
    scores, shift = fits.max(-1)
    shift = shift.gather(-1, scores.argmax(-1, keepdim=True))[..., 0]
    x = x + 0.5 + shift % len(_SHIFTS_X) + _SHIFTS_X[0]
    y = y + 0.5 + shift // len(_SHIFTS_X) + _SHIFTS_Y[0]
    return votes, scores, torch.stack((x, y), -1)


def _object_fraction(chroma: Tensor) -> Tensor:
    low, high = _CHROMA_BOUNDS
    return ((chroma - low) / (high - low)).clamp(0, 1)


def _locate(found: Tensor) -> tuple[Tensor, Tensor]:
    """Column and row of the centre of the densest window, [N, O], from saturations [N, O, H, W]."""
    x, y = (torch.arange(size, device=found.device, dtype=torch.float32) for size in (WIDTH, HEIGHT))
    reach = _WINDOW // 2
    column_sums = found.sum(-2)
    near = F.avg_pool1d(F.pad(column_sums, (reach, reach)), _WINDOW, 1).argmax(-1)
    for _ in range(2):
        columns = column_sums * ((x - near[..., None]).abs() <= reach)
        near = ((columns * x).sum(-1) / columns.sum(-1).clamp(min=1e-6)).round()
    row_sums = (found * ((x - near[..., None]).abs() <= reach)[..., None, :]).sum(-1)
    level = F.avg_pool1d(F.pad(row_sums, (reach, reach)), _WINDOW, 1).argmax(-1)
    for _ in range(2):
        lines = row_sums * ((y - level[..., None]).abs() <= reach)
        level = ((lines * y).sum(-1) / lines.sum(-1).clamp(min=1e-6)).round()
    return near.long(), level.long()


def _cut(chroma: Tensor, rows: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """Crop windows around (x, y): chroma [N, 2, O, P, P], and a mask of the rows in the region, [N, O, P]."""
    reach = _WINDOW // 2
    offsets = torch.arange(_WINDOW, device=chroma.device)
    padded = F.pad(chroma, (reach, reach, reach, reach))
    lines, columns = y[..., None] + offsets, x[..., None] + offsets
    frame = torch.arange(len(chroma), device=chroma.device)[:, None, None, None]
    windows = padded.permute(0, 2, 3, 1)[frame, lines[..., None], columns[..., None, :]]
    region = F.pad(rows, (reach, reach)).gather(2, lines)
    return windows.movedim(-1, 1), region


def _tables(device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Chroma axes [2, 3], chroma of the palette [colours, 2] and unit templates [shapes, shifts, P * P]."""
    axes = torch.tensor(_CHROMA_AXES, device=device)
    palette = torch.tensor(list(COLOURS.values()), device=device).float() / 127.5 @ axes.T
    offsets = torch.arange(_WINDOW, device=device) - _WINDOW // 2
    shift_y, shift_x = torch.meshgrid(
        torch.tensor(_SHIFTS_Y, device=device), torch.tensor(_SHIFTS_X, device=device), indexing="ij"
    )
    x = offsets - shift_x.reshape(-1, 1, 1)
    y = offsets[:, None] - shift_y.reshape(-1, 1, 1)
    templates = torch.stack([shape_coverage(shape, x.float(), y.float()).flatten(1) for shape in SHAPES])
    return axes, palette, F.normalize(templates, dim=-1)
