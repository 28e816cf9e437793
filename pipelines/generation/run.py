"""Generating the videos of a run: one file and one record per prompt, resumable, beside other processes."""

import logging
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from arl2.rollout import num_blocks
from pipelines.generation.announcements import announced
from pipelines.generation.arguments import InferenceRun, timeline_of
from pipelines.generation.blocks import NonFiniteBlockError, VideoBlock
from pipelines.generation.decoding import Phase
from pipelines.generation.inputs.given import GivenVideo
from pipelines.generation.inputs.request import Prompts
from pipelines.generation.lockstep import Lockstep, join_processes
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.generation.records import (
    asked_of,
    given_of,
    identity_of,
    is_finished,
    lock_path,
    num_pixel_frames,
    record_path,
    video_facts,
    video_path,
)
from pipelines.generation.timing import PhaseTimer
from pipelines.media.images import read_image
from pipelines.media.video import VideoWriter
from pipelines.prompts.jobs import PromptJob, shard_jobs
from pipelines.provenance import device_name, source_fingerprint, summary_of, versions
from wan.utils.files import write_json
from wan.utils.locks import LockedError, exclusive
from wan.utils.ranks import require_agreement
from wan.utils.signals import check_interrupted, on_interruption_say

log = logging.getLogger(__name__)

WARM_UP = "warm up"
GO_ON_WITH_VIDEOS = "finished videos are kept; start the same command again to go on"
MEASURED_PACKAGES = ("diffusers", "transformers")


def load_pipeline(run: InferenceRun) -> CausalVideoPipeline:
    """The pipeline that a run asks for.

    Raises:
        CheckpointError, InputError: weights that are missing, damaged or do not fit.
    """
    config = run.config
    if config.caveat is not None:
        log.warning("%s", config.caveat)
    pipeline = CausalVideoPipeline.from_pretrained(
        config.model_folder,
        checkpoint_path=config.checkpoint_path,
        use_ema=run.use_ema,
        hybrid=config.hybrid.settings(),
        dtype=run.dtype,
        device=run.device,
        vae_device=config.speed.vae_on(run.device),
        seed=run.seed,
        lora=config.lora_sources(),
        optimize=False,
        **config.sampling(),
    )
    check_interrupted()
    pipeline.note_base()
    pipeline.use_attention_backend(run.backend)
    if run.over_video:
        join_processes(run.device)
        require_agreement(settings_of_all(run))
        pipeline.parallelize(config.speed.exchange)
    pipeline.optimize_for_inference(config.speed)
    return pipeline


def settings_of_all(run: InferenceRun) -> dict[str, Any]:
    """Code, settings and videos of a run, which must be the same for all processes that compute every video together.

    What paths lead to is compared by content later, see `identity_of`.
    """
    speed = {name: value for name, value in vars(run.config.speed).items() if name != "tiny_vae"}
    videos = [(job.name, job.prompt, job.seed) for job in run.jobs]
    asked = {"the number of videos": len(videos), "the videos": summary_of(videos), "the code": source_fingerprint()}
    made = {"speed": speed, "dtype": str(run.dtype), "the number of given frames": run.given_frames}
    return run.config.identity() | made | asked


class VideoLog(Protocol):
    """What wants to know which videos of a run are finished."""

    def begin(self, identity: dict[str, Any]) -> None:
        """Take note of what all videos depend on, see `identity_of`, before the first is made."""

    def add(self, job: PromptJob, video: Path, record: Path) -> None:
        """Take note of a finished video and its record, new or found whole."""


