"""Prompt schedules: several prompts for one video, each from some moment on.

A file is JSON lines, in one of two forms.

- One video per line, as LongLive's `MultiTextDataset` reads it: `{"prompts": [...]}`, a list of texts, or of
  `{"prompt", "frame"}`, `{"prompt", "block"}` or `{"prompt", "second"}`. `dimensions` may say what it tests,
  for suites.
- One prompt per line, all for one video: `{"prompt", "frame"}` and so on.

Frames are latent ones, from 0; blocks too, those of given frames included; seconds are those of the video's file. The
first prompt begins at 0. Where no prompt says when it begins, the generated blocks are divided evenly.

A block has one prompt. One that begins inside of a block holds for all of this block.
"""

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import StrEnum
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipelines.prompts.files import FILE_CURE, check_prompt, checked_dimensions, read_lines
from pipelines.prompts.names import shown
from wan.utils.errors import InputError
from wan.utils.files import parse_json

UNITS = ("frame", "block", "second")
SCRIPT, LINE = '{"prompts": ["…", "…"]}', '{"prompt": "…", "frame": 0}'


class OnSwitch(StrEnum):
    """What happens to the memory when the prompt changes."""

    keep = "keep"
    recompute = "recompute"


@dataclass(frozen=True)
class Switch:
    """A prompt of a video, and when it begins; None in all units if the file does not say it.

    Attributes:
        prompt: what the video shows from then on.
        frame: latent frame at which it begins.
        second: the same in seconds.
        block: the same as the number of a block.
    """

    prompt: str
    frame: int | None = None
    second: float | None = None
    block: int | None = None

    @property
    def time(self) -> tuple[str, float] | None:
        """Unit and number of the moment at which it begins; None if it says none."""
        named = ((unit, vars(self)[unit]) for unit in UNITS)
        return next(((unit, value) for unit, value in named if value is not None), None)

    def as_plain(self) -> dict[str, Any]:
        """As a file has it."""
        return {"prompt": self.prompt} | ({} if self.time is None else dict([self.time]))


@dataclass(frozen=True)
class Script:
    """The prompts of one video.

    Attributes:
        prompts: in their order; the first begins at 0.
        dimensions: what they test.
        where: file and line, for messages.
    """

    prompts: tuple[Switch, ...]
    dimensions: tuple[str, ...] = ()
    where: str = "the schedule"


