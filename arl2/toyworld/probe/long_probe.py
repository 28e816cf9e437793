"""Memory probe of videos of any length, block by block: memory does not grow with the length, only answers are kept.

Every video begins with given blocks of true frames, which show all of its objects; their length is that of the scene's
introduction. Then an object that comes out of hiding again is a question: does it have the colour and shape of before?
"""

import copy
from collections import deque
from collections.abc import Iterator
from dataclasses import dataclass
from enum import StrEnum
from functools import partial

import torch
from torch import Tensor

from arl2.evaluation.eval_setup import EvalSetup
from arl2.rollout import SeededNoise, denoise_block, remember_block, seed_for
from arl2.toyworld.probe.memory_probe import FIRST_SEED, PROBE_MIX, silent_captions
from arl2.toyworld.probe.passes import Answer, Passes, PassVotes, answers_of, find_passes, latent_of
from arl2.toyworld.world.latents import embed_captions
from arl2.toyworld.world.long_scenes import LongScenes, sample_long_scenes
from arl2.toyworld.world.reader import detect
from arl2.toyworld.world.render import STRIDE, as_pixels, frames_of, render_blocks
from arl2.toyworld.world.scenes import (
    FRAMES_PER_BLOCK,
    HEIGHT,
    NUM_FRAMES,
    STANDARD_HIDDEN_FRAMES,
    WIDTH,
    SceneBatch,
    sample_scenes,
)
from arl2.toyworld.world.worlds import World
from wan.text import TextEncoder
from wan.vae.wan_vae import WanVAE

STANDARD_LATENTS = (NUM_FRAMES - 1) // STRIDE + 1
"""Latent frames of a standard video, which the shipped models were trained on."""
SEEDS_PER_SET = 10_000
"""Videos of one seed of the probe at most."""
GIVEN_BLOCKS = 2
"""Given blocks of a video of the standard world."""
BRANCH_BLOCKS = 3
"""Blocks that a branch goes on for: an object that comes out in the first is whole in the last."""
WARM_BLOCKS = 3
"""True blocks that the decoder sees before those of a branch."""


class Context(StrEnum):
    """What a model remembers: `OWN` its own frames; `TRUE` true ones, so what it gets wrong it has forgotten."""

    OWN = "own"
    TRUE = "true"


@dataclass(frozen=True)
class LongProbe:
    """Some videos of a probe.

    Attributes:
        scenes: B scenes.
        text_BTD: embeddings of captions that name nothing.
        latents: length of the videos in latent frames, a multiple of FRAMES_PER_BLOCK.
        given: given latent frames of each video, whole blocks, [B], on the CPU.
    """

    scenes: SceneBatch
    text_BTD: Tensor
    latents: int
    given: Tensor

    @property
    def starts(self) -> range:
        """First latent frame of every block."""
        return range(0, self.latents, FRAMES_PER_BLOCK)

    def passes(self) -> Passes:
        """Passes of the videos' objects."""
        return find_passes(self.scenes, num_frames_of(self.latents))

    def asked(self, passes: Passes) -> Tensor:
        """Passes that are questions, [B, O, P], bool."""
        return passes.asked(1 + STRIDE * (self.given - 1))


def num_frames_of(latents: int) -> int:
    """Frames of a video of some latent frames."""
    return 1 + STRIDE * (latents - 1)


def probe_scenes(world: World, seed: int, videos: list[int], hidden_frames: int, device: torch.device) -> SceneBatch:
    """Scenes of some videos of a probe, each a function of world, seed and its number.

    Args:
        world: kind of scenes; of the standard world those with walls.
        seed: of the set of scenes; training uses none of them.
        videos: numbers of the videos, below SEEDS_PER_SET.
        hidden_frames: lower bound on hidden frames in the standard world.
        device: where the scenes are.
    """
    seeds = FIRST_SEED - SEEDS_PER_SET * seed + torch.tensor(videos, dtype=torch.int64, device=device)
    if world is World.LONG:
        return sample_long_scenes(seeds, NUM_FRAMES)
    return sample_scenes(seeds, mix=PROBE_MIX, hidden_frames=hidden_frames)


def make_long_probe(
    encoder: TextEncoder,
    world: World,
    seed: int,
    videos: list[int],
    latents: int,
    hidden_frames: int = STANDARD_HIDDEN_FRAMES,
) -> LongProbe:
    """Sample some videos of a probe; they are the same whichever others are asked for.

    Args:
        encoder: text encoder of the toy world; scenes are on its device.
        world, seed, videos, hidden_frames: see `probe_scenes`.
        latents: length of the videos in latent frames, a multiple of FRAMES_PER_BLOCK.

    Raises:
        InputError: a caption names an answer, which would make the probe void.
    """
    device = encoder.model.device
    scenes = probe_scenes(world, seed, videos, hidden_frames, device)
    captions = silent_captions(scenes)
    return LongProbe(scenes, embed_captions(encoder, captions).to(device), latents, given_latents(scenes))


def given_latents(scenes: SceneBatch) -> Tensor:
    """Given latent frames of each video, [B], on the CPU: the blocks in which objects are introduced."""
    if not isinstance(scenes, LongScenes):
        return torch.full((len(scenes),), GIVEN_BLOCKS * FRAMES_PER_BLOCK)
    blocks = latent_of(scenes.introduced.cpu()).div(FRAMES_PER_BLOCK, rounding_mode="floor") + 1
    return blocks * FRAMES_PER_BLOCK


