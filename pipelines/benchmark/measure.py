"""Measuring one case: warm-up, repeats, and what is left to say when memory runs out."""

import gc
import logging
import statistics
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from arl2.inference.cuda_graphs import GraphedModel
from arl2.model import keep_gates_in_float32
from arl2.rollout import GeneratedBlock, SeededNoise, remember_block, rollout
from pipelines.benchmark.cases import BLOCKS_PER_SAMPLE, BenchmarkConfig, Case, empty_model, memory_bytes
from pipelines.benchmark.ceilings import Ceilings
from pipelines.benchmark.flops import Flops, rollout_flops
from pipelines.config import MemoryKind
from pipelines.generation.blocks import NonFiniteBlockError
from pipelines.generation.lockstep import Lockstep
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.random_model import random_pipeline
from pipelines.generation.streaming import Transfer, finished
from pipelines.generation.timing import PhaseTimer
from pipelines.media.video import VideoWriter
from wan.memory import Memory, SlotUpdate
from wan.model import TextKV
from wan.utils.errors import out_of_memory

log = logging.getLogger(__name__)

PROMPT = "a red shape rolls"
ENDS = 10
"""Blocks at the start, and at the end, whose latency is reported."""


@dataclass(frozen=True)
class Stage:
    """A model that is ready to be measured.

    Attributes:
        pipeline: with random weights.
        prompt_embeds: of a prompt; text is encoded once and never timed.
        config: of the benchmark.
        folder: where videos are written, and removed when they have been measured.
        lockstep: of the ranks that compute every video together; None for one.
    """

    pipeline: CausalVideoPipeline
    prompt_embeds: Tensor
    config: BenchmarkConfig
    folder: Path
    lockstep: Lockstep | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.prompt_embeds.device


class SpanTimer(PhaseTimer):
    """A timer that tells every single span too."""

    def spans(self, name: str) -> list[float]:
        """Seconds of every span of a phase, in order; waits for the GPU."""
        self.synchronize()
        return [span() for span in self._spans[name]]


@dataclass
class Trace:
    """What one run shows, noted block by block, so that it is there if the run breaks off.

    Attributes:
        start: when it began, by the wall clock.
        frames: of the video so far.
        arrivals: seconds from the start until each block was there: on the CPU with the VAE, else finished.
        allocated: bytes on the GPU then.
        denoise, clean: (block, GPU seconds) of every block measured; none if the decoder worked beside them.
        vae, mp4, total: seconds of decoding, of encoding beside the rest (wall clock), and of everything until the
            file was whole.
        sampled: whether only some places of the video ran.
    """

    start: float = field(default_factory=time.perf_counter)
    frames: int = 0
    arrivals: list[float] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)
    denoise: list[tuple[int, float]] = field(default_factory=list)
    clean: list[tuple[int, float]] = field(default_factory=list)
    vae: float | None = None
    mp4: float | None = None
    total: float | None = None
    sampled: bool = False

    def block_arrived(self, frames: int, device: torch.device) -> None:
        """Note that the video has `frames` frames now."""
        self.frames = frames
        self.arrivals.append(time.perf_counter() - self.start)
        if device.type == "cuda":
            self.allocated.append(torch.cuda.memory_allocated(device))

    def take(self, timer: SpanTimer, first_block: int = 0) -> None:
        """Add the spans of a rollout that began at `first_block`."""
        self.denoise += enumerate(timer.spans("denoise"), first_block)
        self.clean += enumerate(timer.spans("remember"), first_block)


def build_stage(
    config: BenchmarkConfig,
    case: Case,
    device: torch.device,
    dtype: torch.dtype,
    folder: Path,
    lockstep: Lockstep | None = None,
) -> Stage:
    """Draw the case's model on the device."""
    start = time.perf_counter()
    pipeline = random_pipeline(
        config.size,
        case.settings(config.lora_rank),
        vae_config=config.vae_config,
        text_config=config.text_config,
        words=PROMPT.split(),
        seed=config.seed,
        device=device,
        dtype=dtype,
        frames_per_block=config.frames_per_block,
        denoising_steps=config.denoising_steps,
        warp_denoising_steps=config.warp_denoising_steps,
        timestep_shift=config.timestep_shift,
    )
    keep_gates_in_float32(pipeline.transformer, dtype)
    if lockstep is not None:
        pipeline.parallelize(case.speed.exchange)
    case.speed.apply(pipeline)
    with torch.no_grad():
        stage = Stage(pipeline, pipeline.encode_prompt([PROMPT]).to(device), config, folder, lockstep)
    log.info("%s: drawn in %.1f s", case.row, time.perf_counter() - start)
    return stage


