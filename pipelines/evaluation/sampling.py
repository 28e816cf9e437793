"""The videos of a suite: jobs for `pipelines.generation.run`, and the manifest that says which file shows what.

videos/<prompt>-<index>.mp4     nothing else lies here: VBench takes the ending of whatever file it finds first
records/<prompt>-<index>.json   settings and measurements, as inference.py writes them
manifest.json                   every finished video: prompt, index, seed, hash; settings and weights of all
"""

import hashlib
import logging
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipelines.evaluation.names import file_stems
from pipelines.evaluation.suites import Suite, SuiteEntry
from pipelines.prompts.jobs import PromptJob, prompt_seed
from pipelines.records import open_records
from wan.utils.files import read_json
from wan.utils.locks import exclusive

log = logging.getLogger(__name__)

VIDEOS, RECORDS, MANIFEST = "videos", "records", "manifest.json"
WRITE_SECONDS = 5.0
"""A manifest of thousands of videos takes a tenth of a second to write: not after each, if they come quickly."""
CURE = "give another --output_folder, or remove that one"


@dataclass(frozen=True)
class SuiteVideo:
    """A video of a suite.

    Attributes:
        job: for `generate`; its name is that of the file, its prompt conditions the model.
        entry: the prompt it belongs to.
        index: which of its videos, from 0.
    """

    job: PromptJob
    entry: SuiteEntry
    index: int


def plan_videos(
    whole: Suite, part: Suite, seed: int, ignores_case: bool, first_prompt: bool = False
) -> list[SuiteVideo]:
    """The videos of a part of a suite: first one per prompt, then the second ones, so that a stopped run is balanced.

    The seed of a video is a function of `seed`, the short prompt and the index: other prompts, the extended form and
    the number of processes change nothing.

    Args:
        whole: all of the suite, which decides the names of files.
        part: prompts of `whole` to sample.
        ignores_case: see `file_stems`.
        first_prompt: make videos of several prompts from their first alone.
    """
    prompts = [entry.prompt for entry in whole.entries]
    stems = dict(zip(prompts, file_stems(prompts, ignores_case), strict=True))
    return [
        SuiteVideo(
            PromptJob(
                prompt=entry.conditioning,
                occurrence=index,
                seed=prompt_seed(seed, entry.prompt, index),
                name=f"{stems[entry.prompt]}-{index}",
                prompts=entry.prompts if len(entry.prompts) > 1 and not first_prompt else (),
            ),
            entry,
            index,
        )
        for index in range(max((entry.samples for entry in part.entries), default=0))
        for entry in part.entries
        if index < entry.samples
    ]


@dataclass
class Manifest:
    """The manifest of a folder, written while videos come; a `pipelines.generation.run.VideoLog`.

    Processes that share the folder write into one file, each what it has made.

    Args:
        folder: the output folder.
        suite: its name.
        seed: of the suite.
        videos: what is to be made.

    Attributes:
        found: how many of these the file had when it was written last.
    """

    folder: Path
    suite: str
    seed: int
    videos: Sequence[SuiteVideo]
    found: int = 0
    _settings: dict[str, Any] = field(default_factory=dict)
    _pending: dict[str, dict[str, Any]] = field(default_factory=dict)
    _written: float = 0.0
    _by_name: dict[str, SuiteVideo] = field(init=False)

    def __post_init__(self) -> None:
        self._by_name = {video.job.name: video for video in self.videos}

    @property
    def path(self) -> Path:
        """Of the file."""
        return self.folder / MANIFEST

    def begin(self, identity: dict[str, Any]) -> None:
        """Write down what made the videos.

        Raises:
            InputError: those of the manifest are of another suite, seed, settings or weights, or it is damaged.
        """
        settings = {"suite": self.suite, "seed": self.seed, **identity}
        self._write(settings)
        self._settings = settings

    def add(self, job: PromptJob, video: Path, record: Path) -> None:
        """Note a finished video."""
        planned, found = self._by_name[job.name], read_json(record)
        with video.open("rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
        facts = {name: value for name, value in found["video"].items() if name != "sha256"}
        self._pending[video.name] = {**_entry(planned), "sha256": digest, **facts}
        if time.monotonic() - self._written > WRITE_SECONDS:
            self._write(self._settings)

    def close(self) -> None:
        """Write what is left, and count.

        Raises:
            InputError: the file is damaged meanwhile, or cannot be written.
        """
        if self._settings:
            self._write(self._settings)

    def _write(self, settings: Mapping[str, Any]) -> None:
        """Add to the file what was noted since the last time."""
        with (
            exclusive(self.folder / f".{MANIFEST}.turn", str(self.path), on_wait=lambda holder: None),
            open_records(self.path, "videos", cure=CURE) as records,
        ):
            records.made_with(settings)
            videos: dict[str, Any] = records.page["videos"] | self._pending
            records.page["videos"] = dict(sorted(videos.items()))
            records.save()
        self._pending.clear()
        self._written = time.monotonic()
        self.found = sum(f"{name}.mp4" in videos for name in self._by_name)


def _entry(video: SuiteVideo) -> Mapping[str, Any]:
    """What a manifest says of a video before it is made."""
    entry = video.entry
    found: dict[str, Any] = {"prompt": entry.prompt, "index": video.index, "seed": video.job.seed}
    if entry.extended is not None:
        found["extended"] = entry.extended
    if entry.dimensions:
        found["dimensions"] = list(entry.dimensions)
    if video.job.prompts:
        found["prompts"] = [each.as_plain() for each in video.job.prompts]
    elif len(entry.prompts) > 1:
        found["left_out"] = [each.prompt for each in entry.prompts[1:]]
    return found
