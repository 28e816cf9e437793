"""Scenes of the long world: up to four objects, two walls, and long waits out of sight.

A scene is a function of its seed, as in the standard world (`arl2.toyworld.world.scenes`), from which colours, shapes,
sizes and speeds are taken. What differs:

- There is a wall at either side of the frame. Behind each waits at most one object of the upper and one of the lower
  half, so the place where an object comes out says which one it is, and only memory says what it looks like.
- In each half one object at a time is in sight. Two objects take turns: each comes out, turns around, and goes back
  behind its own wall. A single object crosses from wall to wall.
- Once a half is empty, the next object comes out after `WAITS` frames, which the look of its wall tells. So the time is
  predictable once a wall has been seen, and passes differ in length from scene to scene.
- Nothing is in sight during the first block, so a sink that keeps this block cannot tell what comes out. Objects
  appear for the first time one after the other; at `introduced` all have been seen and are hidden again.

Any number of frames of a scene can be rendered, and a longer video begins with the shorter one. Lengths are in pixels
and times in frames throughout.
"""

from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from arl2.toyworld.world.scenes import (
    BACKGROUNDS,
    COLOURS,
    EXTENT,
    LANES,
    SHAPES,
    SPEEDS,
    WALLS,
    WIDTH,
    SceneBatch,
    draw_integer,
    draw_uniform,
    splitmix64,
)
from wan.utils.errors import InputError

NUM_LANES, NUM_SIDES = 2, 2
OBJECTS: Final = NUM_LANES * NUM_SIDES
"""Objects per scene at most: one per half of the frame and wall, in this order."""
WAITS = {"grey": 12, "dark": 26, "brown": 42}
"""Frames for which a half stays empty before an object comes out from behind a wall, by the wall's look.

No wall is striped: the shipped VAE, which was trained on the standard world, draws stripes in the colours of objects.
"""
COUNTS = {1: 0.15, 2: 0.25, 3: 0.3, 4: 0.3}
"""Fractions of scenes by number of objects."""
EDGE_WIDTHS = (18, 20, 22)
"""Widths of the walls."""
FIRST_START = (10.0, 34.0)
"""Range of the frame at which the first object of a half starts to move; the first block ends with frame 8."""
REACHES = (36.0, 46.0)
"""Range of the distance at which an object that goes back to its wall turns around."""
MARGIN = 1.0
"""Distance from which a hidden object comes to the edge of its wall."""
HEIGHTS = (-1.8, 1.8)
"""Range of an object's vertical position around the middle of its half."""
SLOPES = (-0.02, 0.02)


