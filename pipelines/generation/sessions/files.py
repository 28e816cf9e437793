"""Files of sessions: safetensors with all tensors, and a header that says what they are of. They are untrusted.

    header["arl2_session"]   JSON: version, facts (`SessionFacts`), counters, hashes of all tensors, and what made them
    header["sha256"]         of that JSON

Before anything of the size that a file names is allocated or computed, its tensors are compared with what a session of
that size holds.
"""

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Self

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from arl2.rollout import FewStepSampler
from pipelines.config import Frames, MemoryConfig, Pixels, Strength
from pipelines.feasibility import available_bytes
from pipelines.generation.inputs.request import MAX_GUIDANCE, Texts
from pipelines.generation.inputs.schedule import check_on_switch
from pipelines.generation.mixins.making import MakingMixin
from pipelines.generation.mixins.planning import Given, VideoPlan
from pipelines.prompts.schedules import OnSwitch
from pipelines.provenance import versions
from wan.checkpoints.loading import read_header
from wan.checkpoints.saving import METADATA, stored_hash, write_safetensors
from wan.checkpoints.tensors import require_finite
from wan.memory import MemorySpec
from wan.snapshots import Snapshot
from wan.utils.errors import CheckpointError, InputError
from wan.utils.files import check_target, parse_json
from wan.utils.ranges import Bounds, Length, Seed, typed
from wan.utils.settings import differences, plain, require_same_settings

log = logging.getLogger(__name__)

VERSION = 1
"""Of the format. A file of another one is refused."""
ENTRY, DIGEST = "arl2_session", "sha256"
CURE = "save the session again"
OTHER = "load it with the pipeline that saved it"
MAX_TEXTS = 10_000
Count = Annotated[int, Bounds(0, 2**40)]
Levels = Annotated[list[float], Length(1, 1000)]


@dataclass
class SamplerFacts:
    """Steps of a block, as `arl2.rollout.FewStepSampler` has them."""

    timesteps: Levels
    sigmas: Levels


@dataclass
class TextFacts:
    """The words of a text, one per video; null where embeddings were given in their place."""

    prompts: list[str] | None = None
    negative_prompts: list[str] | None = None


@dataclass
class SessionFacts:
    """What a session is, beside its tensors.

    Attributes:
        height, width: pixels.
        seeds: one per video.
        sampler, first_block: steps of all blocks, and of the first if it has its own.
        memory: of the softmax layers, resolved.
        text_frames: first latent frames of the texts, the present one first.
        texts: their words.
        index: number of the next block, given ones not counted.
        start_frame: its first latent frame.
        context_frames: latent frames of given blocks.
        latent_frames, blocks: of the whole video; null for no end.
        guidance_scale: 1 for no guidance.
        strength, max_sequence_length, on_switch: as in a call.
    """

    height: Pixels
    width: Pixels
    seeds: Annotated[list[Seed], Length(1, 2**20)]
    sampler: SamplerFacts
    memory: MemoryConfig
    text_frames: Annotated[list[Count], Length(1, MAX_TEXTS)]
    index: Count
    start_frame: Count
    context_frames: Count
    texts: list[TextFacts] = field(default_factory=list)
    first_block: SamplerFacts | None = None
    latent_frames: Frames | None = None
    blocks: Frames | None = None
    guidance_scale: Annotated[float, Bounds(1, MAX_GUIDANCE)] = 1.0
    strength: Strength | None = None
    max_sequence_length: Annotated[int, Bounds(2, 2**20)] | None = None
    on_switch: OnSwitch = OnSwitch.keep

    @classmethod
    def of(
        cls,
        plan: VideoPlan,
        memory: MemoryConfig,
        text_frames: Sequence[int],
        *,
        index: int,
        start_frame: int,
        context_frames: int,
    ) -> Self:
        """Facts of a plan at some position.

        Args:
            memory: of the plan, resolved.
            text_frames, index, start_frame, context_frames: see the class.
        """
        first = plan.sampler.first_block
        texts = (plan.texts, *(each for _, each in plan.switches))
        return cls(
            height=plan.height,
            width=plan.width,
            seeds=list(plan.seeds),
            sampler=SamplerFacts(list(plan.sampler.timesteps), list(plan.sampler.sigmas)),
            first_block=None if first is None else SamplerFacts(list(first.timesteps), list(first.sigmas)),
            memory=memory,
            text_frames=list(text_frames),
            texts=[TextFacts(each.prompts, each.negative_prompts) for each in texts],
            index=index,
            start_frame=start_frame,
            context_frames=context_frames,
            latent_frames=plan.latent_frames,
            blocks=plan.blocks,
            guidance_scale=plan.texts.guidance_scale,
            strength=plan.given.strength,
            max_sequence_length=plan.max_sequence_length,
            on_switch=plan.on_switch,
        )

    def check(self, frames_per_block: int) -> None:
        """Make sure that the facts agree with one another.

        Raises:
            InputError: they do not.
        """
        end = None if self.latent_frames is None else (self.latent_frames - self.context_frames) / frames_per_block
        agree = {
            "texts": len(self.texts) == len(self.text_frames),
            "text_frames": self.text_frames == sorted(set(self.text_frames)),
            "context_frames": self.context_frames % frames_per_block == 0,
            "start_frame": self.start_frame == self.context_frames + self.index * frames_per_block,
            "blocks": self.blocks == end,
            "index": self.blocks is None or self.index <= self.blocks,
            "sampler": all(
                len(each.timesteps) == len(each.sigmas) for each in (self.sampler, self.first_block or self.sampler)
            ),
        }
        for name, fits in agree.items():
            if not fits:
                raise InputError(f"its {name} contradicts its other facts")
        self.memory.check(frames_per_block)
        check_on_switch(self.on_switch, self.memory)

    def few_steps(self) -> FewStepSampler:
        """The steps."""
        parts = [
            None if each is None else (tuple(each.timesteps), tuple(each.sigmas))
            for each in (self.first_block, self.sampler)
        ]
        first = None if parts[0] is None else FewStepSampler(*parts[0])
        assert parts[1] is not None
        return FewStepSampler(*parts[1], first)