def generate(
    run: InferenceRun,
    pipeline: CausalVideoPipeline,
    rank: int = 0,
    world_size: int = 1,
    *,
    anew: bool = False,
    video_log: VideoLog | None = None,
) -> int:
    """Generate this rank's part of the videos, or all of them together with the others; finished ones are skipped.

    Every video has a lock: what another process makes is left to it, and looked at again when the rest is done. A video
    of which something is not finite is left out, and the run goes on.

    Args:
        anew: make finished ones too.
        video_log: told of every finished video of this rank; with --parallel video only that of the leading process is.

    Returns:
        how many videos failed.

    Raises:
        InputError: a finished video was made with other settings, weights or image, or another process is about to
            make it so.
    """
    # As the model means it, so that a video is the same one whichever way its memory was asked for.
    run = replace(run, config=replace(run.config, memory=pipeline.resolve_memory(run.config.memory)))
    identity, lockstep = identity_of(run, pipeline), None
    if run.over_video:
        require_agreement(identity | {"the given pictures": summary_of([given_of(run, job) for job in run.jobs])})
        lockstep = Lockstep(run.device)
        if not lockstep.leads:
            follow(run, pipeline, lockstep)
            return 0
    maker = _Maker(run, pipeline, identity, anew, lockstep, video_log)
    if video_log is not None:
        video_log.begin(maker.identity)
    mine = run.jobs if run.over_video else shard_jobs(run.jobs, rank, world_size)
    # All videos, also those of other ranks: a rank with other settings or weights must not make its part.
    videos = {job.name: given_of(run, job) | asked_of(job) for job in run.jobs}
    with announced(run.output_folder, maker.identity, videos):
        maker.make_all(mine, quiet=rank != 0)
    if lockstep is not None:
        lockstep.tell(None)
    return maker.failed


def follow(run: InferenceRun, pipeline: CausalVideoPipeline, lockstep: Lockstep) -> None:
    """Compute what the leading process makes, until it makes nothing more."""
    jobs = {job.name: job for job in run.jobs}
    while (order := lockstep.hear()) is not None:
        if order == WARM_UP:
            pipeline.warm_up(run.config.height, run.config.width, run.config.memory)
        else:
            deque(new_stream(run, pipeline, jobs[order[0]], lockstep), maxlen=0)


@dataclass
class _Maker:
    """Makes the videos of a run, one at a time, each under its lock.

    Attributes:
        identity: see `identity_of`.
        anew: make finished videos too.
        lockstep: of the processes that make every video together.
        video_log: told of every finished video.
        failed: videos that could not be made so far.
    """

    run: InferenceRun
    pipeline: CausalVideoPipeline
    identity: dict[str, Any]
    anew: bool = False
    lockstep: Lockstep | None = None
    video_log: VideoLog | None = None
    failed: int = 0

    def made_with(self, job: PromptJob) -> dict[str, Any]:
        """Settings, weights and image of a job's video, the image as it is now."""
        return self.identity | given_of(self.run, job)

    def is_finished(self, job: PromptJob, *, quiet: bool = False) -> bool:
        """Whether a job's video needs no making.

        Args:
            quiet: do not warn of a damaged one again.

        Raises:
            InputError: it was made with other settings, weights or image.
        """
        if self.anew:
            return False
        paths = video_path(self.run, job), record_path(self.run, job)
        frames = num_pixel_frames(self.run, self.pipeline)
        finished = is_finished(*paths, self.made_with(job), asked_of(job), frames, quiet=quiet)
        if finished and lock_path(self.run, job).exists():
            # Of a process that was killed at its very end, or is at it.
            with suppress(LockedError), self._lock(job):
                pass
        return finished

    def _tell(self, job: PromptJob) -> None:
        if self.video_log is not None:
            self.video_log.add(job, video_path(self.run, job), record_path(self.run, job))

    def make_all(self, jobs: list[PromptJob], quiet: bool) -> None:
        """Make what is not finished of some jobs; what another process makes comes last.

        Args:
            quiet: show no progress.

        Raises:
            InputError: as for `is_finished`, and what cannot be written.
        """
        run, pipeline = self.run, self.pipeline
        todo = []
        for job in jobs:
            if self.is_finished(job):
                self._tell(job)
            else:
                todo.append(job)
        if len(todo) < len(jobs):
            on_interruption_say(GO_ON_WITH_VIDEOS)
            log.info("%d of %d videos are finished already: skipped", len(jobs) - len(todo), len(jobs))
        if todo and pipeline.flow_model is not pipeline.transformer:
            if self.lockstep is not None:
                self.lockstep.tell(WARM_UP)
            pipeline.warm_up(run.config.height, run.config.width, run.config.memory)
        columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
        with Progress(*columns, disable=quiet) as progress:
            bar = progress.add_task("videos", total=len(jobs), completed=len(jobs) - len(todo))
            others: list[PromptJob] = []
            for job in todo:
                try:
                    self.make(job, progress)
                except LockedError as error:
                    log.info("%s is being made by %s: other videos first", video_path(run, job), error.holder)
                    others.append(job)
                else:
                    progress.advance(bar)
            for job in others:
                on_wait = partial(log.info, "waiting for %s, made by %s", video_path(run, job))
                self.make(job, progress, on_wait=on_wait)
                progress.advance(bar)

    def make(self, job: PromptJob, progress: Progress, on_wait: Callable[[str], None] | None = None) -> None:
        """Make a job's video, unless another process has finished it meanwhile.

        Args:
            on_wait: told who makes it; then that is waited for.

        Raises:
            LockedError: another process makes it, and there is no `on_wait`.
            InputError: as for `is_finished`, and what cannot be written.
        """
        with self._lock(job, on_wait):
            if self.is_finished(job, quiet=True):
                log.info("%s was finished by another process", video_path(self.run, job))
                self._tell(job)
                return
            blocks = progress.add_task(job.name[:40], total=generated_blocks(self.run))
            try:
                advance = partial(progress.advance, blocks)
                generate_one(self.run, self.pipeline, job, self.made_with(job), advance, self.lockstep)
            except NonFiniteBlockError as error:
                self.failed += 1
                log.error("%s: %s; going on with the next video", job.name, error)
            else:
                on_interruption_say(GO_ON_WITH_VIDEOS)
                self._tell(job)
            finally:
                progress.remove_task(blocks)

    def _lock(self, job: PromptJob, on_wait: Callable[[str], None] | None = None) -> AbstractContextManager[None]:
        return exclusive(lock_path(self.run, job), str(video_path(self.run, job)), on_wait)