@dataclass(frozen=True)
class Timeline:
    """The frames of a video, to find the block at which a prompt begins.

    Attributes:
        frames_per_block: latent frames per block.
        num_frames: latent frames of the video, given ones included; None for no end.
        given_frames: latent frames that are remembered before anything is generated.
        stride: frames per latent frame, after the first.
        fps: frames per second.
    """

    frames_per_block: int
    num_frames: int | None
    given_frames: int = 0
    stride: int = 4
    fps: float = 16

    def starts(self, prompts: Sequence[Switch], where: str) -> list[int]:
        """First latent frame of the block at which each prompt begins; 0 for the first.

        Args:
            prompts: of one video.
            where: they are from, for messages.

        Raises:
            InputError: one begins inside of the given frames, after the end, or in the block of another.
        """
        if len(prompts) > 1 and prompts[1].time is None:
            return self._evenly(len(prompts), where)
        starts = [0, *(self._frame(each) // self.frames_per_block * self.frames_per_block for each in prompts[1:])]
        for number, (before, start) in enumerate(pairwise(starts), 2):
            name = f"{where}: prompt {number}"
            if self.num_frames is not None and start >= self.num_frames:
                raise InputError(f"{name} begins at latent frame {start}, the video ends at {self.num_frames}: {_CURE}")
            if 0 < start < self.given_frames:
                raise InputError(
                    f"{name} begins at latent frame {start}, inside of the {self.given_frames} that are given: {_CURE}"
                )
            if start <= before:
                raise InputError(
                    f"{name} begins in the block of {self.frames_per_block} latent frames in which the one before it "
                    f"does: {_CURE}"
                )
        return starts

    def _evenly(self, count: int, where: str) -> list[int]:
        if self.num_frames is None:
            raise InputError(f"{where}: a video without an end cannot be divided evenly: say when each prompt begins")
        blocks = (self.num_frames - self.given_frames) // self.frames_per_block
        if blocks < count:
            raise InputError(f"{where}: {count} prompts for {blocks} blocks: make the video longer")
        firsts = (number * blocks // count for number in range(count))
        return [0, *(self.given_frames + first * self.frames_per_block for first in firsts if first)]

    def _frame(self, switch: Switch) -> int:
        """Latent frame at which a prompt begins."""
        if switch.block is not None:
            return switch.block * self.frames_per_block
        if switch.second is not None:
            return -(-int(switch.second * self.fps) // self.stride)
        assert switch.frame is not None
        return switch.frame


_CURE = "move it, or make the video longer"


def read_schedule(path: Path) -> list[Script]:
    """The videos of a schedule, see the module for the formats.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    if has_scripts(path):
        return read_scripts(path)
    lines = list(_records(path, FILE_CURE))
    if not lines:
        raise InputError(f"{shown(path)} holds no prompt: write {LINE} or {SCRIPT} in each line")
    prompts = tuple(_switch(record, where) for where, record in lines)
    where = lines[0][0]
    _check_order(prompts, where)
    return [Script(prompts, where=where)]


def has_scripts(path: Path) -> bool:
    """Whether lines are videos of several prompts.

    Raises:
        InputError: the file cannot be read.
    """
    for _, line in read_lines(path, cure=FILE_CURE):
        try:
            record = parse_json(line)
        except ValueError:
            return False  # what reads the lines names the one that is broken
        if isinstance(record, dict) and "prompts" in record:
            return True
    return False


def read_scripts(path: Path, cure: str = FILE_CURE) -> list[Script]:
    """The videos of a file that has one per line.

    Args:
        cure: for a file that cannot be read.

    Raises:
        InputError: the file cannot be read, or is damaged.
    """
    scripts = []
    for where, record in _records(path, cure):
        prompts = record.get("prompts") if isinstance(record, dict) else None
        if not isinstance(prompts, list) or not prompts or set(record) - {"prompts", "dimensions"}:
            raise InputError(f"{where} is no video of several prompts: write {SCRIPT}")
        found = tuple(_switch(item, f"{where}, prompt {place}") for place, item in enumerate(prompts, 1))
        _check_order(found, where)
        scripts.append(Script(found, checked_dimensions(record.get("dimensions"), where), where))
    return scripts


def _records(path: Path, cure: str) -> Iterator[tuple[str, Any]]:
    """The values of a file of JSON lines, with where they are."""
    for number, line in read_lines(path, cure=cure):
        where = f"{shown(path)} line {number}"
        try:
            yield where, parse_json(line)
        except ValueError as error:
            raise InputError(f"{where} is not valid JSON ({str(error).splitlines()[0]}): fix it") from error


def _switch(item: Any, where: str) -> Switch:
    if isinstance(item, str):
        item = {"prompt": item}
    if not isinstance(item, dict) or not isinstance(item.get("prompt"), str):
        raise InputError(f"{where} is {json.dumps(item)[:40]}: write a text or {LINE}")
    times = {unit: item[unit] for unit in UNITS if item.get(unit) is not None}
    fits = all(_is_time(value, whole=unit != "second") for unit, value in times.items())
    if set(item) - {"prompt", *UNITS} or not fits or len(times) > 1:
        raise InputError(
            f"{where} needs a prompt and at most one of frame (latent, from 0), block and second, not negative"
        )
    check_prompt(item["prompt"], where)
    second = times.get("second")
    return Switch(
        item["prompt"].strip(), times.get("frame"), None if second is None else float(second), times.get("block")
    )


def _is_time(value: Any, whole: bool) -> bool:
    kinds = int if whole else int | float
    return isinstance(value, kinds) and not isinstance(value, bool) and 0 <= value < 10**9


def _check_order(prompts: Sequence[Switch], where: str) -> None:
    """Make sure that either no prompt of a video says when it begins, or all do, in one unit and in order from 0."""
    times = [prompt.time for prompt in prompts]
    named = [time for time in times if time is not None]
    if not named:
        return
    numbers = [number for _, number in named]
    is_one_unit = len(named) == len(times) and len({unit for unit, _ in named}) == 1
    if not is_one_unit or numbers[0] != 0 or any(b <= a for a, b in pairwise(numbers)):
        raise InputError(
            f"{where}: prompts must begin at 0 and follow each other, all in frames, all in blocks or all in seconds"
        )