def generate_video(stage: Stage, case: Case, frames: int, trace: Trace) -> None:
    """Generate, decode and write a video of `frames` frames; a rank that follows writes nothing."""
    config, timer = stage.config, SpanTimer(stage.device, {"vae": stage.pipeline.wan_vae.device})
    stream = partial(
        stage.pipeline.stream,
        None,
        frames,
        config.height,
        config.width,
        prompt_embeds=stage.prompt_embeds,
        seeds=[config.seed],
        memory=case.memory,
        phase=timer.phase,
        lockstep=stage.lockstep,
    )
    if stage.lockstep is not None and not stage.lockstep.leads:
        deque(stream(), maxlen=0)
        return
    with tempfile.TemporaryDirectory(dir=stage.folder) as folder:
        trace.start = time.perf_counter()
        with VideoWriter(Path(folder) / "video.mp4", config.height, config.width, fps=config.fps) as writer:
            for block in stream():
                frames_THWC = block.frames_BTHWC.wait()[0]
                trace.block_arrived(config.frames_after(block.index + 1), stage.device)
                writer.write(frames_THWC)
        trace.total = time.perf_counter() - trace.start
    trace.mp4 = writer.seconds
    if not stage.pipeline.overlaps_decoding:
        trace.take(timer)
        trace.vae = sum(timer.spans("vae"))


def empty_memory(stage: Stage, case: Case, frames: int) -> tuple[Memory, TextKV]:
    """An empty memory for a video of `frames` frames, and the text's keys and values."""
    pipeline, config = stage.pipeline, stage.config
    memory = pipeline.new_memory(1, config.height, config.width, pipeline.latent_frames(frames), case.memory)
    return memory, pipeline.transformer.embed_text(stage.prompt_embeds.to(pipeline.transformer.dtype))


@torch.no_grad()
def generate_latents(stage: Stage, case: Case, frames: int, trace: Trace) -> None:
    """Run only the transformer over a video of `frames` frames."""
    trace.start, timer = time.perf_counter(), SpanTimer(stage.device)
    _roll(stage, *empty_memory(stage, case, frames), stage.config.blocks(frames), 0, trace, timer)
    trace.take(timer)


def whole_run(case: Case) -> Callable[[Stage, Case, int, Trace], None]:
    """What makes a whole video of a case: with the VAE or without."""
    return generate_video if case.vae else generate_latents


def _roll(
    stage: Stage, memory: Memory, text: TextKV, blocks: int, first_block: int, trace: Trace, timer: SpanTimer
) -> None:
    """Generate some blocks over a memory that holds `first_block` blocks."""
    pipeline, config = stage.pipeline, stage.config
    noise = _noise(stage)
    start_frame, context_noise = first_block * config.frames_per_block, pipeline.config.context_noise
    model, sampler = pipeline.flow_model, pipeline.sampler
    generated = rollout(model, sampler, noise, text, memory, blocks, start_frame, context_noise, timer.phase)

    # The check of `CausalVideoPipeline.stream`: the same costs as there.
    def check(block: GeneratedBlock) -> tuple[int, Transfer]:
        return block.index, Transfer(torch.isfinite(block.latents_BFCHW).all())

    for index, finite in finished(check, generated, stage.device):
        if not finite.wait():
            raise NonFiniteBlockError(first_block + index)
        trace.block_arrived(config.frames_after(first_block + index + 1), stage.device)


def _noise(stage: Stage) -> SeededNoise:
    config = stage.config
    shape = (config.frames_per_block, stage.pipeline.transformer.config.in_dim, *config.latent_size)
    return SeededNoise([config.seed], shape, stage.device)


class RepeatedCommits(Memory):
    """A memory that takes every commit several times: filled without generating what it holds."""

    def __init__(self, memory: Memory, times: int) -> None:
        super().__init__(memory.layers)
        self._times = times

    def commit(self, updates: Sequence[Any]) -> None:
        """Give every layer its update, again and again."""
        copied = [update.copied() if isinstance(update, SlotUpdate) else update for update in updates]
        for _ in range(self._times):
            super().commit(copied)