def generated_blocks(run: InferenceRun) -> int:
    """Blocks to generate for one video of the run."""
    config = run.config
    whole = run.given_frames // config.frames_per_block * config.frames_per_block
    return num_blocks(config.num_output_frames - whole, config.frames_per_block)


@dataclass
class Measurement:
    """The measurements of one video.

    Attributes:
        arrivals: seconds from the start until each block's frames were on the CPU.
        allocated: bytes on the GPU after each block.
    """

    start: float
    frames: int = 0
    arrivals: list[float] = field(default_factory=list)
    allocated: list[int] = field(default_factory=list)

    def block_arrived(self, frames: int, device: torch.device) -> None:
        """Note that a block's frames are on the CPU."""
        self.frames += frames
        self.arrivals.append(time.perf_counter() - self.start)
        if device.type == "cuda":
            self.allocated.append(torch.cuda.memory_allocated(device))

    def block_seconds(self) -> list[float]:
        """Seconds from one block to the next; the first block, which waits for the text too, is left out."""
        return [after - before for before, after in zip(self.arrivals, self.arrivals[1:], strict=False)]

    def report(self, phases: dict[str, float], total: float, apart: bool) -> dict[str, Any]:
        """Seconds, rates and latencies under the names of the metrics file.

        Args:
            apart: whether transformer and decoder worked one after the other; else neither has a rate of its own.
        """
        blocks = self.block_seconds()
        names = {"text": "text", "denoise": "denoise", "remember": "clean_pass", "vae": "vae"}
        seconds = {name: phases.get(phase, 0.0) for phase, name in names.items()}
        fps = {"end_to_end": self.frames / total}
        if apart:
            fps |= {
                "dit": self.frames / (seconds["denoise"] + seconds["clean_pass"]),
                "vae": self.frames / seconds["vae"],
            }
        return {
            "frames": self.frames,
            "seconds": seconds | {"total": total},
            "time_to_first_frame": self.arrivals[0],
            "block_seconds": {
                "median": statistics.median(blocks) if blocks else None,
                "p90": float(np.percentile(blocks, 90)) if blocks else None,
                "all": blocks,
            },
            "allocated_bytes_after_block": self.allocated,
            "fps": fps,
        }


