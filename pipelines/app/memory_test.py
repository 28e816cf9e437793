"""The memory test of the page: one scene of the toy world's memory probe, watched and judged while models continue it.

An object is in sight in the given frames, stays out of sight for longer than a block, and has to come back as it was.
The caption names neither colour nor shape, so a model can only know them from its memory.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from arl2.toyworld.probe.long_probe import GIVEN_BLOCKS, SEEDS_PER_SET, STANDARD_LATENTS, num_frames_of, probe_scenes
from arl2.toyworld.probe.memory_probe import silent_captions
from arl2.toyworld.probe.passes import Passes, PassVotes, find_passes
from arl2.toyworld.world.captions import VOCABULARY
from arl2.toyworld.world.reader import detect
from arl2.toyworld.world.render import STRIDE, as_pixels, render
from arl2.toyworld.world.scenes import (
    COLOURS,
    FRAMES_PER_BLOCK,
    HEIGHT,
    SHAPES,
    STANDARD_HIDDEN_FRAMES,
    WIDTH,
    SceneBatch,
)
from arl2.toyworld.world.worlds import World
from pipelines.app.limits import Limits, Request, read_models, read_steps, require
from pipelines.flags import SceneSeed
from pipelines.generation.pipeline import CausalVideoPipeline
from wan.utils.ranges import typed

GIVEN_FRAMES, NUM_FRAMES = (num_frames_of(latents) for latents in (GIVEN_BLOCKS * FRAMES_PER_BLOCK, STANDARD_LATENTS))
"""Frames that models are given, and frames of the whole video."""
RIGHT, GONE = "right", "gone"
FORM = ("models", "seed", "steps")
"""What a page sends to start a test."""


@dataclass(frozen=True)
class Moment:
    """When an object is out of sight.

    Attributes:
        name: its colour and shape.
        hidden_from: first frame without it.
        back: frame in which it should be seen again.
    """

    name: str
    hidden_from: int
    back: int


@dataclass(frozen=True)
class Verdict:
    """What came back of an object.

    Attributes:
        name: colour and shape that it had.
        seen: colour and shape that came back; None for nothing.
        word: `RIGHT`, "wrong colour", "wrong shape", "wrong colour and shape" or `GONE`.
    """

    name: str
    seen: str | None
    word: str


@dataclass(frozen=True)
class Findings:
    """What the page shows of a test beside a video.

    Attributes:
        moments: of all objects.
        verdicts: likewise; none before the video is whole.
    """

    moments: tuple[Moment, ...]
    verdicts: tuple[Verdict, ...] = ()


@dataclass(frozen=True)
class MemoryTest:
    """A scene and its questions, a function of the seed; on the CPU.

    Attributes:
        scene: batch of one.
        caption: names neither colour nor shape.
        passes: of its objects, see `arl2.toyworld.probe.passes`.
        moments: when its objects are out of sight.
    """

    scene: SceneBatch
    caption: str
    passes: Passes
    moments: tuple[Moment, ...]

    @classmethod
    def draw(cls, seed: int) -> Self:
        """A scene of the probe's; training uses none of them.

        Raises:
            InputError: the caption names the answer.
        """
        chosen, number = divmod(seed, SEEDS_PER_SET)
        scene = probe_scenes(World.STANDARD, chosen, [number], STANDARD_HIDDEN_FRAMES, torch.device("cpu"))
        passes = find_passes(scene, NUM_FRAMES)
        moments = tuple(
            Moment(
                _name(int(scene.colour[0, thing]), int(scene.shape[0, thing])),
                int(passes.last[0, thing, 0]) + 1,
                int(passes.first[0, thing, 1]),
            )
            for thing in _things(scene)
        )
        return cls(scene, silent_captions(scene)[0], passes, moments)

    def given_pixels(self) -> Tensor:
        """The frames that models are given, [T, 3, H, W] in [-1, 1]."""
        return as_pixels(render(self.scene, torch.arange(GIVEN_FRAMES)))[0]

    def request(self, form: Mapping[str, Any], limits: Limits, known: list[str]) -> Request:
        """What models are asked for.

        Args:
            form: values by the names of `FORM`, of which the seed is the test's own.

        Raises:
            InputError: a value that is missing, of another type or beyond the limits.
        """
        require(form, FORM)
        pixels = self.given_pixels()
        return Request(
            prompt=self.caption,
            models=read_models(form["models"], limits, known),
            seed=read_seed(form),
            height=HEIGHT,
            width=WIDTH,
            steps=read_steps(form["steps"]),
            blocks=STANDARD_LATENTS // FRAMES_PER_BLOCK - GIVEN_BLOCKS,
            video=pixels,
            given_frames=len(pixels),
        )


def read_seed(form: Mapping[str, Any]) -> int:
    """The seed of a test, as a page sends it.

    Raises:
        InputError: none, or one that no scene has.
    """
    require(form, FORM)
    seed: int = typed(SceneSeed, form["seed"], "seed")
    return seed


class Watch:
    """What is seen of a test's objects in one video.

    Args:
        test: that the video is of.
    """

    def __init__(self, test: MemoryTest) -> None:
        self._test, self._seen = test, 0
        self._votes = PassVotes(test.passes, test.scene.half_of)

    def add(self, frames_THWC: Tensor) -> None:
        """Look at the next frames, bytes, [T, H, W, 3]."""
        pixels = as_pixels(frames_THWC.cpu().permute(0, 3, 1, 2))[None]
        self._votes.add(self._seen, detect(pixels, self._test.scene.halved))
        self._seen += len(frames_THWC)

    def findings(self) -> Findings:
        """What can be said by now."""
        is_whole = self._seen >= NUM_FRAMES
        return Findings(self._test.moments, self._verdicts() if is_whole else ())

    def _verdicts(self) -> tuple[Verdict, ...]:
        scene = self._test.scene
        colours, shapes = (read[0, :, 1].tolist() for read in self._votes.read())
        return tuple(
            _verdict((int(scene.colour[0, thing]), int(scene.shape[0, thing])), (colours[thing], shapes[thing]))
            for thing in _things(scene)
        )


def _things(scene: SceneBatch) -> list[int]:
    """Indices of the objects that there are."""
    found: list[int] = scene.exists[0].nonzero().flatten().tolist()
    return found


def _name(colour: int, shape: int) -> str:
    return f"{tuple(COLOURS)[colour]} {SHAPES[shape]}"


def _verdict(true: tuple[int, int], read: tuple[int, int]) -> Verdict:
    """Compare colour and shape with those that were read, -1 for nothing."""
    if min(read) < 0:
        return Verdict(_name(*true), None, GONE)
    wrong = [what for what, one, other in zip(("colour", "shape"), true, read, strict=True) if one != other]
    return Verdict(_name(*true), _name(*read), f"wrong {' and '.join(wrong)}" if wrong else RIGHT)


def is_of_toyworld(pipeline: CausalVideoPipeline) -> bool:
    """Whether a pipeline is one of the toy world: its words, sizes and strides."""
    if pipeline.tokenizer is None or not set(VOCABULARY) <= set(pipeline.tokenizer.get_vocab()):
        return False
    sizes = (pipeline.default_of("height"), pipeline.default_of("width"), int(pipeline.config.frames_per_block))
    return sizes == (HEIGHT, WIDTH, FRAMES_PER_BLOCK) and pipeline.wan_vae.temporal_compression == STRIDE
