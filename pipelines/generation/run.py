"""Generating the videos of a run: one file and one page of measurements a prompt, resumable."""

import hashlib
import json
import logging
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, UnidentifiedImageError
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from arl2.rollout import num_blocks
from pipelines.generation.arguments import InferenceRun
from pipelines.generation.pipeline import CausalVideoPipeline, NonFiniteBlockError
from pipelines.generation.timing import PhaseTimer
from pipelines.media.video import VideoWriter
from pipelines.prompts import PromptJob, shard_jobs
from pipelines.provenance import device_name, versions
from wan.checkpoints.loading import fingerprint_of
from wan.utils.errors import InputError
from wan.utils.files import write_json

log = logging.getLogger(__name__)

MEASURED_PACKAGES = ("diffusers", "transformers")


def load_pipeline(run: InferenceRun) -> CausalVideoPipeline:
    """The pipeline that a run asks for.

    Raises:
        CheckpointError, InputError: weights that are missing, damaged or do not fit.
    """
    config = run.config
    pipeline = CausalVideoPipeline.from_pretrained(
        config.model_folder,
        checkpoint_path=config.checkpoint_path,
        use_ema=run.use_ema,
        hybrid=config.hybrid.settings(),
        torch_dtype=run.dtype,
        device=run.device,
        seed=run.seed,
        frames_per_block=config.frames_per_block,
        denoising_steps=config.denoising_steps,
        warp_denoising_steps=config.warp_denoising_steps,
        timestep_shift=config.timestep_shift,
        context_noise=config.context_noise,
    )
    pipeline.use_attention_backend(run.backend)
    pipeline.optimize_for_inference(config.speed)
    return pipeline


def generate(run: InferenceRun, pipeline: CausalVideoPipeline, rank: int = 0, world_size: int = 1) -> int:
    """Generate this rank's share of the videos; finished ones are skipped.

    A block that is not finite ends its video, not the run.

    Returns:
        how many videos failed.

    Raises:
        InputError: a finished video was made with other settings, weights or image.
    """
    # As the model means it, so that a video is the same one whichever way its memory was asked for.
    run = replace(run, config=replace(run.config, memory=pipeline.resolve_memory(run.config.memory)))
    mine = shard_jobs(run.jobs, rank, world_size)
    made_with = settings_of(run) | {"weights": fingerprint_of(pipeline.transformer.state_dict())}
    made = {job.name: made_with | image_of(run, job) for job in mine}
    todo = [job for job in mine if not is_finished(run, job, made[job.name])]
    if len(todo) < len(mine):
        log.info("%d of %d videos are finished already: skipped", len(mine) - len(todo), len(mine))
    if todo and pipeline.flow_model is not pipeline.transformer:
        pipeline.warm_up(run.config.height, run.config.width, run.config.memory)
    failed = 0
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, disable=rank != 0) as progress:
        bar = progress.add_task("videos", total=len(todo))
        for job in todo:
            blocks = progress.add_task(job.name[:40], total=generated_blocks(run))
            try:
                generate_one(run, pipeline, job, made[job.name], partial(progress.advance, blocks))
            except NonFiniteBlockError as error:
                failed += 1
                log.error("%s: %s; going on with the next video", job.name, error)
            progress.remove_task(blocks)
            progress.advance(bar)
    return failed


def video_path(run: InferenceRun, job: PromptJob) -> Path:
    """Where a job's video goes."""
    return run.output_folder / f"{job.name}.mp4"


def metrics_path(run: InferenceRun, job: PromptJob) -> Path:
    """Where the page of measurements of a job goes."""
    return run.metrics_folder / f"{job.name}.json"


def settings_of(run: InferenceRun) -> dict[str, Any]:
    """Everything but prompt, seed and weights that a video depends on, as JSON gives it back."""
    settings = asdict(run.config) | {"dtype": str(run.dtype), "attention_backend": run.backend.value}
    plain: dict[str, Any] = json.loads(json.dumps(settings, default=str))
    return plain


