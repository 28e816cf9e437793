"""Scenes of the toy world: objects, background and wall, and positions at every frame.

A scene is a function of its seed. Motion follows one law, so that it can be predicted. An object keeps its speed and
bounces off the sides of its range, a box inside the frame. Kinds of scenes differ as follows:

- `occlusion`: behind a wall in the middle the object rests, always for the same number of frames, and goes on. No
  pixel of it is visible for `hidden_frames` frames or a few more. A striped wall announces a rest beyond the standard.
- `binding`: the same with two objects of different colours and shapes. One moves in the upper half and one in the
  lower; they cross or move in the same direction.
- `bounce`: no wall, one or two objects.
- `leave`: no wall. The range ends outside the frame on the side that the object moves to. It leaves the frame for
  `hidden_frames` frames or a few more, and returns.

Any number of frames of a scene can be rendered, and a longer video begins with the shorter one. Objects then pass
behind the wall repeatedly. Lengths are in pixels and times in frames throughout.
"""

import math
import zlib
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, Self

import torch
from torch import Tensor

from wan.utils.errors import InputError

HEIGHT, WIDTH = 64, 96
NUM_FRAMES = 81
FRAMES_PER_BLOCK = 3
"""Latent frames per block of the toy world's models."""
MAX_OBJECTS = 2

COLOURS = {
    "red": (226, 32, 40),
    "orange": (250, 128, 8),
    "yellow": (244, 214, 16),
    "green": (32, 176, 56),
    "cyan": (24, 204, 214),
    "blue": (36, 76, 236),
    "purple": (142, 44, 214),
    "pink": (244, 72, 176),
}
# Distinct even when blurred, unlike a disc next to a square or a cross.
SHAPES = ("ring", "square", "triangle", "cross")
# Backgrounds and walls are nearly neutral, so that saturation alone separates objects from them.
BACKGROUNDS = {"cream": (245, 240, 228), "mist": (212, 219, 228), "sage": (198, 208, 198), "night": (40, 44, 58)}
WALLS = {"grey": (134, 136, 140), "dark": (84, 87, 95), "brown": (116, 104, 95), "striped": (134, 136, 140)}
STRIPE_COLOUR = (84, 87, 95)
STRIPE_HEIGHT = 8
STRIPED = tuple(WALLS).index("striped")

KINDS = ("occlusion", "binding", "bounce", "leave")
DEFAULT_MIX = {"occlusion": 0.4, "binding": 0.3, "bounce": 0.15, "leave": 0.15}

AREA = math.pi * 9.0**2
"""Area of every shape in square pixels."""
EXTENT = 11.8
"""Largest horizontal distance of a shape's pixels, soft edge included, from its centre."""
HEIGHT_EXTENT = 13.0
"""Largest vertical distance of a shape's pixels from its centre."""

STANDARD_HIDDEN_FRAMES = 27
"""Default lower bound on hidden frames.

With the times below, block 3 of a standard video (frames 33 to 44) is hidden in every scene.
"""
SPEEDS = (1.5, 1.9)
WALL_WIDTHS = (26, 28, 30)
WALL_CENTRES = (46, 47, 48, 49, 50)
FIRST_CONTACT = (5.0, 10.0)
"""Range of frames at which an object first touches the wall or the frame's edge; before, all of it is visible."""
SIDES = (12.0, WIDTH - 12.0)
"""Positions at which an object's centre turns around in the frame."""
LANES = ((HEIGHT_EXTENT, 19.0), (HEIGHT - 19.0, HEIGHT - HEIGHT_EXTENT))
"""Vertical ranges of two objects, which stay in the upper and the lower half and never meet."""
WHOLE_LANE = (HEIGHT_EXTENT, HEIGHT - HEIGHT_EXTENT)


def splitmix64(values: Tensor) -> Tensor:
    """Hash int64 values to int64, equally on every device, by the finalizer of SplitMix64 (Steele et al., 2014)."""
    mixed = values + -7046029254386353131
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        mixed = (mixed ^ _shift_right(mixed, shift)) * factor
    return mixed ^ _shift_right(mixed, 31)


def _shift_right(values: Tensor, bits: int) -> Tensor:
    """Logical right shift; int64 alone shifts arithmetically."""
    return (values >> bits) & ((1 << (64 - bits)) - 1)