@torch.no_grad()
def sample_latents(stage: Stage, case: Case, frames: int, trace: Trace) -> None:
    """Run only the transformer, and only `BLOCKS_PER_SAMPLE` blocks at each of some places of the video.

    Before each place the memory is filled with keys and values of one clean pass over noise, as often as blocks are
    missing: what a block costs depends on how much is remembered, not on what.
    """
    assert case.blocks_sampled is not None
    trace.start, trace.sampled, written = time.perf_counter(), True, 0
    memory, text = empty_memory(stage, case, frames)
    for place in sampled_places(stage.config.blocks(frames), case.blocks_sampled):
        if place > written:
            filling = RepeatedCommits(memory, place - written)
            remember_block(stage.pipeline.flow_model, _noise(stage)(place, 0), text, filling, 0)
        timer = SpanTimer(stage.device)
        # One more than is counted: the last block of a rollout is not remembered.
        _roll(stage, memory, text, BLOCKS_PER_SAMPLE + 1, place, trace, timer)
        trace.take(timer, place)
        written = place + BLOCKS_PER_SAMPLE


def sampled_places(blocks: int, samples: int) -> list[int]:
    """Blocks at which samples begin, from the first to the last that leaves room for one."""
    return [round(place) for place in np.linspace(0, blocks - BLOCKS_PER_SAMPLE - 1, samples)]


def integrate(points: list[tuple[int, float]], blocks: int) -> float:
    """Seconds of blocks 0 to `blocks` - 1 from those of some: straight lines between them, level beyond the ends."""
    places, seconds = zip(*points, strict=True)
    return float(np.interp(np.arange(blocks), places, seconds).sum())


def latencies(trace: Trace) -> list[tuple[int, float]]:
    """(block, seconds) from noise to remembered, of all blocks that were remembered."""
    clean = dict(trace.clean)
    return [(block, seconds + clean[block]) for block, seconds in trace.denoise if block in clean]


def metrics(trace: Trace, case: Case, blocks: int, flops: Flops, ceilings: Ceilings) -> dict[str, float | None]:
    """The columns of the table, in seconds, bytes, frames and operations a second; None where not measured."""
    steps = [after - before for before, after in pairwise(trace.arrivals)]
    columns: dict[str, float | None] = {
        "vae_seconds": trace.vae,
        "mp4_seconds": trace.mp4,
        "total_seconds": trace.total,
        "vae_fps": case.frames / trace.vae if trace.vae else None,
        "fps": case.frames / trace.total if trace.total else None,
        "first_frame_seconds": trace.arrivals[0] if trace.total else None,
        "interval_median": statistics.median(steps) if trace.total and steps else None,
        "interval_p90": float(np.percentile(steps, 90)) if trace.total and steps else None,
        "steady_bytes": trace.allocated[-1] if trace.allocated else None,
    }
    return columns | (transformer_metrics(trace, case, blocks, flops, ceilings) if trace.denoise else {})


def transformer_metrics(
    trace: Trace, case: Case, blocks: int, flops: Flops, ceilings: Ceilings
) -> dict[str, float | None]:
    """The columns that are of the transformer alone."""
    denoise, clean = integrate(trace.denoise, blocks), integrate(trace.clean, blocks - 1) if trace.clean else 0.0
    dit = denoise + clean
    per_block = latencies(trace) or trace.denoise
    ends = {
        "first_blocks": [seconds for block, seconds in per_block if block < ENDS],
        "last_blocks": [seconds for block, seconds in per_block if block >= per_block[-1][0] + 1 - ENDS],
    }
    columns: dict[str, float | None] = {
        "denoise_seconds": denoise,
        "clean_seconds": clean,
        "dit_seconds": dit,
        "dit_fps": case.frames / dit,
        "flops_per_second": flops.total / dit,
        "share_of_ceiling": ceilings.least_seconds(flops) / case.ranks / dit,
    }
    for name, seconds in ends.items():
        columns[f"{name}_median"] = statistics.median(seconds)
        columns[f"{name}_p90"] = float(np.percentile(seconds, 90))
    return columns


