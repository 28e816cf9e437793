"""A video in the making, which can be held between any two blocks."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import Self

import torch
from torch import Tensor

from arl2.guidance import GuidedModel
from arl2.inference.past_blocks import PastBlocks
from arl2.rollout import Conditions, GeneratedBlock, Rollout, remember_block
from pipelines.generation.blocks import GIVEN, TEXT, NonFiniteBlockError, VideoBlock
from pipelines.generation.decoding import BlockDecoder, Phase, no_phase
from pipelines.generation.inputs.given import GivenFrames
from pipelines.generation.inputs.request import Prompts, Texts, choose_seeds
from pipelines.generation.inputs.schedule import with_prompt
from pipelines.generation.lockstep import Lockstep
from pipelines.generation.mixins.making import MakingMixin
from pipelines.generation.mixins.planning import VideoPlan
from pipelines.generation.sessions.files import SessionFacts, write_session
from pipelines.generation.streaming import finished
from pipelines.prompts.schedules import OnSwitch
from wan.memory import Memory, MemorySpec
from wan.model import FlowModel
from wan.snapshots import Snapshot, require_alike
from wan.utils.errors import InputError
from wan.vae.stream import SETTLING_LATENTS


@dataclass(frozen=True)
class TimedText:
    """Texts of a video from some block on.

    Attributes:
        frame: absolute index of the first latent frame of that block.
        texts: as they were given.
        embeds_BTD: their embeddings; with guidance, those of the negative prompts follow.
    """

    frame: int
    texts: Texts
    embeds_BTD: Tensor


def _note_nothing(latents_BFCHW: Tensor, start_frame: int) -> None:
    """For a memory that is never made anew."""


class Session:
    """A video that is generated block by block, on request. `CausalVideoPipeline.session` begins one.

    It holds all that the video's future depends on: memory, decoder, position, text and seeds; the noise is a function
    of seed, block and step. So a session can be saved and continued elsewhere, and forked into several futures. Several
    sessions of one pipeline can be used in turns, from one thread at a time.

        with pipe.session("a red ball rolls to the left", num_frames=None, memory="window") as session:
            first = session.next()
            session.switch("a blue cube rolls to the right")
            other = session.fork(seeds=[1])
            session.save("rolling.safetensors")

    Args:
        host: the pipeline.
        plan: what was asked for.
        texts: of the video, the present first, then those to come.
        given: latents of given frames.
        memory: empty.
        phase, lockstep: as in `CausalVideoPipeline.stream`.
        context_frames: latent frames of given whole blocks.
    """

    def __init__(
        self,
        host: MakingMixin,
        plan: VideoPlan,
        texts: Sequence[TimedText],
        given: GivenFrames,
        memory: Memory,
        context_frames: int,
        phase: Phase = no_phase,
        lockstep: Lockstep | None = None,
    ) -> None:
        self._host, self._plan, self._given, self._phase, self._lockstep = host, plan, given, phase, lockstep
        self._device: torch.device = host._execution_device
        self._size = host.latent_size(plan.height, plan.width)
        self._texts, self._context_frames = list(texts), context_frames
        self._context_noise: float = host.config.context_noise
        self._per_block: int = host.config.frames_per_block
        # Not the error: its traceback would keep the loops alive that it has left.
        self._broken: tuple[int, str] | None = None
        self._closed = False
        embeds = self._conditioning(texts[0])
        host.bring(host.transformer)
        recomputed = plan.memory.recomputed_for(plan.latent_frames, self._per_block)
        context = given.context_BFCHW
        self._past = self._new_past(memory) if plan.on_switch is OnSwitch.recompute else None
        context = context if context is None or not recomputed else context[:, -recomputed:]
        self._video = Rollout(
            self._model(),
            plan.sampler,
            host.noise(plan, context_frames, self._size, self._device),
            host.transformer.embed_text(embeds),
            memory,
            context_frames,
            self._context_noise,
            phase,
            Conditions(
                given.kept_BFCHW,
                given.source_BFCHW,
                plan.given.strength or 1.0,
                host.step_hook(plan),
                context if recomputed else None,
            ),
            recomputed,
            # No method of this object: a circle would keep a finished video's memory until it is collected.
            _note_nothing if self._past is None else self._past.note,
        )
        if context is not None:
            self._remember_given(context)
        made_from = {TEXT: embeds}
        if given.all():
            made_from[GIVEN] = torch.cat(given.all(), dim=1)
        self._decode = BlockDecoder(
            host.wan_vae, self._size, host._side, given.context_BFCHW, made_from, phase, lockstep
        )

    @classmethod
    def start(
        cls, host: MakingMixin, plan: VideoPlan, phase: Phase = no_phase, lockstep: Lockstep | None = None
    ) -> Self:
        """Begin a video; its texts and given frames are encoded and remembered."""
        with phase("text"):
            texts = [
                TimedText(frame, each, host.encode_texts(each, plan.max_sequence_length))
                for frame, each in ((0, plan.texts), *plan.switches)
            ]
        given = host.encode_given(plan, host._execution_device)
        batch = len(texts[0].embeds_BTD)
        memory = host.new_memory(batch, plan.height, plan.width, plan.latent_frames, plan.memory)
        return cls(host, plan, texts, given, memory, given.context_frames, phase, lockstep)

    @classmethod
    def resume(
        cls, host: MakingMixin, plan: VideoPlan, facts: SessionFacts, snapshot: Snapshot, spec: MemorySpec
    ) -> Self:
        """Go on where another session of the same pipeline was.

        Args:
            plan: of that session.
            facts: its position and what its file says of it.
            snapshot: see `snapshot`; tensors are taken over.
            spec: of its memory, with as many frames as it holds.

        Raises:
            InputError: the snapshot is of another session.
        """
        everything = (plan.texts, *(each for _, each in plan.switches))
        texts = [
            TimedText(frame, each, snapshot.tensor(f"text.{number}"))
            for number, (frame, each) in enumerate(zip(facts.text_frames, everything, strict=True))
        ]
        kept, source = (snapshot.tensors.get(name) for name in ("kept", "source"))
        memory = (host._pool or host.transformer).new_memory(spec)
        session = cls(host, plan, texts, GivenFrames(None, kept, source), memory, facts.context_frames)
        session._restore(facts, snapshot)
        return session

    def _restore(self, facts: SessionFacts, snapshot: Snapshot) -> None:
        video, per_block = self._video, self._per_block
        video.index, video.start_frame = facts.index, facts.start_frame
        video.pending_BFCHW = snapshot.tensors.get("pending")
        video.recent_BFCHW = snapshot.tensors.get("recent")
        remembered = facts.start_frame - (0 if video.pending_BFCHW is None else per_block)
        if self._past is not None:
            self._past.restore(snapshot.part("past"), remembered)
        video.memory.restore(snapshot.part("memory"))
        # A view of the next block finds out whether what was counted makes sense.
        tokens = per_block * self._host.transformer.tokens_per_frame(*self._size)
        try:
            video.memory.read(tokens)
        except ValueError as error:
            raise InputError(str(error)) from error
        # What is handed out with the first block is what was decoded before it.
        waiting = facts.context_frames if facts.index == 0 else 0
        frames = (waiting - 1) * self._host.wan_vae.temporal_compression + 1 if waiting else 0
        decoded = waiting or min(facts.start_frame, SETTLING_LATENTS)
        like = torch.zeros(self._plan.texts.batch, decoded, *self._latent_shape(), device=self._device)
        self._decode.restore(snapshot.part("decoder"), like, frames)
        mine = self.snapshot()
        require_alike(snapshot.tensors, mine.tensors)
        if dict(snapshot.counters) != dict(mine.counters):
            raise InputError("its counters are of another session")

    def _latent_shape(self) -> tuple[int, int, int]:
        return (self._host.transformer.config.in_dim, *self._size)

    def _new_past(self, memory: Memory) -> PastBlocks:
        kind = self._host.resolve_memory(self._plan.memory)
        return PastBlocks(memory, self._per_block, *kind.window_for(self._plan.latent_frames))

    def _remember_given(self, context_BFCHW: Tensor) -> None:
        """Remember given blocks, the last of which comes right before the first generated one."""
        video, frames = self._video, context_BFCHW.shape[1]
        for first in range(0, frames, self._per_block):
            block, start = context_BFCHW[:, first : first + self._per_block], self._context_frames - frames + first
            if self._past is not None:
                self._past.note(block, start)
            remember_block(video.model, block, video.text, video.memory, start, self._context_noise)

    def _conditioning(self, timed: TimedText) -> Tensor:
        return timed.embeds_BTD.to(self._device, self._host.transformer.dtype)

    def _model(self) -> FlowModel:
        texts = self._plan.texts
        model: FlowModel = self._host.flow_model
        return GuidedModel(model, texts.guidance_scale) if texts.is_guided else model

    # -- generating

    @torch.no_grad()
    def next(self) -> VideoBlock:
        """Generate the next block. On a GPU its frames may still be on their way: `frames_BTHWC.wait()` has them.

        Returns:
            the block; the first brings given frames too.

        Raises:
            InputError: the video has all its blocks, the session is closed, or the pipeline has moved.
            NonFiniteBlockError: text, latents or pixels hold NaN or infinity; the session cannot go on.
        """
        self._require_open()
        if self.is_finished:
            raise InputError(f"the video has all its {self._video.index} blocks: begin another session")
        self._host.ready()
        self._video.model = self._model()
        block = self._decode(self._advance())
        if self._device.type == "cuda" and not self.is_finished:
            self._video.remember()  # beside the decoder's work
        return self._checked(block)

    def __iter__(self) -> Iterator[VideoBlock]:
        return self

    def __next__(self) -> VideoBlock:
        self._require_open()
        if self.is_finished:
            raise StopIteration
        return self.next()

    def blocks(self) -> Iterator[VideoBlock]:
        """All blocks that are left, each handed out when the next one has been asked for, on a GPU; see `stream`.

        Nothing else can be done with the session meanwhile.
        """
        lockstep, decode = self._lockstep, self._decode
        generated = self._generated()
        if lockstep is not None:
            generated = lockstep.blocks(generated)
        finish = lockstep.together(decode) if lockstep is not None and decode.divided else decode
        for each in finished(finish, generated, self._device):
            self._checked(each)
            if lockstep is None or lockstep.leads:
                yield each

    def _generated(self) -> Iterator[GeneratedBlock]:
        while not self.is_finished:
            yield self._advance()

    def _advance(self) -> GeneratedBlock:
        """The next block, under the text that holds for it."""
        if len(self._texts) > 1 and self._texts[1].frame <= self._video.start_frame:
            del self._texts[0]
            self._change_text()
        return self._video.next_block()

    def _checked(self, block: VideoBlock) -> VideoBlock:
        if self._lockstep is None or self._lockstep.leads:
            what = block.finite.first_broken()
            if what is not None:
                self._broken = block.index, what
                raise NonFiniteBlockError(*self._broken)
        block.frames_BTHWC.join()
        return block

    @property
    def is_finished(self) -> bool:
        """Whether the video has all its blocks; never for one without an end."""
        return self._plan.blocks is not None and self._video.index >= self._plan.blocks

    @property
    def next_frame(self) -> int:
        """Absolute index of the next block's first latent frame, given frames included."""
        return self._video.start_frame

    # -- steering

    @torch.no_grad()
    def switch(self, prompt: Prompts | None = None, *, prompt_embeds: Tensor | None = None) -> None:
        """Change the prompt from the next block on. Prompts of a schedule that are still to come come none the less.

        With `on_switch="keep"` the memory stays: what earlier blocks left in it was computed under their prompts. With
        "recompute" it is made anew of the blocks that softmax layers see, under the new prompt.

        Args:
            prompt: one for all videos, or one per video.
            prompt_embeds: in its place, from `encode_prompt`.

        Raises:
            InputError: no prompt, or one that cannot be encoded; the session goes on as before.
        """
        self._require_open()
        host, length = self._host, self._plan.max_sequence_length
        texts = with_prompt(self._texts[0].texts, prompt, prompt_embeds)
        host.check_text(texts, length if texts.prompts is not None else None)
        embeds = host.encode_texts(texts, length)
        self._texts[0] = TimedText(self._video.start_frame, texts, embeds)
        host.ready()
        self._video.model = self._model()
        self._change_text()

    def _change_text(self) -> None:
        """Let the next block have the present text, and its memory what `on_switch` says."""
        video, embeds = self._video, self._conditioning(self._texts[0])
        video.remember()  # under the text of its time
        self._host.bring(self._host.transformer)
        video.text = self._host.transformer.embed_text(embeds)
        self._decode.check_too({TEXT: embeds})
        if self._past is not None:
            with self._phase("remember"):
                self._past.recompute(video.model, video.text, self._context_noise)

    @torch.no_grad()
    def fork(self, seeds: Sequence[int] | None = None) -> "Session":
        """Another session with the same past. With the same seeds and prompts both go on to the same frames.

        Args:
            seeds: of the noise of the fork's blocks, one per video; those of this session by default.

        Raises:
            InputError: another number of seeds than videos, or the session is closed.
        """
        self._require_open()
        plan = self._present_plan()
        if seeds is not None:
            plan = replace(plan, seeds=choose_seeds(seeds, None, plan.texts.batch))
        self._host.ready()
        spec = self._host.memory_spec(
            len(self._texts[0].embeds_BTD), plan.height, plan.width, plan.latent_frames, plan.memory
        )
        return Session.resume(self._host, plan, self._facts(plan), self.snapshot().clone(), spec)

    # -- holding

    def _present_plan(self) -> VideoPlan:
        """The plan with the texts that are left."""
        first, *later = self._texts
        return replace(self._plan, texts=first.texts, switches=tuple((each.frame, each.texts) for each in later))

    def _facts(self, plan: VideoPlan) -> SessionFacts:
        return SessionFacts.of(
            plan,
            self._host.resolve_memory(plan.memory),
            [each.frame for each in self._texts],
            index=self._video.index,
            start_frame=self._video.start_frame,
            context_frames=self._context_frames,
        )

    def snapshot(self) -> Snapshot:
        """All tensors that the video's future depends on, and what is counted in them; views, which `next` changes."""
        video = self._video
        tensors = {f"text.{number}": each.embeds_BTD for number, each in enumerate(self._texts)}
        kept = self._given.kept_BFCHW if video.index == 0 else None
        others = {
            "pending": video.pending_BFCHW,
            "recent": video.recent_BFCHW,
            "kept": kept,
            "source": self._given.source_BFCHW,
            "noise": self._plan.latents,
        }
        tensors |= {name: value for name, value in others.items() if value is not None}
        parts = {"memory": video.memory.snapshot(), "decoder": self._decode.snapshot()}
        if self._past is not None:
            parts["past"] = self._past.snapshot()
        whole = Snapshot.joined(parts)
        return Snapshot({**tensors, **whole.tensors}, whole.counters)

    def save(self, path: str | Path) -> None:
        """Write the session to a safetensors file, from which `CausalVideoPipeline.load_session` goes on; atomic.

        The file has the memory as far as it is written, the decoder's cache, the last block, texts and embeddings,
        settings, position, and fingerprints of all parts of the pipeline. It has no frames that were handed out.

        Raises:
            InputError: the file cannot be written, the session is closed, or it has a callback, which no file holds.
        """
        self._require_open()
        if self._plan.callback is not None:
            raise InputError("a session with callback_on_step_end cannot be saved: leave the callback out")
        write_session(Path(path), self._host, self._facts(self._present_plan()), self.snapshot())

    @property
    def memory_bytes(self) -> int:
        """Bytes of the transformer's memory, and of the blocks that a switch would compute it anew from."""
        self._require_open()
        return self._video.memory.num_bytes + self.past_bytes

    @property
    def past_bytes(self) -> int:
        """Of `memory_bytes`, those of the blocks that a switch would compute the memory anew from."""
        self._require_open()
        return 0 if self._past is None else self._past.num_bytes

    def close(self) -> None:
        """Give memory and decoder back. Nothing can be done with the session after it; closing twice does nothing."""
        if self._closed:
            return
        self._closed = True
        del self._video, self._decode, self._past, self._given
        self._texts.clear()
        self._host.maybe_free_model_hooks()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _require_open(self) -> None:
        """Check that the session can go on.

        Raises:
            InputError: it is closed, or the pipeline is on another device than when it began.
            NonFiniteBlockError: a block was not finite.
        """
        if self._closed:
            raise InputError("the session is closed: begin another, or load a saved one")
        if self._broken is not None:
            raise NonFiniteBlockError(*self._broken)
        if self._host._execution_device != self._device:
            raise InputError(
                f"the session is on {self._device}, the pipeline on {self._host._execution_device}: move it back, save "
                "the session, and load it after the move"
            )