def image_of(run: InferenceRun, job: PromptJob) -> dict[str, Any]:
    """What tells a job's image from others, if it has one."""
    if not run.images:
        return {}
    return {"image": hashlib.sha256(run.images[job.name].read_bytes()).hexdigest()[:16]}


def is_finished(run: InferenceRun, job: PromptJob, made_with: dict[str, Any]) -> bool:
    """Whether a job's video is there.

    Raises:
        InputError: it is another: its page of measurements tells of other settings, weights or image, or is not there.
    """
    if not video_path(run, job).exists():
        return False
    page = metrics_path(run, job)
    if not page.is_file():
        raise InputError(
            f"{video_path(run, job)} is there, {page}, which would say what made it, is not: give the --metrics_dir of "
            "that run, or another --output_folder, or delete the video"
        )
    before = json.loads(page.read_text()).get("settings", {})
    other = sorted(name for name in before.keys() | made_with.keys() if before.get(name) != made_with.get(name))
    if other:
        raise InputError(
            f"{video_path(run, job)} was made with {other[0]} {before.get(other[0])}, not {made_with.get(other[0])}: "
            "give another --output_folder, or delete it"
        )
    return True


def generated_blocks(run: InferenceRun) -> int:
    """Blocks to generate for one video of the run."""
    given = 1 if run.images else 0
    return num_blocks(run.config.num_output_frames - given, run.config.frames_per_block)


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
) -> None:
    """Generate, write and measure one video. Nothing is left under its name unless it is whole.

    Raises:
        NonFiniteBlockError: the model produced NaN or infinity.
        InputError: the video cannot be written.
    """
    config, timer = run.config, PhaseTimer(run.device)
    image = read_image(run.images[job.name], config.height, config.width) if run.images else None
    num_frames = (config.num_output_frames - 1) * pipeline.wan_vae.temporal_compression + 1
    if run.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(run.device)
    measured = Measurement(time.perf_counter())
    with VideoWriter(video_path(run, job), config.height, config.width, fps=config.fps) as writer:
        stream = pipeline.stream(
            job.prompt,
            num_frames,
            config.height,
            config.width,
            image=image,
            seeds=[job.seed],
            memory=config.memory,
            phase=timer.phase,
        )
        for block in stream:
            frames = block.frames_BTHWC.wait()[0]
            measured.block_arrived(len(frames), run.device)
            writer.write(frames)
            on_block()
        writer.wait()
        # The video gets its name when the context ends: a finished video has its measurements.
        total = time.perf_counter() - measured.start
        start = {"load_seconds": pipeline.load_seconds, "warm_up_seconds": pipeline.warm_up_seconds}
        metrics = measured.report(timer.seconds(), total, apart=not pipeline.overlaps_decoding)
        metrics |= start | provenance(run, job, made_with)
        write_json(metrics_path(run, job), metrics, default=str)


def provenance(run: InferenceRun, job: PromptJob, made_with: dict[str, Any]) -> dict[str, Any]:
    """What made a video: prompt, settings, weights, device, versions, and the memory it took."""
    on_gpu = run.device.type == "cuda"
    return {
        "prompt": job.prompt,
        "seed": job.seed,
        "settings": made_with,
        "device": device_name(run.device),
        "peak_memory_bytes": torch.cuda.max_memory_allocated(run.device) if on_gpu else None,
        "versions": versions(MEASURED_PACKAGES),
    }


def read_image(path: Path, height: int, width: int) -> Tensor:
    """An image scaled and cropped about its centre, [1, 1, 3, height, width] in [-1, 1].

    Raises:
        InputError: not an image.
    """
    try:
        image = Image.open(path).convert("RGB")
    except (UnidentifiedImageError, OSError) as error:
        raise InputError(f"cannot read {path} as an image: give a PNG or JPEG") from error
    scale = max(height / image.height, width / image.width)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.LANCZOS)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    pixels = torch.from_numpy(np.asarray(image.crop((left, top, left + width, top + height))).copy())
    return (pixels.permute(2, 0, 1).float() / 127.5 - 1)[None, None]
