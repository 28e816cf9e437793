"""Parts of a planned video: memory, latents of given frames, noise; and fingerprints of what makes it."""

import logging
import weakref
from itertools import count

import torch
from torch import Tensor, nn

from arl2.rollout import Noise, SeededNoise, StepHook
from pipelines.config import MemoryConfig
from pipelines.generation.inputs.given import GivenFrames
from pipelines.generation.inputs.request import StartingNoise, changed_latents
from pipelines.generation.mixins.planning import PlanningMixin, VideoPlan
from pipelines.generation.mixins.speed import SpeedMixin, Weights, weights_state
from pipelines.provenance import part_fingerprint, tokenizer_fingerprint
from wan.memory import Memory, MemorySpec

log = logging.getLogger(__name__)


class MakingMixin(PlanningMixin, SpeedMixin):
    """Adds the parts of a planned video to a pipeline."""

    _warnings_of_memory: set[str]
    _known_fingerprints: dict[str, tuple[weakref.ref[nn.Module], Weights, str]]

    def resolve_memory(self, memory: MemoryConfig) -> MemoryConfig:
        """The memory that a request means for this model; one that training did not meet is warned of, once."""
        trained = self.transformer.trained_memory
        warning = memory.warning(trained, bool(self.transformer.hybrid.layers))
        if warning is not None and warning not in self._warnings_of_memory:
            self._warnings_of_memory.add(warning)
            log.warning("%s", warning)
        return memory.resolved(trained)

    def new_memory(
        self, batch_size: int, height: int, width: int, latent_frames: int | None, memory: MemoryConfig
    ) -> Memory:
        """An empty memory for videos of this size.

        Args:
            latent_frames: of the whole video, to be allocated at once; None if it is not known.
            memory: of the softmax layers; another than the model was trained with is warned of once.
        """
        spec = self.memory_spec(batch_size, height, width, latent_frames, memory)
        return (self._pool or self.transformer).new_memory(spec)

    def memory_spec(
        self, batch_size: int, height: int, width: int, latent_frames: int | None, memory: MemoryConfig
    ) -> MemorySpec:
        """Sizes and kind of the memory that `new_memory` makes."""
        self.check_memory(memory)
        memory = self.resolve_memory(memory)
        window_frames, sink_frames = memory.window_for(latent_frames)
        return MemorySpec(
            batch_size=batch_size,
            tokens_per_frame=self.transformer.tokens_per_frame(*self.latent_size(height, width)),
            device=self._execution_device,
            dtype=self.transformer.dtype,
            frames=latent_frames or self.config.frames_per_block,
            window_frames=window_frames,
            sink_frames=sink_frames,
            head_shards=self.transformer.head_shards,
            sink_decay=memory.decay_for(latent_frames),
        )

    def encode_given(self, plan: VideoPlan, device: torch.device) -> GivenFrames:
        """Latents of the frames that a call is given."""
        given, batch = plan.given, plan.texts.batch
        if given.pixels_BTCHW is not None:
            latents = self.wan_vae.encode(given.pixels_BTCHW.to(self.wan_vae.device, self.wan_vae.dtype))
        elif given.video is not None:
            frames = given.latent_frames if given.strength is None else plan.latent_frames or 0
            latents = given.video.encode(self.wan_vae, batch, given.first_frame, frames)
        else:
            return GivenFrames()
        latents = latents.to(device)
        if given.strength is not None:
            return GivenFrames(source_BFCHW=latents)
        return GivenFrames.to_continue(latents, self.config.frames_per_block)

    def noise(self, plan: VideoPlan, first_frame: int, size: tuple[int, int], device: torch.device) -> Noise:
        """The noise of a video's blocks.

        Args:
            first_frame: latent frames before the first generated block.
            size: height and width of latents.
        """
        drawn = SeededNoise(plan.seeds, (self.config.frames_per_block, self.transformer.config.in_dim, *size), device)
        return drawn if plan.latents is None else StartingNoise(plan.latents, drawn, first_frame)

    def step_hook(self, plan: VideoPlan) -> StepHook | None:
        """The callback of a call, as the rollout takes it."""
        callback, steps = plan.callback, count()
        if callback is None:
            return None

        def hook(block: int, step: int, timestep: float, latents_BFCHW: Tensor) -> Tensor:
            return changed_latents(callback(self, next(steps), timestep, {"latents": latents_BFCHW}), latents_BFCHW)

        return hook

    def ready(self) -> None:
        """Have the parts as the next pass needs them: the fast form made, nothing in a type that is too narrow."""
        self.wan_vae.leave_float16()
        self.ready_form()

    def fingerprints(self) -> dict[str, str]:
        """Hashes of all parts as they are, LoRAs included; computed anew only for parts whose weights have changed."""
        parts = {"vae": self.vae, "text_encoder": self.text_encoder, "tiny_vae": self.wan_vae.tiny}
        found = {name: self._fingerprint(name, part) for name, part in parts.items() if part is not None}
        merged = self.unmerged_fingerprint
        found["transformer"] = self._fingerprint("transformer", self.transformer) if merged is None else merged
        if self.tokenizer is not None:
            found["tokenizer"] = tokenizer_fingerprint(self.tokenizer)
        return found

    def _fingerprint(self, name: str, part: nn.Module) -> str:
        state = weights_state(part)
        known = self._known_fingerprints.get(name)
        if known is None or known[0]() is not part or known[1] != state:
            known = self._known_fingerprints[name] = weakref.ref(part), state, part_fingerprint(part)
        return known[2]