def draw_uniform(seeds: Tensor, name: str, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Draw a number in [low, high) for each seed, float64; draws of different names are independent."""
    bits = splitmix64(splitmix64(seeds) ^ zlib.crc32(name.encode()))
    return low + (high - low) * _shift_right(bits, 32).double() / 2.0**32


def draw_integer(seeds: Tensor, name: str, number: int) -> Tensor:
    """Draw an integer in [0, number) for each seed, int64."""
    return draw_uniform(seeds, name, 0, number).long()


@dataclass(frozen=True)
class SceneBatch(ABC):
    """Batch of B scenes with up to O objects each, of one of the worlds; entries of missing parts are zero.

    Attributes:
        num_frames: default number of frames of a video.
        seed [B]: seed that determines all other fields.
        exists [B, O]: whether the object exists.
        colour, shape [B, O]: indices in COLOURS and SHAPES.
        background [B]: index in BACKGROUNDS.
    """

    num_frames: int
    seed: Tensor
    exists: Tensor
    colour: Tensor
    shape: Tensor
    background: Tensor

    def __len__(self) -> int:
        return self.seed.shape[0]

    def __getitem__(self, rows: slice | Tensor) -> Self:
        """Select scenes by a slice, a mask or indices."""
        return replace(self, **{name: tensor[rows] for name, tensor in self._tensors().items()})

    def to(self, device: torch.device | str) -> Self:
        """Copy the scenes to a device."""
        return replace(self, **{name: tensor.to(device) for name, tensor in self._tensors().items()})

    @property
    def device(self) -> torch.device:
        """Device of the tensors."""
        return self.seed.device

    def frames(self) -> Tensor:
        """Frame indices of a video of the default length, [T]."""
        return torch.arange(self.num_frames, device=self.device)

    @abstractmethod
    def centres(self, frames: Tensor | None = None) -> Tensor:
        """Centres (x, y) of the objects' bounding boxes, [B, O, T, 2], float32; pixel i spans i to i + 1.

        Args:
            frames: frame indices, [T]; None for all frames of a video of the default length.
        """

    @abstractmethod
    def walls(self) -> tuple[Tensor, Tensor, Tensor]:
        """Looks (indices in WALLS, -1 for none), left and right columns of the walls, each [B, number of walls].

        The right column is excluded.
        """

    @property
    @abstractmethod
    def halved(self) -> Tensor:
        """Whether every object keeps to the upper or the lower half of the frame, [B], bool."""

    @property
    @abstractmethod
    def half_of(self) -> tuple[int, ...]:
        """Half of each of the O objects: 0 for the upper one, or the whole frame; 1 for the lower one."""

    def _tensors(self) -> dict[str, Any]:
        return {field.name: getattr(self, field.name) for field in fields(self) if field.name != "num_frames"}


@dataclass(frozen=True)
class Scenes(SceneBatch):
    """Batch of B scenes of the standard world with up to O objects each.

    Attributes:
        kind [B]: index in KINDS.
        wall [B]: index in WALLS, -1 for none.
        wall_left, wall_right [B]: columns of the wall, the right one excluded.
        rest [B]: frames for which an object rests behind the wall.
        start [B, O]: horizontal position at frame 0, outside the range if the object still has to bounce off that side.
        heading [B, O]: 1 to the right, -1 to the left.
        speed [B, O]: horizontal speed in pixels per frame.
        slope [B, O]: vertical pixels (downwards) per horizontal pixel.
        x_range, y_range [B, O, 2]: ranges of the centre.
        y_start [B, O]: vertical position at frame 0.
        contact [B, O]: frame at which the object first touches the wall, or the edge through which it leaves.
    """

    kind: Tensor
    wall: Tensor
    wall_left: Tensor
    wall_right: Tensor
    rest: Tensor
    start: Tensor
    heading: Tensor
    speed: Tensor
    slope: Tensor
    x_range: Tensor
    y_range: Tensor
    y_start: Tensor
    contact: Tensor

    def centres(self, frames: Tensor | None = None) -> Tensor:
        """See `SceneBatch.centres`."""
        times = (self.frames() if frames is None else frames).to(self.seed.device, torch.float64)
        moved = self._moved(times)
        x = _fold(self.start[..., None] + self.heading[..., None] * moved, self.x_range)
        y = _fold(self.y_start[..., None] + self.slope[..., None] * moved, self.y_range)
        return torch.stack((x, y), -1).float()

    def _moved(self, times: Tensor) -> Tensor:
        """Horizontal distance that each object has travelled, [B, O, T]; a round trip holds two rests."""
        wall = ((self.wall_left + self.wall_right) / 2)[:, None]
        rest = self.rest[:, None, None].double()
        to_sides = torch.stack((self.x_range[..., 1] - wall, wall - self.x_range[..., 0]), -1)
        ahead, behind = (2 * to_sides / self.speed[..., None]).unsqueeze(-2).unbind(-1)
        ahead, behind = (torch.where(self.heading[..., None] > 0, *pair) for pair in ((ahead, behind), (behind, ahead)))
        arrival = ((wall - self.start) * self.heading / self.speed)[..., None]
        since = times - arrival
        rounds = (since / (2 * rest + ahead + behind)).floor().clamp(min=0)
        within = since - rounds * (2 * rest + ahead + behind)
        in_motion = (within - rest).clamp(min=0).minimum(ahead)
        in_motion = in_motion + (within - 2 * rest - ahead).clamp(min=0).minimum(behind)
        moving_time = torch.where(since < 0, times, arrival + rounds * (ahead + behind) + in_motion)
        return self.speed[..., None] * torch.where(rest > 0, moving_time, times)

    def walls(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `SceneBatch.walls`; one wall."""
        return self.wall[:, None], self.wall_left[:, None], self.wall_right[:, None]

    @property
    def halved(self) -> Tensor:
        """See `SceneBatch.halved`: where there are two objects."""
        return self.exists[:, 1]

    @property
    def half_of(self) -> tuple[int, ...]:
        """See `SceneBatch.half_of`."""
        return 0, 1


def _fold(positions: Tensor, ranges: Tensor) -> Tensor:
    """Reflect [B, O, T] at both ends of [B, O, 2]."""
    low, high = ranges[..., :1], ranges[..., 1:]
    length = high - low
    return high - (torch.remainder(positions - low, 2 * length) - length).abs()


def sample_scenes(
    seeds: Tensor,
    num_frames: int = NUM_FRAMES,
    mix: Mapping[str, float] = DEFAULT_MIX,
    hidden_frames: int | Tensor = STANDARD_HIDDEN_FRAMES,
) -> Scenes:
    """Sample scenes; each is a function of its seed and the arguments, and does not depend on the batch.

    Args:
        seeds: [B], int64; their device is that of the scenes.
        num_frames: default length of the videos; affects nothing else.
        mix: weights of KINDS, which need not sum to one.
        hidden_frames: lower bound on the frames for which an object is invisible (at most nine more), [B] or one for
            all. Beyond STANDARD_HIDDEN_FRAMES walls are striped. The duration is then not visible and must be learned,
            so train and test with one value. In 81 frames no object hidden for more than 30 comes out completely.

    Raises:
        InputError: seeds have another dtype or shape, there are no frames, or the mix has unknown kinds or no weight.
    """
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise InputError(f"seeds are {seeds.dtype} of shape {tuple(seeds.shape)}: give int64 of shape [B]")
    kind = _draw_kind(seeds, mix)
    hidden = torch.as_tensor(hidden_frames, device=seeds.device).expand(seeds.shape)
    if num_frames < 1 or bool((hidden < 1).any()):
        raise InputError(f"num_frames is {num_frames}, hidden_frames {hidden.min()}: both must be at least 1")
    objects = splitmix64(seeds[:, None] * MAX_OBJECTS + torch.arange(MAX_OBJECTS, device=seeds.device))
    is_kind = {name: kind == index for index, name in enumerate(KINDS)}
    walled = is_kind["occlusion"] | is_kind["binding"]
    two = torch.where(walled, is_kind["binding"], draw_integer(seeds, "objects", 2).bool())
    wall = torch.where(hidden > STANDARD_HIDDEN_FRAMES, STRIPED, draw_integer(seeds, "wall", STRIPED))
    widths, middles = (torch.tensor(values, device=seeds.device) for values in (WALL_WIDTHS, WALL_CENTRES))
    width = widths[draw_integer(seeds, "wall width", len(widths))]
    wall_left = middles[draw_integer(seeds, "wall centre", len(middles))] - width // 2
    scenes = Scenes(
        num_frames=num_frames,
        seed=seeds,
        kind=kind,
        exists=torch.stack((torch.ones_like(two), two), 1),
        colour=_draw_distinct(seeds, "colour", len(COLOURS)),
        shape=_draw_distinct(seeds, "shape", len(SHAPES)),
        background=draw_integer(seeds, "background", len(BACKGROUNDS)),
        wall=torch.where(walled, wall, -1),
        wall_left=torch.where(walled, wall_left, 0),
        wall_right=torch.where(walled, wall_left + width, 0),
        rest=torch.where(walled, hidden - 1, 0),
        heading=2 * draw_integer(objects, "heading", 2) - 1,
        speed=draw_uniform(objects, "speed", *SPEEDS),
        contact=draw_uniform(objects, "contact", *FIRST_CONTACT),
        **_draw_heights(objects, is_kind["bounce"], two),
        **{name: torch.zeros(0) for name in ("start", "x_range")},
    )
    return _place(scenes, is_kind, hidden, objects)


def _draw_kind(seeds: Tensor, mix: Mapping[str, float]) -> Tensor:
    unknown = set(mix) - set(KINDS)
    if unknown or min(mix.values(), default=0) < 0 or sum(mix.values()) <= 0:
        raise InputError(f"mix is {dict(mix)}: give a weight to some of {', '.join(KINDS)}")
    weights = torch.tensor([mix.get(name, 0.0) for name in KINDS], dtype=torch.float64, device=seeds.device)
    bounds = weights.cumsum(0) / weights.sum()
    return (draw_uniform(seeds, "kind")[:, None] >= bounds[:-1]).sum(1)


def _draw_distinct(seeds: Tensor, name: str, number: int) -> Tensor:
    """Draw two different integers in [0, number) for each seed, [B, 2]."""
    first = draw_integer(seeds, name, number)
    return torch.stack((first, (first + 1 + draw_integer(seeds, f"other {name}", number - 1)) % number), 1)


def _draw_heights(objects: Tensor, bounces: Tensor, two: Tensor) -> dict[str, Tensor]:
    """Draw vertical range, position and slope; slopes are small behind walls and in the narrow lanes of two objects."""
    lanes = torch.tensor(LANES, dtype=torch.float64, device=objects.device)
    whole = torch.tensor(WHOLE_LANE, dtype=torch.float64, device=objects.device)
    y_range = torch.where(two[:, None, None], lanes, whole)
    steep = torch.where(bounces, 0.8, 0.25) * torch.where(two, 0.25, 1.0)
    low, high = y_range.unbind(-1)
    return {
        "y_range": y_range,
        "y_start": low + (high - low) * draw_uniform(objects, "height"),
        "slope": steep[:, None].double() * draw_uniform(objects, "slope", -1, 1),
    }


def _place(scenes: Scenes, is_kind: Mapping[str, Tensor], hidden: Tensor, objects: Tensor) -> Scenes:
    """Set horizontal ranges, and starts from which objects touch the wall or edge at their `contact` frame."""
    low, high = (torch.full_like(scenes.speed, side) for side in SIDES)
    right = scenes.heading > 0
    leaves = is_kind["leave"][:, None]
    outside = EXTENT + scenes.speed * (hidden[:, None] + 1) / 2
    low = torch.where(leaves & ~right, -outside, low)
    high = torch.where(leaves & right, WIDTH + outside, high)
    half_wall = (scenes.wall_right - scenes.wall_left)[:, None] / 2
    wall_touch = (scenes.wall_left[:, None] + half_wall) - scenes.heading * (half_wall + EXTENT)
    touch = torch.where(leaves, torch.where(right, WIDTH - EXTENT, EXTENT), wall_touch)
    start = touch - scenes.heading * scenes.speed * scenes.contact
    anywhere = draw_uniform(objects, "start", *SIDES)
    start = torch.where(is_kind["bounce"][:, None], anywhere, start)
    return replace(scenes, start=start, x_range=torch.stack((low, high), -1))