class _Model:
    """A model and its memory of some videos.

    Args:
        setup: model, sampler and window.
        probe: the videos.
        shape: [C, h, w] of a latent frame.
    """

    def __init__(self, setup: EvalSetup, probe: LongProbe, shape: tuple[int, ...]) -> None:
        self._model, self._sampler = setup.transformer, setup.sampler
        device = probe.scenes.device
        like = torch.empty(1, device=device).expand(len(probe.scenes), probe.latents, *shape)
        self._memory = self._model.memory_for(like, setup.window_frames, setup.sink_frames)
        self._text = self._model.embed_text(probe.text_BTD.to(self._model.dtype))
        seeds = [seed_for("long probe", seed) for seed in probe.scenes.seed.tolist()]
        self._noise = SeededNoise(seeds, (FRAMES_PER_BLOCK, *shape), device)

    def denoise(self, start: int) -> Tensor:
        """Generate a block; the memory is only read."""
        noise = partial(self._noise, start // FRAMES_PER_BLOCK)
        return denoise_block(self._model, self._sampler.for_block(start), noise, self._text, self._memory, start)

    def remember(self, latents_BFCHW: Tensor, start: int) -> None:
        """Remember a block."""
        remember_block(self._model, latents_BFCHW, self._text, self._memory, start)

    def branch(self) -> "_Model":
        """A copy whose memory goes its own way."""
        other = copy.copy(self)
        other._memory = copy.deepcopy(self._memory)
        return other


@torch.no_grad()
def probe_videos(
    setup: EvalSetup | None, vae: WanVAE, probe: LongProbe, context: Context = Context.OWN
) -> list[list[Answer]]:
    """Answers of a model on some videos.

    Args:
        setup: the model; None reads the true frames through the VAE, which bounds what a model can get right.
        vae: VAE of the toy world.
        probe: the videos.
        context: what the model remembers after the given blocks.

    Returns:
        answers of each video; empty for a video that asks nothing.
    """
    passes = probe.passes()
    asked = probe.asked(passes)
    votes = PassVotes(passes, probe.scenes.half_of)
    if setup is not None and context is Context.TRUE:
        _watch_branches(setup, vae, probe, passes.first.where(asked, -1), votes)
    else:
        for first, pixels in watch(setup, vae, probe):
            votes.add(first, detect(pixels, probe.scenes.halved))
    return answers_of(passes, votes, probe.scenes, asked)


def _true_blocks(vae: WanVAE, probe: LongProbe) -> Iterator[Tensor]:
    """Encode the true videos block by block; [B, F, C, h, w]."""
    encoder = vae.encode_stream()
    for frames in render_blocks(probe.scenes, probe.latents, FRAMES_PER_BLOCK):
        yield encoder.encode(as_pixels(frames).to(vae.dtype)).float()


@torch.no_grad()
def watch(setup: EvalSetup | None, vae: WanVAE, probe: LongProbe) -> Iterator[tuple[int, Tensor]]:
    """Let a model make the videos after their given blocks, block by block.

    Args:
        setup, vae, probe: see `probe_videos`.

    Yields:
        first frame of a block, and its pixels, [B, T, 3, H, W] in [-1, 1].
    """
    truth, decoder = _true_blocks(vae, probe), vae.decode_stream()
    model = None if setup is None else _Model(setup, probe, _latent_shape(vae))
    for start in probe.starts:
        is_given = torch.ones_like(probe.given, dtype=torch.bool) if model is None else start < probe.given
        shown = next(truth) if is_given.any() else None
        if model is not None and not is_given.all():
            made = model.denoise(start)
            choice = is_given.to(made.device)[:, None, None, None, None]
            shown = made if shown is None else torch.where(choice, shown, made)
        assert shown is not None
        if model is not None and start + FRAMES_PER_BLOCK < probe.latents:
            model.remember(shown, start)
        yield _first_frame(start), decoder.decode(shown.to(vae.dtype)).float()


def _watch_branches(setup: EvalSetup, vae: WanVAE, probe: LongProbe, firsts: Tensor, votes: PassVotes) -> None:
    """Let a model remember true blocks alone; where an object is to come out, a branch of it says what does.

    A branch is needed since true frames of the object that has come out would tell the rest of the pass.

    Args:
        firsts: first frames of the passes that are questions, [B, O, P]; -1 for others.
    """
    model = _Model(setup, probe, _latent_shape(vae))
    recent: deque[Tensor] = deque(maxlen=WARM_BLOCKS)
    for start, true in zip(probe.starts, _true_blocks(vae, probe), strict=True):
        first, end = _first_frame(start), _first_frame(start + FRAMES_PER_BLOCK)
        now = (firsts >= first) & (firsts < end)
        if now.any():
            made = _branch(model.branch(), range(start, probe.latents, FRAMES_PER_BLOCK)[:BRANCH_BLOCKS])
            frames = num_frames_of(start + made.shape[1]) - first
            pixels = vae.decode(torch.cat([*recent, made], 1).to(vae.dtype))[:, -frames:].float()
            votes.add(first, detect(pixels, probe.scenes.halved), now)
        model.remember(true, start)
        recent.append(true)


def _branch(model: _Model, starts: range) -> Tensor:
    """Generate some blocks from what a model remembers, [B, F, C, h, w]."""
    made = []
    for start in starts:
        made.append(model.denoise(start))
        if start != starts[-1]:
            model.remember(made[-1], start)
    return torch.cat(made, 1)


def _first_frame(start: int) -> int:
    """First frame of the block that begins at a latent frame."""
    return int(frames_of(start, 1)[0])


def _latent_shape(vae: WanVAE) -> tuple[int, int, int]:
    """[C, h, w] of a latent frame."""
    return vae.latent_channels, HEIGHT // vae.spatial_compression, WIDTH // vae.spatial_compression