def generate_one(
    run: InferenceRun,
    pipeline: CausalVideoPipeline,
    job: PromptJob,
    made_with: dict[str, Any],
    on_block: Callable[[], None],
    lockstep: Lockstep | None = None,
) -> None:
    """Generate, write and measure one video. Nothing is left under its name unless it is whole.

    Raises:
        NonFiniteBlockError: the model produced NaN or infinity.
        InputError: the video cannot be written.
    """
    config, timer = run.config, PhaseTimer(run.device, {"vae": pipeline.wan_vae.device})
    for device in {run.device, pipeline.wan_vae.device}:
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
    measured = Measurement(time.perf_counter())
    with VideoWriter(video_path(run, job), config.height, config.width, fps=config.fps) as writer:
        if lockstep is not None:
            lockstep.tell([job.name])
        stream = new_stream(run, pipeline, job, lockstep, timer.phase)
        for block in stream:
            frames = block.frames_BTHWC.wait()[0]
            measured.block_arrived(len(frames), run.device)
            writer.write(frames)
            on_block()
            check_interrupted()
        writer.wait()
        total = time.perf_counter() - measured.start
        facts = video_facts(writer.finish(), config.height, config.width, config.fps, writer.num_frames)
        start = {"load_seconds": pipeline.load_seconds, "warm_up_seconds": pipeline.warm_up_seconds}
        metrics = measured.report(timer.seconds(), total, apart=not pipeline.overlaps_decoding)
        metrics |= start | provenance(run, pipeline, job, made_with) | {"video": facts}
        # The video gets its name when the context ends: a finished video has its record.
        write_json(record_path(run, job), metrics, default=str)


def new_stream(
    run: InferenceRun,
    pipeline: CausalVideoPipeline,
    job: PromptJob,
    lockstep: Lockstep | None = None,
    phase: Phase = lambda name: nullcontext(),
) -> Iterator[VideoBlock]:
    """The blocks of a job's video; see `CausalVideoPipeline.stream`."""
    config = run.config
    image = read_image(run.images[job.name], config.height, config.width, quiet=True) if run.images else None
    prompt: str | list[tuple[int, Prompts]] = job.prompt
    if job.prompts:
        starts = timeline_of(config, run.given_frames).starts(job.prompts, job.name)
        prompt = [(start, each.prompt) for start, each in zip(starts, job.prompts, strict=True)]
    return pipeline.stream(
        prompt,
        num_pixel_frames(run, pipeline),
        config.height,
        config.width,
        image=image,
        video=None if run.video is None else GivenVideo(run.video, config.height, config.width, config.fps),
        strength=config.strength,
        seeds=[job.seed],
        memory=config.memory,
        on_switch=config.on_switch,
        phase=phase,
        lockstep=lockstep,
    )


def provenance(
    run: InferenceRun, pipeline: CausalVideoPipeline, job: PromptJob, made_with: dict[str, Any]
) -> dict[str, Any]:
    """Origin of a video: prompt, settings, weights, devices, versions, and the memory it took."""
    found = {
        **{name: value for name, value in asked_of(job).items() if value is not None},
        "settings": made_with,
        "lora_files": [str(source.path) for source in run.config.lora_sources()],
        **_on_device(run.device, pipeline.symmetric_bytes),
        "versions": versions(MEASURED_PACKAGES),
    }
    return found | ({"vae": _on_device(pipeline.wan_vae.device)} if pipeline.vae_is_apart else {})


def _on_device(device: torch.device, uncounted_bytes: int = 0) -> dict[str, Any]:
    peak = torch.cuda.max_memory_allocated(device) + uncounted_bytes if device.type == "cuda" else None
    return {"device": device_name(device), "peak_memory_bytes": peak}