def write_session(path: Path, host: MakingMixin, facts: SessionFacts, snapshot: Snapshot) -> None:
    """Write a session; atomic.

    Args:
        path: the name must end in `.safetensors`.
        host: the pipeline.

    Raises:
        InputError: it cannot be written.
    """
    if path.suffix != ".safetensors":
        raise InputError(f"{path} is no name of a session: let it end in .safetensors")
    check_target(path)
    held = snapshot.clone(torch.device("cpu"))
    record = {
        "version": VERSION,
        "facts": plain(asdict(facts)),
        "counters": dict(held.counters),
        "tensors": {name: stored_hash(value) for name, value in held.tensors.items()},
        "made_with": made_with(host),
        "made_on": made_on(host),
    }
    text = json.dumps(record, sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()
    write_safetensors(path, held.tensors, METADATA | {ENTRY: text, DIGEST: digest})


def made_with(host: MakingMixin) -> dict[str, Any]:
    """What a session cannot be continued without: all parts of a pipeline, their types, and how it makes blocks."""
    vae = host.wan_vae
    bands = int(host.vae.tile_sample_min_height) if host.vae.use_tiling else None
    return {
        "weights": host.fingerprints(),
        "dtype": str(host.transformer.dtype),
        "vae_dtype": str(vae.dtype),
        "decoder": "tiny" if vae.tiny is not None else "fast" if vae.fast else "plain",
        "tiling": bands,
        "slicing": bool(host.vae.use_slicing),
        "frames_per_block": host.config.frames_per_block,
        "context_noise": host.config.context_noise,
    }


def made_on(host: MakingMixin) -> dict[str, Any]:
    """What the last bits of frames depend on beside that."""
    return {
        "device": host._execution_device.type,
        "fast_form": host._fast is not None,
        "torch": versions(())["torch"],
    }


def read_session(path: Path, host: MakingMixin) -> tuple[VideoPlan, SessionFacts, Snapshot, MemorySpec]:
    """Read a session's file, and hold it against a pipeline.

    Returns:
        its plan, facts, tensors on the pipeline's device, and the sizes of its memory.

    Raises:
        CheckpointError: the file is missing, damaged, no session's, of another version, pipeline or size.
    """
    record = _read_record(path)
    facts, sampler = _facts_of(path, record, host)
    tensors = _read_tensors(path, record)
    snapshot = Snapshot(tensors, record["counters"])
    try:
        plan = _plan_of(facts, sampler, snapshot, host)
        spec = _spec_of(facts, snapshot, plan, host)
    except InputError as error:
        raise does_not_fit(path, error) from error
    return plan, facts, snapshot.clone(host._execution_device), spec


def was_saved_by(path: Path, host: MakingMixin) -> bool:
    """Whether a session's file names the transformer of a pipeline as its own; nothing else is compared.

    Raises:
        CheckpointError: the file is missing, damaged, no session's or of another version.
    """
    weights = _read_record(path)["made_with"].get("weights")
    return isinstance(weights, dict) and weights.get("transformer") == host.fingerprints()["transformer"]


def read_facts(path: Path, host: MakingMixin) -> SessionFacts:
    """What a session's file says beside its tensors, which are not read.

    Raises:
        CheckpointError: the file is missing, damaged, no session's, or of another version or pipeline.
    """
    return _facts_of(path, _read_record(path), host)[0]


def _facts_of(path: Path, record: Mapping[str, Any], host: MakingMixin) -> tuple[SessionFacts, FewStepSampler]:
    """The facts of a file, held against a pipeline, and the steps."""
    _require_same_pipeline(path, record, host)
    try:
        facts: SessionFacts = typed(SessionFacts, record["facts"], "")
        facts.check(host.config.frames_per_block)
        sampler = facts.few_steps()
        host.latent_size(facts.height, facts.width)
    except InputError as error:
        raise CheckpointError(f"{path} holds no session that can be continued ({error}): {CURE}") from error
    return facts, sampler


def does_not_fit(path: Path, error: InputError) -> CheckpointError:
    """The error of a file whose tensors are not those of its facts."""
    return CheckpointError(f"{path} does not fit this pipeline: {error}; {OTHER}, or {CURE}")


def _read_record(path: Path) -> dict[str, Any]:
    """The header's record."""
    if not path.is_file():
        raise CheckpointError(f"no session at {path}: check the path")
    try:
        _, metadata = read_header(path)
    except CheckpointError as error:
        raise CheckpointError(f"{path} is damaged or incomplete, or is no safetensors file: {CURE}") from error
    text = metadata.get(ENTRY)
    if text is None:
        raise CheckpointError(f"{path} holds no session: give a file that Session.save has written")
    if metadata.get(DIGEST) != hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest():
        raise CheckpointError(f"{path} is damaged, its header is not the one that was written: {CURE}")
    try:
        record = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{path} is damaged, its header is not valid JSON: {CURE}") from error
    version = record.get("version") if isinstance(record, dict) else None
    if version != VERSION:
        raise CheckpointError(
            f"{path} is a session of version {str(version)[:20]}, this code reads {VERSION}: load it with the version "
            "that saved it, or begin another session"
        )
    kinds = {"facts": dict, "counters": dict, "tensors": dict, "made_with": dict, "made_on": dict}
    if any(not isinstance(record.get(name), kind) for name, kind in kinds.items()) or not all(
        type(value) is int for value in record["counters"].values()
    ):
        raise CheckpointError(f"{path} is damaged, its header lacks what every session has: {CURE}")
    found: dict[str, Any] = record
    return found


def _require_same_pipeline(path: Path, record: Mapping[str, Any], host: MakingMixin) -> None:
    """Compare what made a session with a pipeline; a difference of last bits is warned of."""
    before, now = dict(record["made_with"]), made_with(host)
    # Without an encoder a session can go on, with the embeddings that it has.
    if isinstance(before.get("weights"), dict):
        for part in ("text_encoder", "tokenizer"):
            if part not in before["weights"] or part not in now["weights"]:
                before["weights"] = {name: value for name, value in before["weights"].items() if name != part}
                now["weights"].pop(part, None)
    require_same_settings(before, now, f"{path} was saved", OTHER, CheckpointError)
    changed = differences(record["made_on"], made_on(host))
    if changed:
        log.warning("%s: %s: the video goes on, but not to the same last bits", path, "; ".join(changed))


def _read_tensors(path: Path, record: Mapping[str, Any]) -> dict[str, Tensor]:
    """The tensors, each as it was written."""
    try:
        tensors: dict[str, Tensor] = load_file(path)
    except (SafetensorError, OSError, RuntimeError, KeyError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged or incomplete: {CURE}") from error
    if {name: stored_hash(value) for name, value in tensors.items()} != record["tensors"]:
        raise CheckpointError(f"{path} is damaged, its tensors are not those that were written: {CURE}")
    require_finite(tensors, path)
    return tensors


def _plan_of(facts: SessionFacts, sampler: FewStepSampler, snapshot: Snapshot, host: MakingMixin) -> VideoPlan:
    """The plan of a session."""
    batch = len(facts.seeds)
    texts = []
    for number, words in enumerate(facts.texts):
        embeds = snapshot.tensor(f"text.{number}")
        host.check_embeds(embeds)
        guided = facts.guidance_scale > 1
        negative = embeds[batch:] if guided else None
        if len(embeds) != batch * (2 if guided else 1) or len(words.prompts or facts.seeds) != batch:
            raise InputError(f"text.{number} is not of {batch} videos")
        if len(words.negative_prompts or facts.seeds) != batch:
            raise InputError(f"the negative prompts of text {number} are not of {batch} videos")
        texts.append(
            Texts(
                words.prompts,
                words.negative_prompts,
                None if words.prompts is not None else embeds[:batch],
                None if words.negative_prompts is not None else negative,
                facts.guidance_scale,
            )
        )
    _require_latents(facts, snapshot, host)
    return VideoPlan(
        texts=texts[0],
        height=facts.height,
        width=facts.width,
        latent_frames=facts.latent_frames,
        blocks=facts.blocks,
        sampler=sampler,
        seeds=facts.seeds,
        memory=facts.memory,
        given=Given(strength=facts.strength),
        latents=snapshot.tensors.get("noise"),
        callback=None,
        max_sequence_length=facts.max_sequence_length,
        switches=tuple(zip(facts.text_frames[1:], texts[1:], strict=True)),
        on_switch=facts.on_switch,
    )


def _require_latents(facts: SessionFacts, snapshot: Snapshot, host: MakingMixin) -> None:
    """Make sure that latents have the size of the video, and as many frames as their part in it needs."""
    per_block = host.config.frames_per_block
    frames = {"pending": (per_block, per_block), "kept": (1, per_block - 1), "recent": (per_block, facts.start_frame)}
    if facts.latent_frames is not None:
        frames |= {"noise": (facts.latent_frames,) * 2, "source": (facts.latent_frames, 2**40)}
    frames |= {"past.sink": (per_block, facts.start_frame), "past.recent": (per_block, facts.start_frame)}
    size = (host.transformer.config.in_dim, *host.latent_size(facts.height, facts.width))
    for name, (least, most) in frames.items():
        value = snapshot.tensors.get(name)
        if value is None:
            continue
        fits = value.ndim == 5 and len(value) == len(facts.seeds) and tuple(value.shape[2:]) == size
        if not fits or not least <= value.shape[1] <= most or not value.is_floating_point():
            raise InputError(f"{name} is {list(value.shape)} in {value.dtype}, not latents of this video")
    if ("source" in snapshot.tensors) != (facts.strength is not None):
        raise InputError("source and strength must come together")
    if "pending" in snapshot.tensors and not facts.index:
        raise InputError("pending is of a block before the first")


def _spec_of(facts: SessionFacts, snapshot: Snapshot, plan: VideoPlan, host: MakingMixin) -> MemorySpec:
    """Sizes of a session's memory, which the tensors of its file fill, and for which there is room."""
    embeds = snapshot.tensor("text.0")
    spec = host.memory_spec(len(embeds), facts.height, facts.width, facts.latent_frames, plan.memory)
    # A full memory grows: it begins with what the file fills.
    frames = max(facts.start_frame, host.config.frames_per_block)
    spec = replace(spec, frames=frames if spec.window_frames is None else spec.frames)
    tokens = facts.start_frame * spec.tokens_per_frame
    too_many = [name for name, value in snapshot.counters.items() if name.endswith(".written") and value > tokens]
    if too_many:
        raise InputError(f"{too_many[0]} is more than the {facts.start_frame} latent frames that there are")
    on_meta = host.transformer.new_memory(replace(spec, device=torch.device("meta"), frames=0))
    memory = snapshot.part("memory")
    on_meta.restore(Snapshot({name: value.to("meta") for name, value in memory.tensors.items()}, memory.counters))
    if on_meta.num_bytes > available_bytes(spec.device):
        raise InputError(f"its memory needs {on_meta.num_bytes} bytes, {spec.device} has not as many free")
    # What a decoder remembers has at least a value per latent.
    rows, columns = host.latent_size(facts.height, facts.width)
    cached = sum(value.numel() for value in snapshot.part("decoder").tensors.values())
    if facts.start_frame and cached < len(facts.seeds) * rows * columns:
        raise InputError(f"its decoder's cache is too small for {facts.height}×{facts.width} pixels")
    return spec
