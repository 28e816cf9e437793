"""Passes of objects in videos of any length: when each is in sight, and what was read of it meanwhile.

A pass is a run of frames in which an object is in sight, between two times out of sight; pass 0 is its first
appearance. What is read is summed up per pass as the frames come, so a long video is never in memory.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from arl2.toyworld.world.reader import PRESENT_AREA, WHOLE, Detections, frame_weights, phases
from arl2.toyworld.world.render import STRIDE, visible_fraction
from arl2.toyworld.world.scenes import COLOURS, SHAPES, SceneBatch

FRAMES_AT_ONCE = 256


class Answer(NamedTuple):
    """Answer to one question: what came out, when an object came into sight again.

    Attributes:
        thing: index of the object in its scene.
        number: the how-manieth pass it is, after the first appearance; at least 1.
        frame: its first frame.
        age: latent frames since the object was last in sight.
        load: number of objects that had been in sight and were hidden just before, this one included.
        colour, shape: whether they were right, 0 or 1.
    """

    thing: int
    number: int
    frame: int
    age: int
    load: int
    colour: int
    shape: int


@dataclass(frozen=True)
class Passes:
    """Passes of B scenes of O objects in T frames, P at most per object; on the CPU.

    Attributes:
        number [B, O, T]: pass of each frame, -1 out of sight and for objects that do not exist.
        first, last [B, O, P]: first and last frame of each pass, -1 for those that there are not.
        whole [B, O, P]: whether the whole object is in sight at some time of the pass, bool.
        age, load [B, O, P]: see `Answer`; 0 for the first pass and for those that there are not.
    """

    number: Tensor
    first: Tensor
    last: Tensor
    whole: Tensor
    age: Tensor
    load: Tensor

    def asked(self, given_frames: Tensor) -> Tensor:
        """Passes that are questions, [B, O, P], bool: begun after the given frames, and wholly in sight once.

        Args:
            given_frames: frames of each video that are given, [B].
        """
        after = self.first >= given_frames[:, None, None]
        return after & self.whole & (torch.arange(self.first.shape[-1]) > 0)


def find_passes(scenes: SceneBatch, num_frames: int) -> Passes:
    """Find all passes in videos of some length.

    Args:
        scenes: B scenes of O objects.
        num_frames: length of the videos.
    """
    hidden, whole = [], []
    for begin in range(0, num_frames, FRAMES_AT_ONCE):
        frames = torch.arange(begin, min(begin + FRAMES_AT_ONCE, num_frames))
        visible = visible_fraction(scenes, frames).cpu()
        hidden.append(visible == 0)
        whole.append(visible >= WHOLE)
    exists = scenes.exists.cpu()[..., None]
    number = torch.where(exists, phases(torch.cat(hidden, -1) & exists), -1)
    return passes_of(number, torch.cat(whole, -1) & exists)


def passes_of(number: Tensor, whole: Tensor) -> Passes:
    """Describe passes.

    Args:
        number: [B, O, T], see `Passes`.
        whole: frames that show the whole object, [B, O, T], bool.
    """
    count = max(int(number.max()) + 1, 1)
    frames = torch.arange(number.shape[-1]).expand_as(number)
    shape = (*number.shape[:2], count + 1)
    index = torch.where(number < 0, count, number)  # the last place takes what belongs to no pass
    first = torch.full(shape, number.shape[-1]).scatter_reduce(-1, index, frames, "amin")[..., :count]
    last = torch.full(shape, -1).scatter_reduce(-1, index, frames, "amax")[..., :count]
    seen_whole = torch.zeros(shape, dtype=torch.long).scatter_reduce(-1, index, whole.long(), "amax")[..., :count]
    is_there = last >= 0
    first = torch.where(is_there, first, -1)
    again = is_there.clone()
    again[..., 0] = False
    before = torch.cat((last[..., :1], last[..., :-1]), -1)
    age = torch.where(again, latent_of(first) - latent_of(before), 0)
    remembered = ((number < 0) & ((number >= 0).cumsum(-1) > 0)).sum(1)  # [B, T]
    moments = (first - 1).clamp(min=0).flatten(1)
    load = torch.where(again, remembered.gather(1, moments).view_as(first), 0)
    return Passes(number, first, last, seen_whole.bool(), age, load)


def latent_of(frame: Tensor) -> Tensor:
    """Index of the latent frame that holds a frame."""
    return (frame + STRIDE - 1).div(STRIDE, rounding_mode="floor")


class PassVotes:
    """Sums of what the reader sees during each pass.

    Args:
        passes: passes of the scenes.
        half_of: half of the frame in which each object is, see `SceneBatch.half_of`.
    """

    def __init__(self, passes: Passes, half_of: tuple[int, ...]) -> None:
        self._passes, self._half_of = passes, list(half_of)
        videos, things, count = passes.first.shape
        self._votes = torch.zeros(videos, things, count + 1, len(COLOURS))
        self._scores = torch.zeros(videos, things, count + 1, len(SHAPES))
        self._area = torch.zeros(videos, things, count + 1)

    def add(self, first_frame: int, seen: Detections, only: Tensor | None = None) -> None:
        """Add what was seen in the next frames.

        Args:
            first_frame: index of the first of them.
            seen: detections of B videos.
            only: passes that count, [B, O, P], bool; None for all.
        """
        length, count = seen.votes.shape[2], self._passes.first.shape[-1]
        number = self._passes.number[..., first_frame : first_frame + length]
        index = torch.where(number < 0, count, number)
        if only is not None:
            padded = torch.cat((only, torch.zeros_like(only[..., :1])), -1)
            index = torch.where(padded.gather(-1, index), index, count)
        area, votes, scores = (each.cpu()[:, self._half_of] for each in (seen.area, seen.votes, seen.scores))
        weight = frame_weights(area)[..., None]
        for total, values in ((self._votes, votes), (self._scores, scores)):
            total.scatter_add_(2, index[..., None].expand_as(values), weight * values)
        self._area.scatter_reduce_(2, index, area, "amax")

    def read(self) -> tuple[Tensor, Tensor]:
        """Colour and shape of each object in each pass, [B, O, P]: indices in COLOURS and SHAPES, -1 for nothing."""
        present = self._area[..., :-1] >= PRESENT_AREA
        colour, shape = (sums[..., :-1, :].argmax(-1) for sums in (self._votes, self._scores))
        return torch.where(present, colour, -1), torch.where(present, shape, -1)


def answers_of(passes: Passes, votes: PassVotes, scenes: SceneBatch, asked: Tensor) -> list[list[Answer]]:
    """Answers of each video, in the order of objects and passes.

    Args:
        passes: passes of the scenes.
        votes: what was seen during each.
        scenes: what should have been seen.
        asked: passes that are questions, [B, O, P], bool.
    """
    colour, shape = votes.read()
    right_colour = (colour == scenes.colour.cpu()[..., None]).long()
    right_shape = (shape == scenes.shape.cpu()[..., None]).long()
    answers: list[list[Answer]] = [[] for _ in range(len(scenes))]
    for video, thing, number in asked.nonzero().tolist():
        at = (video, thing, number)
        about = (tensor[at].item() for tensor in (passes.first, passes.age, passes.load, right_colour, right_shape))
        answers[video].append(Answer(thing, number, *(int(value) for value in about)))
    return answers
