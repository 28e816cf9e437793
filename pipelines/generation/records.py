"""The record beside a video: what made it and what it is, and so whether it is whole and the one that is wanted."""

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipelines.generation.arguments import InferenceRun
from pipelines.generation.pipeline import CausalVideoPipeline
from pipelines.media.video import count_frames
from pipelines.prompts.jobs import PromptJob
from pipelines.provenance import part_fingerprint, tokenizer_fingerprint
from wan.utils.errors import InputError
from wan.utils.files import content_hash, parse_json
from wan.utils.settings import plain, require_same_settings

log = logging.getLogger(__name__)

_NOT_OF_FRAMES = ("tiny_vae", "vae_device", "exchange", "shard_weights")
"""Settings of `speed` that frames do not depend on: where weights lie, where they are used, how they travel."""


def video_path(run: InferenceRun, job: PromptJob) -> Path:
    """Where a job's video goes."""
    return run.output_folder / f"{job.name}.mp4"


def record_path(run: InferenceRun, job: PromptJob) -> Path:
    """Where the record of a job goes: measurements, and what made the video."""
    return run.metrics_folder / f"{job.name}.json"


def lock_path(run: InferenceRun, job: PromptJob) -> Path:
    """The file that a process locks while it makes a job's video."""
    return run.output_folder / f".{job.name}.lock"


def num_pixel_frames(run: InferenceRun, pipeline: CausalVideoPipeline) -> int:
    """Frames of every video of a run."""
    return (run.config.num_output_frames - 1) * pipeline.wan_vae.temporal_compression + 1


def identity_of(run: InferenceRun, pipeline: CausalVideoPipeline) -> dict[str, Any]:
    """Everything but prompt, seed and image that a video depends on, as JSON gives it back.

    Files count by their content: the same weights in another place make the same videos.
    """
    settings = run.config.identity()
    if run.config.lora:
        settings["lora"] = [source.identity() for source in run.config.lora_sources()]
    settings["speed"] = {name: value for name, value in settings["speed"].items() if name not in _NOT_OF_FRAMES}
    # The layers of the model, whether they were asked for or are those of its checkpoint.
    settings["hybrid"] = asdict(pipeline.base_hybrid or pipeline.transformer.hybrid)
    settings |= {"dtype": str(run.dtype), "attention_backend": run.backend.value}
    return plain(settings | {"weights": weights_of(pipeline)})


def weights_of(pipeline: CausalVideoPipeline) -> dict[str, str]:
    """A fingerprint of every part of a pipeline: weights, sizes and statistics; of the tokenizer, all that it knows.

    The transformer's is that before LoRAs, which count by their files, and before its fast form where that was noted.
    """
    found = {"transformer": pipeline.base_fingerprint or part_fingerprint(pipeline.transformer)}
    parts = {"vae": pipeline.vae, "text_encoder": pipeline.text_encoder}
    found |= {name: part_fingerprint(part) for name, part in parts.items() if part is not None}
    if pipeline.tokenizer is not None:
        found["tokenizer"] = tokenizer_fingerprint(pipeline.tokenizer)
    if pipeline.wan_vae.tiny is not None:
        found["tiny_vae"] = part_fingerprint(pipeline.wan_vae.tiny)
    return found


def given_of(run: InferenceRun, job: PromptJob) -> dict[str, str]:
    """The hash of a job's image or of the run's video, if it has one.

    Raises:
        InputError: it cannot be read.
    """
    if run.video is not None:
        return {"video": content_hash(run.video)}
    return {"image": content_hash(run.images[job.name])} if run.images else {}


def video_facts(path: Path, height: int, width: int, fps: int, frames: int) -> dict[str, Any]:
    """Facts about a video's file, for its record.

    Args:
        path: of the file, complete.
        frames: that were written into it.
    """
    return {"frames": frames, "height": height, "width": width, "fps": fps, "sha256": content_hash(path)}


def asked_of(job: PromptJob) -> dict[str, Any]:
    """Prompts and seed of a job, as records have them beside the settings; None for no switches."""
    return {"prompt": job.prompt, "seed": job.seed, "prompts": [each.as_plain() for each in job.prompts] or None}


def is_finished(
    video: Path,
    record: Path,
    made_with: Mapping[str, Any],
    asked: Mapping[str, Any],
    frames: int,
    *,
    quiet: bool = False,
) -> bool:
    """Whether a whole video is there that was made with some settings. A damaged one is not, with a warning.

    Args:
        video, record: the files.
        made_with: settings, weights and image.
        asked: prompts and seed, see `asked_of`; they matter where a request names its file.
        frames: that the video should have.
        quiet: do not warn; for a video that was looked at before.

    Raises:
        InputError: the record tells of another prompt, other settings, weights or image, cannot be read, or is not
            there; or a folder has a file's name.
    """
    for path in (video, record):
        if path.is_dir():
            raise InputError(f"{path} is a folder: remove it, or give another --output_folder")
    if not video.exists():
        return False
    if not record.is_file():
        raise InputError(
            f"{video} is there, {record}, which would say what made it, is not: give the --metrics_folder of that run, "
            "or another --output_folder, or delete the video"
        )
    try:
        found = _read_record(record)
        made, cure = f"{video} was made", "give another --output_folder, or delete it"
        require_same_settings(found["settings"], made_with, made, cure)
        _require_whole(video, found, frames)
        # Last: a record of another video does not fit the file, which is damage and no other request.
        require_same_settings({name: found.get(name) for name in asked}, asked, made, cure)
    except _DamagedError as error:
        if not quiet:
            log.warning("%s: made again", error)
        return False
    return True


class _DamagedError(Exception):
    """A video or its record is not whole."""


def _read_record(path: Path) -> dict[str, Any]:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path} ({error.strerror}): fix its permissions, or delete the video") from error
    try:
        found = parse_json(content)
    except ValueError as error:
        raise _DamagedError(f"{path}, the record of a video, is damaged") from error
    settings = found.get("settings") if isinstance(found, dict) else None
    if not isinstance(found, dict) or not isinstance(settings, dict) or not settings:
        raise _DamagedError(f"{path} is no record of a video")
    return found


def _require_whole(video: Path, record: Mapping[str, Any], frames: int) -> None:
    """Compare a video's file with its record and with what is wanted."""
    facts = record.get("video")
    if not isinstance(facts, dict):
        raise _DamagedError(f"the record of {video} does not say what it is")
    try:
        counted = count_frames(video)
    except InputError as error:
        raise _DamagedError(str(error).partition(": make")[0]) from error
    if counted != frames or facts.get("frames") != frames:
        raise _DamagedError(f"{video} has {counted} frames, its record says {facts.get('frames')}, wanted are {frames}")
    if content_hash(video) != facts.get("sha256"):
        raise _DamagedError(f"{video} is not the file that its record is of")
