"""Sessions that visitors have saved, and bring back: files that nobody trusts, held against the app's limits."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pipelines.app.limits import MAX_STEPS, Limits, Request
from pipelines.app.models import AppModel
from pipelines.config import MemoryKind
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.sessions.files import SessionFacts, read_facts, was_saved_by
from pipelines.generation.sessions.session import Session
from wan.utils.errors import InputError

SAVED = "saved session"
"""Title of a video that goes on from a file."""


@dataclass(frozen=True)
class SavedModel(AppModel):
    """A model that goes on with a session of its own.

    Attributes:
        path: the session's file.
    """

    path: Path = Path()

    def begin(self, request: Request) -> Session:
        """Load the session; the request says what is in it already."""
        return self.pipeline.load_session(self.path)


def read_saved(path: Path, models: Mapping[str, AppModel], limits: Limits) -> tuple[SavedModel, Request]:
    """The model that saved a session, and what the session is.

    Raises:
        CheckpointError, InputError: the file is damaged, no model of the page has saved it, or it is beyond the limits.
    """
    makers = [model for model in models.values() if was_saved_by(path, model.pipeline)]
    if not makers:
        raise InputError("no model of this page has saved that session: start the app with the checkpoint that did")
    pipeline = makers[0].pipeline
    facts = read_facts(path, pipeline)
    prompts = facts.texts[0].prompts
    request = Request(
        prompt=prompts[0] if prompts else "(a prompt that was given as embeddings)",
        models=(SAVED,),
        seed=facts.seeds[0],
        height=facts.height,
        width=facts.width,
        steps=len(facts.sampler.timesteps),
        blocks=None if facts.blocks is None else facts.blocks - facts.index,
        on_switch=facts.on_switch,
    )
    _check(facts, request, pipeline, limits)
    return SavedModel(SAVED, makers[0].about, pipeline, lambda _: facts.memory, path), request


def _check(facts: SessionFacts, request: Request, pipeline: CausalVideoPipeline, limits: Limits) -> None:
    """Hold a session against what a page could have asked for.

    Raises:
        InputError: it is beyond the limits, or has no block left.
    """
    if len(facts.seeds) > 1 or facts.guidance_scale > 1:
        raise InputError("the session is of several videos or has guidance: the page shows one video without")
    if facts.height * facts.width > limits.pixels:
        raise InputError(f"the session is of {facts.height}×{facts.width} pixels: the page takes {limits.pixels}")
    steps = max(len(each.timesteps) for each in (facts.sampler, facts.first_block or facts.sampler))
    if steps > MAX_STEPS:
        raise InputError(f"the session has {steps} steps per block: the page takes {MAX_STEPS}")
    if request.blocks == 0:
        raise InputError("the session's video has all its blocks: save a session before its video ends")
    if request.blocks is not None and request.blocks > limits.blocks:
        raise InputError(f"the session has {request.blocks} blocks to come: the page takes {limits.blocks}")
    per_block = int(pipeline.config.frames_per_block)
    # A page's longest memory: all blocks after a given video, whose latents are fewer than its frames.
    most = limits.blocks * per_block + limits.given_frames
    window = facts.memory.window_frames if facts.memory.kind is MemoryKind.window else None
    held = [frames for frames in (window, facts.latent_frames) if frames is not None]
    if not held:
        raise InputError("the session remembers everything and has no end: its memory would grow without a bound")
    if min(held) > most:
        raise InputError(f"the session remembers {min(held)} latent frames: the page takes {most}")