def measure_case(
    build: Callable[[], Stage], config: BenchmarkConfig, case: Case, ceilings: Ceilings, dtype: torch.dtype
) -> dict[str, Any]:
    """Measure one case; what goes wrong with it is its result, unless several ranks compute it.

    Args:
        build: the stage of the case's model; called inside, since memory may run out there too.
        config: of the benchmark.
        case: what to measure.
        ceilings: to compare with.
        dtype: of the weights.

    Returns:
        a record of the JSON file: case, status ("ok", "oom", "failed"), and per repeat what `Trace` holds and `metrics`
        makes of it, with median, least and greatest over repeats.
    """
    trace, repeats, failure, seconds = Trace(), [], None, None
    flops = case_flops(config, case)
    try:
        stage = build()
        run = sample_latents if case.blocks_sampled else whole_run(case)
        seconds = warm_up(stage, case)
        for _ in range(config.repeats):
            release()
            trace = Trace()
            if stage.device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(stage.device)
            run(stage, case, case.frames, trace)
            repeats.append(_repeat(trace, case, config, flops, ceilings, stage))
    except RuntimeError as error:
        # Of several ranks, the others would wait for this one.
        if case.ranks > 1 or not (isinstance(error, NonFiniteBlockError) or out_of_memory(error)):
            raise
        failure = {
            "status": "failed" if isinstance(error, NonFiniteBlockError) else "oom",
            "error": str(error).splitlines()[0],
            "reached_frames": trace.frames,
        }
    release()
    return {
        "case": asdict(case),
        "status": "ok",
        "warm_up_seconds": seconds,
        "memory_bytes": memory_bytes(config, case, dtype),
        "flops": asdict(flops),
        "summary": summary([repeat["metrics"] for repeat in repeats]),
        "repeats": repeats,
    } | (failure or {})


def warm_up(stage: Stage, case: Case) -> float:
    """Run a short video, so that kernels are compiled, tuned and loaded, and windows have been full.

    Where passes are recorded, a second one records those that the first met.

    Returns:
        seconds that it took.
    """
    blocks = min(stage.config.warmup_blocks, stage.config.blocks(case.frames))
    run, start = whole_run(case), time.perf_counter()
    for _ in range(2 if isinstance(stage.pipeline.flow_model, GraphedModel) else 1):
        run(stage, case, stage.config.frames_after(blocks), Trace())
    seconds = time.perf_counter() - start
    log.info("%s, %d frames: warm-up %.1f s", case.row, case.frames, seconds)
    return seconds


def _repeat(
    trace: Trace, case: Case, config: BenchmarkConfig, flops: Flops, ceilings: Ceilings, stage: Stage
) -> dict[str, Any]:
    columns = metrics(trace, case, config.blocks(case.frames), flops, ceilings)
    columns["peak_bytes"] = None
    if stage.device.type == "cuda":
        columns["peak_bytes"] = torch.cuda.max_memory_allocated(stage.device) + stage.pipeline.symmetric_bytes
    return {
        "metrics": columns,
        "dit_block_seconds": latencies(trace),
        "arrivals": trace.arrivals,
        "allocated_bytes_after_block": trace.allocated,
    }


def case_flops(config: BenchmarkConfig, case: Case) -> Flops:
    """Operations of the case's transformer over the whole video."""
    model = empty_model(config, case)
    per_frame = model.tokens_per_frame(*config.latent_size)
    window = case.memory.window_frames * per_frame if case.memory.kind is MemoryKind.window else None
    return rollout_flops(
        model,
        config.frames_per_block,
        config.frames_per_block * per_frame,
        window,
        len(config.denoising_steps),
        config.blocks(case.frames),
    )


def summary(repeats: list[dict[str, float | None]]) -> dict[str, dict[str, float]]:
    """Median, least and greatest of every column over repeats."""
    columns = {
        name: [value for repeat in repeats if (value := repeat[name]) is not None]
        for name in (repeats[0] if repeats else ())
    }
    return {
        name: {"median": statistics.median(values), "least": min(values), "greatest": max(values)}
        for name, values in columns.items()
        if values
    }


def release() -> None:
    """Give back the GPU memory that nothing refers to."""
    if torch.cuda.is_available():
        gc.collect()
        torch.cuda.empty_cache()