@dataclass(frozen=True)
class LongScenes(SceneBatch):
    """Batch of B scenes of the long world; objects are upper left, upper right, lower left, lower right.

    Attributes:
        look [B, 2]: index in WALLS of the left and the right wall.
        edge [B, 2]: column at which the left wall ends and the right one begins.
        first_side [B, 2]: wall from which the first object of each half comes, 0 left, 1 right.
        start [B, 2]: frame at which it starts to move.
        speed [B, 4]: horizontal speed in pixels per frame.
        reach [B, 4]: distance at which an object that goes back turns around.
        height [B, 4]: vertical position in the middle of the frame.
        slope [B, 4]: vertical pixels (downwards) per horizontal pixel.
    """

    look: Tensor
    edge: Tensor
    first_side: Tensor
    start: Tensor
    speed: Tensor
    reach: Tensor
    height: Tensor
    slope: Tensor

    def walls(self) -> tuple[Tensor, Tensor, Tensor]:
        """See `SceneBatch.walls`; the left and the right one."""
        left, right = self.edge.unbind(1)
        return self.look, torch.stack((torch.zeros_like(left), right), 1), torch.stack((left, left * 0 + WIDTH), 1)

    @property
    def halved(self) -> Tensor:
        """See `SceneBatch.halved`: always."""
        return torch.ones_like(self.exists[:, 0])

    @property
    def half_of(self) -> tuple[int, ...]:
        """See `SceneBatch.half_of`."""
        return tuple(slot // NUM_SIDES for slot in range(OBJECTS))

    @property
    def takes_turns(self) -> Tensor:
        """Whether a half has two objects, [B, 2], bool."""
        return _by_lane(self.exists).all(-1)

    @property
    def introduced(self) -> Tensor:
        """Frame at which all objects have been in sight and are hidden again, [B], int64."""
        durations, waits = self._durations(), self._waits()
        first, second = durations.unbind(-1)
        ends = self.start + first + torch.where(self.takes_turns, waits[..., 1] + second, 0.0)
        ends = torch.where(_by_lane(self.exists).any(-1), ends, 0.0)
        return ends.amax(1).ceil().long()

    def centres(self, frames: Tensor | None = None) -> Tensor:
        """See `SceneBatch.centres`."""
        times = (self.frames() if frames is None else frames).to(self.seed.device, torch.float64)
        (first, second), (before_first, before_second) = self._durations().unbind(-1), self._waits().unbind(-1)
        since = times - self.start[..., None]
        period = (first + before_second + second + before_first)[..., None]
        within = torch.where(since < 0, 0.0, torch.remainder(since, period))
        turns = torch.stack(
            (
                torch.minimum(within, first[..., None]),
                torch.minimum((within - (first + before_second)[..., None]).clamp(min=0), second[..., None]),
            ),
            dim=2,
        )  # frames for which each turn has been going on, [B, 2 halves, 2 turns, T]
        x = torch.where(self.takes_turns[..., None, None], self._returning(turns), self._crossing(turns))
        x = x.flatten(1, 2)
        y = self.height[..., None] + self.slope[..., None] * (x - WIDTH / 2)
        return torch.stack((x, y), -1).float()

    def _by_turn(self, by_side: Tensor) -> Tensor:
        """Reorder [B, 2 halves, 2 walls, …] so that the wall of each half's first turn comes first, and back."""
        index = torch.stack((self.first_side, 1 - self.first_side), -1)
        index = index.reshape(*index.shape, *[1] * (by_side.ndim - 3)).expand_as(by_side)
        return by_side.gather(2, index)

    def _homes(self) -> Tensor:
        """Positions at which objects wait behind the left and the right wall, [B, 2]."""
        inwards = torch.tensor([-1.0, 1.0], dtype=torch.float64, device=self.device)
        return self.edge + inwards * (EXTENT + MARGIN)

    def _durations(self) -> Tensor:
        """Frames that each turn of each half takes, [B, 2 halves, 2 turns]."""
        homes = self._homes()
        across = (homes[:, 1] - homes[:, 0])[:, None, None]
        distance = torch.where(self.takes_turns[..., None], 2 * _by_lane(self.reach), across)
        return self._by_turn(distance / _by_lane(self.speed))

    def _waits(self) -> Tensor:
        """Frames for which each half is empty before each turn, [B, 2 halves, 2 turns]."""
        waits = torch.tensor(
            [WAITS[name] for name in tuple(WALLS)[: len(WAITS)]], dtype=torch.float64, device=self.device
        )
        return self._by_turn(waits[self.look][:, None].expand(-1, NUM_LANES, -1))

    def _returning(self, turns: Tensor) -> Tensor:
        """Horizontal positions by wall of objects that go back to their walls, [B, 2 halves, 2 walls, T]."""
        moved = self._by_turn(turns) * _by_lane(self.speed)[..., None]
        away = torch.minimum(moved, 2 * _by_lane(self.reach)[..., None] - moved)
        inwards = torch.tensor([1.0, -1.0], dtype=torch.float64, device=self.device)
        return self._homes()[:, None, :, None] + inwards[:, None] * away

    def _crossing(self, turns: Tensor) -> Tensor:
        """Horizontal positions of objects that are alone in their half, under both walls; [B, 2 halves, 2 walls, T]."""
        homes = self._homes()
        crossed = turns / self._durations()[..., None]
        fraction = (crossed[:, :, 0] - crossed[:, :, 1])[:, :, None]
        here = homes.gather(1, self.first_side)[..., None, None]
        there = homes.gather(1, 1 - self.first_side)[..., None, None]
        return (here + (there - here) * fraction).expand(-1, -1, NUM_SIDES, -1)


def sample_long_scenes(seeds: Tensor, num_frames: int) -> LongScenes:
    """Sample scenes; each is a function of its seed alone and does not depend on the batch.

    Args:
        seeds: [B], int64; their device is that of the scenes.
        num_frames: default length of the videos; affects nothing else.

    Raises:
        InputError: seeds have another dtype or shape, or there are no frames.
    """
    if seeds.dtype != torch.int64 or seeds.ndim != 1:
        raise InputError(f"seeds are {seeds.dtype} of shape {tuple(seeds.shape)}: give int64 of shape [B]")
    if num_frames < 1:
        raise InputError(f"num_frames is {num_frames}: it must be at least 1")
    own = splitmix64(seeds ^ splitmix64(torch.full_like(seeds, OBJECTS)))  # apart from the standard world's draws
    objects = splitmix64(own[:, None] * OBJECTS + torch.arange(OBJECTS, device=seeds.device))
    lanes, sides = objects[:, :NUM_LANES], objects[:, -NUM_SIDES:]
    first_side = draw_integer(lanes, "first side", NUM_SIDES)
    exists = _draw_existing(own, first_side)
    widths = torch.tensor(EDGE_WIDTHS, device=seeds.device)[draw_integer(sides, "width", len(EDGE_WIDTHS))]
    middles = torch.tensor(LANES, dtype=torch.float64, device=seeds.device).mean(1).repeat_interleave(NUM_SIDES)
    return LongScenes(
        num_frames=num_frames,
        seed=seeds,
        exists=exists,
        colour=_draw_distinct(own, "colour", len(COLOURS)),
        shape=draw_integer(objects, "shape", len(SHAPES)),
        background=draw_integer(own, "background", len(BACKGROUNDS)),
        look=draw_integer(sides, "look", len(WAITS)),
        edge=torch.stack((widths[:, 0], WIDTH - widths[:, 1]), 1),
        first_side=first_side,
        start=draw_uniform(lanes, "start", *FIRST_START),
        speed=_one_of_each(draw_uniform(objects, "speed", *SPEEDS), exists),
        reach=draw_uniform(objects, "reach", *REACHES),
        height=middles + draw_uniform(objects, "height", *HEIGHTS),
        slope=draw_uniform(objects, "slope", *SLOPES),
    )


def _by_lane(by_object: Tensor) -> Tensor:
    """[B, 4] to [B, 2 halves, 2 walls]."""
    return by_object.unflatten(1, (NUM_LANES, NUM_SIDES))


def _one_of_each(speed: Tensor, exists: Tensor) -> Tensor:
    """Give both walls of a half the speed of its only object, which comes out of both."""
    speeds, there = _by_lane(speed), _by_lane(exists)
    alone = speeds.gather(2, there.long().argmax(-1, keepdim=True))
    return torch.where(there.all(-1, keepdim=True), speeds, alone).flatten(1)


def _draw_existing(seeds: Tensor, first_side: Tensor) -> Tensor:
    """Draw which objects exist, [B, 4]: their number by COUNTS, divided over the halves as evenly as not."""
    weights = torch.tensor(list(COUNTS.values()), dtype=torch.float64, device=seeds.device)
    number = 1 + (draw_uniform(seeds, "objects")[:, None] >= (weights.cumsum(0) / weights.sum())[:-1]).sum(1)
    upper_first = draw_integer(seeds, "upper first", 2).bool()
    even = draw_integer(seeds, "even", 2).bool()
    larger = torch.where((number == 2) & even, 1, number.clamp(max=NUM_SIDES))
    in_lanes = torch.stack((larger, number - larger), 1)
    in_lanes = torch.where(upper_first[:, None], in_lanes, in_lanes.flip(1))
    side = torch.arange(NUM_SIDES, device=seeds.device)
    is_there = (in_lanes[..., None] == NUM_SIDES) | ((in_lanes[..., None] == 1) & (side == first_side[..., None]))
    return is_there.flatten(1)


def _draw_distinct(seeds: Tensor, name: str, number: int) -> Tensor:
    """Draw different integers in [0, number) for the objects of each seed, [B, 4]."""
    keys = torch.stack([draw_uniform(seeds, f"{name} {value}") for value in range(number)], 1)
    return keys.argsort(dim=1)[:, :OBJECTS]
